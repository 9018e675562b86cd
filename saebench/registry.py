"""Plug-ins are files: the name in a suite is the name of a module, and nothing is registered.

Each module in saes/, variants/, evals/, controls/, loaders/, exports/ and reports/ defines exactly one public class
or function. A package installed beside this one adds a plug-in through an entry point of the group `saebench.<kind>`,
whose value is `module:object`.
"""

import ast
import importlib
import pkgutil
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from saebench.errors import UserError

KINDS = ("variants", "saes", "evals", "loaders", "exports", "reports", "controls")


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


def summary(kind: str, name: str) -> str:
    """The first sentence of a plug-in's file, read without importing it; empty for those of other packages."""
    path = Path(__file__).parent / kind / f"{name}.py"
    if not path.is_file():
        return ""
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition(
        "\n\n"
    )[0]
    return re.split(r"(?<=[^.])[.:](?: |$)| \(", " ".join(first.split()))[0]


def folder(name: str) -> Path:
    """`baselines` or `suites`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def suites() -> list[Path]:
    return sorted(folder("suites").glob("*.yaml"))


def suite_file(given: str | Path) -> Path:
    """The file itself, or the suite of that name that comes along."""
    named = folder("suites") / f"{given}.yaml"
    return named if not Path(given).is_file() and named.is_file() else Path(given)


@cache
def _added(kind: str) -> dict[str, EntryPoint]:
    """Found once: looking through all installed packages takes long."""
    return {point.name: point for point in entry_points(group=f"saebench.{kind}")}
