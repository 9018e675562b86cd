"""Cards as files: audit.json in the folder of a suite's results, and shipped.json beside this module."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from saebench import strict
from saebench.errors import UserError
from saebench.reliability.cards import SCHEMA, Card
from saebench.reliability.verdicts import Verdict, Verdicts, verdicts_of

FILE = "audit.json"
"""In the folder of a suite's results."""
SHIPPED = Path(__file__).with_name("shipped.json")
"""What audits of this project found, for results that were never audited themselves."""

_File = TypeVar("_File", bound=Card | Verdicts)


def as_json(card: Card | Verdicts) -> str:
    return json.dumps(_plain(card), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_card(path: Path) -> Card:
    return _read(path, Card)


def read_verdicts(path: Path) -> tuple[Verdict, ...]:
    return _read(path, Verdicts).verdicts


def applying(folder: Path) -> tuple[Verdict, ...]:
    """To the results in a folder: those of its own audit, and of the audits of other suites that the package ships."""
    shipped = read_verdicts(SHIPPED)
    audit = folder / FILE
    if not audit.is_file():
        return shipped
    card = read_card(audit)
    return verdicts_of(card) + tuple(v for v in shipped if v.suite != card.suite)


def _plain(value: Any) -> Any:
    """Named tuples as objects, for JSON."""
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value


def _read(path: Path, kind: type[_File]) -> _File:
    again = "Run `saebench audit` again, or delete it"
    try:
        text = path.read_bytes()
        content = strict.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. {again}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has the schema {schema!r}; expected {SCHEMA}. {again}")
    try:
        return _built(kind, text)
    except ValueError as error:
        raise UserError(f"{path} is no reliability card: {error}. {again}") from None


def _built(kind: type[_File], text: bytes) -> _File:
    try:
        found: _File = TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("it", *first["loc"])))
        given = "" if first["type"].startswith("missing") else f" is {first['input']!r:.40}"
        raise ValueError(f"{where}{given}: {first['msg']}") from None
    _check(found, "it")
    return found


def _check(value: Any, where: str) -> None:
    """What types do not say: `missing` has the fields that are null, and parameters are a JSON object."""
    if not isinstance(value, tuple):
        return
    fields = value._asdict() if hasattr(value, "_asdict") else dict(enumerate(value))
    for name, part in fields.items():
        _check(part, f"{where}.{name}")
    empty = {name for name, part in fields.items() if part is None and name != "panel"}
    if "missing" in fields and empty != set(fields["missing"]):
        raise ValueError(f"{where}.missing names other fields than those that are null")
    if "params" in fields and not _is_object(fields["params"]):
        raise ValueError(f"{where}.params is no JSON object")


def _is_object(text: str) -> bool:
    try:
        return isinstance(strict.loads(text), dict)
    except (ValueError, RecursionError):
        return False
