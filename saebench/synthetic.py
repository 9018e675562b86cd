"""A subject without a language model: activations of a world whose true features are known (`worlds`).

Its token ids number tokens, and the first id of a row is the seed of the whole row. So a text is a range of numbers,
any row can be had again at any time, and rows of training, evaluation and labelled tasks never meet. Everything that
trains or scores on the activations of a language model works here as it is, but for what asks how well the language
model predicts with an activation replaced: there is none.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import NamedTuple, NoReturn, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saebench import sparse
from saebench.cache import Cache
from saebench.errors import UserError
from saebench.progress import say
from saebench.sites import nearest
from saebench.subject import LanguageModel
from saebench.text import TextTokens
from saebench.types import Facts, Outcome, References, Site, SparseCode, Spec, Truth
from saebench.worlds import LARGE, SMALL, Sampled, World, separated

WORLDS = {"builtin:synthetic-small": SMALL, "builtin:synthetic-16k": LARGE}
"""Recipes by what a suite calls them."""
SITE = Site("resid_post", 0)
"""The only one that there is."""

_VERSION = 1
"""Raised by every change that can move an activation."""
_EVALUATION, _TASKS = 2**30, 3 * 2**29
"""Where numbers of tokens begin that are not trained on; those of training begin at 0."""
_MOST_EVALUATED = 2**24
"""Tokens of one evaluation text: so far apart are the texts of two seeds."""
_MOST_SEEDS = (_TASKS - _EVALUATION) // _MOST_EVALUATED
_MOST_TASKED = 2**17
"""Tokens to ask about for one seed."""
_MOST_TASK_SEEDS = (2**31 - _TASKS) // _MOST_TASKED
_TASK_ROW = 128
_BATCH_NUMBERS = 2**23
"""Magnitudes of the features of a batch, at the most."""
_MULTIPLIER = 0x1E3779B97F4A7C15
"""Odd, with bits set all over."""
_QUICK = 2**20
"""Numbers in directions that are made at once."""
_KEPT_BYTES = 2**30
"""Up to which the evaluation text is kept in memory."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedWorld(NamedTuple):
    """The place of a language model with its tokenizer."""

    world: World
    identity: Spec
    """`id`, `revision` and `dtype`."""


def load_world(name: str, dtype: str, device: str, cache: Cache) -> LoadedWorld:
    """One of `WORLDS`; its directions, which take a minute where there are many, are kept. Raises `UserError` where
    there is none of that name.
    """
    if name not in WORLDS:
        raise UserError(
            f"there is no synthetic world {name!r}{nearest(name, WORLDS)}; expected one of {', '.join(WORLDS)}"
        )
    said = json.dumps(asdict(WORLDS[name]) | {"version": _VERSION}, sort_keys=True)
    revision = f"sha256:{hashlib.sha256(said.encode()).hexdigest()}"
    identity = {"id": name, "revision": revision, "dtype": dtype}

    def separate(directions: Float[Tensor, "n_features d"], steps: int) -> Tensor:
        # What rounds otherwise has its own.
        numerics = [torch.__version__, torch.device(device).type, torch.get_num_threads()]
        spec: Spec = {"kind": "directions", "revision": revision, "numerics": numerics}
        found = cache.tensors(spec)
        if found is None:
            if directions.numel() > _QUICK:
                say(f"making {len(directions):,} directions of {name}, which takes a minute")
            found = {"directions": separated(directions, steps)}
            cache.keep_tensors(spec, found)
        return found["directions"].to(device)

    return LoadedWorld(World(WORLDS[name], device, separate), identity)


def world_text(context: int, train_tokens: int, eval_tokens: int, eval_seed: int) -> TextTokens:
    """Rows of numbers; every row is a document of its own, since no token is like its neighbours."""
    if eval_tokens > _MOST_EVALUATED or eval_seed >= _MOST_SEEDS:
        raise UserError(
            f"eval_tokens is {eval_tokens:,} and eval_seed {eval_seed}; a synthetic world has at most "
            f"{_MOST_EVALUATED:,} evaluation tokens for each of the seeds 0 to {_MOST_SEEDS - 1}"
        )
    if train_tokens > _EVALUATION:
        raise UserError(
            f"train_tokens is {train_tokens:,}; a synthetic world has at most {_EVALUATION:,}"
        )
    train = rows_from(0, train_tokens, context)
    evaluation = rows_from(_EVALUATION + eval_seed * _MOST_EVALUATED, eval_tokens, context)
    return TextTokens(
        train=train,
        evaluation=evaluation,
        fingerprint_train=f"synthetic:{context}:0+{train.size}",
        fingerprint_eval=f"synthetic:{context}:{evaluation[0, 0]}+{evaluation.size}",
        special_ids=frozenset(),
        context=context,
        documents=np.arange(len(evaluation)),
    )


def rows_from(first: int, tokens: int, context: int) -> Int[np.ndarray, "rows context"]:
    """Just enough whole rows, whose tokens are numbered from `first` on."""
    n_rows = -(-tokens // context)
    return np.arange(first, first + n_rows * context, dtype=np.int32).reshape(n_rows, context)


@final
class SyntheticSubject:
    """What `LanguageModel` is to a language model, to a world."""

    predicts = False
    """No token follows from another."""

    def __init__(
        self, world: World, tokens: TextTokens, identity: Spec, cache: Cache, batch_rows: int
    ) -> None:
        self.world, self.tokens, self.identity = world, tokens, identity
        self.cache, self.batch_rows = cache, batch_rows
        self.device, self.dtype = torch.device(world.device), _DTYPES[identity["dtype"]]
        self.train_rows, self.eval_rows = map(torch.from_numpy, (tokens.train, tokens.evaluation))
        self.train_special = torch.zeros_like(self.train_rows, dtype=torch.bool)
        self.eval_special = torch.zeros_like(self.eval_rows, dtype=torch.bool)
        self._kept: list[Sampled] | None = None
        self._mean: Float[Tensor, " d"] | None = None
        self._known = _Known()

    n_layers = 1
    longest = None

    def check_site(self, site: Site) -> None:
        """Raises `UserError` where it is another than the one that there is."""
        if site not in (SITE, Site("resid_pre", 0)):
            raise UserError(
                f"{self.identity['id']} has no site {site}; it has {SITE}, where its activations are"
            )

    def canonical(self, site: Site) -> Site:
        """Nothing lies between what enters and what leaves its only block."""
        self.check_site(site)
        return SITE

    def layer(self, site: Site) -> int:
        self.check_site(site)
        return 0

    def width(self, site: Site) -> int:
        self.check_site(site)
        return self.world.recipe.d

    def read(
        self, sites: Sequence[Site], rows: Int[Tensor, "rows context"]
    ) -> dict[Site, Float[Tensor, "rows context d"]]:
        """Activations of whole rows."""
        for site in sites:
            self.check_site(site)
        x = torch.stack([self._row(row).x for row in rows]).to(self.dtype)
        return dict.fromkeys(sites, x)

    def sample(self, rows: Int[Tensor, "rows context"]) -> Sampled:
        """Row after row, as an SAE sees them; from now on `features_of` knows these tokens."""
        found = [self._as_read(self._row(row)) for row in rows]
        for row, part in zip(rows, found, strict=True):
            self._known.add(int(row[0]), part)
        return Sampled(
            torch.cat([part.x for part in found]),
            sparse.concatenate([part.features for part in found]),
        )

    def features_of(self, x: Float[Tensor, "n d"]) -> SparseCode:
        """The true features of tokens that were sampled before, by their activations."""
        return self._known.find(x)

    def task_rows(self, seed: int, tokens: int) -> Int[np.ndarray, "rows context"]:
        """To ask questions about: of no text of training or evaluation, and the same whatever the suite's context."""
        if tokens > _MOST_TASKED or not 0 <= seed < _MOST_TASK_SEEDS:
            raise UserError(
                f"the seed is {seed}, for {tokens:,} tokens; a synthetic world has at most {_MOST_TASKED:,} tokens to "
                f"ask about for each of the seeds 0 to {_MOST_TASK_SEEDS - 1:,}"
            )
        return rows_from(_TASKS + seed * _MOST_TASKED, tokens, _TASK_ROW)

    def passage(self, *_: object) -> NoReturn:
        raise UserError(
            f"{self.identity['id']} has no language model to train through; drop the variants that are trained end "
            "to end"
        )

    def facts(self, site: Site, predicted: Site) -> Facts:
        """What is known of the evaluation text before any SAE is looked at."""
        self.prepare([site, predicted])
        assert self._mean is not None, "prepared"
        n = len(self.eval_rows)
        return Facts(site, predicted, n, self.n_tokens, self._mean, self.truth)

    @cached_property
    def truth(self) -> Truth:
        world = self.world
        return Truth(
            world.directions, world.offset, world.mean_magnitudes, world.parents, world.depths
        )

    @property
    def n_tokens(self) -> int:
        """Of the evaluation text."""
        return self.eval_rows.numel()

    def prepare(self, sites: Sequence[Site]) -> None:
        """Samples the evaluation text, and keeps it where it is not too large."""
        for site in sites:
            self.check_site(site)
        if self._mean is not None:
            return
        exact = torch.device("cpu") if self.device.type == "mps" else self.device
        total = torch.zeros(self.world.recipe.d, dtype=torch.float64, device=exact)
        size = 4 * self.n_tokens * self.world.recipe.d
        kept: list[Sampled] | None = [] if size <= _KEPT_BYTES else None
        for _, part in self._eval_parts():
            total += part.x.to(exact).double().sum(0)
            if kept is not None:
                kept.append(part)
        self._kept, self._mean = kept, total / self.n_tokens

    def evaluation(self, site: Site, predicted: Site | None = None) -> Iterator["WorldBatch"]:
        """The evaluation text in whole rows, always the same batches in the same order."""
        self.prepare([site, predicted or site])
        starts = range(0, len(self.eval_rows), self.batch_rows)
        kept = self._eval_parts() if self._kept is None else zip(starts, self._kept, strict=True)
        for start, part in kept:
            yield WorldBatch(part, start, self.tokens.context)

    def scored_before(self, _row: int) -> int:
        """No position is."""
        return 0

    def numerics(self, site: Site) -> Spec:
        """What determines activations, but for the text."""
        return {
            "site": str(site),
            "model": self.identity,
            "device": self.device.type,
            "versions": [torch.__version__],
            "context": self.tokens.context,
            "world": self.world.fingerprint,
        }

    def parameters_below(self, site: Site) -> int:
        """What sampling a token costs, as weights that would be multiplied with: those of the directions."""
        self.check_site(site)
        return self.world.directions.numel()

    def parameters_above(self, site: Site) -> int:
        self.check_site(site)
        return 0

    def memory(self) -> dict[str, int]:
        """Bytes on the device."""
        held = (self.world.directions, self.world.factors)
        n_features = self.world.recipe.n_features
        return {
            "synthetic world": sum(t.numel() * t.element_size() for t in held),
            "its working memory": 4 * 4 * self.batch_rows * self.tokens.context * n_features,
        }

    @property
    def n_parameters(self) -> int:
        return self.world.directions.numel()

    def on_random_text(self, rows: int, context: int) -> "SyntheticSubject":
        """The same, with another text of this shape, for measurements of its speed."""
        tokens = world_text(context, rows * context, rows * context, 0)
        return SyntheticSubject(self.world, tokens, self.identity, Cache(None), rows)

    def _eval_parts(self) -> Iterator[tuple[int, Sampled]]:
        for start in range(0, len(self.eval_rows), self.batch_rows):
            yield start, self.sample(self.eval_rows[start : start + self.batch_rows])

    def _as_read(self, part: Sampled) -> Sampled:
        """Rounded as a model of this precision would have it."""
        return part._replace(x=part.x.to(self.dtype).float())

    def _row(self, row: Int[Tensor, " context"]) -> Sampled:
        return self.world.sample(int(row[0]), len(row))


Subject = LanguageModel | SyntheticSubject


def world_rows_per_batch(world: World, context: int) -> int:
    """How many rows are sampled at once."""
    return max(1, _BATCH_NUMBERS // (world.recipe.n_features * context))


@final
class WorldBatch:
    """Some rows of the evaluation text (`types.Batch`)."""

    def __init__(self, part: Sampled, start: int, context: int) -> None:
        self.x: Float[Tensor, "n d"] = part.x
        self.features: SparseCode = part.features
        self.sequence: Int[Tensor, " n"] = (
            torch.arange(len(part.x), device=part.x.device) // context + start
        )
        self.scored_sequence: Int[Tensor, " m"] = self.sequence[:0]

    @property
    def target(self) -> Float[Tensor, "n d"]:
        return self.x

    def references(self) -> References:
        raise AssertionError("no eval that asks for a language model is started here")

    def outcome(self, replacement: Float[Tensor, "n d"]) -> Outcome:  # noqa: ARG002
        raise AssertionError("no eval that asks for a language model is started here")


class _Known:
    """Tokens by their activations: no two are alike, but those on which nothing fires."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Int[Tensor, " n"], SparseCode]] = {}
        self._sorted: tuple[Tensor, Tensor, SparseCode] | None = None

    def add(self, first: int, row: Sampled) -> None:
        """A row by the number of its first token."""
        if first not in self._rows:
            self._rows[first] = (_key(row.x), row.features)
            self._sorted = None

    def find(self, x: Float[Tensor, "n d"]) -> SparseCode:
        """Raises `ValueError` where a token was never sampled."""
        if not self._rows:
            raise ValueError("no token was sampled yet")
        if self._sorted is None:
            keys, order = torch.cat([keys for keys, _ in self._rows.values()]).sort()
            features = sparse.concatenate([features for _, features in self._rows.values()])
            self._sorted = (keys, order, features)
        keys, order, features = self._sorted
        wanted = _key(x)
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        if not torch.equal(keys[place], wanted):
            raise ValueError("some of these activations are of no token that was sampled")
        return sparse.take(features, order[place])


def _key(x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """64 bits of hash of each row's bits."""
    bits = x.float().contiguous().view(torch.int32).long()
    odd = 2 * torch.arange(1, x.shape[1] + 1, device=x.device) + 1
    mixed = bits * odd * _MULTIPLIER
    return (mixed ^ (mixed >> 29)).sum(-1)
