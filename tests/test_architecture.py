"""The layers of the package, as a test."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import saebench

ROOT = Path(saebench.__file__).parent
LAYERS = [  # a module imports only from layers above it in this list, or from its own folder
    ["errors", "_triton"],
    ["types", "registry", "stats", "progress", "kernels", "strict", "isolation"],
    ["ranks", "frontiers", "matching", "reliability", "rescaling"],
    ["sites", "results", "cache", "text"],
    ["suite", "sparse", "reports", "codelabels", "scrutiny", "submitted", "relations"],
    ["worlds", "worldlabels"],
    ["saes", "labelled", "logistic", "peer_json", "bundle", "wrapped"],
    ["subject", "loaders", "exports", "variants", "evals", "controls"],
    ["hub", "synthetic"],
    ["trainer", "lab", "checkpoints"],
    ["runner", "exchange"],
    ["planner", "verification", "selfcheck", "auditor"],
    ["submission"],
    ["api"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
MODULES = sorted(
    ".".join(["saebench", *path.with_suffix("").parts]).removesuffix(".__init__")
    for path in FILES
    if path != Path("_triton.py") or find_spec("triton")  # written in a package for GPUs
)
LIGHT = [
    "errors",
    "registry",
    "stats",
    "ranks",
    "frontiers",
    "reliability.files",
    "results",
    "reports.leaderboard",
    "reports._card",
    "reports.pareto",
    "peer_json",
    "bundle",
    "cli",
]
"""What answers `list`, `report`, `plot`, `compare` and `import`."""


def part(module: str) -> str:
    return module.removeprefix("saebench").strip(".").partition(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """Parts of saebench that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saebench"):
            names = [alias.name for alias in node.names]
            found |= {part(f"{node.module}.{name}") for name in names}
        elif isinstance(node, ast.Import):
            found |= {part(a.name) for a in node.names if a.name.startswith("saebench.")}
    return {name for name in found if name and not name.startswith("__version__")}


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def test_the_files_of_the_package_are_found():
    assert Path("saes/relu.py") in FILES and Path("cli.py") in FILES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    here = part(".".join(path.with_suffix("").parts))
    for there in imported(parsed(path)) - {here}:
        assert RANK[there] < RANK[here], f"{path}: {here} imports {there}"


def test_every_part_has_its_layer_and_every_layer_its_parts():
    assert {part(".".join(path.with_suffix("").parts)) for path in FILES} == RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_import_is_relative(path):
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in nodes)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_printed(path):
    """`progress.say` writes to the error stream, and the command line has its own `echo`."""
    calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_says_what_it_is(path):
    assert len(ast.get_docstring(parsed(path)) or "") > 20


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_quickly_never_imports_torch(module):
    code = f"import sys, saebench.{module}; print('torch' in sys.modules)"
    assert run(code).strip() == "False"


def test_listing_plugins_imports_no_plugin_and_no_torch():
    code = (
        "import sys; from saebench import registry;"
        "[registry.names(kind) for kind in registry.KINDS];"
        "print('torch' in sys.modules, 'saebench.saes.relu' in sys.modules)"
    )
    assert run(code).strip() == "False False"


def test_importing_says_nothing_and_draws_no_random_number():
    code = (
        "import importlib, numpy, torch;"
        "before = torch.random.get_rng_state(), numpy.random.get_state()[2];"
        f"[importlib.import_module(m) for m in {MODULES!r}];"
        "assert torch.equal(before[0], torch.random.get_rng_state());"
        "assert before[1] == numpy.random.get_state()[2]"
    )
    assert run(code) == ""
