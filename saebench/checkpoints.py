"""Where checkpoints come from: a local path, or the Hub at a commit; in a format that is told or recognised.

A Hub checkpoint is written `org/name@revision` or `org/name@revision/folder/in/it`. A branch or tag is resolved
to the commit that it stands for, and the commit is what results name.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saebench import registry
from saebench.errors import UserError
from saebench.hub import Reference, download
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import Loader, Member, Told
from saebench.types import Site, Spec

_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+)(?:/(?P<folder>.+))?)?")


class Opened(NamedTuple):
    """A checkpoint whose files are here and checked for size and structure; no weights are read yet."""

    format: str
    members: Sequence[Member]
    origin: Spec
    """Where it is from, for results: a Hub id with its commit, or nothing but that it was local."""
    where: str
    """For messages."""


def open_checkpoint(  # noqa: PLR0913  (what the user says, and where files may be)
    given: str, format: str | None, told: Told, limits: Limits, cache: Path | None, beside: Path
) -> Opened:
    """`beside`: relative paths are meant from here. `cache`: where downloads are kept.

    Raises `UserError` where there is nothing, for a Hub id without a revision, for files beyond the limits, and where
    no format fits or several do.
    """
    path, origin = locate(given, limits, cache, beside)
    source = Source(path, limits)
    name = format or _recognised(source)
    loader: Loader = registry.get("loaders", name)()
    return Opened(name, loader.members(source, told), origin, str(given))


def one_at(opened: Opened, places: Sequence[tuple[Site, Site]]) -> Member:
    """The one SAE of a checkpoint that reads and predicts what is looked at. Raises `UserError`."""
    found = [m for m in opened.members if (m.site, m.target) in places]
    if len(found) == 1:
        return found[0]
    has = ", ".join(dict.fromkeys(where(m.site, m.target) for m in opened.members))
    wanted = ", ".join(where(*place) for place in places)
    if not found:
        raise UserError(f"{opened.where} was trained at {has}; the suite looks at {wanted}")
    raise UserError(
        f"{opened.where} has {len(found)} SAEs at what the suite looks at ({has}); say which with site"
    )


def where(site: Site, target: Site) -> str:
    """What an SAE reads and, where that is another site, what it predicts."""
    return str(site) if site == target else f"{site} to {target}"


def locate(
    given: str, limits: Limits, cache: Path | None, beside: Path
) -> tuple[Path, dict[str, Any]]:
    """Where the files are, downloaded where they were not here, and what results may say of it."""
    path = beside / Path(given).expanduser()
    if path.exists():
        return path, {"from": "local"}
    hub = _HUB.fullmatch(given)
    if hub is None:
        raise UserError(
            f"there is no {path}; expected the path of a checkpoint, or a Hub id such as org/name@revision/folder"
        )
    if hub["revision"] is None:
        raise UserError(
            f"there is no {path}, and as a Hub id {given!r} lacks a revision; give a commit, or a branch such as "
            f"{hub['repo']}@main, whose commit is then written into the results"
        )
    if cache is None:
        raise UserError(
            f"{given} has to be downloaded, and there is no cache to keep it in; drop --no-cache"
        )
    reference = Reference(hub["repo"], hub["revision"], hub["folder"] or "")
    downloaded = download(reference, limits, cache)
    return downloaded.path, {
        "from": "hub",
        "id": hub["repo"],
        "revision": downloaded.commit,
        "folder": hub["folder"],
    }


def _recognised(source: Source) -> str:
    fitting = [n for n in registry.names("loaders") if registry.get("loaders", n)().fits(source)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{source.path} fits several formats: {', '.join(fitting)}; say which with format"
        )
    there = ", ".join(source.names[:8]) or "nothing"
    raise UserError(
        f"{source.path} is in no known format; it has {there}. Formats: {', '.join(registry.names('loaders'))}"
    )
