"""A suite file, read strictly: an unknown key, name or value is refused with its line and the nearest valid choice.

`load` gives a `Suite`; `Suite.trained()` expands its sweeps into one `TrainedSAE` each. What a suite asks for is
known without a model; what determines a result besides (revisions, fingerprints) is added by
the trainer and the runner.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from saebench import registry, strict
from saebench.errors import UserError
from saebench.sites import parse_site
from saebench.types import Site, Spec, TextEval

SYNTHETIC = "builtin:synthetic"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_MOST_CHARACTERS = 2**18
_MOST_SAES = 1_000
_MOST_VALUES = 10_000
"""In one suite file, aliases written out: a few lines of aliases of aliases can stand for billions."""


class _Wrong(ValueError):
    """Something is wrong with a field that lies below the place where pydantic looks."""

    def __init__(self, message: str, *field: str | int) -> None:
        super().__init__(message)
        self.field = field


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _known_name(kind: str, name: Any) -> str:
    names = registry.names(kind)
    if name not in names:
        raise ValueError(f"there is no {kind[:-1]} {_nearest(str(name), names)}")
    return str(name)


def _site(entry: Any) -> Any:
    if not isinstance(entry, str | dict):
        raise ValueError(
            f"got {_shown(entry)}; expected a site such as {{layer: 2, stream: resid_post}}"
        )
    return _explained(partial(parse_site, entry))


def _plugin(kind: str) -> BeforeValidator:
    return BeforeValidator(
        lambda entry: plugin(kind, entry), json_schema_input_type=str | dict[str, Any]
    )


def _sae(entry: Any) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"got {_shown(entry)}; expected {{variant: ...}} or {{checkpoint: ...}}")
    if ("variant" in entry) == ("checkpoint" in entry):
        keys = ", ".join(map(str, entry))
        raise ValueError(f"got the keys {keys}; expected one of variant and checkpoint")
    return entry


def _kind_of_sae(entry: Any) -> str:
    # Asked of what the file says, and again of the model made of it when that is written down.
    return "Trained" if "variant" in dict(entry) else "Checkpoint"


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


class Plugin(NamedTuple):
    """An eval, control or report with its parameters filled in."""

    name: str
    value: Any


class Model(_Strict):
    """Any causal language model of transformers. Exactly one of `id` and `config` is given."""

    id: str | None = None
    """`builtin:pylm`, a Hub id, a local folder (relative to the suite file), or `builtin:synthetic-small` and
    `builtin:synthetic-16k`: activations whose true features are known, without a language model."""
    revision: str | None = None
    """Hub commit, tag or branch; what a branch stood for is written into every result."""
    config: dict[str, Any] | str | None = None
    """An architecture alone: what a config.json of transformers says, or the path of one (relative to the suite
    file). Its weights are random and seeded, so that a suite can be rehearsed without a download."""
    weights: Literal["random"] | None = None
    """Has to be said beside `config`."""
    tokenizer: str | None = None
    """Beside `config`: `builtin:pylm` (where nothing is said), a Hub id, or a local folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @property
    def synthetic(self) -> bool:
        """Whether it is no language model, but a world of known features."""
        return self.id is not None and self.id.startswith(SYNTHETIC)

    @model_validator(mode="after")
    def _one_model(self) -> "Model":
        given = [n for n in ("id", "config") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of id and config; got {' and '.join(given) or 'none'}"
            )
        others = {"id": ("weights", "tokenizer"), "config": ("revision",)}[given[0]]
        for name in others:
            if getattr(self, name) is not None:
                raise _Wrong(f"{name} has no meaning beside {given[0]}; remove it", name)
        if self.config is not None and self.weights is None:
            raise ValueError("a config has no weights of its own; say `weights: random` beside it")
        if isinstance(self.config, dict) and not isinstance(self.config.get("model_type"), str):
            raise _Wrong(
                "the config has no model_type; expected what a config.json of transformers says, such as "
                "{model_type: gpt_neox, hidden_size: 512, num_hidden_layers: 6}",
                "config",
            )
        return self


class Text(_Strict):
    """Where tokens come from. Exactly one of `source`, `dataset` and `files` is given."""

    source: Literal["builtin:python-stdlib", "builtin:synthetic"] | None = None
    """`builtin:synthetic` goes with a model of that name, and with no other."""
    dataset: str | None = None
    """Hub id of a dataset."""
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = True
    files: str | None = None
    """A path or pattern of .jsonl, .txt or .parquet files, relative to the suite file."""
    field: str | None = None
    """The field (column) with the text, or with ready token ids."""
    context: PositiveInt
    train_tokens: PositiveInt
    eval_tokens: PositiveInt
    eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the documents, by hash, that is kept from training."""
    eval_draws: PositiveInt = 1
    """Into how many texts the documents kept from training are dealt, by hash: none is in two of them."""
    eval_draw: Annotated[int, Field(ge=0)] = 0
    """Which of these texts SAEs are scored on."""
    train_passes: PositiveInt = 1
    """How often the training text may be read again when it is shorter than `train_tokens`."""

    @model_validator(mode="after")
    def _one_source(self) -> "Text":
        given = [n for n in ("source", "dataset", "files") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of source, dataset and files; got {given or 'none'}"
            )
        only = {"dataset": ("config", "split", "revision", "field"), "files": ("field",)}
        allowed = only.get(given[0], ())
        for name in ("config", "split", "revision", "field"):
            if getattr(self, name) is not None and name not in allowed:
                raise ValueError(f"{name} has no meaning beside {given[0]}; remove it")
        if self.eval_draw >= self.eval_draws:
            raise _Wrong(
                f"eval_draw is {self.eval_draw}; expected a number below eval_draws, {self.eval_draws}",
                "eval_draw",
            )
        return self


class TrainingOptions(_Strict):
    """How the one stream of activations is cut and mixed, for all SAEs alike."""

    batch_tokens: PositiveInt = 2048
    buffer_tokens: PositiveInt = 131_072
    """Activations that are shuffled together: a whole number of batches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the batches, and so of the encoder product, which is the only dense one; weights, gradients and the optimiser
    are in float32. bfloat16 is for processors that have it in hardware."""
    snapshots: list[PositiveInt] = []
    """Token counts, ascending, at which every SAE is also kept as it is by then: after the first step that reaches so
    many. No trained weight and no score depends on them."""

    @model_validator(mode="after")
    def _ascending(self) -> "TrainingOptions":
        for i, (before, after) in enumerate(itertools.pairwise(self.snapshots), 1):
            if after <= before:
                raise _Wrong(
                    f"snapshots has {after} after {before}; expected token counts that ascend, such as "
                    f"{sorted(set(self.snapshots))}",
                    "snapshots",
                    i,
                )
        return self

    @model_validator(mode="after")
    def _whole_batches(self) -> "TrainingOptions":
        if self.buffer_tokens % self.batch_tokens:
            nearest = max(1, round(self.buffer_tokens / self.batch_tokens)) * self.batch_tokens
            raise _Wrong(
                f"buffer_tokens is {self.buffer_tokens}; expected a multiple of batch_tokens "
                f"({self.batch_tokens}), such as {nearest}",
                "buffer_tokens",
            )
        return self


def _sweep_of(kind: Any) -> Any:
    """A list of values, or one value by itself."""
    return BeforeValidator(_as_list, json_schema_input_type=kind | list[kind])


_Number = Annotated[float, Field(gt=0)]
_Seed = Annotated[int, Field(ge=0)]


_OneSite = Annotated[
    Site, BeforeValidator(_site, json_schema_input_type=str | dict[str, str | int])
]


class Trained(_Strict):
    """SAEs to train: every list is a sweep. Further keys override fields of the variant's baseline."""

    model_config = ConfigDict(extra="allow", frozen=True)

    variant: str
    width: Annotated[list[PositiveInt], Field(min_length=1), _sweep_of(PositiveInt)]
    l0: Annotated[list[_Number], Field(min_length=1), _sweep_of(_Number)]
    seed: Annotated[list[_Seed], Field(min_length=1), _sweep_of(_Seed)] = [0]
    reads: _OneSite | None = None
    """Of a transcoder: the site that it reads, in place of those of the suite."""
    predicts: _OneSite | None = None
    """Of a transcoder: the site that it predicts."""
    of: str | None = None
    """Of a variant that starts from a trained SAE: that one's variant. Width, L0 and seed are its own."""

    @field_validator("variant")
    @classmethod
    def _known(cls, name: str) -> str:
        return _known_name("variants", name)

    @model_validator(mode="after")
    def _possible(self) -> "Trained":
        for name, choices in (self.model_extra or {}).items():
            if choices == []:
                raise _Wrong(f"{name} is an empty list; give at least one value", name)
        swept = [v for n, v in (self.model_extra or {}).items() if _is_sweep(self.variant, n, v)]
        n_saes = math.prod(map(len, [*swept, self.width, self.l0, self.seed]))
        if n_saes > _MOST_SAES:
            raise _Wrong(f"the lists multiply to {n_saes:,} SAEs; expected at most {_MOST_SAES:,}")
        for overrides in _sweep(self.variant, self.model_extra or {}):
            filled = recipe(self.variant, overrides)
            for width, l0 in itertools.product(self.width, self.l0):
                try:
                    filled.check(width, l0)
                except ValueError as error:
                    raise _Wrong(str(error), "l0") from None
        self._check_sites(registry.get("variants", self.variant))
        return self

    def _check_sites(self, variant: Any) -> None:
        for name in ("reads", "predicts"):
            given = getattr(self, name) is not None
            if given and variant.target != "other":
                raise _Wrong(f"{self.variant} reads and predicts one site; remove {name}", name)
            if not given and variant.target == "other":
                raise _Wrong(f"{self.variant} needs {name}, a site such as 2.mlp_out", name)
        if self.reads is not None and self.reads == self.predicts:
            raise _Wrong(
                f"{self.variant} reads {self.reads} and predicts the same; name another site, or train the variant "
                "that is its activation",
                "predicts",
            )
        if variant.from_parent and self.of is None:
            raise _Wrong(f"{self.variant} needs of, the variant that it starts from", "of")
        if self.of is not None and not variant.from_parent:
            raise _Wrong(f"{self.variant} starts from no other SAE; remove of", "of")


class Checkpoint(_Strict):
    """An SAE somebody has trained."""

    checkpoint: str
    """A path (relative to the suite file), or `org/name@revision/folder` on the Hub."""
    format: str | None = None
    """A module of `loaders/`; where nothing is said, the one that the structure of the files fits."""
    name: Annotated[str, Field(pattern=NAME)]
    site: _OneSite | None = None
    """What it reads, where its files do not say, or have SAEs of several sites."""
    predicts: _OneSite | None = None
    """What it predicts, where that is another site and its files do not say."""
    k: PositiveInt | None = None
    """Active latents per token, where its files do not say."""
    norm: _Number | None = None
    """Mean length of an activation of the text it was trained on, where it takes activations that were scaled by it."""

    @field_validator("format")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return None if name is None else _known_name("loaders", name)


class TrainedSAE(NamedTuple):
    """One SAE that a suite asks to be trained."""

    name: str
    variant: str
    family: str
    """The variant, with the swept options where there are some: what stands together in tables and plots."""
    recipe: Any
    """The variant's dataclass: its baseline with the suite's overrides."""
    width: int
    l0: float
    seed: int
    site: Site
    """What it reads."""
    target: Site
    """What it predicts."""
    of: str | None
    """The variant of the SAE that it starts from."""

    def with_seed(self, seed: int) -> "TrainedSAE":
        """The same recipe, trained anew."""
        start = f"{self.variant}-w{self.width}-l{self.l0:g}-s"
        rest = self.name.removeprefix(f"{start}{self.seed}")
        return self._replace(name=f"{start}{seed}{rest}", seed=seed)


class Suite(_Strict):
    """One suite file."""

    name: Annotated[str, Field(pattern=NAME)]
    model: Model
    sites: Annotated[
        list[_OneSite],
        Field(min_length=1),
    ]
    text: Text
    training: TrainingOptions = TrainingOptions()
    saes: Annotated[
        list[
            Annotated[
                Annotated[Trained, Tag("Trained")] | Annotated[Checkpoint, Tag("Checkpoint")],
                Discriminator(_kind_of_sae),
                BeforeValidator(_sae),
            ]
        ],
        Field(min_length=1),
    ]
    controls: list[Annotated[Plugin, _plugin("controls")]] = []
    evals: Annotated[list[Annotated[Plugin, _plugin("evals")]], Field(min_length=1)]
    reports: list[Annotated[Plugin, _plugin("reports")]] = []

    @field_validator("evals")
    @classmethod
    def _filled_in(cls, evals: list[Plugin], info: Any) -> list[Plugin]:
        """What an eval leaves to the kind of model; no model is there where that is wrong."""
        model: Model | None = info.data.get("model")
        if model is None:
            return evals
        return [
            eval_._replace(value=eval_.value.filled_in(model.synthetic))
            if isinstance(eval_.value, TextEval)
            else eval_
            for eval_ in evals
        ]

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        names = [s.name for s in self.trained()] + [c.name for c in self.checkpoints()]
        if again := twice(names):
            raise _Wrong(f"two SAEs are called {again!r}; each needs a name of its own", "saes")
        for name in names:
            if not re.fullmatch(NAME, name):
                raise _Wrong(f"an SAE would be called {name!r}, which cannot name a file", "saes")
        for kind in ("sites", "controls", "evals", "reports"):
            if again := twice(getattr(self, kind)):
                what = again.name if isinstance(again, Plugin) else again
                raise _Wrong(f"{what} is there twice with the same parameters", kind)
        return self

    @model_validator(mode="after")
    def _parents(self) -> "Suite":
        for sae in self.trained():
            try:
                self.parent(sae)
            except UserError as error:
                raise _Wrong(str(error), "saes") from None
        return self

    @model_validator(mode="after")
    def _measured(self) -> "Suite":
        known = [metric.name for eval_ in self.evals for metric in eval_.value.metrics]
        for number, report in enumerate(self.reports):
            for name in report.value.needs:
                if name.partition("[")[0] not in known:
                    message = f"{report.name} draws a metric that no eval of the suite gives: "
                    raise _Wrong(message + _nearest(name, known), "reports", str(number))
        return self

    @model_validator(mode="after")
    def _labels(self) -> "Suite":
        if not any(isinstance(eval_.value, TextEval) for eval_ in self.evals):
            for number, control in enumerate(self.controls):
                if control.value.shuffled:
                    raise _Wrong(
                        f"{control.name} is scored by evals that learn from labels alone; add one, such as "
                        "sparse_probing, or drop the control",
                        "controls",
                        str(number),
                    )
        return self

    @model_validator(mode="after")
    def _trained_model(self) -> "Suite":
        for number, control in enumerate(self.controls):
            if self.model.config is not None and control.value.untrained_lm:
                raise _Wrong(
                    f"{control.name} is of the model before its training, and this one has random weights "
                    "itself; drop the control",
                    "controls",
                    str(number),
                )
        return self

    @model_validator(mode="after")
    def _synthetic(self) -> "Suite":
        """A world without a language model has a text, a site and SAEs of its own kind."""
        if self.model.synthetic != (self.text.source == SYNTHETIC):
            model = self.model.id or "that of the config"
            raise _Wrong(
                f"the text {SYNTHETIC} goes with the models {SYNTHETIC}-small and {SYNTHETIC}-16k, and these with no "
                f"other text; got the model {model} and the text {self.text.source or 'of a dataset or files'}",
                "text",
                "source",
            )
        if not self.model.synthetic:
            self._needs_no_truth()
            return self
        for number, sae in enumerate(self.saes):
            if isinstance(sae, Trained) and registry.get("variants", sae.variant).end_to_end:
                raise _Wrong(
                    f"{sae.variant} is trained through a language model, and {self.model.id} has none; drop it",
                    "saes",
                    str(number),
                )
        for number, control in enumerate(self.controls):
            if control.value.untrained_lm:
                raise _Wrong(
                    f"{control.name} is of a language model, and {self.model.id} is none; drop the control",
                    "controls",
                    str(number),
                )
        return self

    def _needs_no_truth(self) -> None:
        for number, control in enumerate(self.controls):
            if control.value.needs_truth:
                raise _Wrong(
                    f"{control.name} is made of the true features, and nobody knows those of a language model; drop "
                    f"the control, or name the model {SYNTHETIC}-small or {SYNTHETIC}-16k",
                    "controls",
                    str(number),
                )

    @model_validator(mode="after")
    def _one_batch(self) -> "Suite":
        batch, tokens = self.training.batch_tokens, self.text.train_tokens
        if tokens < batch:
            raise _Wrong(
                f"train_tokens is {tokens}; expected at least one batch, batch_tokens ({batch})",
                "text",
                "train_tokens",
            )
        return self

    @model_validator(mode="after")
    def _snapshots(self) -> "Suite":
        batch, tokens = self.training.batch_tokens, self.text.train_tokens
        reached: dict[int, int] = {}
        for i, wanted in enumerate(self.training.snapshots):
            where = ("training", "snapshots", i)
            if wanted > tokens:
                raise _Wrong(
                    f"snapshots has {wanted}; expected at most train_tokens ({tokens})", *where
                )
            step = step_reaching(wanted, tokens // batch, batch)
            if step in reached:
                raise _Wrong(
                    f"snapshots has {reached[step]} and {wanted}, which the same step of {batch} tokens reaches; "
                    "keep one of them, or lower batch_tokens",
                    *where,
                )
            reached[step] = wanted
        return self

    @model_validator(mode="after")
    def _snapshot_names(self) -> "Suite":
        given = {checkpoint.name for checkpoint in self.checkpoints()}
        for sae, tokens in itertools.product(self.trained(), self.training.snapshots):
            name = snapshot_name(sae.name, tokens)
            if not re.fullmatch(NAME, name):
                raise _Wrong(
                    f"a snapshot would be called {name!r}, which cannot name a file", "saes"
                )
            if name in given:
                raise _Wrong(f"a snapshot and a checkpoint are both called {name!r}", "saes")
        return self

    def trained(self) -> list[TrainedSAE]:
        """Every SAE to train, sweeps expanded, in the order of the file."""
        entries = [entry for entry in self.saes if isinstance(entry, Trained)]
        transcoded = {(e.reads, e.predicts) for e in entries if e.reads is not None}
        return [
            sae._replace(name=sae.name + suffix, site=site, target=target)
            for entry in entries
            for sae in _expand(entry, self.sites[0])
            for site, target, suffix in self._places(entry, len(transcoded) > 1)
        ]

    def _places(self, entry: Trained, several: bool) -> list[tuple[Site, Site, str]]:
        """What the SAEs of an entry read and predict, with what their names say of it."""
        if entry.reads is not None and entry.predicts is not None:
            suffix = f"-{entry.reads}-{entry.predicts}" if several else ""
            return [(entry.reads, entry.predicts, suffix)]
        return [(s, s, f"-{s}" if len(self.sites) > 1 else "") for s in self.sites]

    def parent(self, sae: TrainedSAE) -> TrainedSAE | None:
        """The SAE that this one starts from."""
        if sae.of is None:
            return None
        shape = (sae.of, sae.width, sae.l0, sae.seed, sae.site, sae.target)
        found = [
            other
            for other in self.trained()
            if (other.variant, other.width, other.l0, other.seed, other.site, other.target) == shape
            and other.of is None
        ]
        if len(found) == 1:
            return found[0]
        names = ", ".join(other.name for other in found) or "none"
        raise UserError(
            f"{sae.name} starts from a {sae.of} SAE of width {sae.width}, l0 {sae.l0:g} and seed {sae.seed}; "
            f"the suite trains {names}, and there must be one"
        )

    def all_sites(self) -> list[Site]:
        """Every site that is read or predicted."""
        trained = [site for sae in self.trained() for site in (sae.site, sae.target)]
        return list(dict.fromkeys([*self.sites, *trained]))

    def checkpoints(self) -> list[Checkpoint]:
        return [entry for entry in self.saes if isinstance(entry, Checkpoint)]

    def definition(self) -> Spec:
        """The suite as plain data, for the record beside its results."""
        # Snapshots change nothing of the results that the record lies beside.
        apart = {"controls": True, "evals": True, "reports": True, "sites": True}
        plain = self.model_dump(mode="json", exclude={**apart, "training": {"snapshots"}})
        for kind in ("controls", "evals", "reports"):
            plain[kind] = [{p.name: dataclasses.asdict(p.value)} for p in getattr(self, kind)]
        return plain | {"sites": [str(site) for site in self.sites]}


def step_reaching(tokens: int, steps: int, batch_tokens: int) -> int:
    """How many steps it takes to have seen so many tokens: all of them for what is left beside whole batches."""
    return min(math.ceil(tokens / batch_tokens), steps)


def snapshot_name(sae: str, tokens: int) -> str:
    """Of an SAE as it was after so many tokens."""
    return f"{sae}-at-{tokens}"


def load(path: Path) -> Suite:
    """Reads and checks a suite file. Raises `UserError` with file, line and field of what is wrong."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for
            raise UserError(f"{path} is no plain file; expected a suite file")
        with path.open(encoding="utf-8") as file:
            source = file.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(
            f"there is no suite file {path}; `saebench list suites` names those that come along"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a suite file: {error}") from None
    if len(source) > _MOST_CHARACTERS:
        raise UserError(
            f"{path} has more than {_MOST_CHARACTERS:,} characters; write a shorter suite"
        )
    try:
        tree = yaml.compose(source, Loader=strict.Bounded)
        _check_tree(path, tree)
        data = yaml.load(source, Loader=strict.Bounded)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: lists or mappings are nested too deep for a suite") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected a mapping with the keys {_keys(Suite)}, got {type(data).__name__}"
        )
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(_messages(path, error, tree))) from None


def recipe(variant: str, overrides: dict[str, Any]) -> Any:
    """The variant's dataclass, from its baseline and the overrides.

    A transcoder has the loss of another variant, its `activation`: what the transcoder's baseline and the suite say
    goes before that variant's own baseline.
    """
    fields = _baseline(variant) | overrides
    build = registry.get("variants", variant)
    known = [field.name for field in dataclasses.fields(build)]
    if "inner" in known:
        activation = _known_name("variants", fields["activation"])
        passed_on = {name: value for name, value in fields.items() if name != "activation"}
        inner = recipe(activation, passed_on)
        fields = {n: v for n, v in fields.items() if n in known and n != "inner"} | {"inner": inner}
    return _fill(build, fields, f"variant {variant}")


@cache
def _baseline(variant: str) -> dict[str, Any]:
    path = registry.folder("baselines") / f"{variant}.yaml"
    fields: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return fields


def plugin(kind: str, entry: Any) -> Plugin:
    """An entry of `evals`, `controls` or `reports`: a name, or a mapping of one name to parameters."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"got {_shown(entry)}; expected a name or {{name: {{parameter: value}}}}")
    ((name, parameters),) = entry.items()
    build = registry.get(kind, _known_name(kind, name))
    fields = {} if parameters is None else parameters
    return Plugin(name, _fill(build, fields, f"{kind[:-1]} {name}", name))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of suite files, for editors."""
    schema = Suite.model_json_schema()
    schema["title"] = "saebench suite"
    for kind in ("controls", "evals", "reports"):
        names = {"enum": registry.names(kind)}
        with_parameters = {"type": "object", "propertyNames": names, "maxProperties": 1}
        schema["properties"][kind]["items"] = {"anyOf": [names, with_parameters]}
    schema["$defs"]["Trained"]["properties"]["variant"]["enum"] = registry.names("variants")
    schema["$defs"]["Checkpoint"]["properties"]["format"]["enum"] = [
        *registry.names("loaders"),
        None,
    ]
    return schema


def _expand(entry: Trained, site: Site) -> Iterator[TrainedSAE]:
    options = entry.model_extra or {}
    swept = [name for name, value in options.items() if _is_sweep(entry.variant, name, value)]
    for overrides in _sweep(entry.variant, options):
        filled = recipe(entry.variant, overrides)
        suffix = "".join(f"-{name}{_short(_field(filled, name))}" for name in swept)
        for width, l0, seed in itertools.product(entry.width, entry.l0, entry.seed):
            yield TrainedSAE(
                name=f"{entry.variant}-w{width}-l{l0:g}-s{seed}{suffix}",
                variant=entry.variant,
                family=entry.variant + suffix,
                recipe=filled,
                width=width,
                l0=l0,
                seed=seed,
                site=site,
                target=site,
                of=entry.of,
            )


def _field(recipe: Any, name: str) -> Any:
    """Of the recipe or, where a transcoder has none of that name, of the one inside."""
    return getattr(recipe, name) if hasattr(recipe, name) else getattr(recipe.inner, name)


def _short(value: Any) -> str:
    """As part of a name."""
    if isinstance(value, tuple):
        return "-".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_sweep(variant: str, name: str, value: Any) -> bool:
    """A list is a choice of values; for a field that is a list itself, a list of lists is."""
    one_value = isinstance(_baseline(variant).get(name), list)
    return isinstance(value, list) and not (one_value and not isinstance(value[0], list))


def _sweep(variant: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the options."""
    choices = [v if _is_sweep(variant, n, v) else [v] for n, v in options.items()]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*choices)]


def _fill(build: Any, fields: Any, what: str, *where: str) -> Any:
    """The dataclass `build` with these fields, each checked against its type."""
    if not isinstance(fields, dict):
        raise _Wrong(f"{what}: got {_shown(fields)}; expected {{parameter: value}}", *where)
    types = {field.name: field.type for field in dataclasses.fields(build)}
    for name, given in fields.items():
        if name not in types:
            nearest = _nearest(str(name), list(types))
            raise _Wrong(f"{what} has no parameter {nearest}", *where, str(name))
        if isinstance(given, bool) and types[name] is not bool:  # pydantic takes it for 0 or 1
            raise _Wrong(f"{what}: {name} is {given}, which is no value of it", *where, name)
    try:
        filled = _explained(partial(_adapter(build).validate_python, fields))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
        if first["type"] == "unexpected_keyword_argument":
            said = "there is no such parameter"
        # What is wrong with several parameters together names them itself.
        value = f"{name} is {_shown(first['input'])}; " if name else ""
        raise _Wrong(f"{what}: {value}{said}", *where, *first["loc"]) from None
    for name in types:
        if not _finite(getattr(filled, name)):
            value = _shown(getattr(filled, name))
            raise _Wrong(f"{what}: {name} is {value}; expected finite numbers", *where, name)
    return filled


def _finite(value: Any) -> bool:
    """Whether no number in it is infinite or none."""
    if isinstance(value, tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@cache
def _adapter(build: Any) -> Any:
    """Made once: it takes longer than what it checks, and sweeps ask for it again and again."""
    return TypeAdapter(build)


def _nearest(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{name!r}; {hint}There are: {', '.join(choices)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def twice(things: list[Any]) -> Any:
    """The first that is there twice; None where all differ."""
    return next((thing for i, thing in enumerate(things) if thing in things[:i]), None)


def _explained(parse: Callable[[], Any]) -> Any:
    """pydantic reports a ValueError beside its line; our own exception would pass it by."""
    try:
        return parse()
    except UserError as error:
        raise ValueError(str(error)) from None


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _messages(path: Path, error: ValidationError, tree: yaml.Node | None) -> Iterator[str]:
    # A key that is missing is often one that is misspelt, which says more.
    for problem in sorted(error.errors(), key=lambda p: p["type"] == "missing"):
        loc = [part for part in problem["loc"] if part not in ("Trained", "Checkpoint")]
        cause = problem.get("ctx", {}).get("error")
        below = cause.field if isinstance(cause, _Wrong) else ()
        where = ".".join(str(part) for part in [*loc, *below])
        line = _line(tree, [*loc, *below])
        yield f"{path}:{line}: {where or 'suite'}: {_explain(problem, loc)}"


def _check_tree(path: Path, root: yaml.Node | None) -> None:
    """Refuses what YAML allows and no suite means: a key given twice, aliases that grow without end."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if not isinstance(node, yaml.MappingNode | yaml.SequenceNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES + 1  # what a node that contains itself finds here
            parts = node.value
            if isinstance(node, yaml.MappingNode):
                _check_keys(path, node)
                parts = [value for _, value in node.value]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(root) > _MOST_VALUES:
        raise UserError(
            f"{path}: more than {_MOST_VALUES:,} values, or aliases that stand for as many; "
            "write a shorter suite"
        )


def _check_keys(path: Path, node: yaml.MappingNode) -> None:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for i, (key, _) in enumerate(node.value):
        if isinstance(key, yaml.ScalarNode) and key.value in keys[:i] and key.value != "<<":
            line = key.start_mark.line + 1
            raise UserError(f"{path}:{line}: the key {key.value!r} is there twice; keep one")


def _explain(problem: Any, loc: list[Any]) -> str:
    if problem["type"] == "extra_forbidden":
        choices: type[BaseModel] = {
            (): Suite,
            ("model",): Model,
            ("text",): Text,
            ("training",): TrainingOptions,
        }.get(tuple(loc[:-1]), Checkpoint)  # type: ignore[assignment]
        return f"unknown key {_nearest(str(loc[-1]), list(choices.model_fields))}"
    if problem["type"] == "missing":
        return "this key is missing"
    if problem["type"] == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"got {_shown(problem['input'])}; {problem['msg']}"


def _line(node: yaml.Node | None, loc: list[Any]) -> int:
    """The line of the deepest node that the location leads to."""
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(part)]
            if not found:
                break
            key, node = found[0]
            line = key.start_mark.line + 1
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
