"""How much of an SAE comes back when it is trained again with another seed.

It is compared with every SAE of the suite that differs from it in its seed alone: a_i are the decoder directions of its
live latents, b_j those of another seed. Live are those that fire on the first `tokens` tokens of the evaluation text:
dead ones lie near their random start, which has no twin, and are left out on both sides. All seeds of a suite read the
same batches in the same order, so that a seed is a random start alone; other data may change more.

stability_mmcs      = mean over i of max_j cos(a_i, b_j), mean max cosine similarity: several i may have the same j
stability_mmcs_back = mean over j of max_i cos(a_i, b_j)
stability_mcc       = mean of cos(a_i, b_j) over the one-to-one pairs for which it is largest (Hungarian assignment, and
                      greedy pairs above 16,384 live latents; Song et al. 2025, https://arxiv.org/abs/2505.20254)
stability_mcc_abs   = mean of |cos(a_i, b_j)| over the pairs for which this is largest
shared_07           = share of the i whose partner among the pairs of stability_mcc has a cosine of 0.7 or more, of
                      encoder directions too where both have some (after Paulo and Belrose 2025,
                      https://arxiv.org/abs/2501.16615)
mutual_nearest      = share of the i that are the nearest of their nearest b_j; of random directions, about half are
stability           = mean over i of the share of other seeds with a b_j at a cosine of 0.7 or more
                      (https://arxiv.org/abs/2606.12138)
stability_frequent  = the same over live latents that fire more often than the median one
stability_rare      = the same over the other live latents

All are means over the other seeds; a unit of stability_mmcs_back is the latents of the others that have one number.
References are of random directions, on both sides as many as there are live latents on average. That of a share at 0.7
is the chance that any of so many has such a cosine, which is exact for stability and more than chance for shared_07.
The spread of these numbers over the seeds of one family is no training noise: any two seeds share a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.special import betainc
from torch import Tensor

from saebench import matching
from saebench.types import Metric, Omitted, Score, Seeded, SeedEval, Skip

_NEAR = 0.7
_RANDOM = "reference: random directions"


def _metric(name: str, doc: str) -> Metric:
    return Metric(name, "max", "latent", f"{doc}; {_RANDOM}", ends=(0.0, 1.0))


@final
@dataclass(frozen=True)
class Stability(SeedEval):
    version: ClassVar = 1
    metrics: ClassVar = (
        _metric("stability_mmcs", "cosine to the nearest decoder direction of another seed, mean"),
        _metric("stability_mmcs_back", "the same from the other seeds to this one"),
        _metric("stability_mcc", "cosine of decoder directions paired one-to-one, mean"),
        _metric("stability_mcc_abs", "absolute cosine of directions paired one-to-one, mean"),
        _metric("shared_07", "share of latents with a partner at cosine 0.7, encoder included"),
        _metric("mutual_nearest", "share of latents that are the nearest of their nearest"),
        _metric("stability", "share of other seeds with a direction at cosine 0.7"),
        _metric("stability_frequent", "the same over the half of latents that fires more often"),
        _metric("stability_rare", "the same over the half of latents that fires less often"),
    )

    def scores(self, one: Seeded, others: Sequence[Seeded]) -> Sequence[Score | Omitted]:
        ours, *theirs = (_live(seeded) for seeded in (one, *others))
        sums = _Sums(one.sae.d_sae)
        for live in theirs:
            _add_nearest(sums, ours, live)
            _add_pairs(sums, ours, live)
        _add_halves(sums, one.density)
        reference = _references(ours, theirs)
        names = [metric.name for metric in self.metrics if metric.name in sums.num]
        found = [
            Score(name, sums.num[name], sums.den[name], one.n_tokens, reference[name])
            for name in names
        ]
        if "stability_frequent" not in sums.num:
            reason = "no live latent fires more often than the median one"
            return [*found, Omitted("stability_frequent", reason)]
        return found


class _Live(NamedTuple):
    """The latents of an SAE that fire."""

    latents: Int[np.ndarray, " m"]
    """Their numbers, ascending."""
    decoder: Float[Tensor, "m d_out"]
    encoder: Float[Tensor, "m d_in"] | None


class _Sums:
    """For each latent: the sum over other seeds, and over how many of them."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.num: dict[str, np.ndarray] = {}
        self.den: dict[str, np.ndarray] = {}

    def add(
        self, metric: str, latents: Int[np.ndarray, " m"], values: Shaped[Tensor, " m"]
    ) -> None:
        """Latents are there once."""
        for sums in (self.num, self.den):
            sums.setdefault(metric, np.zeros(self.d_sae))
        self.num[metric][latents] += values.double().cpu().numpy()
        self.den[metric][latents] += 1


def _live(seeded: Seeded) -> _Live:
    W_dec, W_enc = (getattr(seeded.sae, name, None) for name in ("W_dec", "W_enc"))
    if W_dec is None:
        raise Skip("it has no decoder directions")
    latents = np.flatnonzero(seeded.density > 0)
    if not len(latents):
        raise Skip(
            f"no latent of it, or of another seed of it, fires on {seeded.n_tokens:,} tokens"
        )
    rows = torch.from_numpy(latents).to(W_dec.device)
    return _Live(latents, W_dec[rows], None if W_enc is None else W_enc.T[rows])


def _add_nearest(sums: _Sums, ours: _Live, theirs: _Live) -> None:
    there = matching.nearest(ours.decoder, theirs.decoder, signed=True).cosine
    back = matching.nearest(theirs.decoder, ours.decoder, signed=True).cosine
    mutual = matching.mutual(ours.decoder, theirs.decoder, signed=True).a
    sums.add("stability_mmcs", ours.latents, there)
    sums.add("stability_mmcs_back", theirs.latents, back)
    sums.add("mutual_nearest", ours.latents, _marked(mutual, len(there)))
    sums.add("stability", ours.latents, there >= _NEAR)


def _add_pairs(sums: _Sums, ours: _Live, theirs: _Live) -> None:
    """A latent without a partner, where the other has fewer, is not shared, and is in no mean of cosines."""
    pairs = matching.matched(ours.decoder, theirs.decoder, signed=True)
    sums.add("stability_mcc", ours.latents[pairs.a.cpu().numpy()], pairs.cosine)
    either = matching.matched(ours.decoder, theirs.decoder, signed=False)
    sums.add("stability_mcc_abs", ours.latents[either.a.cpu().numpy()], either.cosine)
    near = pairs.cosine >= _NEAR
    if ours.encoder is not None and theirs.encoder is not None:
        encoders = (ours.encoder[pairs.a].double(), theirs.encoder[pairs.b].double())
        near &= torch.cosine_similarity(*encoders, dim=-1, eps=1e-30) >= _NEAR
    sums.add("shared_07", ours.latents, _marked(pairs.a[near], len(ours.latents)))


def _marked(places: Int[Tensor, " p"], m: int) -> Shaped[Tensor, " m"]:
    marks = torch.zeros(m, dtype=torch.bool, device=places.device)
    marks[places] = True
    return marks


def _add_halves(sums: _Sums, density: Float[np.ndarray, " d_sae"]) -> None:
    """Latents that fire as often as the median one are among the rare, so that their order does not matter."""
    often = density > np.median(density[density > 0])
    for name, half in (("stability_frequent", often), ("stability_rare", ~often)):
        if (sums.den["stability"] * half).any():
            sums.num[name] = sums.num["stability"] * half
            sums.den[name] = sums.den["stability"] * half


def _references(ours: _Live, theirs: Sequence[_Live]) -> dict[str, float]:
    """The same for all seeds of a family, so that random directions are matched once."""
    k = round(float(np.mean([len(live.latents) for live in (ours, *theirs)])))
    d = ours.decoder.shape[1]
    signed, either = (matching.chance(k, k, d, signed) for signed in (True, False))
    near = _any_near(k, d)
    return {
        "stability_mmcs": signed.nearest,
        "stability_mmcs_back": signed.nearest,
        "stability_mcc": signed.matched,
        "stability_mcc_abs": either.matched,
        "shared_07": near,
        "mutual_nearest": signed.shared,
        "stability": near,
        "stability_frequent": near,
        "stability_rare": near,
    }


def _any_near(k: int, d: int) -> float:
    """Chance that one of k random directions of d dimensions has a cosine of 0.7 or more to a given one.

    The cap of a sphere that is this near has the share I_{1 - 0.7^2}((d - 1) / 2, 1 / 2) / 2 of it.
    """
    cap = betainc((d - 1) / 2, 0.5, 1 - _NEAR**2) / 2
    return float(-np.expm1(k * np.log1p(-cap)))
