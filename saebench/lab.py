"""A language model, or a synthetic world, to which evals bring their own text (`types.Lab`).

Texts of different length go through the model side by side, filled up at their ends: a causal model sees nothing of
what comes after a token, so that the filling changes nothing before it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saebench.synthetic import Subject, SyntheticSubject
from saebench.types import Excerpt, KnownTokens, Site, SparseCode, Spec, Truth

LONGEST = 1024
"""Tokens of an excerpt, also where the model has positions for more."""


@final
class ModelLab:
    def __init__(self, subject: Subject, tokenizer: Any, folder: Path) -> None:
        self.subject, self.tokenizer, self.folder = subject, tokenizer, folder
        self.identity = subject.identity
        self.longest = min(LONGEST, subject.longest or LONGEST)

    @property
    def truth(self) -> Truth | None:
        return self.subject.truth if isinstance(self.subject, SyntheticSubject) else None

    def known_tokens(self, seed: int, n: int) -> KnownTokens:
        assert isinstance(self.subject, SyntheticSubject), "asked of a lab that has a truth"
        rows = self.subject.task_rows(seed, n)
        features = self.subject.sample(torch.from_numpy(rows)).features
        return KnownTokens(rows.astype(np.int64), SparseCode(*(part.cpu() for part in features)))

    def width(self, site: Site) -> int:
        return self.subject.width(site)

    def activations(self, site: Site, excerpts: Sequence[Excerpt]) -> Float[Tensor, "n d"]:
        """At the wanted positions, excerpt after excerpt, on the CPU in the model's dtype."""
        spec = self.subject.numerics(site) | {
            "kind": "excerpts",
            "excerpts": _fingerprint(excerpts),
            "batch_tokens": self._batch_tokens,
        }
        shape = (sum(len(e.wanted) for e in excerpts), self.subject.width(site))
        key = (spec, shape, self.subject.dtype)
        cache = self.subject.cache
        if (kept := cache.array(*key)) is not None:
            return kept
        with cache.writing(*key) as writer:
            if writer is not None:
                for piece in self._read(site, excerpts):
                    writer.append(piece)
        if (kept := cache.array(*key)) is not None:
            return kept
        return torch.cat([torch.empty(0, shape[1], dtype=key[2]), *self._read(site, excerpts)])

    def kept(self, spec: Spec, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        whole = {
            "kind": "kept",
            "of": spec,
            "model": self.identity,
            "dtype": str(self.subject.dtype),
        }
        found = self.subject.cache.tensors(whole)
        if found is None:
            found = compute()
            self.subject.cache.keep_tensors(whole, found)
        return found

    @property
    def _batch_tokens(self) -> int:
        return self.subject.batch_rows * self.subject.tokens.context

    def _read(self, site: Site, excerpts: Sequence[Excerpt]) -> Iterator[Float[Tensor, "w d"]]:
        for batch in _batches(excerpts, self._batch_tokens):
            stream = self.subject.read([site], _filled(batch))[site]
            rows = np.repeat(np.arange(len(batch)), [len(e.wanted) for e in batch])
            columns = np.concatenate([e.wanted for e in batch])
            yield stream[torch.from_numpy(rows), torch.from_numpy(columns)].cpu()


def _batches(excerpts: Sequence[Excerpt], tokens: int) -> Iterator[Sequence[Excerpt]]:
    """Neighbours whose filled rows hold so many tokens together, or one excerpt that alone holds more."""
    start = 0
    while start < len(excerpts):
        stop, longest = start, 0
        while stop < len(excerpts):
            longest = max(longest, len(excerpts[stop].ids))
            if stop > start and longest * (stop + 1 - start) > tokens:
                break
            stop += 1
        yield excerpts[start:stop]
        start = stop


def _filled(excerpts: Sequence[Excerpt]) -> Tensor:
    """Rows of one length; the last token of each is repeated up to it."""
    longest = max(len(e.ids) for e in excerpts)
    rows = [np.pad(e.ids.astype(np.int64), (0, longest - len(e.ids)), "edge") for e in excerpts]
    return torch.from_numpy(np.stack(rows))


def _fingerprint(excerpts: Sequence[Excerpt]) -> str:
    digest = hashlib.sha256()
    for part in ("ids", "wanted"):
        arrays = [getattr(e, part) for e in excerpts]
        digest.update(np.array([len(a) for a in arrays], dtype="<i8").tobytes())
        digest.update(np.concatenate([np.empty(0, "<i8"), *arrays]).astype("<i8").tobytes())
    return digest.hexdigest()
