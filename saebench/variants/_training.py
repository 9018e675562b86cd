"""What the variants share: the two classes that each of them fills in, and the parts that several use.

A variant is trained on centred activations of unit mean square, (x - mean) / scale with one mean and one
scale for the whole stream; the trainer folds both into the exported SAE.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, final

import torch
from annotated_types import Gt, Interval
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary

Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]


class Task(NamedTuple):
    """What one SAE is trained for."""

    d_in: int
    width: int
    l0: float
    """Active latents per token that the trained SAE shall have."""
    tokens: int
    """How many it will see."""
    generator: torch.Generator
    """On the CPU, seeded by the run; for the initial weights."""


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """A recipe: its fields are what a file of `baselines/` gives and a suite may override. No field has a default."""

    whole_l0: ClassVar[bool] = False
    """Whether L0 is a number of latents that is kept, and so a whole one."""

    lr: Positive
    """Peak learning rate of Adam."""
    beta1: Annotated[float, Interval(ge=0, lt=1)]
    beta2: Annotated[float, Interval(ge=0, lt=1)]
    lr_warmup: Share
    """Share of the training tokens over which the learning rate rises from 0."""
    lr_decay: Share
    """Share of the training tokens, at the end, over which it falls to 0 in a line."""
    grad_clip: Positive
    """Largest norm of the gradient of all parameters together."""

    @abstractmethod
    def start(self, task: Task) -> "Training": ...


class Training(nn.Module, ABC):
    """One SAE in training. All that must survive a restart is a parameter or a buffer.

    The rows of the decoder have unit norm: the component of the gradient along each row is removed and the norm
    restored after every step, so that no penalty can be met by growing the decoder (Bricken et al. 2023). The
    encoder starts as the decoder's copy (Gao et al. 2024, section 2.4). Both are kept row by row, `[d_sae d]`.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        rows = torch.randn(task.width, task.d_in, generator=task.generator)
        rows = nn.functional.normalize(rows, dim=-1)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(task.width))
        self.b_dec = nn.Parameter(torch.zeros(task.d_in))
        self.non_negative: list[nn.Parameter] = []
        """Clamped at zero after every step."""

    @abstractmethod
    def loss(self, x: Float[Tensor, "n d"], progress: float) -> Float[Tensor, ""]:
        """What to minimise on a batch; `progress` is the share of the training tokens that went before."""

    @abstractmethod
    def export(self) -> Dictionary:
        """The trained SAE, of centred and scaled activations."""

    @torch.no_grad()
    def pre(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
        """The one dense product of a step. Its gradients are taken at the chosen latents alone."""
        return torch.addmm(self.b_enc, x, self.encoder.T)

    @torch.no_grad()
    def after_backward(self) -> None:
        assert self.decoder.grad is not None, "called before backward"
        along = torch.linalg.vecdot(self.decoder.grad, self.decoder)
        self.decoder.grad.addcmul_(along[:, None], self.decoder, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=-1, keepdim=True))
        for parameter in self.non_negative:
            parameter.clamp_min_(0)

    def shared_weights(self) -> dict[str, Tensor]:
        """By the names of `saes/`."""
        return {"W_enc": self.encoder.T, "W_dec": self.decoder, "b_dec": self.b_dec}


def squared_error(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Sum over dimensions, mean over tokens."""
    return (x - x_hat).square().sum() / len(x)


def ramp(progress: float, share: float) -> float:
    """From 0 to 1 in a line over the first `share` of the training tokens."""
    return min(1.0, progress / share) if share > 0 else 1.0


class Activity(nn.Module):
    """How many tokens ago each latent last fired. A latent fires where its value is above zero."""

    silent_for: Tensor

    def __init__(self, task: Task, dead_after: float) -> None:
        super().__init__()
        self.dead_after = dead_after * task.tokens
        self.register_buffer("silent_for", torch.zeros(task.width, dtype=torch.int64))

    def update(self, fired: Bool[Tensor, " d_sae"], n: int) -> None:
        self.silent_for.add_(n).mul_(~fired)

    def dead(self) -> Bool[Tensor, " d_sae"]:
        return self.silent_for > self.dead_after


@final
class AuxK:
    """Dead latents are made to predict what the live ones leave over (Gao et al. 2024, appendix A.2).

    The k largest pre-activations of dead latents go through a ReLU and reconstruct the residual e; the loss is
    |e - e_hat|^2 / |e - mean(e)|^2. Its gradient reaches encoder and decoder.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def loss(
        self,
        sae: Training,
        x: Float[Tensor, "n d"],
        residual: Float[Tensor, "n d"],
        pre: Float[Tensor, "n d_sae"],
        dead: Bool[Tensor, " d_sae"],
    ) -> Float[Tensor, ""]:
        candidates = dead.nonzero().squeeze(-1)
        k = min(self.k, len(candidates))
        if k == 0:
            return residual.new_zeros(())
        top = pre[:, candidates].topk(k, dim=-1, sorted=False).indices
        rows = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
        pairs = sparse.Pairs(pre, rows, candidates[top].flatten())
        e = residual.detach()
        e_hat = pairs.decode(pairs.pre(x, sae.encoder, sae.b_enc).relu(), sae.decoder)
        return (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()


PROPORTIONAL = 0.5
"""Change of ln(coefficient) for a change of the error by 1, that is of L0 by a factor of e."""
INTEGRAL = 40.0
"""Change of ln(coefficient) for an error of 1 that lasts for the whole training."""
INTEGRAL_PER_STEP = 0.08
"""The most that an error of 1 adds in one step."""


class PenaltyControl(nn.Module):
    """Steers the coefficient of a sparsity penalty so that the SAE reaches the wanted L0.

    The goal for ln L0 falls in a line from where training starts to the wanted value over the first `descent` of
    the tokens and stays there. The logarithm of the coefficient follows the error of ln L0 by a proportional and
    an integral term (a PI controller). The integral gain is a number per training run, so that long runs are steered
    as gently as short ones; a step never adds more than `INTEGRAL_PER_STEP` of the error, because L0 answers a
    change of the coefficient only after some tens of steps.
    """

    log_coefficient: Tensor
    start: Tensor
    error: Tensor

    def __init__(self, task: Task, coefficient: float, descent: float) -> None:
        super().__init__()
        self.wanted, self.tokens, self.descent = task.l0, task.tokens, descent
        self.register_buffer("log_coefficient", torch.tensor(math.log(coefficient)))
        self.register_buffer("start", torch.tensor(float("nan")))
        self.register_buffer("error", torch.tensor(0.0))

    def coefficient(self) -> float:
        return math.exp(self.log_coefficient.item())

    def update(self, l0: float, n: int, progress: float) -> None:
        log_l0 = math.log(max(l0, 0.01))
        if math.isnan(self.start.item()):
            self.start.fill_(log_l0)
        share = ramp(progress, self.descent)
        goal = (1 - share) * self.start.item() + share * math.log(self.wanted)
        error = log_l0 - goal
        gain = min(INTEGRAL * n / self.tokens, INTEGRAL_PER_STEP)
        change = PROPORTIONAL * (error - self.error.item()) + gain * error
        self.log_coefficient.add_(change)
        self.error.fill_(error)
