"""The nouns of the benchmark. Everything else in the package is a verb on these.

Dimensions: n tokens in a batch, d_in and d_out widths of the sites an SAE reads and predicts (equal
but for transcoders), d_sae number of latents, nnz active latents of all tokens of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

Split = Literal["train", "eval"]


class Skip(Exception):
    """An eval does not apply to this SAE; the message says why and is shown in the report."""


@dataclass(frozen=True)
class Site:
    """Where activations are read: a stream of one block, or the input or output of a named module.

    `stream` is one of resid_pre, resid_mid, resid_post, attn_z (all heads' outputs, before they are mixed), attn_out,
    mlp_in, mlp_out, mlp_hidden, with the `layer` counted from 0; or a module path of the model, or of the base model
    without its head, followed by `.input` or `.output`, with `layer` None.
    """

    stream: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.stream if self.layer is None else f"{self.layer}.{self.stream}"


class SparseCode(NamedTuple):
    """The active latents of n tokens, token after token (compressed sparse rows).

    Token i owns `indices[offsets[i]:offsets[i + 1]]`, ascending, and the values beside them; no value is zero.
    """

    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    offsets: Int[Tensor, " n_plus_1"]


@runtime_checkable
class SAE(Protocol):
    """Anything that encodes activations into latents and decodes them, on raw activations.

    Where an architecture has them, it also carries `W_enc [d_in d_sae]`, `W_dec [d_sae d_out]` and
    `b_dec [d_out]`; evals that need these raise `Skip` when they are missing. One whose prediction has a part that
    follows from x without the latents, such as the affine path of a skip transcoder, carries `beside(x) [n d_out]`,
    which is added to what it decodes, or gives None.
    """

    d_in: int
    d_sae: int

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]: ...
    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_out"]: ...
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCode: ...
    def decode_sparse(self, code: SparseCode) -> Float[Tensor, "n d_out"]: ...


class Truth(NamedTuple):
    """The features that activations are made of, where somebody knows them: x = a D + b, most of a zero."""

    directions: Float[Tensor, "n_features d"]
    """D: unit rows, more of them than dimensions; features that fire often come first."""
    offset: Float[Tensor, " d"]
    """b."""
    mean_magnitudes: Float[Tensor, " n_features"]
    """Of a feature where it fires."""
    parents: Int[Tensor, " n_features"]
    """A feature is silent where its parent is; -1: it has none."""
    depths: Int[Tensor, " n_features"]
    """Generation below the root of its tree, whose own is 0; -1: it is in no tree."""


class Outcome(NamedTuple):
    """What the language model predicts at the scored positions when a stream is replaced.

    A position is scored when its own token is replaced and the next token of its sequence is not a
    special one. `m` scored positions, in the order of the batch.
    """

    loss: Float[Tensor, " m"]
    """Next-token cross-entropy, nats."""
    kl: Float[Tensor, " m"]
    """KL(p_clean || p_replaced), nats."""
    same_top1: Bool[Tensor, " m"]
    """Whether the likeliest next token is that of the clean model."""


class References(NamedTuple):
    """Next-token cross-entropies, nats, of the m scored positions: nothing here depends on an SAE."""

    clean: Float[Tensor, " m"]
    zero: Float[Tensor, " m"]
    """The same positions with the stream replaced by zeros."""
    mean: Float[Tensor, " m"]
    """The same positions with the stream replaced by its mean over the evaluation tokens."""


@runtime_checkable
class Batch(Protocol):
    """Some whole sequences of the evaluation text at one site, special tokens left out."""

    x: Float[Tensor, "n d_in"]
    """Activations that an SAE reads, in float32."""
    sequence: Int[Tensor, " n"]
    """Number of the sequence, from 0 over the whole evaluation text, that each token is from."""
    scored_sequence: Int[Tensor, " m"]
    """The same for the scored positions of `Outcome` and `References`."""

    @property
    def target(self) -> Float[Tensor, "n d_out"]:
        """What an SAE is to give back: `x`, but for transcoders."""
        ...

    @property
    def features(self) -> SparseCode | None:
        """The true features of each token with their magnitudes; None where nobody knows them."""
        ...

    def references(self) -> References: ...
    def outcome(self, replacement: Float[Tensor, "n d_out"]) -> Outcome:
        """Resumes the language model at the site, with the n tokens of `target` replaced."""
        ...


class Metric(NamedTuple):
    """What a number means. Direction, unit and statistic are declared here and nowhere else."""

    name: str
    best: Literal["min", "max"] | None
    unit: Literal["sequence", "latent", "dataset", "feature"]
    """What intervals and paired tests resample; of sequences, the documents that they were cut from. Every sequence of
    the evaluation text is a unit, in order, unless `Score.ids` says their numbers."""
    doc: str
    statistic: Literal["ratio", "median", "q05", "q95"] = "ratio"
    """How units become the value: sum(num) / sum(den), or a quantile of num over units with den > 0."""
    ends: tuple[float, float] | None = None
    """The value of an SAE that is worth nothing and that of a perfect one, where the metric has such; hypervolumes
    are measured between them."""


class Score(NamedTuple):
    """One metric of one SAE, unit by unit; `Metric.statistic` says how units become the value."""

    metric: str
    num: np.ndarray
    den: np.ndarray
    n: int
    """How many tokens (or latents, texts ...) lie behind it."""
    reference: float | None = None
    """A value to read beside it, such as that of random directions or a bound; the metric's doc says which."""
    ids: Sequence[str] | None = None
    """Names of the units where they have some; None numbers them from 0."""
    clusters: Sequence[str] | None = None
    """What each unit is from, where several are from one source and so alike; None where each stands for itself."""


class Omitted(NamedTuple):
    """What a run leaves out of its scores: a metric, a dataset, some rows of one."""

    what: str
    reason: str


class Seen(NamedTuple):
    """One batch as one SAE sees it: encoded and decoded once, for all evals."""

    batch: Batch
    code: SparseCode
    x_hat: Float[Tensor, "n d_out"]
    outcome: Outcome | None
    """Of the language model with `x_hat` in place; None where no eval of the run asks for it."""


@runtime_checkable
class Tally(Protocol):
    """The running sums of one eval on one SAE."""

    def update(self, seen: Seen) -> None: ...
    def scores(self) -> Sequence[Score | Omitted]: ...


@dataclass(frozen=True)
class Eval(ABC):
    """A frozen dataclass whose fields are its parameters: a `StreamEval`, a `TextEval` or a `SeedEval`."""

    version: ClassVar[int]
    metrics: ClassVar[tuple[Metric, ...]]

    def parameters(self) -> "Spec":
        """What tells results apart: no path of this machine."""
        return asdict(self)


@dataclass(frozen=True)
class StreamEval(Eval):
    """Looks at the suite's evaluation text, which all evals of this kind read together."""

    needs_outcome: ClassVar[bool] = False
    """Whether batches must come with the language model's outcome."""

    @abstractmethod
    def start(self, sae: SAE, facts: "Facts") -> Tally:
        """Sums at zero for one SAE. Raises `Skip` where the eval does not apply to it."""


class Excerpt(NamedTuple):
    """Some tokens, special ones included, and at which of them activations are wanted."""

    ids: Int[np.ndarray, " length"]
    wanted: Int[np.ndarray, " w"]
    """Positions, ascending, none twice."""


class KnownTokens(NamedTuple):
    """Some tokens of a synthetic world, with what they are made of."""

    rows: Int[np.ndarray, "rows length"]
    features: SparseCode
    """Of all tokens, row after row, on the CPU."""


@runtime_checkable
class Lab(Protocol):
    """A language model, or a synthetic world, to which an eval brings its own text."""

    identity: "Spec"
    tokenizer: Any
    """A fast tokenizer of transformers; a world has none."""
    longest: int
    """Tokens of an excerpt, at the most."""
    folder: Path
    """Relative paths in an eval's parameters are meant from here."""

    @property
    def truth(self) -> Truth | None:
        """What the activations of a world are made of; None where nobody knows, as in a language model."""
        ...

    def known_tokens(self, seed: int, n: int) -> KnownTokens:
        """About n tokens of a world that are in no text of training or evaluation."""
        ...

    def width(self, site: Site) -> int: ...
    def activations(self, site: Site, excerpts: Sequence[Excerpt]) -> Float[Tensor, "n d"]:
        """At the wanted positions, excerpt after excerpt, on the CPU in the model's dtype; read once and kept on disk.

        Excerpts of about the same length should stand together.
        """
        ...

    def kept(self, spec: "Spec", compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was computed before for the same model and spec, or is computed now and kept."""
        ...


@runtime_checkable
class Reading(Protocol):
    """The own text of an eval, read and split but not yet seen by the model."""

    @property
    def fingerprint(self) -> str:
        """Hash of all of its content."""
        ...


@dataclass(frozen=True)
class TextEval(Eval):
    """Brings its own text. What does not depend on the SAE is computed once for a site."""

    codes_alone: ClassVar[bool] = False
    """Whether it looks at nothing but codes, so that an SAE with another's codes has the other's scores."""

    def filled_in(self, synthetic: bool) -> "TextEval":  # noqa: ARG002  (what others decide by it)
        """With what was left to the kind of model: `synthetic` where that is a world of known features."""
        return self

    @abstractmethod
    def read(self, lab: Lab) -> Reading:
        """Without running the model. Raises `UserError` where nothing can be read at all."""

    @abstractmethod
    def prepare(self, lab: Lab, reading: Any, site: Site) -> Any:
        """The model's part, for all SAEs that read this site."""

    @abstractmethod
    def scores(self, sae: SAE, prepared: Any, shuffled: bool) -> Sequence[Score | Omitted]:
        """Of one SAE. `shuffled`: labels are dealt out anew before anything is learned from them, as a control.

        Raises `Skip` where the eval does not apply.
        """


class Seeded(NamedTuple):
    """One of several SAEs that differ in their seed alone."""

    sae: SAE
    density: Float[np.ndarray, " d_sae"]
    """Firing rate of each latent on tokens that are the same for all seeds."""
    n_tokens: int
    """How many these are."""


@dataclass(frozen=True)
class SeedEval(Eval):
    """Compares an SAE that the suite trains with those that differ from it in their seed alone."""

    tokens: int = 131_072
    """The first of the evaluation text, all where it has fewer: firing rates are counted on these."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; expected 1 or more")

    @abstractmethod
    def scores(self, one: Seeded, others: Sequence[Seeded]) -> Sequence[Score | Omitted]:
        """Of one SAE beside one or more others. Raises `Skip` where the eval does not apply."""


class Facts(NamedTuple):
    """What is known of a site's evaluation text before any SAE is looked at."""

    site: Site
    """What the SAE reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""
    n_sequences: int
    n_tokens: int
    mean: Float[Tensor, " d_out"]
    """Mean activation of the predicted site over the evaluation tokens, float64."""
    truth: Truth | None = None
    """What the activations are made of; None where nobody knows, as in a language model."""


Spec = dict[str, Any]
