"""saebench: train a baseline of every SAE variant, score SAEs, and compare them.

Parsing and printing only. Nothing heavy is imported before it is needed.
"""

import logging
import math
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
from saebench.progress import printable

_STYLE = re.compile(r"(\x1b\[[0-3](?:;[0-3])*m)")
_LONGEST = 4_000
"""Characters of a line of a message, which may quote what strangers wrote."""


class _Commands(typer.core.TyperGroup):
    """A mistake of the user's is one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _complain(str(error))
            raise typer.Exit(2) from None
        except OSError as error:
            if error.filename is None:
                raise
            _complain(f"{error.filename}: {error.strerror}")
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
SiteOption = Annotated[
    str | None, typer.Option(help="what it reads, such as 4.resid_post, where its files do not say")
]
PredictsOption = Annotated[
    str | None, typer.Option(help="of a transcoder: what it predicts, where its files do not say")
]
KOption = Annotated[
    int | None, typer.Option(help="active latents per token, where its files do not say")
]
NormOption = Annotated[
    float | None,
    typer.Option(
        help="mean length of the activations it was trained on, where they were scaled by it"
    ),
]
ResultsOption = Annotated[Path, typer.Option(help="where results go")]
CheckpointsOption = Annotated[Path, typer.Option(help="where trained SAEs go")]
CacheOption = Annotated[Path, typer.Option(help="where activations are kept")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]
_RESULT_FILES = "sae_bench_json"
"""What --format of `export` calls result files of sae_bench."""
Kind = Enum("Kind", {kind: kind for kind in (*registry.KINDS, "suites")})  # type: ignore[misc]


@app.command()
def run(  # noqa: PLR0913  (the options of the command)
    suite: SuiteFile,
    results: ResultsOption = Path("results"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
    cache: CacheOption = Path("cache"),
    no_cache: Annotated[bool, typer.Option("--no-cache", help="compute activations anew")] = False,
    device: DeviceOption = "auto",
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
    path = registry.suite_file(suite)
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
def submit(  # noqa: PLR0913  (the options of the command)
    checkpoint: Annotated[
        str, typer.Argument(help="a folder, a file, or org/name@revision/folder on the Hub")
    ],
    suite: Annotated[Path, typer.Option(help="a suite file, or the name of one that comes along")],
    name: Annotated[str, typer.Option(help="of the SAE in tables and file names")],
    format: Format = None,
    site: SiteOption = None,
    predicts: PredictsOption = None,
    k: KOption = None,
    norm: NormOption = None,
    results: ResultsOption = Path("results"),
    checkpoints: Annotated[Path, typer.Option(help="where trained SAEs are")] = Path("checkpoints"),
    cache: CacheOption = Path("cache"),
    device: DeviceOption = "auto",
    replace: Annotated[
        bool, typer.Option("--replace", help="other weights under the same name; keeps the old")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="score it although the self-check refuses it")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check it, say what would be scored, write nothing")
    ] = False,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="in a process with bounds and without a network")
    ] = False,
    isolate_memory: Annotated[float, typer.Option(help="GiB of that process")] = 8.0,
    isolate_minutes: Annotated[float, typer.Option(help="time of that process")] = 60.0,
    bundle: Annotated[
        Path | None, typer.Option(help="also write the submission to a .zip file, to hand in")
    ] = None,
    allow_pickle_weights: AllowPickle = False,
    max_size: MaxSize = 8.0,
) -> None:
    """Score a checkpoint on a suite, add it to the results, and say where it stands."""
    if bundle is not None and bundle.suffix != ".zip":
        raise UserError(f"--bundle is {bundle}; expected a file whose name ends in .zip")
    limits = _limits(max_size, allow_pickle_weights)
    from saebench import submitted

    submitted.check_name(name)  # before torch is imported
    path = registry.suite_file(suite)
    loaded = _load_suite(path)
    from saebench import runner, submission

    given = submission.checkpoint(
        checkpoint=checkpoint,
        format=format,
        name=name,
        site=site,
        predicts=predicts,
        k=k,
        norm=norm,
    )
    if isolate:
        bounds = _bounds(isolate_memory, isolate_minutes, device)
        folder = results / loaded.name
        submission.check_early(loaded, folder, name)  # before anything is downloaded
        raise typer.Exit(_isolated(checkpoint, (limits, cache), bounds, folder))
    options = runner.Options(results, checkpoints, cache, _device(device), None, False, limits)
    prepared = submission.prepare(loaded, path, options, given, dry=dry_run)
    _print("\n".join(prepared.check.lines()))
    if dry_run:
        _print("\n".join(submission.described(prepared)))
        return
    done = submission.keep(prepared, replace=replace, force=force)
    _print(done.told)
    if done.failed:
        _complain(f"{done.failed} runs failed (see above); the others are finished and kept")
        raise typer.Exit(1)
    from saebench.reports._standing import standing

    _print(standing(done.folder, done.name))
    if bundle is not None:
        _write_bundle(done.folder, done.name, bundle)


@app.command(name="bundle")
def bundle_(
    results: ResultsFolder,
    name: Annotated[str, typer.Argument(help="of a submission")],
    out: Annotated[Path, typer.Argument(help="file to write: .zip")],
) -> None:
    """Write an earlier submission to a file that can be handed in."""
    _write_bundle(results, name, out)


@app.command()
def adopt(
    bundle: Annotated[Path, typer.Argument(help="a .zip file that has been verified")],
    results: ResultsFolder,
    replace: Annotated[
        bool, typer.Option("--replace", help="keep what is there under its name as history")
    ] = False,
) -> None:
    """Put a submission that somebody handed in into the results of its suite."""
    from saebench.bundle import adopt

    name = adopt(bundle, results, replace)
    _print(f"{name} is in {results}; saebench report {results} --format md,csv,tex shows it")


@app.command()
def verify(  # noqa: PLR0913  (the options of the command)
    bundle: Annotated[Path, typer.Argument(help="a .zip file that submit or bundle wrote")],
    suite: Annotated[
        Path | None, typer.Option(help="compare it with a suite file, or one that comes along")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="score a sample of sequences again with these weights")
    ] = None,
    format: Format = None,
    site: SiteOption = None,
    predicts: PredictsOption = None,
    k: KOption = None,
    norm: NormOption = None,
    sample: Annotated[
        int | None, typer.Option(help="sequences to score again; 64 where not given", min=1)
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="score every sequence again")] = False,
    seed: Annotated[
        int | None, typer.Option(help="of the sample; drawn anew where not given", min=0)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="relative difference of units that counts as none", min=0)
    ] = 1e-4,
    texts: Annotated[
        bool, typer.Option("--texts", help="also score evals again that bring their own text")
    ] = False,
    cache: CacheOption = Path("cache"),
    device: DeviceOption = "auto",
    allow_pickle_weights: AllowPickle = False,
    max_size: MaxSize = 8.0,
) -> None:
    """Check a submission: its file alone, against its suite, against its checkpoint."""
    if checkpoint is not None and suite is None:
        raise UserError("--checkpoint scores on a suite; say on which with --suite")
    if all_ and sample is not None:
        raise UserError(f"--all is every sequence, and --sample {sample} some; give one of the two")
    import secrets

    from saebench import runner, submission, verification

    given, place = None, None
    if checkpoint is not None:
        given = submission.checkpoint(
            checkpoint=checkpoint,
            format=format,
            name="verified",
            site=site,
            predicts=predicts,
            k=k,
            norm=norm,
        )
    if suite is not None:
        path = registry.suite_file(suite)
        limits = _limits(max_size, allow_pickle_weights)
        nowhere = Path()  # nothing is written but the cache
        options = runner.Options(nowhere, nowhere, cache, _device(device), None, False, limits)
        place = verification.Place(_load_suite(path), path, options)
    drawn = secrets.randbelow(2**32) if seed is None else seed
    sequences = None if all_ else sample or verification.SEQUENCES
    sampling = verification.Sampling(sequences, drawn, tolerance, texts)
    found = verification.verify(bundle, place, given, sampling)
    _print(found.text)
    if found.problems:
        raise typer.Exit(2)


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
def audit(  # noqa: PLR0913  (the options of the command)
    suite: SuiteFile,
    results: ResultsOption = Path("results"),
    checkpoints: CheckpointsOption = Path("checkpoints"),
    cache: CacheOption = Path("cache"),
    device: DeviceOption = "auto",
    draws: Annotated[int, typer.Option(help="evaluation texts that are drawn", min=2)] = 5,
    references: Annotated[
        int, typer.Option(help="SAEs that are scored under every condition", min=3)
    ] = 6,
    seeds: Annotated[
        int, typer.Option(help="trainings of three of them, where the suite has fewer", min=1)
    ] = 3,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="results of an audited suite on a synthetic subject, which say how metrics agree with true features; "
            "if not given, synthetic_small beside the suite's own, where it is there"
        ),
    ] = None,
) -> None:
    """Measure how far each metric of a suite can be relied on: the reliability card."""
    path = registry.suite_file(suite)
    loaded = _load_suite(path)
    from saebench import auditor, runner
    from saebench.reports import _card

    options = runner.Options(results, checkpoints, cache, _device(device), None, False)
    extent = auditor.Extent(draws, references, seeds)
    card = auditor.audit(loaded, path, options, extent, truth or auditor.panel_beside(results))
    _print(_card.text(card))


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
def plot(  # noqa: PLR0913  (the options of the command)
    results: ResultsFolder,
    out: Annotated[Path, typer.Option(help="figure to write: .pdf, .svg or .png")],
    x: Annotated[str, typer.Option(help="metric along the axis")] = "l0",
    y: Annotated[str, typer.Option(help="metric up the axis")] = "loss_recovered",
    site: Annotated[str | None, typer.Option(help="only SAEs of this site")] = None,
    width: Annotated[int | None, typer.Option(help="only SAEs of this width")] = None,
) -> None:
    """Draw one Pareto figure, ready for a paper."""
    from saebench.reports._table import only
    from saebench.reports.pareto import Pareto
    from saebench.results import read

    figure = Pareto(x=x, y=y)
    figure.save(figure.draw(only(read(results), site, width)), out)
    _print(f"wrote {out}")


@app.command()
def export(  # noqa: PLR0913  (the options of the command)
    what: Annotated[
        str,
        typer.Argument(help="a checkpoint, here or on the Hub; for sae_bench_json, results"),
    ],
    out: Annotated[Path, typer.Argument(help="folder to write, new or empty")],
    format: Annotated[
        str, typer.Option(help="of `saebench list exports`, or sae_bench_json for results")
    ],
    from_format: Annotated[
        str | None, typer.Option("--from", help="format of the checkpoint, where several fit")
    ] = None,
    site: SiteOption = None,
    predicts: PredictsOption = None,
    k: KOption = None,
    norm: NormOption = None,
    mode: Annotated[
        str | None, typer.Option(help="of sae_bench_json: sb-0125, sb-0.6 or native")
    ] = None,
    sae: Annotated[
        list[str] | None, typer.Option(help="of sae_bench_json: only this SAE; several times")
    ] = None,
    cache: Annotated[Path, typer.Option(help="where downloads are kept")] = Path("cache"),
    allow_pickle_weights: AllowPickle = False,
    max_size: MaxSize = 8.0,
) -> None:
    """Write a checkpoint, or results, as another tool reads them."""
    if format == _RESULT_FILES:
        if any(given is not None for given in (from_format, site, predicts, k, norm)):
            raise UserError(
                "--from, --site, --predicts, --k and --norm are about checkpoints, not results"
            )
        _export_results(Path(what), out, mode, sae)
        return
    if mode is not None or sae is not None:
        raise UserError(f"--mode and --sae are about results, with --format {_RESULT_FILES}")
    known = registry.names("exports")
    if format not in known:
        raise UserError(
            f"--format is {format!r}; expected one of {', '.join([*known, _RESULT_FILES])}"
        )
    from saebench import exchange
    from saebench.checkpoints import open_checkpoint

    told = _told(site, predicts, k, norm)
    limits = _limits(max_size, allow_pickle_weights)
    opened = open_checkpoint(what, from_format, told, limits, cache, Path())
    for name in exchange.export(opened, told, format, out):
        _print(f"wrote {out / name}")
    _print(f"read back as {format}, it gives what the checkpoint gives")


@app.command(name="import")
def import_(
    files: Annotated[
        list[Path], typer.Argument(help="result files of sae_bench, *_eval_results.json")
    ],
    out: Annotated[Path, typer.Argument(help="folder of imported results, new or of such")],
) -> None:
    """Read result files of sae_bench as rows of a leaderboard of their own."""
    from saebench import peer_json

    new = peer_json.import_(files, out)
    of = "file" if len(files) == 1 else "files"
    _print(f"{len(files)} {of} read, {len(new)} of them new; `saebench report {out}` shows {out}")


@app.command()
def check(  # noqa: PLR0913  (the options of the command)
    what: Annotated[Path, typer.Argument(help="a suite file, or the folder of a checkpoint")],
    results: Annotated[Path, typer.Option(help="where those of a suite are")] = Path("results"),
    checkpoints: Annotated[Path, typer.Option(help="where trained SAEs are")] = Path("checkpoints"),
    cache: CacheOption = Path("cache"),
    device: DeviceOption = "auto",
    format: Format = None,
    site: SiteOption = None,
    predicts: PredictsOption = None,
    k: KOption = None,
    norm: NormOption = None,
    allow_pickle_weights: AllowPickle = False,
    max_size: MaxSize = 8.0,
) -> None:
    """Say everything that can be known of a suite or a checkpoint without running it."""
    if what.is_dir() or (what.is_file() and what.suffix not in (".yaml", ".yml")):
        limits = _limits(max_size, allow_pickle_weights)
        told = _told(site, predicts, k, norm)
        _print("\n".join(_describe_checkpoint(what, format, told, limits)))
        return
    path = registry.suite_file(what)
    loaded = _load_suite(path)
    from saebench import planner, runner

    options = runner.Options(results, checkpoints, cache, _device(device), None, False)
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


def _export_results(results: Path, out: Path, mode: str | None, saes: list[str] | None) -> None:
    from saebench import peer_json

    found = next((known for known in peer_json.MODES if known == mode), None)
    if found is None:
        given = "is not given" if mode is None else f"is {mode!r}"
        raise UserError(
            f"--mode {given}; expected one of {', '.join(peer_json.MODES)}: which definitions the numbers have"
        )
    for path in peer_json.export(results, out, found, saes):
        _print(f"wrote {path}")


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
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if not sys.stderr.isatty():  # bars of downloads and loading fill log files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


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


def _write_bundle(results: Path, name: str, out: Path) -> None:
    from saebench import bundle

    bundle.write(results, name, out)
    _print(f"wrote {out}")


def _bounds(memory: float, minutes: float, device: str) -> Any:
    from saebench.isolation import Bounds

    for option, given in (("--isolate-memory", memory), ("--isolate-minutes", minutes)):
        if not 0 < given < math.inf:
            raise UserError(f"{option} is {given}; expected a positive number")
    on_gpu = _device(device) != "cpu"
    return Bounds(None if on_gpu else int(memory * 1024**3), 60 * minutes)


def _isolated(checkpoint: str, download: tuple[Any, Path], bounds: Any, folder: Path) -> int:
    """The same command in a process of its own, after the download. `folder`: where that one writes."""
    from saebench import isolation, submission

    pinned = {checkpoint: submission.fetched(checkpoint, *download)}
    arguments = [pinned.get(part, part) for part in sys.argv[1:] if part != "--isolate"]
    try:
        return isolation.run(arguments, bounds)
    except isolation.Killed:
        submission.tidy(folder)
        raise


def _limits(max_size: float, allow_pickle: bool) -> Any:
    from saebench.loaders._files import Limits

    if not max_size > 0:
        raise UserError(f"--max-size is {max_size}; expected a positive number of GiB")
    return Limits(int(max_size * 1024**3), allow_pickle)


def _told(site: str | None, predicts: str | None, k: int | None, norm: float | None) -> Any:
    from saebench.loaders._loader import Told
    from saebench.sites import parse_site

    places = [None if given is None else parse_site(given) for given in (site, predicts)]
    return Told(places[0], places[1], k, norm)


def _describe_checkpoint(path: Path, format: str | None, told: Any, limits: Any) -> list[str]:
    import torch

    from saebench.checkpoints import open_checkpoint, where

    opened = open_checkpoint(str(path), format, told, limits, None, Path())
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
    # Tables for a terminal have bold and dim parts, which say nothing but that, whoever wrote them.
    parts = _STYLE.split(text) if sys.stdout.isatty() else [text]
    shown = [part if _STYLE.fullmatch(part) else printable(part) for part in parts]
    sys.stdout.write("".join(shown) + "\n")
    sys.stdout.flush()  # in its place among the lines of progress where both go to one file


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _complain(text: str) -> None:
    sys.stderr.write("saebench: " + printable("\n".join(map(_cut, text.split("\n")))) + "\n")


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
