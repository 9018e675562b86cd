"""Plug-ins are files: the name in a suite is the name of a module, and nothing is registered.

Each module in saes/, variants/, evals/, controls/, loaders/ and reports/ defines exactly one public class or
function. A package installed beside this one adds a plug-in through an entry point of the group `saebench.<kind>`,
whose value is `module:object`.
"""

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from saebench.errors import UserError

KINDS = ("variants", "saes", "evals", "loaders", "reports", "controls")


def names(kind: str) -> list[str]:
    """Plug-ins of one kind, found by listing the folder; no plug-in is imported."""
    path = importlib.import_module(f"saebench.{kind}").__path__
    ours = {m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")}
    return sorted(ours | _added(kind).keys())


def get(kind: str, name: str) -> Any:
    """The one public object that saebench/<kind>/<name>.py defines."""
    if name not in names(kind):
        raise UserError(f"there is no {name!r} in {kind}; there are: {', '.join(names(kind))}")
    added = _added(kind)
    if name in added:
        return added[name].load()
    module = importlib.import_module(f"saebench.{kind}.{name}")
    public = [
        obj
        for key, obj in vars(module).items()
        if not key.startswith("_") and getattr(obj, "__module__", None) == module.__name__
    ]
    assert len(public) == 1, f"{module.__name__} must define one public object, found {public}"
    return public[0]


def folder(name: str) -> Path:
    """`baselines` or `suites`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def suites() -> list[Path]:
    return sorted(folder("suites").glob("*.yaml"))


def _added(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"saebench.{kind}")}
