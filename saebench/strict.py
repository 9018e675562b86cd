"""Strangers' JSON and YAML, read strictly: no key is there twice, every number is one, nothing is nested or repeated
beyond measure, and no value is more than text, a number, true, false, null, a list or a mapping.
"""

import json
import math
from collections.abc import Hashable
from typing import Any

import yaml

from saebench.errors import UserError

DEEPEST = 20
_MOST_VALUES = 200_000
_MOST_DIGITS = 20
_LONGEST_YAML_NUMBER = 80
_MOST_YAML_VALUES = 25_000
"""Keys are values here."""
_LARGEST = 2**63
_DEEPEST_YAML = 100
"""Where parsing stops. What may be that deep is less."""


def loads(text: str | bytes) -> Any:
    """JSON. Raises `ValueError`, and `RecursionError` where it is nested too deeply to be read at all."""
    return json.loads(
        text,
        object_pairs_hook=_distinct,
        parse_constant=_no_number,
        parse_float=_finite,
        parse_int=_whole,
    )


def loads_yaml(text: str) -> Any:
    """YAML without aliases, tags and values that JSON does not have. Raises `ValueError`.

    The parser is slow with much text, so whoever calls looks at its length first.
    """
    try:
        return yaml.load(text, Loader=Plain)  # noqa: S506  (it is a SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _yaml_whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) <= _LONGEST_YAML_NUMBER:
        value = int(loader.construct_yaml_int(node))
        if abs(value) < _LARGEST:
            return value
    raise _yaml_error("the number is too large", node)


def _yaml_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


class Bounded(yaml.SafeLoader):
    """Stops where brackets are open beyond measure, at tags, at numbers beyond 64 bits, and after very many values. A
    date is text."""

    n_values = 0
    yaml_constructors = yaml.SafeLoader.yaml_constructors | {
        "tag:yaml.org,2002:int": _yaml_whole,
        "tag:yaml.org,2002:timestamp": _yaml_text,
    }

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # Every open bracket makes every token after it slower.
        if self.flow_level >= _DEEPEST_YAML:
            raise _yaml_error("lists or mappings are nested too deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.isascii() and not _is_encodable(value):
            raise _yaml_error("text with half a character (a lone surrogate)", node)
        return value

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.n_values += 1
        if self.n_values > _MOST_YAML_VALUES:
            raise _yaml_error(f"more than {_MOST_YAML_VALUES:,} values", event)
        if getattr(event, "tag", None) is not None:
            raise _yaml_error(f"the tag {event.tag!r} is no plain value", event)
        return super().compose_node(parent, index)


class Plain(Bounded):
    """Stops also at aliases, of which a few can stand for billions of values, and at a key that is there twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _yaml_error(f"it has an alias (*{event.anchor}); write the value out", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _yaml_error("a key is no text", key)
            if key.value in seen:
                raise _yaml_error(f"the key {key.value!r} is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml_error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=getattr(at, "start_mark", at))


def check_depth(value: Any, where: str) -> None:
    """Raises `UserError` for what is nested too deeply, too much, or no plain value."""
    _Counted(where).check(value, DEEPEST)


class _Counted:
    def __init__(self, where: str) -> None:
        self._where, self._n = where, 0

    def check(self, value: Any, left: int) -> None:
        self._n += 1
        if self._n > _MOST_VALUES:
            raise UserError(f"{self._where} has more than {_MOST_VALUES:,} values")
        if left == 0:
            raise UserError(f"{self._where} is nested more than {DEEPEST} deep")
        if isinstance(value, dict):
            for key, part in value.items():
                self.check(key, 1)
                self.check(part, left - 1)
        elif isinstance(value, list):
            for part in value:
                self.check(part, left - 1)
        else:
            self._check_one(value)

    def _check_one(self, value: Any) -> None:
        if isinstance(value, str):
            if not value.isascii() and not _is_encodable(value):
                raise UserError(f"{self._where} has text with half a character (a lone surrogate)")
        elif type(value) is int:
            if abs(value) >= _LARGEST:
                raise UserError(f"{self._where} has a number that is too large")
        elif type(value) is float:
            if not math.isfinite(value):
                raise UserError(f"{self._where} has {value}, which is not a number")
        elif value is not None and type(value) is not bool:
            raise UserError(f"{self._where} has {type(value).__name__}; expected plain values")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise ValueError(f"{written[:40]} is too large a number")
    return value


def _whole(written: str) -> int:
    if len(written) > _MOST_DIGITS:
        raise ValueError(f"{written[:40]}... is too large a number")
    return int(written)
