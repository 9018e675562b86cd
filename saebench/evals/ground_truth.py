"""Whether latents are the features that activations are made of, where these are known (arXiv:2602.14687).

x = a D + b with true features D_1 ... D_n and their magnitudes a; d_i is the decoder direction of latent i, z_i its
value. Latent i is of the feature f(i) = argmax_j |cos(d_i, D_j)|; the best latent of feature j is
l(j) = argmax_i |cos(d_i, D_j)|. Latents and features are active where they are not zero.

Directions
mcc               = mean |cos| over the one-to-one pairs of latents and features with the largest total, as many as are
                    on the smaller side (`matching.matched`); its reference is that of random directions
mcc_above_chance  = (mcc - chance) / (1 - chance)
feature_recall_07 = share of all features, also of those that an SAE has no room for, with |cos(d_l(j), D_j)| >= 0.7;
                    feature_recall_09 the same with 0.9; feature_recall_07_weighted with features weighted by how often
                    they are active
uniqueness        = different f(i) / latents; its reference is that of latents which pick their features at random,
                    n (1 - (1 - 1/n)^d_sae) / d_sae
hedging           = mean over active latents of max_r |cos(d_i, D_r)| over the parent, children and siblings r of f(i),
                    where it has some: how much of what is active together with its feature is mixed into a latent
                    (arXiv:2505.11756); its reference is that of the D_f(i) themselves, into which nothing is mixed

Activity: of latent i and its feature, TP tokens have both, FP the latent alone, FN the feature alone
precision         = mean over all latents of TP / (TP + FP), 0 where it is never active
recall            = mean over all latents of TP / (TP + FN), 0 where the feature is never active
f1                = mean over all latents of 2 TP / (2 TP + FP + FN), so that those that are never active count as 0
f1_live           = the same over latents that are ever active
f1_weighted       = the same over all latents, weighted by how often f(i) is active
f1_depth_0        = f1_live where f(i) is the root of a tree; f1_depth_1 its child; f1_depth_2 further below; f1_free in
                    no tree; f1_rare among the rarest quarter of the features that active latents are of; f1_frequent
                    among the most frequent quarter

Hierarchy: a parent counts if its best latent has |cos| >= 0.7 with it and is of no other feature. From there on half of
the square of a latent's direction is the parent's; below, nobody has found the parent, so no latent of it is silent.
absorption        = share of tokens with an active child, and so with an active parent, on which the parent's latent is
                    silent (arXiv:2409.14507)
parent_miss       = share of tokens with an active parent and no active child on which the parent's latent is silent:
                    what it misses anyway
absorption_excess = absorption - parent_miss, parent by parent:
                    sum_c (silent_c - tokens_c parent_miss of c's parent) / sum_c tokens_c over children c

Magnitudes: of latents with |cos(d_i, D_f(i))| >= 0.7, over their TP tokens; z_i <d_i, D_f(i)> is what a latent gives
back of its feature
magnitude_ratio   = sum z_i <d_i, D_f(i)> / sum a_f(i): 1 is right, below 1 the SAE shrinks
magnitude_error   = sum |z_i <d_i, D_f(i)> - a_f(i)| / sum a_f(i)
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from saebench import matching, sparse
from saebench.types import (
    SAE,
    Facts,
    Metric,
    Omitted,
    Score,
    Seen,
    Skip,
    SparseCode,
    StreamEval,
    Tally,
    Truth,
)

_FOUND = 0.7
_CLOSE = 0.9
_QUARTER = 0.25
_NUMBERS = 2**22
"""Of directions in doubles that are held at a time, at the most."""

Floats = NDArray[np.float64]

_F1 = "F1 of latent and its feature, mean over"
_SHARE = (0.0, 1.0)

_NO_LATENT = "no active latent is of such a feature"
_NOTHING = {
    "feature_recall_07_weighted": "no feature is ever active",
    "f1_live": "no latent is ever active",
    "f1_weighted": "no feature that a latent is of is ever active",
    "hedging": "no active latent is of a feature in a tree",
    "f1_depth_0": _NO_LATENT,
    "f1_depth_1": _NO_LATENT,
    "f1_depth_2": _NO_LATENT,
    "f1_free": _NO_LATENT,
    "f1_rare": "no latent is ever active",
    "f1_frequent": "no latent is ever active",
    "absorption": "no latent has |cosine| 0.7 or more with a parent of active features",
    "parent_miss": "no latent has |cosine| 0.7 or more with a parent that is active without its children",
    "absorption_excess": "no latent has |cosine| 0.7 or more with a parent that is active with and without children",
    "magnitude_ratio": "no latent has |cosine| 0.7 or more with a feature that it is active with",
    "magnitude_error": "no latent has |cosine| 0.7 or more with a feature that it is active with",
}
"""Why a metric is left out, by metric: those that may have nothing to average."""


@final
@dataclass(frozen=True)
class GroundTruth(StreamEval):
    version: ClassVar = 1
    metrics: ClassVar = (
        Metric(
            "mcc",
            "max",
            "feature",
            "mean |cosine| of latents and true features, paired one to one; reference: random directions",
        ),
        Metric("mcc_above_chance", "max", "feature", "(mcc - chance) / (1 - chance)", ends=_SHARE),
        Metric(
            "feature_recall_07",
            "max",
            "feature",
            "share of all features with a latent of |cosine| 0.7 or more",
            ends=_SHARE,
        ),
        Metric(
            "feature_recall_09",
            "max",
            "feature",
            "share of all features with a latent of |cosine| 0.9 or more",
            ends=_SHARE,
        ),
        Metric(
            "feature_recall_07_weighted",
            "max",
            "feature",
            "share of features with a latent of |cosine| 0.7 or more, by how often they are active",
            ends=_SHARE,
        ),
        Metric(
            "uniqueness",
            "max",
            "latent",
            "different features that latents are of, per latent; reference: features picked at random",
        ),
        Metric(
            "hedging",
            "min",
            "latent",
            "|cosine| to the nearest parent, child or sibling of a latent's feature, mean over active latents; "
            "reference: that of the true directions",
        ),
        Metric("precision", "max", "latent", "precision of firing, mean over latents", ends=_SHARE),
        Metric("recall", "max", "latent", "recall of firing, mean over latents", ends=_SHARE),
        Metric("f1", "max", "latent", f"{_F1} all latents", ends=_SHARE),
        Metric("f1_live", "max", "latent", f"{_F1} latents ever active", ends=_SHARE),
        Metric(
            "f1_weighted",
            "max",
            "latent",
            f"{_F1} all latents, by how often the feature is active",
            ends=_SHARE,
        ),
        Metric("f1_depth_0", "max", "latent", f"{_F1} active latents of roots", ends=_SHARE),
        Metric(
            "f1_depth_1", "max", "latent", f"{_F1} active latents of children of roots", ends=_SHARE
        ),
        Metric(
            "f1_depth_2",
            "max",
            "latent",
            f"{_F1} active latents of features two or more generations below a root",
            ends=_SHARE,
        ),
        Metric(
            "f1_free", "max", "latent", f"{_F1} active latents of features in no tree", ends=_SHARE
        ),
        Metric(
            "f1_rare",
            "max",
            "latent",
            f"{_F1} active latents of the rarest quarter of their features",
            ends=_SHARE,
        ),
        Metric(
            "f1_frequent",
            "max",
            "latent",
            f"{_F1} active latents of the most frequent quarter of their features",
            ends=_SHARE,
        ),
        Metric(
            "absorption",
            "min",
            "feature",
            "share of tokens with an active child on which the latent of its parent is silent",
        ),
        Metric(
            "parent_miss",
            "min",
            "feature",
            "share of tokens with an active parent and no active child on which the parent's latent is silent",
        ),
        Metric("absorption_excess", "min", "feature", "absorption - parent_miss, parent by parent"),
        Metric(
            "magnitude_ratio",
            None,
            "latent",
            "what latents give back of their features / true magnitude; below 1 the SAE shrinks",
        ),
        Metric(
            "magnitude_error",
            "min",
            "latent",
            "|what latents give back of their features - true magnitude| / true magnitude",
        ),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        if facts.truth is None:
            raise Skip(
                "nobody knows the features of these activations; only of the synthetic subjects"
            )
        W_dec = getattr(sae, "W_dec", None)
        if W_dec is None:
            raise Skip("it has no decoder directions")
        if facts.site != facts.target:
            raise Skip("it predicts another site than the one whose features are known")
        return _Tally(W_dec.detach(), facts.truth)


class _Pairing(NamedTuple):
    """Which latent is of which feature: it follows from directions alone."""

    of_latent: matching.Nearest
    """f(i)."""
    of_feature: matching.Nearest
    """l(j)."""
    given_back: Float[Tensor, " d_sae"]
    """<d_i, D_f(i)>, in float64."""
    watched: Int[Tensor, " n_features"]
    """The latent of a parent that counts; -1 for other features."""
    parent_watched: Int[Tensor, " n_features"]
    """The same for the parent of each feature."""


def _pairing(W_dec: Float[Tensor, "d_sae d"], truth: Truth) -> _Pairing:
    D, parents = truth.directions, truth.parents
    of_latent, of_feature = (
        matching.nearest(*two, signed=False) for two in ((W_dec, D), (D, W_dec))
    )
    features = torch.arange(len(D), device=D.device)
    is_parent = torch.isin(features, parents)
    own = of_latent.index[of_feature.index] == features
    counts = is_parent & own & (of_feature.cosine >= _FOUND)
    watched = torch.where(counts, of_feature.index, -1)
    return _Pairing(
        of_latent,
        of_feature,
        _dots(W_dec, D, of_latent.index),
        watched,
        torch.where(parents >= 0, watched[parents.clamp_min(0)], -1),
    )


@final
class _Tally:
    """Counts alone: an entry of a code is looked up in the other code of its token."""

    def __init__(self, W_dec: Float[Tensor, "d_sae d"], truth: Truth) -> None:
        self.truth = Truth(*(part.to(W_dec.device) for part in truth))
        self.W_dec, self.n = W_dec, 0
        self.d_sae, self.n_features = len(W_dec), len(truth.directions)
        self.pairing = _pairing(W_dec, self.truth)
        self._totals: dict[str, Tensor] = {}

    def update(self, seen: Seen) -> None:
        features = seen.batch.features
        assert features is not None, (
            "where the truth is known, batches say which features they have"
        )
        features = SparseCode(*(part.to(self.W_dec.device) for part in features))
        self.n += len(seen.batch.x)
        self._add("fires", seen.code.indices, self.d_sae)
        self._add("occurs", features.indices, self.n_features)
        latents = _Entries(seen.code, self.d_sae)
        truths = _Entries(features, self.n_features)
        self._activity(latents, truths)
        self._hierarchy(latents, truths)

    def _activity(self, latents: "_Entries", truths: "_Entries") -> None:
        own = self.pairing.of_latent.index[latents.code.indices]
        place, there = truths.find(latents.rows, own)
        latent = latents.code.indices[there]
        a = truths.code.values[place[there]].double()
        back = latents.code.values[there].double() * self.pairing.given_back[latent]
        self._add("both", latent, self.d_sae)
        self._add("given_back", latent, self.d_sae, back)
        self._add("magnitude", latent, self.d_sae, a)
        self._add("error", latent, self.d_sae, (back - a).abs())

    def _hierarchy(self, latents: "_Entries", truths: "_Entries") -> None:
        feature, rows = truths.code.indices, truths.rows
        parent = self.truth.parents[feature]
        place, there = truths.find(rows, parent)
        alone = torch.ones_like(there)
        alone[place[there]] = False
        for kind, watched, of in (
            ("child", self.pairing.parent_watched, slice(None)),
            ("alone", self.pairing.watched, alone),
        ):
            entries, tokens = feature[of], rows[of]
            latent = watched[entries]
            entries, tokens, latent = (part[latent >= 0] for part in (entries, tokens, latent))
            _, heard = latents.find(tokens, latent)
            self._add(kind, entries, self.n_features)
            self._add(f"{kind} missed", entries[~heard], self.n_features)

    def _add(
        self, name: str, places: Int[Tensor, " m"], size: int, weights: Tensor | None = None
    ) -> None:
        counts = torch.bincount(places, weights, minlength=size)
        self._totals[name] = self._totals[name] + counts if name in self._totals else counts

    def _total(self, name: str) -> Floats:
        return self._totals[name].cpu().numpy().astype(np.float64)

    @torch.no_grad()
    def scores(self) -> list[Score | Omitted]:
        assert self.n, "no batch was seen"
        scores = [
            *self._directions(),
            *self._hedging(),
            *self._firing(),
            *self._absorption(),
            *self._magnitudes(),
        ]
        return [s if s.den.any() else Omitted(s.metric, _NOTHING[s.metric]) for s in scores]

    def _directions(self) -> list[Score]:
        n_features, d_sae = self.n_features, self.d_sae
        pairs = matching.matched(self.W_dec, self.truth.directions, signed=False)
        chance = matching.chance(d_sae, n_features, self.W_dec.shape[1], signed=False).matched
        cosine, paired = np.zeros(n_features), np.zeros(n_features)
        at = pairs.b.cpu().numpy()
        cosine[at], paired[at] = pairs.cosine.cpu().numpy(), 1
        best = _numpy(self.pairing.of_feature.cosine)
        one, occurs = np.ones(n_features), self._total("occurs")
        of = self.pairing.of_latent.index.cpu().numpy()
        sharing = np.bincount(of, minlength=n_features)[of]
        picked = n_features * (1 - (1 - 1 / n_features) ** d_sae) / d_sae
        above, room = paired * (cosine - chance), paired * (1 - chance)
        return [
            Score("mcc", cosine, paired, len(at), chance),
            Score("mcc_above_chance", above, room, len(at)),
            Score("feature_recall_07", 1.0 * (best >= _FOUND), one, n_features),
            Score("feature_recall_09", 1.0 * (best >= _CLOSE), one, n_features),
            Score("feature_recall_07_weighted", occurs * (best >= _FOUND), occurs, self.n),
            Score("uniqueness", 1 / sharing, np.ones(d_sae), d_sae, picked),
        ]

    def _hedging(self) -> list[Score]:
        live = self._total("fires") > 0
        D, of = self.truth.directions, self.pairing.of_latent.index
        near = _nearest_relative(self.W_dec, of, self.truth)
        counted = live & (near >= 0)
        ideal = _nearest_relative(D, torch.arange(len(D), device=D.device), self.truth)
        reference = float(ideal[of.cpu().numpy()][counted].mean()) if counted.any() else None
        n = int(counted.sum())
        return [Score("hedging", near * counted, 1.0 * counted, n, reference)]

    def _firing(self) -> list[Score]:
        of = self.pairing.of_latent.index.cpu().numpy()
        both, fires, occurs = self._total("both"), self._total("fires"), self._total("occurs")[of]
        precision, recall = _ratio(both, fires), _ratio(both, occurs)
        f1, one = _ratio(2 * both, fires + occurs), np.ones(self.d_sae)
        live = fires > 0
        groups = {"f1_live": live} | self._groups(live)
        return [
            Score("precision", precision, one, self.n),
            Score("recall", recall, one, self.n),
            Score("f1", f1, one, self.n),
            Score("f1_weighted", f1 * occurs, occurs, self.n),
            *(Score(name, f1 * group, 1.0 * group, self.n) for name, group in groups.items()),
        ]

    def _groups(self, live: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
        """Active latents by what feature they are of."""
        of = self.pairing.of_latent.index.cpu().numpy()
        depth, occurs = self.truth.depths.cpu().numpy()[of], self._total("occurs")
        counts = occurs[np.unique(of[live])]
        rare, frequent = np.quantile(counts, [_QUARTER, 1 - _QUARTER]) if live.any() else (0, 0)
        return {
            "f1_depth_0": live & (depth == 0),
            "f1_depth_1": live & (depth == 1),
            "f1_depth_2": live & (depth >= 2),
            "f1_free": live & (depth < 0),
            "f1_rare": live & (occurs[of] <= rare),
            "f1_frequent": live & (occurs[of] >= frequent),
        }

    def _absorption(self) -> list[Score]:
        tokens, missed = self._total("child"), self._total("child missed")
        alone, silent = self._total("alone"), self._total("alone missed")
        parents = self.truth.parents.cpu().numpy()
        children, lonely = np.flatnonzero(tokens), np.flatnonzero(alone)
        # Where a parent is never alone, nobody knows what its latent misses anyway.
        both = children[alone[parents[children]] > 0]
        expected = tokens[both] * _ratio(silent, alone)[parents[both]]
        return [
            _of_features("absorption", children, missed[children], tokens[children], parents),
            _of_features("parent_miss", lonely, silent[lonely], alone[lonely], None),
            _of_features("absorption_excess", both, missed[both] - expected, tokens[both], parents),
        ]

    def _magnitudes(self) -> list[Score]:
        found = _numpy(self.pairing.of_latent.cosine) >= _FOUND
        given_back, error = self._total("given_back") * found, self._total("error") * found
        magnitude = self._total("magnitude") * found
        n = int((self._total("both") * found).sum())
        return [
            Score("magnitude_ratio", given_back, magnitude, n),
            Score("magnitude_error", error, magnitude, n),
        ]


class _Entries:
    """A sparse code in which entries can be looked up by their token and number."""

    def __init__(self, code: SparseCode, width: int) -> None:
        self.code, self.width = code, width
        self.rows = sparse.rows_of(code)
        self._keys = self.rows * width + code.indices

    def find(
        self, rows: Int[Tensor, " m"], wanted: Int[Tensor, " m"]
    ) -> tuple[Int[Tensor, " m"], Bool[Tensor, " m"]]:
        """Where the entries are, and which of them are there at all. A number of -1 never is."""
        if not len(self._keys):
            return torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        keys = rows * self.width + wanted
        place = torch.searchsorted(self._keys, keys).clamp_max(len(self._keys) - 1)
        return place, (self._keys[place] == keys) & (wanted >= 0)


def _dots(
    W_dec: Float[Tensor, "d_sae d"], D: Float[Tensor, "n_features d"], of: Int[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """<d_i, D_of(i)> in float64, some latents at a time."""
    size = max(1, _NUMBERS // W_dec.shape[1])
    pairs = zip(W_dec.split(size), of.split(size), strict=True)
    return torch.cat([(d.double() * D[j].double()).sum(-1) for d, j in pairs])


def _nearest_relative(rows: Float[Tensor, "m d"], of: Int[Tensor, " m"], truth: Truth) -> Floats:
    """Largest |cosine| of each row with a parent, child or sibling of its feature; -1 where that has none."""
    parents, features = truth.parents, torch.arange(len(truth.parents), device=rows.device)
    found, start = [], 0
    for cosines in matching.cosines(rows, truth.directions, signed=False):
        own = of[start : start + len(cosines), None]
        start += len(cosines)
        parent = parents[own]
        related = (parents == own) | (features == parent) | ((parents == parent) & (parent >= 0))
        related &= features != own
        found.append(cosines.masked_fill_(~related, -1).amax(-1))
    return _numpy(torch.cat(found))


def _of_features(
    metric: str,
    features: NDArray[np.int64],
    num: Floats,
    den: Floats,
    parents: NDArray[np.int64] | None,
) -> Score:
    """Units are named by their feature. Children of one parent are alike: they have one latent that may be silent."""
    clusters = None if parents is None else [str(parent) for parent in parents[features]]
    ids = [str(feature) for feature in features]
    return Score(metric, num, den, int(den.sum()), ids=ids, clusters=clusters)


def _ratio(num: Floats, den: Floats) -> Floats:
    """0 where there is nothing to divide by."""
    return np.divide(num, den, out=np.zeros_like(num), where=den > 0)


def _numpy(values: Float[Tensor, " m"]) -> Floats:
    return values.cpu().numpy().astype(np.float64)
