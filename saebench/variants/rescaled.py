"""Any trained SAE with one more positive scale per latent, the remedy for feature suppression (Wright and Sharkey
2024, "Addressing feature suppression in SAEs").

loss = |x - sum_i s_i f_i d_i - b_dec|^2

Encoder, directions and bias are the parent's and stay; only s is learned. It is exported in the rows of the decoder.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.variants._training import Lesson, Task, Training, Variant, squared_error


@final
@dataclass(frozen=True, kw_only=True)
class Rescaled(Variant):
    target: ClassVar = "same"
    from_parent: ClassVar[bool] = True
    own_decoder: ClassVar = False

    @property
    def float32(self) -> bool:
        return True  # the parent's codes are those of its export

    def start(self, task: Task) -> Training:
        return _Training(task)


@final
class _Training(Training):
    def __init__(self, task: Task) -> None:
        super().__init__()
        assert task.parent is not None, "suites refuse an entry without a parent"
        self.parent = task.parent
        self.log_scale = nn.Parameter(torch.zeros(task.width))

    def loss(self, lesson: Lesson) -> Tensor:
        with torch.no_grad():
            code = self.parent.encode_sparse(lesson.x)
        scaled = code._replace(values=code.values * self.log_scale.exp()[code.indices])
        return squared_error(
            lesson.target, sparse.decode(scaled, self.parent.W_dec) + self.parent.b_dec
        )

    def export(self) -> Dictionary:
        sae = copy.deepcopy(self.parent)
        sae.W_dec.mul_(self.log_scale.detach().exp()[:, None])
        return sae
