"""What the variants share: the two classes that each of them fills in, and the parts that several use.

A variant is trained on centred activations of unit mean square, (x - mean) / scale with one mean and one
scale for the whole stream; the trainer folds both into the exported SAE. A transcoder's target is centred and
scaled by its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Interval
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saebench import sparse
from saebench.saes._dictionary import Dictionary

Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]


class Task(NamedTuple):
    """What one SAE is trained for."""

    d_in: int
    d_out: int
    width: int
    l0: float
    """Active latents per token that the trained SAE shall have."""
    tokens: int
    """How many it will see."""
    generator: torch.Generator
    """On the CPU, seeded by the run; for the initial weights."""
    transcodes: bool
    """Whether it predicts another site than it reads."""
    skip: bool
    """Whether the prediction has an affine path beside the latents."""
    parent: Dictionary | None
    """The trained SAE that a variant starts from, of the same scaled activations; None for most."""


class Downstream(NamedTuple):
    """What becomes of a prediction that is put in its place in the language model."""

    kl: Float[Tensor, ""]
    """KL(p_clean || p_replaced), nats, mean over the positions."""
    later: Float[Tensor, ""] | None
    """Squared error of later residual streams as a share of their variance, mean over layers; None unless asked for."""


class Lesson(NamedTuple):
    """One batch to learn from."""

    x: Float[Tensor, "n d_in"]
    """What the SAE reads, in float32 or bfloat16: corrupted, where the recipe asks for that."""
    target: Float[Tensor, "n d_out"]
    """What it shall give: the clean `x`, but for transcoders."""
    progress: float
    """Share of the training tokens that went before."""
    generator: torch.Generator
    """Of this step, on the device of `x`: the same when the step is done again."""
    downstream: Callable[[Tensor, bool], Downstream] | None
    """Puts a prediction into the language model, and looks at later layers too where the second argument says so;
    None but for variants that are trained through it."""


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """A recipe: its fields are what a file of `baselines/` gives and a suite may override. No field has a default."""

    end_to_end: ClassVar[bool] = False
    """Whether it is trained through the language model, on whole sequences."""
    from_parent: ClassVar[bool] = False
    """Whether it starts from a trained SAE, named by the entry's `of`."""
    target: ClassVar[Literal["same", "any", "other"]] = "any"
    """Whether it predicts the site that it reads, another, or either."""

    own_decoder: ClassVar[bool] = True
    """Whether its decoder is a matrix that is learned beside the encoder."""

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
    input_noise: Annotated[float, Ge(0)]
    """Denoising: root mean square length of the Gaussian noise added to what the SAE reads, whose own is 1."""

    @property
    def float32(self) -> bool:
        """Whether what the SAE reads stays in float32 where a suite asks for batches in bfloat16."""
        return False

    def check(self, width: int, l0: float) -> None:
        """Raises `ValueError` where no SAE of this width can have this L0."""
        if not 1 <= l0 <= width:
            raise ValueError(f"l0 is {l0:g}; with width {width} it must be from 1 to {width}")

    @abstractmethod
    def start(self, task: Task) -> "Training": ...


@dataclass(frozen=True, kw_only=True)
class Penalised(Variant):
    """A recipe whose sparsity comes from a penalty that is steered to the wanted L0 (`PenaltyControl`)."""

    penalty: Positive
    """Coefficient at the start."""
    l0_descent: Share
    """Share of the training tokens over which L0 is brought down to the wanted value."""


class Training(nn.Module, ABC):
    """One SAE in training. All that must survive a restart is a parameter or a buffer."""

    @abstractmethod
    def loss(self, lesson: Lesson) -> Float[Tensor, ""]:
        """What to minimise on a batch."""

    @abstractmethod
    def export(self) -> Dictionary:
        """The trained SAE, of centred and scaled activations."""

    def after_backward(self) -> None:  # noqa: B027  (most need nothing here)
        """Before the gradient is clipped."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """After the optimiser has moved the parameters."""


class DictionaryTraining(Training, ABC):
    """Encoder, decoder and biases, kept row by row: encoder `[d_sae d_in]`, decoder `[d_sae d_out]`.

    Where `unit_norm`, the rows of the decoder have unit norm: the component of the gradient along each row is removed
    and the norm restored after every step, so that no penalty can be met by growing the decoder (Bricken et al.
    2023). The encoder starts as the decoder's copy (Gao et al. 2024, section 2.4), that of a transcoder, whose two
    sites have no common directions, on its own. An affine path beside the latents starts at zero (Paulo et al.
    2025, https://arxiv.org/abs/2501.18823).
    """

    unit_norm: ClassVar[bool] = True

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.wanted, self.frozen = task.l0, False
        rows = _directions(task.width, task.d_out, task.generator)
        first = _directions(task.width, task.d_in, task.generator) if task.transcodes else rows
        self.encoder, self.decoder = nn.Parameter(first.clone()), nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(task.width))
        self.b_dec = nn.Parameter(torch.zeros(task.d_out))
        self.W_skip = nn.Parameter(torch.zeros(task.d_in, task.d_out)) if task.skip else None
        self.non_negative: list[nn.Parameter] = []
        """Clamped at zero after every step."""

    @torch.no_grad()
    def pre(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """The one dense product of a step, in the precision of x, and its sum in float32. Gradients are taken at the
        chosen latents alone.
        """
        if x.dtype == self.encoder.dtype:
            return torch.addmm(self.b_enc, x, self.encoder.T)
        return self.b_enc + x @ self.encoder.T.to(x.dtype)

    def rectified(self, x: Float[Tensor, "n d_in"]) -> tuple[sparse.Selection, Tensor]:
        """The pairs with a positive pre-activation, and relu(x W_enc + b_enc) there."""
        pre = self.pre(x)
        chosen = sparse.select(pre, pre > 0)
        return chosen, chosen.pre(x, self.encoder, self.b_enc).relu()

    def predict(
        self, chosen: sparse.Selection, f: Tensor, x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        return chosen.decode(f, self.decoder) + self.beside(x)

    def beside(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "*n d_out"]:
        """What the prediction has besides latents."""
        if self.W_skip is None:
            return self.b_dec
        return torch.addmm(self.b_dec, x.to(self.W_skip.dtype), self.W_skip)

    def freeze_decoder(self) -> None:
        """It stays where it starts."""
        self.frozen = True

    @torch.no_grad()
    def after_backward(self) -> None:
        assert self.decoder.grad is not None, "called before backward"
        if self.frozen:
            self.decoder.grad.zero_()  # Adam moves nothing that never had a gradient
        elif self.unit_norm:
            along = torch.linalg.vecdot(self.decoder.grad, self.decoder)
            self.decoder.grad.addcmul_(along[:, None], self.decoder, value=-1)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        if self.unit_norm and not self.frozen:
            self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=-1, keepdim=True))
        for parameter in self.non_negative:
            parameter.clamp_min_(0)

    def filled(
        self, build: Callable[..., Dictionary], weights: Mapping[str, Tensor], **arguments: Any
    ) -> Dictionary:
        """An SAE of `saes/` with the shared weights and these."""
        (d_sae, d_in), d_out = self.encoder.shape, self.decoder.shape[1]
        skip = self.W_skip is not None
        sae = build(d_in, d_sae, d_out=d_out, skip=skip, **arguments)
        shared = {"W_enc": self.encoder.T, "W_dec": self.decoder, "b_dec": self.b_dec}
        if self.W_skip is not None:
            shared["W_skip"] = self.W_skip
        sae.load_state_dict(shared | dict(weights))
        return sae


def _directions(width: int, d: int, generator: torch.Generator) -> Float[Tensor, "width d"]:
    return nn.functional.normalize(torch.randn(width, d, generator=generator), dim=-1)


def squared_error(target: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Sum over dimensions, mean over tokens."""
    return (target - x_hat).square().sum() / len(target)


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

    def forget(self, latents: Bool[Tensor, " d_sae"]) -> None:
        """As if these had just fired."""
        self.silent_for.masked_fill_(latents, 0)


@dataclass(frozen=True, kw_only=True)
class Revived(Variant):
    """A recipe that keeps latents alive by an auxiliary loss (`AuxK`)."""

    aux_coefficient: Annotated[float, Ge(0)]
    aux_k_share: Positive
    """Dead latents used per token for the auxiliary loss, as a share of d_out."""
    dead_after: Share
    """A latent is dead that was silent for this share of the training tokens."""


class AuxK(nn.Module):
    """Dead latents are made to predict what the live ones leave over (Gao et al. 2024, appendix A.2).

    The k largest pre-activations of dead latents go through a ReLU and reconstruct the residual e; the loss is
    |e - e_hat|^2 / |e - mean(e)|^2. Its gradient reaches encoder and decoder.
    """

    def __init__(self, task: Task, recipe: Revived) -> None:
        super().__init__()
        self.k = round(recipe.aux_k_share * task.d_out)
        self.coefficient = recipe.aux_coefficient
        self.activity = Activity(task, recipe.dead_after)

    def loss(
        self,
        sae: DictionaryTraining,
        x: Float[Tensor, "n d_in"],
        residual: Float[Tensor, "n d_out"],
        pre: Float[Tensor, "n d_sae"],
    ) -> Float[Tensor, ""]:
        """Weighted by its coefficient; zero where no latent is dead, or the residual has no spread to explain."""
        candidates = self.activity.dead().nonzero().squeeze(-1)
        k = min(self.k, len(candidates))
        if k == 0:
            return residual.new_zeros(())
        top = pre[:, candidates].topk(k, dim=-1, sorted=False).indices
        rows = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
        pairs = sparse.Pairs(pre, rows, candidates[top].flatten())
        e = residual.detach()
        e_hat = pairs.decode(pairs.pre(x, sae.encoder, sae.b_enc).relu(), sae.decoder)
        spread = (e - e.mean(0)).square().sum()
        # Not error / spread and then a choice: the gradient of 0 / 0 would come through.
        weight = torch.where(spread > 0, self.coefficient / spread, 0.0)
        error: Tensor = (e - e_hat).square().sum()
        return weight * error


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

    def __init__(self, task: Task, recipe: Penalised) -> None:
        super().__init__()
        self.wanted, self.tokens, self.descent = task.l0, task.tokens, recipe.l0_descent
        self.register_buffer("log_coefficient", torch.tensor(math.log(recipe.penalty)))
        self.register_buffer("start", torch.tensor(float("nan")))
        self.register_buffer("error", torch.tensor(0.0))

    def coefficient(self) -> Float[Tensor, ""]:
        return self.log_coefficient.exp()

    def scale(self, factor: Float[Tensor, ""]) -> None:
        """The penalty itself has become smaller by this factor."""
        self.log_coefficient.add_(factor.log())

    @torch.no_grad()
    def update(self, l0: Float[Tensor, ""], n: int, progress: float) -> None:
        """All on the device of the SAE: reading a number there would make every step wait."""
        log_l0 = l0.to(self.error.dtype).clamp_min(0.01).log()
        self.start.copy_(torch.where(self.start.isnan(), log_l0, self.start))
        share = ramp(progress, self.descent)
        error = log_l0 - (1 - share) * self.start - share * math.log(self.wanted)
        gain = min(INTEGRAL * n / self.tokens, INTEGRAL_PER_STEP)
        self.log_coefficient.add_(PROPORTIONAL * (error - self.error) + gain * error)
        self.error.copy_(error)
