"""Whether an SAE does at a site what it is said to do, on a few thousand tokens, before it is scored.

explained variance = 1 - sum|t - t_hat|^2 / sum|t - mean(t)|^2      t = activations of the predicted site

over all tokens. Where it is not above 0 the likely causes are tried, and those that explain something are named:
another place of the model (the tokens are read once at all of them), activations scaled to a mean length of sqrt(d),
activations centred token by token (TransformerLens centres what it writes to the residual stream), and the first
token of each sequence left out (its activation can be hundreds of times as long as the others'). Last, predictions
that only are too long, or away by a constant:

t_hat' = mean(t) + a (t_hat - mean(t_hat))      a = sum <t, t_hat - mean(t_hat)> / sum |t_hat - mean(t_hat)|^2
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saebench.checkpoints import where
from saebench.errors import UserError
from saebench.runner import Workbench, predicted
from saebench.sites import STREAMS
from saebench.synthetic import Subject
from saebench.types import SAE, Site

N_TOKENS = 4_096
_WORTH_SAYING = 0.05
"""Explained variance below which another place or treatment is no explanation."""
_MOST_SAID = 3
_SAME_LENGTH = 1.1
"""Factor of lengths below which their difference explains nothing."""
_DENSE = 0.5
"""Share of active latents above which a code is hardly sparse."""

Place = tuple[Site, Site]
"""What an SAE reads and what it predicts."""


class Tokens(NamedTuple):
    """Some tokens, special ones left out, at several sites."""

    streams: dict[Site, Float[Tensor, "n _"]]
    first: Bool[Tensor, " n"]
    """Whether a token is the first of its sequence that is not special."""


Read = Callable[[Sequence[Site]], Iterator[Tokens]]
"""The same tokens at any sites, some sequences at a time."""


class Cause(NamedTuple):
    """Where or how the SAE does explain something."""

    what: str
    """In words that follow "it explains 0.83"."""
    conclusion: str
    explained_variance: float


class SelfCheck(NamedTuple):
    place: str
    n_tokens: int
    finite: bool
    """Whether all codes and predictions are. Where they are not, nothing else is measured."""
    explained_variance: float
    l0: float
    """Active latents per token."""
    live_fraction: float
    """Share of the latents that are active for at least one of the tokens."""
    decoder_norms: tuple[float, float, float] | None
    """Smallest, median and largest; None where there is no `W_dec`."""
    d_sae: int
    causes: tuple[Cause, ...]
    """Best first. Looked for only where the SAE explains nothing."""

    @property
    def refused(self) -> str | None:
        """Why it should not be scored; None where nothing speaks against it."""
        if not self.finite:
            return f"on {self.n_tokens:,} tokens at {self.place} its codes or predictions are not finite numbers"
        if self.explained_variance <= 0:
            return f"it {self._explains()}{self._because()}"
        if self.l0 == 0:
            return (
                f"none of its latents is active on any of {self.n_tokens:,} tokens at {self.place}"
            )
        return None

    def lines(self) -> list[str]:
        """For the user."""
        if not self.finite:
            return [f"self-check: {self.refused}"]
        live = f"{100 * self.live_fraction:.1f} % of its {self.d_sae:,} latents are active on some"
        found = [
            f"self-check: on {self.n_tokens:,} tokens it {self._explains()}",
            f"self-check: L0 is {self.l0:.4g}, and {live}",
        ]
        if self.l0 > _DENSE * self.d_sae:
            found.append(
                "self-check: more than half of its latents are active per token: is it an SAE?"
            )
        if self.decoder_norms is not None:
            low, median, high = self.decoder_norms
            found.append(
                f"self-check: decoder norms are {low:.4g} to {high:.4g}, median {median:.4g}"
            )
        return found

    def numbers(self) -> dict[str, Any]:
        """For the record."""
        if not self.finite:
            return {"n_tokens": self.n_tokens, "finite": False}
        norms = None if self.decoder_norms is None else list(self.decoder_norms)
        return {
            "n_tokens": self.n_tokens,
            "finite": True,
            "explained_variance": _finite(self.explained_variance),
            "l0": self.l0,
            "live_fraction": self.live_fraction,
            "decoder_norms": norms,
        }

    def _explains(self) -> str:
        return f"explains {self.explained_variance:.3g} of the variance at {self.place}"

    def _because(self) -> str:
        if not self.causes:
            return (
                "; nor does it explain any at other places of the model that have its width, with scaled or centred "
                "activations, without the first token of each sequence, or with predictions made shorter or longer. Is "
                "it of another model, or damaged?"
            )
        found = [f"{cause.explained_variance:.2g} {cause.what}" for cause in self.causes]
        return f", and {'; '.join(found)}: {self.causes[0].conclusion}"


def _finite(value: float) -> float | None:
    """For JSON: where the activations do not vary at all, there is no variance to explain."""
    return value if math.isfinite(value) else None


def check(sae: SAE, place: Place, read: Read, others: Callable[[], Sequence[Place]]) -> SelfCheck:
    """`others`: where else an SAE of these widths could be from, asked for only where it explains nothing.

    Raises `UserError` where there are no tokens.
    """
    site, target = place
    tokens = _whole(read(list(dict.fromkeys(place))))
    x, t = tokens.streams[site], tokens.streams[target]
    if not len(x):
        raise UserError(f"the suite's training text has no token to check an SAE of {site} on")
    with torch.no_grad():
        found = _measured(sae, x, t)
        told = SelfCheck(
            where(*place),
            len(x),
            found.finite,
            found.explained_variance,
            found.l0,
            found.live_fraction,
            _decoder_norms(sae),
            sae.d_sae,
            (),
        )
        if not found.finite or found.explained_variance > 0:
            return told
        causes = [*_treated(sae, tokens, place), *_elsewhere(sae, read, others())]
        causes += _rescaled(t, predicted(sae, x, sae.encode_sparse(x)))
    causes = [cause for cause in causes if cause.explained_variance > _WORTH_SAYING]
    causes.sort(key=lambda cause: -cause.explained_variance)
    return told._replace(causes=tuple(causes[:_MOST_SAID]))


def reader(bench: Workbench) -> Read:
    """4,096 tokens of a suite's training text, in whole sequences from all over it."""
    rows, special = bench.subject.train_rows, bench.subject.train_special
    counts = np.cumsum((~special).sum(1).numpy())
    n_rows = min(len(rows), 1 + int(np.searchsorted(counts, N_TOKENS)))
    chosen = np.unique(np.linspace(0, len(rows) - 1, n_rows).astype(np.int64))

    def read(sites: Sequence[Site]) -> Iterator[Tokens]:
        left = N_TOKENS
        for numbers in np.array_split(chosen, math.ceil(len(chosen) / bench.subject.batch_rows)):
            here = bench.subject.read(sites, rows[numbers].long())
            kept = ~special[numbers]
            first = (kept.cumsum(1) == 1)[kept][:left]
            streams = {s: x[kept.to(x.device)][:left].float() for s, x in here.items()}
            left -= len(first)
            yield Tokens(streams, first)

    return read


def other_places(bench: Workbench, sae: SAE, place: Place) -> list[Place]:
    """All streams of all layers that have the width of the SAE; of a transcoder, its two streams in other layers.

    Also those where something else of the same layer is predicted, as by a transcoder that was taken for an SAE.
    """
    site, target = place
    here = _sites_of_width(bench.subject, sae.d_in)
    layers = range(bench.subject.n_layers)
    if site == target:
        named = {bench.subject.canonical(s) for s in here}
        found = [(s, s) for s in sorted(named, key=str)]
        if site.layer is not None:
            beside = [Site(stream, site.layer) for stream in STREAMS]
            found += [(site, other) for other in beside if other in here and other != site]
    else:
        shifted = [(Site(site.stream, i), Site(target.stream, i)) for i in layers]
        d_out = bench.subject.width(target)
        there = _sites_of_width(bench.subject, d_out)
        found = [p for p in shifted if p[0] in here and p[1] in there]
        found += [(site, site)] if sae.d_in == d_out else []
    own = tuple(map(bench.subject.canonical, place))
    return [p for p in found if p != own]


def _sites_of_width(subject: Subject, d: int) -> set[Site]:
    found = set()
    for layer in range(subject.n_layers):
        for stream in STREAMS:
            with suppress(UserError):  # a block has those streams that it has
                site = subject.canonical(Site(stream, layer))
                if subject.width(site) == d:
                    found |= {site, Site(stream, layer)}
    return found


class _Measured(NamedTuple):
    finite: bool
    explained_variance: float
    l0: float
    live_fraction: float


class _Sums:
    """Of squares, in float64, about a mean that is known only at the end."""

    def __init__(self) -> None:
        self.n, self.error, self.squares = 0, 0.0, 0.0
        self.total: Tensor | None = None

    def update(self, t: Float[Tensor, "n d_out"], t_hat: Float[Tensor, "n d_out"]) -> None:
        exact = t.double()
        self.n += len(t)
        self.error += float((exact - t_hat.double()).square().sum())
        self.squares += float(exact.square().sum())
        total = exact.sum(0)
        self.total = total if self.total is None else self.total + total

    def explained_variance(self) -> float:
        """Minus infinity where there is no variance, or no finite prediction, to speak of."""
        assert self.total is not None, "nothing was counted"
        variance = self.squares - float(self.total.square().sum()) / self.n
        if not (variance > 0 and math.isfinite(self.error)):
            return -math.inf
        return 1 - self.error / variance


def _measured(sae: SAE, x: Float[Tensor, "n d_in"], t: Float[Tensor, "n d_out"]) -> _Measured:
    code = sae.encode_sparse(x)
    t_hat = predicted(sae, x, code)
    if not bool(torch.isfinite(code.values).all() and torch.isfinite(t_hat).all()):
        return _Measured(False, math.nan, math.nan, math.nan)
    sums = _Sums()
    sums.update(t, t_hat)
    live = len(code.indices.unique()) / sae.d_sae
    return _Measured(True, sums.explained_variance(), len(code.indices) / len(x), live)


def _explained(sae: SAE, x: Float[Tensor, "n d_in"], t: Float[Tensor, "n d_out"]) -> float:
    if not len(x):
        return -math.inf
    return _of_sums([(t, predicted(sae, x, sae.encode_sparse(x)))])


def _of_sums(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    sums = _Sums()
    for t, t_hat in pairs:
        sums.update(t, t_hat)
    return sums.explained_variance()


def _treated(sae: SAE, tokens: Tokens, place: Place) -> Iterator[Cause]:
    """At the same place, with what may have been done to activations in training."""
    x, t = (tokens.streams[site] for site in place)
    yield Cause(
        "with activations scaled to a mean length of sqrt(d)",
        "the scale of the activations that it was trained on seems to be missing; give it with --norm, or fold it into "
        "the weights",
        _explained(sae, _scaled(x), _scaled(t)),
    )
    yield Cause(
        "with activations centred token by token",
        "it was probably trained in TransformerLens on a model whose residual stream is centred; fold that into its "
        "weights, or train it on activations as the model has them",
        _explained(sae, _centred(x), _centred(t)),
    )
    later = ~tokens.first.to(x.device)
    yield Cause(
        "without the first token of each sequence",
        "it was probably trained without these tokens, or on sequences that begin with a special one; compare it in "
        "a suite whose text does",
        _explained(sae, x[later], t[later]),
    )


def _rescaled(t: Float[Tensor, "n d_out"], t_hat: Float[Tensor, "n d_out"]) -> list[Cause]:
    """Predictions times one number about their mean. None where they hardly vary, or would have to be turned around."""
    exact, guess = t.double(), t_hat.double()
    guess = guess - guess.mean(0)
    square, product = float(guess.square().sum()), float((exact * guess).sum())
    if not (0 < square < math.inf and 0 < product < math.inf):
        return []
    factor = product / square
    found = _of_sums([(exact, exact.mean(0) + factor * guess)])
    if 1 / _SAME_LENGTH < factor < _SAME_LENGTH:
        return [
            Cause(
                "with a constant added to its predictions",
                "they are away by a constant; a bias of its decoder, or a mean that was taken off in training, seems "
                "to be missing",
                found,
            )
        ]
    too = f"{1 / factor:.1f} times too large" if factor < 1 else f"{factor:.1f} times too small"
    return [
        Cause(
            f"with its predictions times {factor:.2g} about their mean",
            f"its predictions are {too}: times {factor:.2g} they explain {found:.2g}; likely a normalisation of its "
            "training is not folded into its weights; give it with --norm, or fold it in",
            found,
        )
    ]


def _elsewhere(sae: SAE, read: Read, places: Sequence[Place]) -> Iterator[Cause]:
    sums = {place: _Sums() for place in places}
    sites = list(dict.fromkeys(site for place in places for site in place))
    for tokens in read(sites) if sites else ():
        for site in dict.fromkeys(site for site, _ in places):
            x = tokens.streams[site]
            t_hat = predicted(sae, x, sae.encode_sparse(x))
            for place in places:
                if place[0] == site:
                    sums[place].update(tokens.streams[place[1]], t_hat)
    for place, of_place in sums.items():
        yield Cause(
            f"at {where(*place)}",
            "it was probably trained there",
            of_place.explained_variance(),
        )


def _scaled(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    length = torch.linalg.vector_norm(x, dim=-1).mean()
    factor: Tensor = math.sqrt(x.shape[1]) / length.clamp_min(torch.finfo(x.dtype).tiny)
    return x * factor


def _centred(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x - x.mean(-1, keepdim=True)


def _decoder_norms(sae: SAE) -> tuple[float, float, float] | None:
    W_dec = getattr(sae, "W_dec", None)
    if W_dec is None:
        return None
    norms = torch.linalg.vector_norm(W_dec.float(), dim=-1)
    return float(norms.min()), float(norms.median()), float(norms.max())


def _whole(parts: Iterator[Tokens]) -> Tokens:
    found = list(parts)
    streams = {s: torch.cat([part.streams[s] for part in found]) for s in found[0].streams}
    return Tokens(streams, torch.cat([part.first for part in found]))
