"""The same activations and the same SAE in another unit: x' = a x + b.

Nothing is gained or lost by it, so that a metric which says how good an SAE is may not move; one that is measured in
the unit of activations, such as a squared error, moves by a known power of a, and cannot be compared between models.

    encode'(x') = encode((x' - b) / a)        decode'(z) = a decode(z) + b
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from saebench.types import (
    SAE,
    Batch,
    Excerpt,
    Facts,
    Lab,
    Outcome,
    References,
    Site,
    SparseCode,
    Spec,
    Truth,
)


class Unit(NamedTuple):
    """x' = scale * x + offset, the same in every dimension."""

    scale: float
    offset: float

    def of(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.scale * x + self.offset

    @property
    def name(self) -> str:
        """What is done to x."""
        scaled = f"{self.scale:g} x" if self.scale != 1 else "x"
        return f"{scaled} + {self.offset:g}" if self.offset else scaled

    def back(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (x - self.offset) / self.scale


class InUnitSAE:
    """An SAE on activations in the unit."""

    def __init__(self, sae: SAE, unit: Unit) -> None:
        self._sae, self._unit = sae, unit
        self.d_in, self.d_sae = sae.d_in, sae.d_sae
        self._change_weights()

    def _change_weights(self) -> None:
        """Those that the SAE has."""
        unit, has = self._unit, vars(self)
        for name, change in (
            ("W_enc", lambda w: w / unit.scale),
            ("W_dec", lambda w: w * unit.scale),
            ("b_dec", unit.of),
        ):
            weight = getattr(self._sae, name, None)
            if weight is not None:
                has[name] = change(weight)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self._sae.encode(self._unit.back(x))

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]:
        return self._unit.of(self._sae.decode(z))

    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        return self._sae.encode_sparse(self._unit.back(x))

    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_out"]:
        return self._unit.of(self._sae.decode_sparse(code))

    def beside(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"] | None:
        """What is added to the decoded latents: no offset is in it."""
        own = getattr(self._sae, "beside", None)
        more: Tensor | None = None if own is None else own(self._unit.back(x))
        return None if more is None else self._unit.scale * more


class SubjectInUnit:
    """A subject whose activations are in the unit, as far as scoring asks it."""

    def __init__(self, subject: Any, unit: Unit) -> None:
        self._subject, self._unit = subject, unit
        self.identity: Spec = subject.identity

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def facts(self, site: Site, predicted: Site) -> Facts:
        found: Facts = self._subject.facts(site, predicted)
        return found._replace(mean=self._unit.of(found.mean), truth=self._truth(found.truth))

    def evaluation(self, site: Site, predicted: Site | None = None) -> Iterator[Batch]:
        for batch in self._subject.evaluation(site, predicted):
            yield _BatchInUnit(batch, self._unit)

    def _truth(self, truth: Truth | None) -> Truth | None:
        if truth is None:
            return None
        return truth._replace(
            offset=self._unit.of(truth.offset),
            mean_magnitudes=self._unit.scale * truth.mean_magnitudes,
        )


class _BatchInUnit:
    def __init__(self, batch: Batch, unit: Unit) -> None:
        self._batch, self._unit = batch, unit
        self.x: Float[Tensor, "n d_in"] = unit.of(batch.x)
        self.sequence, self.scored_sequence = batch.sequence, batch.scored_sequence

    @property
    def target(self) -> Float[Tensor, "n d_out"]:
        return self._unit.of(self._batch.target)

    @property
    def features(self) -> SparseCode | None:
        found = self._batch.features
        return None if found is None else found._replace(values=self._unit.scale * found.values)

    def references(self) -> References:
        return self._batch.references()

    def outcome(self, replacement: Float[Tensor, "n d_out"]) -> Outcome:
        return self._batch.outcome(self._unit.back(replacement))


class LabInUnit:
    """A lab whose activations are in the unit. Nothing that was computed in another is taken from its cache."""

    def __init__(self, lab: Lab, unit: Unit) -> None:
        self._lab, self._unit = lab, unit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lab, name)

    def activations(self, site: Site, excerpts: Sequence[Excerpt]) -> Float[Tensor, "n d"]:
        return self._unit.of(self._lab.activations(site, excerpts).float())

    def kept(self, spec: Spec, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        unit = {"unit": list(self._unit)}
        return self._lab.kept(spec | unit, compute)
