"""What was not measured: None, with the reason in words in `missing` under the name of the field."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Missing(NamedTuple):
    """Instead of a number."""

    reason: str


def split(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what may be `Missing`: None, and the reasons beside it."""
    reasons = {name: part.reason for name, part in parts.items() if isinstance(part, Missing)}
    plain = {name: None if isinstance(part, Missing) else part for name, part in parts.items()}
    return plain | {"missing": reasons}
