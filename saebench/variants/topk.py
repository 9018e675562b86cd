"""TopK SAE with the AuxK loss for dead latents (Gao et al. 2024, https://arxiv.org/abs/2406.04093).

f    = relu(topk(x W_enc + b_enc))
loss = |x - x_hat|^2 + aux_coefficient * auxk
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from annotated_types import Ge
from torch import Tensor

from saebench import sparse
from saebench.saes._dictionary import Dictionary
from saebench.saes.topk import TopK as TopKSAE
from saebench.variants._training import (
    Activity,
    AuxK,
    Positive,
    Share,
    Task,
    Training,
    Variant,
    squared_error,
)


@final
@dataclass(frozen=True, kw_only=True)
class TopK(Variant):
    whole_l0: ClassVar[bool] = True

    aux_coefficient: Annotated[float, Ge(0)]
    aux_k_share: Positive
    """Dead latents used per token for the auxiliary loss, as a share of d_in."""
    dead_after: Share
    """A latent is dead that was silent for this share of the training tokens."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(Training):
    def __init__(self, recipe: TopK, task: Task) -> None:
        super().__init__(task)
        self.k = round(task.l0)
        self.aux_coefficient = recipe.aux_coefficient
        self.activity = Activity(task, recipe.dead_after)
        self.auxk = AuxK(round(recipe.aux_k_share * task.d_in))

    def loss(self, x: Tensor, progress: float) -> Tensor:
        pre = self.pre(x)
        chosen = sparse.top_per_token(pre, self.k)
        f = chosen.pre(x, self.encoder, self.b_enc).relu()
        x_hat = chosen.decode(f, self.decoder) + self.b_dec
        aux = self.auxk.loss(self, x, x - x_hat, pre, self.activity.dead())
        self.activity.update(chosen.fired(f), len(x))
        return squared_error(x, x_hat) + self.aux_coefficient * aux

    def export(self) -> Dictionary:
        sae = TopKSAE(self.decoder.shape[1], self.decoder.shape[0], k=self.k)
        sae.load_state_dict(self.shared_weights() | {"b_enc": self.b_enc})
        return sae
