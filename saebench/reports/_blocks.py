"""What stands in one row, and which rows in one block.

A row is one SAE, or the SAEs of one recipe that differ in their training seed alone. A block holds what
may be compared: one site, one width, one asked-for L0.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd

from saebench.reports._table import MISSED, natural


class Contender(NamedTuple):
    """One row."""

    name: str
    saes: tuple[str, ...]
    """Several where it is a recipe that was trained with several seeds."""
    kind: str
    variant: str
    width: int | None
    l0: float | None
    """Asked for, or that of the SAEs beside which a checkpoint stands."""
    site: str

    @property
    def standard(self) -> bool:
        """There to read the others against."""
        return self.kind in ("control", "reference")

    @property
    def ranked(self) -> bool:
        return not self.standard and self.kind != "imported"

    @property
    def place(self) -> "Place":
        return self.width, self.l0


Place = tuple[int | None, float | None]
"""Width and asked-for L0, None where nobody asked, as for a foreign checkpoint."""


class Group(NamedTuple):
    title: str
    contenders: tuple[Contender, ...]

    @property
    def ranked(self) -> list[Contender]:
        return [contender for contender in self.contenders if contender.ranked]


def contenders(scores: pd.DataFrame) -> list[Contender]:
    """In the order of the suite, a recipe where its first seed is."""
    saes = scores.drop_duplicates("sae")
    recipes: dict[Contender, list[tuple[str, int | None]]] = {}
    for row in saes.to_dict("records"):
        name, kind, variant = row["sae"], row["kind"], row["variant"]
        width = None if pd.isna(row["width"]) else int(row["width"])
        l0 = None if pd.isna(row["target_l0"]) else float(row["target_l0"])
        seed = None if pd.isna(row["seed"]) else int(row["seed"])
        # What one recipe shares, which is all but the seed; anything else is alone in its recipe.
        recipe = "" if kind == "trained" else name
        shared = Contender(recipe, (), kind, variant, width, l0, row["site"])
        recipes.setdefault(shared, []).append((name, seed))
    found = [one for shared, members in recipes.items() for one in _by_seeds(shared, members)]
    order = {str(sae): place for place, sae in enumerate(saes["sae"])}
    return _matched(sorted(found, key=lambda one: order[one.saes[0]]), scores)


def grouped(scores: pd.DataFrame) -> list[Group]:
    """Blocks in order."""
    everyone = contenders(scores)
    groups: list[Group] = []
    for site in sorted({one.site for one in everyone}, key=natural):
        groups += _of_site(site, [one for one in everyone if one.site == site])
    return groups


def _by_seeds(shared: Contender, members: Sequence[tuple[str, int | None]]) -> list[Contender]:
    saes = tuple(sae for sae, _ in members)
    seeds = {seed for _, seed in members}
    # The same seed twice is two recipes that nothing here tells apart.
    if len(members) > 1 and None not in seeds and len(seeds) == len(members):
        l0 = "" if shared.l0 is None else f"-l{shared.l0:g}"
        return [shared._replace(name=f"{shared.variant}-w{shared.width}{l0}", saes=saes)]
    return [shared._replace(name=sae, saes=(sae,)) for sae in saes]


def _matched(everyone: Sequence[Contender], scores: pd.DataFrame) -> list[Contender]:
    """Puts each checkpoint beside the SAEs of its width whose asked-for L0 it has, where there are such."""
    measured = scores[scores["metric"] == "l0"]
    l0 = dict(zip(map(str, measured["sae"]), map(float, measured["value"]), strict=True))
    matched = []
    for one in everyone:
        asked = one.l0
        if one.kind == "checkpoint" and asked is None and one.saes[0] in l0:
            here = [
                other.l0
                for other in everyone
                if other.kind == "trained"
                and (other.site, other.width) == (one.site, one.width)
                and other.l0 is not None
            ]
            asked = _hit(l0[one.saes[0]], here)
        matched.append(one._replace(l0=asked))
    return matched


def _hit(l0: float, asked: Sequence[float]) -> float | None:
    """The nearest of the asked-for values, None where none is within what counts as hit."""
    distance, nearest = min(((abs(l0 / a - 1), a) for a in asked), default=(math.inf, None))
    return nearest if distance <= MISSED else None


def _of_site(site: str, here: Sequence[Contender]) -> Iterator[Group]:
    saes = [one for one in here if not one.standard]
    others = [one for one in here if one.standard]
    places = {one.place for one in saes}
    placed: set[str] = set()
    for place in sorted(places, key=lambda p: (_none_last(p[0]), _none_last(p[1]))):
        members = [one for one in saes if one.place == place]
        beside = [one for one in others if _belongs(one, place, places)]
        placed.update(one.name for one in beside)
        imported = all(one.kind == "imported" for one in members)
        yield Group(_title(site, place, imported), (*members, *beside))
    left = tuple(one for one in others if one.name not in placed)
    if left:
        kinds = [k for k in ("control", "reference") if any(one.kind == k for one in left)]
        yield Group(f"{site}, {' and '.join(f'{kind}s' for kind in kinds)}", left)


def _none_last(value: int | float | None) -> tuple[bool, float]:
    return (True, 0.0) if value is None else (False, float(value))


def _belongs(control: Contender, place: Place, places: set[Place]) -> bool:
    """A control stands beside the SAEs of its asked-for L0: of its own width, if there are such."""
    own = control.place
    return own[1] is not None and (own == place or (own not in places and own[1] == place[1]))


def _title(site: str, place: Place, imported: bool) -> str:
    """What is imported was not asked for."""
    width, l0 = place
    if imported:
        return site if width is None else f"{site}, width {width:,}"
    if width is None and l0 is None:
        return f"{site}, checkpoints"
    wide = "no width asked for" if width is None else f"width {width:,}"
    return f"{site}, {wide}, " + ("no L0 asked for" if l0 is None else f"asked-for L0 {l0:g}")
