"""Skip transcoder: a transcoder with an affine path beside its latents (Paulo et al. 2025,
https://arxiv.org/abs/2501.18823).

f     = activation(x W_enc + b_enc)
y_hat = f W_dec + x W_skip + b_dec
loss  = |y - y_hat|^2 + what the activation's variant adds

W_skip starts at zero.
"""

from dataclasses import dataclass
from typing import final

from saebench.variants._training import Task, Training
from saebench.variants._transcoding import Transcoding


@final
@dataclass(frozen=True, kw_only=True)
class SkipTranscoder(Transcoding):
    def start(self, task: Task) -> Training:
        return self.inner.start(task._replace(skip=True))
