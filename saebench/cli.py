"""saebench: train a baseline of every SAE variant, score SAEs, and compare them.

Parsing and printing only. Nothing heavy is imported before it is needed.
"""

import logging
import os
import re
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from saebench import __version__, registry
from saebench.errors import NothingToShow, UserError


class _Commands(typer.core.TyperGroup):
    """A mistake of the user's is one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _complain(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _complain("stopped; the same command goes on from here")
            raise typer.Exit(130) from None


app = typer.Typer(
    help=__doc__,
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SuiteFile = Annotated[
    Path, typer.Argument(help="a suite file, or the name of one that comes along")
]
ResultsFolder = Annotated[
    Path, typer.Argument(help="the folder of one suite, such as results/quickstart")
]
Format = Annotated[
    str | None, typer.Option(help="of the checkpoint; recognised from its files if not given")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle-weights", help="also read .pt and .pth files, as weights alone"),
]
MaxSize = Annotated[float, typer.Option(help="GiB that a checkpoint may have")]
Kind = Enum("Kind", {kind: kind for kind in (*registry.KINDS, "suites")})  # type: ignore[misc]


@app.command()
def run(  # noqa: PLR0913  (the options of the command)
    suite: SuiteFile,
    results: Annotated[Path, typer.Option(help="where results go")] = Path("results"),
    checkpoints: Annotated[Path, typer.Option(help="where trained SAEs go")] = Path("checkpoints"),
    cache: Annotated[Path, typer.Option(help="where activations are kept")] = Path("cache"),
    no_cache: Annotated[bool, typer.Option("--no-cache", help="compute activations anew")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only: Annotated[
        str | None, typer.Option(help="only SAEs whose name matches, such as 'topk*'")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, do nothing")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code from the model's repository")
    ] = False,
    allow_pickle_weights: AllowPickle = False,
    max_size: MaxSize = 8.0,
) -> None:
    """Train what is missing, score what is missing, write reports."""
    path = _suite_path(suite)
    loaded = _load_suite(path)
    from saebench import runner

    kept = None if no_cache else cache
    limits = _limits(max_size, allow_pickle_weights)
    options = runner.Options(
        results, checkpoints, kept, _device(device), only, trust_remote_code, limits
    )
    if dry_run:
        from saebench import planner

        _print("\n".join(planner.plan(loaded, path, options)))
        return
    failed = runner.run(loaded, path, options)
    if failed:
        _complain(f"{failed} runs failed (see above); the others are finished and kept")
        raise typer.Exit(1)
    _print(_text_of(results / loaded.name))


@app.command()
def report(
    results: ResultsFolder,
    sort: Annotated[
        str | None, typer.Option(help="metric to sort by, which the column of ranks is about")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="also write leaderboard files: md, csv, tex, comma-separated")
    ] = None,
) -> None:
    """Print the leaderboard of finished runs."""
    from saebench.reports.leaderboard import Leaderboard
    from saebench.results import read

    found = read(results)
    board = Leaderboard()
    if sort is not None:
        board = Leaderboard(metrics=(*board.metrics, sort), sort=sort)
        board.check_sort(found)
    wanted = tuple(part.strip() for part in format.split(",")) if format else ()
    files = replace(board, formats=wanted)
    _print(board.text(found))
    if wanted:
        for path in files(found, results):
            _print(f"wrote {path}")


@app.command()
def compare(  # noqa: PLR0913  (the options of the command)
    results: Annotated[
        list[Path],
        typer.Option(help="the folder of one suite; twice where A and B are of two folders"),
    ],
    saes: Annotated[list[str] | None, typer.Argument(help="two SAEs", metavar="A B")] = None,
    families: Annotated[
        tuple[str, str] | None, typer.Option(help="compare two variants over sparsity instead")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="only this metric; may be given several times")
    ] = None,
    width: Annotated[int | None, typer.Option(help="of families: only this width")] = None,
    site: Annotated[str | None, typer.Option(help="of families: only this site")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the rows to a .csv file")] = None,
) -> None:
    """Compare two SAEs on the same units, or two variants at equal sparsity, with a verdict in words."""
    named = saes or []
    if len(named) != (2 if families is None else 0):
        given = [*named, *(["--families", *families] if families else [])]
        raise UserError(
            "compare takes the names of two SAEs, or two variants with --families; "
            f"got {' '.join(given) or 'neither'}"
        )
    if out is not None and out.suffix != ".csv":
        raise UserError(f"--out is {out}; expected a file whose name ends in .csv")
    if families is None:
        if width is not None or site is not None:
            raise UserError("--width and --site choose among the SAEs of --families")
        from saebench.reports import _compare

        compared = _compare.compare(named[0], named[1], results, metric or [])
        text, rows = _compare.text(compared), _compare.as_csv(compared)
    else:
        if len(results) > 1:
            raise UserError("--families compares within one folder; give --results once")
        from saebench.reports import _families

        at = _families.Place(site, width)
        found = _families.compare(families, results[0], metric or ["explained_variance"], at)
        text, rows = _families.text(found), _families.as_csv(found)
    _print(text)
    if out is not None:
        from saebench.results import write_text_whole

        write_text_whole(out, rows)
        _print(f"wrote {out}")


@app.command()
def plot(
    results: ResultsFolder,
    out: Annotated[Path, typer.Option(help="figure to write: .pdf, .svg or .png")],
    x: Annotated[str, typer.Option(help="metric along the axis")] = "l0",
    y: Annotated[str, typer.Option(help="metric up the axis")] = "loss_recovered",
) -> None:
    """Draw one Pareto figure, ready for a paper."""
    from saebench.reports.pareto import Pareto
    from saebench.results import read

    figure = Pareto(x=x, y=y)
    figure.save(figure.draw(read(results)), out)
    _print(f"wrote {out}")


@app.command()
def check(
    what: Annotated[Path, typer.Argument(help="a suite file, or the folder of a checkpoint")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    format: Format = None,
    allow_pickle_weights: AllowPickle = False,
    max_size: MaxSize = 8.0,
) -> None:
    """Say everything that can be known of a suite or a checkpoint without running it."""
    if what.is_dir() or (what.is_file() and what.suffix not in (".yaml", ".yml")):
        limits = _limits(max_size, allow_pickle_weights)
        _print("\n".join(_describe_checkpoint(what, format, limits)))
        return
    path = _suite_path(what)
    loaded = _load_suite(path)
    from saebench import planner, runner

    options = runner.Options(
        Path("results"), Path("checkpoints"), Path("cache"), _device(device), None, False
    )
    _print("\n".join(planner.plan(loaded, path, options)))


@app.command(name="list")
def list_(kind: Annotated[Kind, typer.Argument(help="what to name")]) -> None:
    """Name what a suite can name."""
    if kind.value == "suites":
        _print("\n".join(str(path) for path in registry.suites()))
        return
    names = registry.names(kind.value)
    column = max(map(len, names)) + 2
    _print("\n".join(f"{n:{column}}{registry.summary(kind.value, n)}".rstrip() for n in names))
    if kind.value == "variants":
        _print(
            "\nOptions of each: its file in baselines/. Every variant takes input_noise (denoising)."
        )


def _version(asked: bool) -> bool:
    if asked:
        _print(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train a baseline of every SAE variant, score SAEs, and compare them."""


def main() -> int:
    """The console script."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if not sys.stderr.isatty():  # bars of downloads and loading fill log files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _suite_path(given: Path) -> Path:
    """The file itself, or the suite of that name that comes along with the package."""
    named = registry.folder("suites") / f"{given}.yaml"
    return named if not given.is_file() and named.is_file() else given


def _load_suite(path: Path) -> Any:
    from saebench import suite

    return suite.load(path)


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UserError(f"--device is {asked!r}; expected auto, cpu, cuda or cuda:0")
    number = int(asked.partition(":")[2] or 0)
    if asked != "cpu" and number >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"--device is {asked}, but torch sees {found} GPUs here; use --device cpu")
    return asked


def _limits(max_size: float, allow_pickle: bool) -> Any:
    from saebench.loaders._files import Limits

    if not max_size > 0:
        raise UserError(f"--max-size is {max_size}; expected a positive number of GiB")
    return Limits(int(max_size * 1024**3), allow_pickle)


def _describe_checkpoint(path: Path, format: str | None, limits: Any) -> list[str]:
    import torch

    from saebench.checkpoints import open_checkpoint, where
    from saebench.loaders._loader import Told

    opened = open_checkpoint(str(path), format, Told(), limits, None, Path())
    lines = [f"format: {opened.format}"]
    for member in opened.members:
        sae = member.load()
        norms = torch.linalg.vector_norm(sae.W_dec, dim=-1)
        place = where(member.site, member.target)
        lines += [
            f"site: {place}" + (f", of {member.model}" if member.model else ""),
            f"architecture: {type(sae).__name__}, {sae.d_in} dimensions, {sae.d_sae} latents",
            f"decoder norms: {norms.min():.4f} to {norms.max():.4f}, mean {norms.mean():.4f}",
        ]
    return [*lines, "weights: finite, of the shapes that the configuration says"]


def _text_of(folder: Path) -> str:
    """The leaderboard, or why there is none: the runs are finished all the same."""
    from saebench.reports.leaderboard import Leaderboard
    from saebench.results import read

    try:
        return Leaderboard().text(read(folder))
    except NothingToShow as reason:
        return str(reason)


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(text: str) -> None:
    sys.stderr.write(f"saebench: {text}\n")
