"""A suite file, read strictly: an unknown key, name or value is refused with its line and the nearest valid choice.

`load` gives a `Suite`; `Suite.trained()` expands its sweeps into one `TrainedSAE` each. What a suite asks for is
known without a model; what determines a result besides (revisions, fingerprints) is added by
the trainer and the runner.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from saebench import registry
from saebench.errors import UserError
from saebench.sites import parse_site
from saebench.types import Site, Spec

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Model(_Strict):
    """Any causal language model of transformers."""

    id: str
    """`builtin:pylm`, a Hub id, or a local folder (relative to the suite file)."""
    revision: str | None = None
    """Hub commit, tag or branch; what a branch stood for is written into every result."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Text(_Strict):
    """Where tokens come from. Exactly one of `source`, `dataset` and `files` is given."""

    source: Literal["builtin:python-stdlib"] | None = None
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
        return self


class TrainingOptions(_Strict):
    """How the one stream of activations is cut and mixed, for all SAEs alike."""

    batch_tokens: PositiveInt = 2048
    buffer_tokens: PositiveInt = 131_072
    """Activations that are shuffled together."""


class Trained(_Strict):
    """SAEs to train: every list is a sweep. Further keys override fields of the variant's baseline."""

    model_config = ConfigDict(extra="allow", frozen=True)

    variant: str
    width: Annotated[list[PositiveInt], BeforeValidator(_as_list)]
    l0: Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_as_list)]
    seed: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_as_list)] = Field(
        default_factory=lambda: [0]
    )

    @field_validator("variant")
    @classmethod
    def _known(cls, name: str) -> str:
        return _known_name("variants", name)

    @model_validator(mode="after")
    def _possible(self) -> "Trained":
        for width, l0 in itertools.product(self.width, self.l0):
            if not 1 <= l0 <= width:
                raise ValueError(f"l0 is {l0:g}; with width {width} it must be from 1 to {width}")
        for overrides in _sweep(self.model_extra or {}):
            recipe(self.variant, overrides)
        whole = registry.get("variants", self.variant).whole_l0
        if whole and any(l0 != round(l0) for l0 in self.l0):
            raise ValueError(f"l0 is {self.l0}; {self.variant} keeps k latents, a whole number")
        return self


class Checkpoint(_Strict):
    """An SAE somebody has trained."""

    checkpoint: str
    format: str
    name: Annotated[str, Field(pattern=NAME)]

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        return _known_name("loaders", name)


class Plugin(NamedTuple):
    """An eval, control or report with its parameters filled in."""

    name: str
    value: Any


class TrainedSAE(NamedTuple):
    """One SAE that a suite asks to be trained."""

    name: str
    variant: str
    recipe: Any
    """The variant's dataclass: its baseline with the suite's overrides."""
    width: int
    l0: float
    seed: int
    site: Site


class Suite(_Strict):
    """One suite file."""

    name: Annotated[str, Field(pattern=NAME)]
    model: Model
    sites: list[Site]
    text: Text
    training: TrainingOptions = TrainingOptions()
    saes: list[Trained | Checkpoint]
    controls: list[Plugin] = []
    evals: list[Plugin]
    reports: list[Plugin] = []

    @field_validator("sites", mode="before")
    @classmethod
    def _sites(cls, entries: Any) -> Any:
        if not isinstance(entries, list) or not entries:
            raise ValueError(
                "expected a list of at least one site, such as {layer: 2, stream: resid_post}"
            )
        return [_explained(parse_site, entry) for entry in entries]

    @field_validator("saes", mode="before")
    @classmethod
    def _saes(cls, entries: Any) -> Any:
        if not isinstance(entries, list):
            raise ValueError("expected a list")
        return [_sae_entry(entry) for entry in entries]

    @field_validator("controls", "evals", "reports", mode="before")
    @classmethod
    def _plugins(cls, entries: Any, info: Any) -> Any:
        if not isinstance(entries, list):
            raise ValueError("expected a list of names, or of {name: {parameter: value}}")
        return [plugin(info.field_name, entry) for entry in entries]

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        names = [s.name for s in self.trained()] + [c.name for c in self.checkpoints()]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two SAEs are called {twice[0]!r}; each needs a name of its own")
        return self

    def trained(self) -> list[TrainedSAE]:
        """Every SAE to train, sweeps expanded, in the order of the file."""
        several = len(self.sites) > 1
        return [
            sae._replace(name=f"{sae.name}-{site}" if several else sae.name, site=site)
            for entry in self.saes
            if isinstance(entry, Trained)
            for sae in _expand(entry, self.sites[0])
            for site in self.sites
        ]

    def checkpoints(self) -> list[Checkpoint]:
        return [entry for entry in self.saes if isinstance(entry, Checkpoint)]

    def definition(self) -> Spec:
        """The suite as plain data, for the record beside its results."""
        plain = self.model_dump(mode="json", exclude={"controls", "evals", "reports", "sites"})
        for kind in ("controls", "evals", "reports"):
            plain[kind] = [{p.name: dataclasses.asdict(p.value)} for p in getattr(self, kind)]
        return plain | {"sites": [str(site) for site in self.sites]}


def load(path: Path) -> Suite:
    """Reads and checks a suite file. Raises `UserError` with file, line and field of what is wrong."""
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"there is no suite file {path}; `saebench list suites` names those that come along"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a suite file: {error}") from None
    try:
        tree = yaml.compose(source, Loader=yaml.SafeLoader)
        data = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected a mapping with the keys {_keys(Suite)}, got {type(data).__name__}"
        )
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(_messages(path, error, tree))) from None


def recipe(variant: str, overrides: dict[str, Any]) -> Any:
    """The variant's dataclass, from its baseline and the overrides."""
    path = registry.folder("baselines") / f"{variant}.yaml"
    fields = yaml.safe_load(path.read_text(encoding="utf-8")) | overrides
    return _fill(registry.get("variants", variant), fields, f"variant {variant}")


def plugin(kind: str, entry: Any) -> Plugin:
    """An entry of `evals`, `controls` or `reports`: a name, or a mapping of one name to parameters."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"got {entry!r}; expected a name or {{name: {{parameter: value}}}}")
    ((name, parameters),) = entry.items()
    build = registry.get(kind, _known_name(kind, name))
    return Plugin(name, _fill(build, parameters or {}, f"{kind[:-1]} {name}"))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of suite files, for editors."""
    entry: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object", "maxProperties": 1}]}
    plain = {
        "sites": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}
    }
    plain |= {
        kind: {
            "type": "array",
            "items": entry | {"description": f"one of: {', '.join(registry.names(kind))}"},
        }
        for kind in ("controls", "evals", "reports")
    }
    schema = _Plain.model_json_schema()
    schema["properties"] |= plain
    schema["title"] = "saebench suite"
    schema["$defs"]["Trained"]["properties"]["variant"]["enum"] = registry.names("variants")
    return schema


class _Plain(_Strict):
    """The parts of a suite whose schema pydantic can tell."""

    name: Annotated[str, Field(pattern=NAME)]
    model: Model
    sites: list[Any]
    text: Text
    training: TrainingOptions = TrainingOptions()
    saes: list[Trained | Checkpoint]
    controls: list[Any] = []
    evals: list[Any]
    reports: list[Any] = []


def _expand(entry: Trained, site: Site) -> Iterator[TrainedSAE]:
    for overrides in _sweep(entry.model_extra or {}):
        swept = {
            k: v for k, v in overrides.items() if isinstance((entry.model_extra or {})[k], list)
        }
        suffix = "".join(f"-{key}{value:g}" for key, value in swept.items())
        for width, l0, seed in itertools.product(entry.width, entry.l0, entry.seed):
            yield TrainedSAE(
                name=f"{entry.variant}-w{width}-l{l0:g}-s{seed}{suffix}",
                variant=entry.variant,
                recipe=recipe(entry.variant, overrides),
                width=width,
                l0=l0,
                seed=seed,
                site=site,
            )


def _sweep(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the options, where a list is a choice."""
    choices = [_as_list(value) for value in options.values()]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*choices)]


def _fill(build: Any, fields: dict[str, Any], what: str) -> Any:
    """The dataclass `build` with these fields, each checked against its type."""
    if not isinstance(fields, dict):
        raise ValueError(f"{what}: got {fields!r}; expected {{parameter: value}}")
    known = [field.name for field in dataclasses.fields(build)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{what} has no parameter {_nearest(name, known)}")
    try:
        return TypeAdapter(build).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "parameters"
        raise ValueError(f"{what}: {field} is {first['input']!r}; {first['msg']}") from None


def _sae_entry(entry: Any) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"got {entry!r}; expected {{variant: ...}} or {{checkpoint: ...}}")
    if ("variant" in entry) == ("checkpoint" in entry):
        raise ValueError(f"got the keys {sorted(entry)}; expected one of variant and checkpoint")
    return entry


def _known_name(kind: str, name: Any) -> str:
    names = registry.names(kind)
    if name not in names:
        raise ValueError(f"there is no {kind[:-1]} {_nearest(str(name), names)}")
    return str(name)


def _nearest(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{name!r}; {hint}There are: {', '.join(choices)}"


def _explained(parse: Any, entry: Any) -> Any:
    """pydantic reports a ValueError beside its line; our own exception would pass it by."""
    try:
        return parse(entry)
    except UserError as error:
        raise ValueError(str(error)) from None


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


def _messages(path: Path, error: ValidationError, tree: yaml.Node | None) -> Iterator[str]:
    for problem in error.errors():
        loc = [part for part in problem["loc"] if part not in ("Trained", "Checkpoint")]
        where = ".".join(str(part) for part in loc)
        line = _line(tree, loc)
        yield f"{path}:{line}: {where or 'suite'}: {_explain(problem, loc)}"


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
    return f"got {problem['input']!r}; {problem['msg']}"


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
