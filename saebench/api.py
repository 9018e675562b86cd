"""For notebooks: `saebench.load` a checkpoint in any format, `saebench.score` any object that encodes and decodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from saebench import registry, results, runner, selfcheck, submission
from saebench.checkpoints import one_at, open_checkpoint, where
from saebench.errors import UserError
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.progress import say
from saebench.results import Entry
from saebench.runner import Candidate, Options, Workbench
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.sites import parse_site
from saebench.submission import Prepared
from saebench.suite import Suite
from saebench.suite import load as load_suite
from saebench.types import SAE, Site
from saebench.wrapped import Wrapped

_SHOWN = ["sae", "eval", "params", "metric", "value", "ci_low", "ci_high", "best", "unit", "n"]
_SHOWN += ["n_units", "reference", "site", "version", "doc"]
_CHECKED_ON = 64
"""Tokens on which shapes are checked."""


class Loaded(NamedTuple):
    """An SAE of a checkpoint, on the CPU in float32, on raw activations."""

    sae: Dictionary | Normalized
    site: Site
    """What it reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""
    model: str | None
    """The language model, as the files name it."""
    format: str
    origin: dict[str, Any]
    """Where it is from: for a Hub id, the commit."""


def load(  # noqa: PLR0913  (what files may leave open)
    path: str | Path,
    format: str | None = None,
    *,
    site: str | None = None,
    predicts: str | None = None,
    k: int | None = None,
    norm: float | None = None,
    allow_pickle_weights: bool = False,
    max_size: float = 8.0,
    cache: str | Path = "cache",
) -> Loaded:
    """The SAE of a checkpoint: a path, or `org/name@revision/folder` on the Hub, in any of the known formats.

    `site`, such as "4.resid_post", names one of several, or says what the files do not; so do `predicts`, `k` and
    `norm`. `max_size` is in GiB.
    """
    reads, predicted = (None if s is None else parse_site(s) for s in (site, predicts))
    limits = Limits(int(max_size * 1024**3), allow_pickle_weights)
    told = Told(reads, predicted, k, norm)
    opened = open_checkpoint(str(path), format, told, limits, Path(cache), Path())
    places = [(member.site, member.target) for member in opened.members]
    if reads is not None:
        places = [place for place in places if place[0] == reads]
    member = one_at(opened, places)
    return Loaded(
        member.load(), member.site, member.target, member.model, opened.format, opened.origin
    )


def score(  # noqa: PLR0913  (where it is scored, and where results go)
    sae: Any,
    suite: str | Path | Suite = "quickstart",
    *,
    site: str | None = None,
    predicts: str | None = None,
    name: str = "my-sae",
    results: str | Path | None = None,
    replace: bool = False,
    force: bool = False,
    cache: str | Path | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Scores of an SAE on the evals of a suite, one row for each metric, with intervals.

    `sae` is anything with `encode` and `decode` on `[n d]` tensors of raw activations (`wrapped.Wrapped`), or what
    `load` gives. `site` is needed where the suite looks at several. It is checked first, as by `saebench submit`, and
    `force` scores it whatever the check says. Nothing is kept, unless `results` names a results folder: then it becomes
    a submission of the suite there. An object without weights of its own is recognised by what it does: its checksum is
    that of its codes and predictions on the tokens of the self-check.
    """
    file, asked = _suite(suite)
    if results is None:  # for whom would they be
        asked = asked.model_copy(update={"reports": []})
    with _folder(results) as folder:
        kept = None if cache is None else Path(cache)
        options = Options(folder, folder / "checkpoints", kept, device, None, False)
        prepared = _prepared(Workbench(asked, file, options), sae, name, (site, predicts))
        for line in prepared.check.lines():
            say(line)
        done = submission.keep(prepared, replace=replace, force=force)
        return _table(done.folder, done.name, done.failed)


def _prepared(
    bench: Workbench, sae: Any, name: str, named: tuple[str | None, str | None]
) -> Prepared:
    if isinstance(sae, Loaded):
        named = (named[0] or str(sae.site), named[1] or str(sae.target))
        sae = sae.sae
    site, target = _place(bench, *named)
    x = _activations(bench, site)
    if not len(x):
        raise UserError("the suite's training text has no token to check the SAE on")
    d_out = bench.subject.width(target)
    known = isinstance(sae, Dictionary | Normalized)
    with torch.no_grad():
        whole: SAE = sae if known else Wrapped(sae, x[:_CHECKED_ON], d_out)
    if (whole.d_in, getattr(whole, "d_out", d_out)) != (x.shape[1], d_out):
        raise UserError(
            f"the SAE reads activations of {whole.d_in} dimensions; those at {site} have {x.shape[1]}"
        )
    checksum = whole.checksum(x) if isinstance(whole, Wrapped) else runner.weights_checksum(whole)
    entry = Entry("checkpoint", "python", whole.d_sae, None, None, where(site, target))
    origin = {"from": "python", "class": type(sae).__name__}
    candidate = Candidate(name, entry, site, target, checksum, lambda: whole, origin=origin)
    return Prepared(bench, candidate, "python", submission.checked(bench, candidate))


def _place(bench: Workbench, site: str | None, predicts: str | None) -> tuple[Site, Site]:
    places = bench.places()
    if site is not None:
        reads = parse_site(site)
        place = (reads, parse_site(predicts) if predicts is not None else reads)
        bench.subject.check_site(place[0])
        bench.subject.check_site(place[1])
        return place
    if len(places) != 1 or predicts is not None:
        raise UserError(
            f"say which site the SAE reads, with site; the suite looks at {', '.join(where(*p) for p in places)}"
        )
    return places[0]


def _activations(bench: Workbench, site: Site) -> Float[Tensor, "n d"]:
    """Those of the self-check."""
    return torch.cat([part.streams[site] for part in selfcheck.reader(bench)([site])])


def _suite(given: str | Path | Suite) -> tuple[Path, Suite]:
    """A suite's file, the name of one that comes along, or one that is read already."""
    if isinstance(given, Suite):
        return Path("suite.yaml"), given
    path = registry.suite_file(given)
    return path, load_suite(path)


@contextmanager
def _folder(asked: str | Path | None) -> Iterator[Path]:
    if asked is not None:
        yield Path(asked)
        return
    with TemporaryDirectory(prefix="saebench-") as folder:
        yield Path(folder)


def _table(folder: Path, name: str, failed: int) -> pd.DataFrame:
    if failed and not (folder / "suite.json").is_file():
        raise UserError(
            f"{failed} runs failed, and none is finished; see above for what went wrong"
        )
    if failed:
        say(f"{failed} runs failed (see above); the others are finished")
    found = results.read(folder)
    for what, rows in (("is skipped", found.skips), ("leaves something out", found.omitted)):
        for row in rows[rows["sae"] == name].itertuples():
            say(f"{row.eval} {what}: {row.reason}")
    scores = found.scores[found.scores["sae"] == name]
    return scores[_SHOWN].reset_index(drop=True)
