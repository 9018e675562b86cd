"""What tables show of cards: the badge of each column, and its warnings in words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from saebench.reliability.cards import PASSED, WARNING, Badge, Card
from saebench.reliability.rows import Version


class Verdict(NamedTuple):
    """What tables show of one metric version."""

    metric: str
    eval: str
    version: int
    params: str
    suite: str
    """Whose audit it is."""
    badge: Badge
    warnings: tuple[str, ...]


class Verdicts(NamedTuple):
    """As they are shipped."""

    schema: int
    verdicts: tuple[Verdict, ...]


class Remarks(NamedTuple):
    """The badge of one column of a table, with its warnings as parts of a sentence."""

    badge: Badge
    warnings: tuple[str, ...]


def verdicts_of(card: Card) -> tuple[Verdict, ...]:
    return tuple(Verdict(*m[:4], card.suite, m.badge, m.warnings) for m in card.metrics)


def strongest(found: Iterable[Verdict]) -> tuple[Verdict, ...]:
    """Of each metric version the audits in which it failed, or else in which it passed: a failure is one anywhere."""
    by_version: dict[Version, list[Verdict]] = {}
    for verdict in found:
        by_version.setdefault(Version(*verdict[:4]), []).append(verdict)
    kept = []
    for version in sorted(by_version):
        of = sorted(by_version[version], key=lambda verdict: verdict.suite)
        failed = [verdict for verdict in of if verdict.badge == WARNING]
        kept += failed or [verdict for verdict in of if verdict.badge == PASSED]
    return tuple(kept)


def remarks(
    found: Sequence[Verdict], metric: str, eval_name: str, version: int, params: str
) -> Remarks:
    """Of a column of a table, whose `params` are as `written_out`.

    A warning holds for the metric whatever its parameters, such as the datasets of probes, which differ from suite to
    suite; a pass only for the same ones.
    """
    about = [v for v in found if v[:3] == (metric, eval_name, version)]
    same = {v: written_out(json.loads(v.params)) == params for v in about}
    warnings = tuple(
        f"{warning} in the audit of {v.suite}{'' if same[v] else ', with other parameters'}"
        for v in about
        for warning in v.warnings
    )
    if warnings:
        return Remarks(WARNING, warnings)
    passed = any(v.badge == PASSED and same[v] for v in about)
    return Remarks(PASSED if passed else "", ())


def written_out(params: Mapping[str, Any]) -> str:
    """As tables name the parameters of an eval."""
    return ", ".join(f"{k}={params[k]}" for k in sorted(params))
