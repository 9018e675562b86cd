"""The true features of a synthetic world as an SAE, and the same SAE with a share of its latents spoilt.

d_i     direction of feature i, a_i its magnitude on a token, b the offset of the world; the features of a world are
        numbered from the most frequent one

oracle    latent j is feature j, for as many of the first features as the trained SAEs have latents: it writes d_j, and
          z_j = a_j, which the world tells for every token that it has sampled; x_hat = sum_j z_j d_j + b
mixed     a spoilt latent j stands for two features: it writes u = (d_j + d_m) / |d_j + d_m| with m another feature
          of the dictionary, and z_j = (a_j d_j + a_m d_m) . u, so that it fires where either does
dropped   a spoilt latent never fires, and its direction is random
permuted  spoilt latents write one another's directions; codes stay as they are

What is spoilt at a share is spoilt at every larger one. A valid metric puts them in order: the oracle first, and each
way of spoiling worse with its share. No SAE is known to reach what the oracle does, which reads nothing off
activations; a trained SAE may still explain more of the variance, because it does not stop at true features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from saebench.controls._control import Asked, BuiltControl, Material, Planned
from saebench.controls._truth import TrueFeatures, Wires
from saebench.errors import UserError
from saebench.types import Truth


class _Damage(NamedTuple):
    way: Literal["mixed", "dropped", "permuted"]
    share: float

    @property
    def suffix(self) -> str:
        return f"-{self.way}{100 * self.share:g}"

    def latents(self, width: int) -> int:
        """How many of so many latents are spoilt. Raises `UserError` where that is too few to spoil."""
        least = 1 if self.way == "dropped" else 2
        found = round(self.share * width)
        if found < least:
            raise UserError(
                f"the control oracle spoils {found} of {width} latents with {self.way} {self.share:g}; expected a "
                f"share that is {least} or more of them"
            )
        return found


@final
@dataclass(frozen=True)
class Oracle(BuiltControl):
    mixed: tuple[float, ...] = (0.25, 0.5)
    """Shares of the latents that are spoilt in this way: an SAE for each of them."""
    dropped: tuple[float, ...] = (0.25, 0.5)
    permuted: tuple[float, ...] = (0.25, 0.5)
    seed: int = 0
    """Of which latents are spoilt, and how."""

    kind: ClassVar = "reference"
    needs_truth: ClassVar = True

    def __post_init__(self) -> None:
        for damage in self._damages():
            if not 0 < damage.share <= 1:
                raise ValueError(
                    f"{damage.way} has {damage.share:g}; expected shares above 0 up to 1"
                )
        if len({damage.suffix for damage in self._damages()}) < len(self._damages()):
            raise ValueError(
                "a share is there twice; expected each share of mixed, dropped and permuted once"
            )

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        widths = dict.fromkeys(sae.width for sae in asked)
        for width in widths:
            for damage in self._damages():
                damage.latents(width)
        return [
            Planned(f"-w{width}{suffix}", width, None)
            for width in widths
            for suffix in ["", *(damage.suffix for damage in self._damages())]
        ]

    def has_parents_codes(self, planned: Planned) -> bool:
        """Where decoder rows alone are exchanged."""
        return any(
            d.way == "permuted" and planned.suffix.endswith(d.suffix) for d in self._damages()
        )

    def build(self, planned: Planned, material: Material) -> TrueFeatures:
        assert planned.width is not None, "planned from a trained SAE"
        assert material.known is not None, "the suite was checked for controls that need it"
        truth, features_of = material.known
        width = min(planned.width, len(truth.directions))
        of_name = {f"-w{planned.width}{damage.suffix}": damage for damage in self._damages()}
        damage = of_name.get(planned.suffix)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(width, generator=generator)
        made = _Made(truth.directions[:width].clone(), _straight(truth, torch.arange(width)))
        if damage is not None:
            spoil = {"mixed": _mixed, "dropped": _dropped, "permuted": _permuted}[damage.way]
            made = spoil(truth, order[: damage.latents(width)], made.directions, generator)
        return TrueFeatures(
            made.directions, truth.offset, made.wires, len(truth.directions), features_of
        )

    def _damages(self) -> list[_Damage]:
        return [
            *(_Damage("mixed", share) for share in self.mixed),
            *(_Damage("dropped", share) for share in self.dropped),
            *(_Damage("permuted", share) for share in self.permuted),
        ]


class _Made(NamedTuple):
    """What an oracle writes and hears."""

    directions: Float[Tensor, "d_sae d"]
    wires: Wires


def _straight(truth: Truth, latents: Int[Tensor, " m"]) -> Wires:
    """These latents hear the feature of their own number."""
    latents = latents.to(truth.directions.device)
    return Wires(latents, latents, torch.ones(len(latents), device=latents.device))


def _mixed(
    truth: Truth,
    spoilt: Int[Tensor, " m"],
    directions: Float[Tensor, "d_sae d"],
    generator: torch.Generator,
) -> _Made:
    # The next one of a random round, so that none is its own other. One from outside of the dictionary would add to
    # what the codes tell.
    circle = torch.randperm(len(directions), generator=generator)
    other = torch.empty_like(circle)
    other[circle] = circle.roll(1)
    whole = _straight(truth, _left(spoilt, len(directions)))
    spoilt, others = spoilt.to(directions.device), other[spoilt].to(directions.device)
    u = normalize(directions[spoilt] + directions[others], dim=-1)
    weights = (directions[spoilt] * u).sum(-1)  # the same for both, which are as long
    directions[spoilt] = u
    wires = Wires(
        torch.cat([whole.features, spoilt, others]),
        torch.cat([whole.latents, spoilt, spoilt]),
        torch.cat([whole.weights, weights, weights]),
    )
    return _Made(directions, wires)


def _dropped(
    truth: Truth,
    spoilt: Int[Tensor, " m"],
    directions: Float[Tensor, "d_sae d"],
    generator: torch.Generator,
) -> _Made:
    rows = normalize(torch.randn(directions.shape, generator=generator), dim=-1)
    directions[spoilt] = rows[spoilt].to(directions)
    return _Made(directions, _straight(truth, _left(spoilt, len(directions))))


def _permuted(
    truth: Truth,
    spoilt: Int[Tensor, " m"],
    directions: Float[Tensor, "d_sae d"],
    generator: torch.Generator,  # noqa: ARG001  (the order of the spoilt is drawn already)
) -> _Made:
    directions[spoilt] = directions[spoilt.roll(1)]
    return _Made(directions, _straight(truth, torch.arange(len(directions))))


def _left(spoilt: Int[Tensor, " m"], width: int) -> Int[Tensor, " k"]:
    """Latents that are not spoilt."""
    kept = torch.ones(width, dtype=torch.bool)
    kept[spoilt] = False
    return kept.nonzero().flatten()
