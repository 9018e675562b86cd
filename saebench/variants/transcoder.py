"""Transcoder: reads the input of a layer's MLP, say, and predicts its output (Dunefsky et al. 2024,
https://arxiv.org/abs/2406.11944).

f     = activation(x W_enc + b_enc)
y_hat = f W_dec + b_dec
loss  = |y - y_hat|^2 + what the activation's variant adds

Both sites are centred and scaled by themselves, so that b_dec starts at the mean of y and pre-activations at that of
x. The input is not shifted by b_dec, which belongs to the other site.
"""

from dataclasses import dataclass
from typing import final

from saebench.variants._training import Task, Training
from saebench.variants._transcoding import Transcoding


@final
@dataclass(frozen=True, kw_only=True)
class Transcoder(Transcoding):
    def start(self, task: Task) -> Training:
        return self.inner.start(task)
