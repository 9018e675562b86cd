"""Trains what is missing: every SAE of a suite, over all its sites, on one stream of activations.

The stream is cut into blocks of exactly `buffer_tokens` tokens; a block is read from the language model, shuffled as
a whole and handed out in batches. Rows of the text are shuffled over the whole text before that. So the batch of
any step follows from the text alone: an SAE is the same whoever is trained beside it, and a run that was stopped
continues with the very batches that were to come.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save
from torch import Tensor

import saebench
from saebench import results
from saebench.errors import UserError
from saebench.loaders._native import FORMAT, read_native
from saebench.progress import Meter, say, several
from saebench.saes._dictionary import Dictionary, Scaling
from saebench.suite import TrainedSAE, step_reaching
from saebench.types import Site, Spec
from saebench.variants._training import (
    DictionaryTraining,
    Downstream,
    Lesson,
    Task,
    Training,
    Variant,
)

VERSION = 2
"""Raised by every change that can move a trained weight."""

SECONDS_BETWEEN_SAVES = 20.0
_SNAPSHOTS = "snapshots"
_RETRAINING = "retraining"
"""Where a finished SAE is trained again for its snapshots; what is made there moves out of it at the end."""
# What torch.load and load_state_dict raise, depending on which byte is wrong.
_DAMAGED = (
    RuntimeError,
    KeyError,
    TypeError,
    ValueError,
    EOFError,
    OSError,
    pickle.UnpicklingError,
)
_MEMORY_SHARE = 0.5


@runtime_checkable
class Reader(Protocol):
    """What training needs of a subject."""

    identity: Spec

    def read(
        self, sites: list[Site], rows: Int[Tensor, "rows context"]
    ) -> dict[Site, Float[Tensor, "rows context d"]]: ...

    def passage(
        self, site: Site, rows: Int[Tensor, "rows context"], special: Bool[Tensor, "rows context"]
    ) -> "Passage": ...


@runtime_checkable
class Passage(Protocol):
    """Some rows of text, with the stream at a site to be replaced (`subject.Passage`)."""

    x: Float[Tensor, "n d"]

    def divergence(
        self, replacement: Float[Tensor, "n d"], later: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]: ...


@dataclass(frozen=True)
class TrainRun:
    """One SAE to train, with all that determines its weights."""

    sae: TrainedSAE
    model: Spec
    text: str
    """Fingerprint of the training tokens."""
    tokens: int
    batch_tokens: int
    buffer_tokens: int
    dtype: str
    """Of the batches."""
    parent: "TrainRun | None" = None
    """The SAE that it starts from."""
    frozen: bool = False
    """Whether the decoder stays at its random start, for a control."""

    def spec(self) -> Spec:
        sae = self.sae
        taken_away = {"frozen_decoder": True} if self.frozen else {}
        return taken_away | {
            "trainer": VERSION,
            "model": self.model,
            "site": str(sae.site),
            "target": str(sae.target),
            "parent": self.parent and results.key(self.parent.spec()),
            "text": self.text,
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "buffer_tokens": self.buffer_tokens,
            "dtype": self.dtype,
            "variant": sae.variant,
            "recipe": dataclasses.asdict(sae.recipe),
            "width": sae.width,
            "l0": sae.l0,
            "seed": sae.seed,
        }

    def folder(self, checkpoints: Path) -> Path:
        return checkpoints / f"{self.sae.name}--{results.key(self.spec())}"

    def done(self, checkpoints: Path) -> bool:
        return _is_whole(self.folder(checkpoints))

    def checksum(self, checkpoints: Path) -> str:
        """Of the trained weights, as the record says: what they are is checked when they are loaded."""
        return recorded_checksum(self.folder(checkpoints))

    def snapshot(self, checkpoints: Path, tokens: int) -> Path:
        """Where the SAE is as it was after the first step that reached so many tokens."""
        return self.folder(checkpoints) / _SNAPSHOTS / str(tokens)

    def snapshots_missing(self, checkpoints: Path, snapshots: Sequence[int]) -> list[int]:
        """Those of the wanted token counts that there is no snapshot of."""
        return [n for n in snapshots if not _is_whole(self.snapshot(checkpoints, n))]

    def to_train(self, checkpoints: Path, snapshots: Sequence[int]) -> bool:
        """Whether it is not trained yet, or lacks a snapshot that only a training can give."""
        return not self.done(checkpoints) or bool(self.snapshots_missing(checkpoints, snapshots))


def recorded_checksum(folder: Path) -> str:
    """Of the weights of a checkpoint or a snapshot, as its record says."""
    record = folder / "sae.json"
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["checksum"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{record} is damaged: expected JSON with a checksum; delete the folder to train the "
            "SAE again, or restore the file"
        ) from None


def _is_whole(folder: Path) -> bool:
    return (folder / "sae.json").exists()


class Stream:
    """Shuffled activations of some sites, batch by batch, from any step on."""

    def __init__(  # noqa: PLR0913  (what determines the batches, and nothing else)
        self,
        subject: Reader,
        sites: list[Site],
        rows: Int[np.ndarray, "rows context"],
        special: Bool[np.ndarray, "rows context"],
        *,
        tokens: int,
        batch_tokens: int,
        buffer_tokens: int,
        rows_at_a_time: int,
    ) -> None:
        self.subject, self.sites, self.rows, self.special = subject, sites, rows, special
        self.batch_tokens, self.rows_at_a_time = batch_tokens, rows_at_a_time
        self.steps = tokens // batch_tokens
        self.steps_per_block = min(buffer_tokens // batch_tokens, self.steps)
        per_pass = int((~special).sum())
        passes = math.ceil(self.steps * batch_tokens / per_pass)
        self._order = np.concatenate(
            [np.random.default_rng(i).permutation(len(rows)) for i in range(passes)]
        )
        counts = (~special).sum(1)[self._order]
        self._starts = np.concatenate([[0], counts.cumsum()])
        self._statistics: dict[Site, Scaling] = {}
        self._last: tuple[int, dict[Site, Tensor]] | None = None
        self._passages: dict[tuple[Site, int], Passage] = {}

    def batches(
        self, first_step: int, ahead: Executor | None = None
    ) -> Iterator[dict[Site, Float[Tensor, "n d"]]]:
        """Centred and scaled activations for every step from `first_step` on.

        With `ahead`, the language model reads the next block there while this one is learned from, which takes the
        memory of two. Nobody else may use the model then.
        """
        numbers = range(first_step // self.steps_per_block, self._n_blocks())
        coming: Future[dict[Site, Tensor]] | None = None
        for number in numbers:
            if coming is not None:
                self._last = (number, _handed_over(coming.result()))
            self.statistics()
            self._block(number)
            if ahead is not None and number + 1 in numbers:
                coming = ahead.submit(self._read_aside, number + 1)
            yield from self._batches_of(number, first_step)

    def _batches_of(
        self, number: int, first_step: int
    ) -> Iterator[dict[Site, Float[Tensor, "n d"]]]:
        statistics, block = self.statistics(), self._block(number)
        size = len(block[self.sites[0]])
        order = torch.from_numpy(np.random.default_rng([1, number]).permutation(size))
        skipped = max(0, first_step - number * self.steps_per_block)
        for picked in order.split(self.batch_tokens)[skipped:]:
            yield {
                site: statistics[site].apply(x[picked.to(x.device)]) for site, x in block.items()
            }
            self._passages.clear()  # the step is over

    def sequences(
        self, step: int
    ) -> tuple[Int[Tensor, "rows context"], Bool[Tensor, "rows context"]]:
        """Whole rows of about as many tokens as a batch has, and where they are special: other rows at every step."""
        n = max(1, self.batch_tokens // self.rows.shape[1])
        chosen = self._order[np.arange(step * n, (step + 1) * n) % len(self._order)]
        ids = torch.from_numpy(self.rows[chosen].astype(np.int64))
        return ids, torch.from_numpy(self.special[chosen])

    def passage(self, site: Site, step: int) -> Passage:
        """Those sequences on their way through the model: the same for all SAEs of a step."""
        if (site, step) not in self._passages:
            self._passages[site, step] = self.subject.passage(site, *self.sequences(step))
        return self._passages[site, step]

    def statistics(self) -> dict[Site, Scaling]:
        """Mean and sqrt(E|x - mean|^2) of the first block."""
        if not self._statistics:
            self._statistics = {site: _statistics(site, x) for site, x in self._block(0).items()}
        return self._statistics

    def calibration(self, site: Site, n: int) -> Float[Tensor, "n d"]:
        """The first n tokens of the stream, as they are."""
        return self._block(0)[site][:n].float()

    def _n_blocks(self) -> int:
        return math.ceil(self.steps / self.steps_per_block)

    def _block(self, number: int) -> dict[Site, Float[Tensor, "block d"]]:
        """The tokens of one block in the order of the text; rows at its borders belong to two blocks.

        The last one is kept: statistics, the first steps and controls all ask for the first.
        """
        if self._last is None or self._last[0] != number:
            self._last = None  # frees the memory before the next block is read
            self._last = (number, self._read_block(number))
        return self._last[1]

    def _read_aside(self, number: int) -> dict[Site, Float[Tensor, "block d"]]:
        """On a CUDA stream of its own where there are such, so that the training does not wait for it."""
        if not torch.cuda.is_available():
            return self._read_block(number)
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            block = self._read_block(number)
        aside.synchronize()
        return block

    def _read_block(self, number: int) -> dict[Site, Float[Tensor, "block d"]]:
        size = self.steps_per_block * self.batch_tokens
        first, last = number * size, min((number + 1) * size, self.steps * self.batch_tokens)
        row_from = int(np.searchsorted(self._starts, first, side="right")) - 1
        row_to = int(np.searchsorted(self._starts, last, side="left"))
        chosen = self._order[row_from:row_to]
        skipped = first - int(self._starts[row_from])
        pieces: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        for numbers in np.array_split(chosen, math.ceil(len(chosen) / self.rows_at_a_time)):
            kept = torch.from_numpy(~self.special[numbers])
            ids = torch.from_numpy(self.rows[numbers].astype(np.int64))
            for site, x in self.subject.read(self.sites, ids).items():
                pieces[site].append(x[kept.to(x.device)])
        return {site: torch.cat(p)[skipped : skipped + last - first] for site, p in pieces.items()}


def _handed_over(block: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """Memory from another CUDA stream must not be used again there before this stream is done with it."""
    for x in block.values():
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))
    return block


def train_missing(
    runs: list[TrainRun], stream: Stream, snapshots: Sequence[int], checkpoints: Path, device: str
) -> None:
    """Trains what has no checkpoint yet, in as few passes as memory allows. Stopped work is continued.

    `snapshots` are token counts at which each SAE is also kept as it is by then. What is finished and lacks one of
    them is trained again from the start, to the same bits, and keeps its checkpoint. What starts from another SAE is
    trained after it. Raises `UserError` where training has diverged, once all others are finished.
    """
    missing = [run for run in runs if run.to_train(checkpoints, snapshots)]
    for run in runs:
        if run.done(checkpoints):
            _tidy(run.folder(checkpoints), keep_retraining=run in missing)
    if again := sum(run.done(checkpoints) for run in missing):
        say(f"trained again for their snapshots: {several(again, 'finished SAE')}")
    diverged: list[str] = []
    for stage in stages(missing):
        possible = [run for run in stage if run.parent is None or run.parent.done(checkpoints)]
        groups = split_groups(possible, widths_of(stream), memory_for_training(device))
        for number, group in enumerate(groups, 1):
            which = f" (group {number} of {len(groups)})" if len(groups) > 1 else ""
            # No name here for the pupils, which would keep their memory while the next group is made.
            diverged += _train_group(
                [_Pupil(run, stream, snapshots, checkpoints, device) for run in group],
                stream,
                device,
                f"training {several(len(group), 'SAE')}{which}",
            )
    if diverged:
        raise UserError(
            f"training {', '.join(diverged)} led to weights that are not finite; lower "
            f"{'its' if len(diverged) == 1 else 'their'} lr, or take back what else in the recipe is far from its "
            "baseline. All other SAEs are trained, but for those that start from one of these"
        )


def stages(runs: list[TrainRun]) -> list[list[TrainRun]]:
    """Those without a parent, then those with one; none is empty."""
    parted = [[r for r in runs if (r.parent is not None) == later] for later in (False, True)]
    return [stage for stage in parted if stage]


def widths_of(stream: Stream) -> dict[Site, int]:
    return {site: len(s.mean) for site, s in stream.statistics().items()}


def split_groups(
    runs: list[TrainRun], widths: dict[Site, int], budget: float
) -> list[list[TrainRun]]:
    """Runs that fit into `budget` bytes together, the largest first; one alone may be larger."""

    def size(run: TrainRun) -> int:
        return training_bytes(run, widths[run.sae.site], widths[run.sae.target])

    groups: list[list[TrainRun]] = []
    left: list[float] = []
    for run in sorted(runs, key=size, reverse=True):
        room = next((i for i, free in enumerate(left) if size(run) <= free), None)
        if room is None:
            room = len(groups)
            groups.append([])
            left.append(budget)
        groups[room].append(run)
        left[room] -= size(run)
    return groups


def training_bytes(run: TrainRun, d_in: int, d_out: int) -> int:
    """Weights, gradients and Adam's two moments, and the latents of a batch with their gradient, in float32."""
    return 4 * (4 * (d_in + d_out) + 2 * run.batch_tokens) * run.sae.width


class _Pupil:
    """One SAE of a group with its optimiser and the step it has reached."""

    def __init__(
        self,
        run: TrainRun,
        stream: Stream,
        snapshots: Sequence[int],
        checkpoints: Path,
        device: str,
    ) -> None:
        self.run, self.stream, self.step = run, stream, 0
        self.diverged = False
        """Whether its weights are not finite: it learns no more, and nothing of it is kept."""
        self.folder, self.device = run.folder(checkpoints), device
        self.again = run.done(checkpoints)
        """Whether it is trained for its snapshots alone."""
        self.work = self.folder / _RETRAINING if self.again else self.folder
        self.snapshots = {
            step_reaching(tokens, stream.steps, stream.batch_tokens): tokens for tokens in snapshots
        }
        self.training: Training = run.sae.recipe.start(self._task(checkpoints)).to(device)
        if run.frozen:
            assert isinstance(self.training, DictionaryTraining), "planned from one with a decoder"
            self.training.freeze_decoder()
        self.optimizer = optimizer_of(self.training, run.sae.recipe)
        precise = run.sae.recipe.float32 or run.dtype == "float32"
        self.dtype = torch.float32 if precise else torch.bfloat16
        self.state = self.work / "training.pt"
        if self.state.exists():
            self._restore(device)

    def learn(self, batch: dict[Site, Float[Tensor, "n d"]]) -> None:
        sae = self.run.sae
        progress = self.step / self.stream.steps
        generator = torch.Generator(self.device).manual_seed((sae.seed << 40) + self.step)
        if sae.recipe.end_to_end:
            lesson = self._whole_sequences(progress, generator)
        else:
            x = batch[sae.site].to(self.dtype)
            lesson = Lesson(x, batch[sae.target], progress, generator, None)
        learn(self.training, self.optimizer, sae.recipe, lesson, 1 / self.stream.steps)
        self.step += 1
        # Before the state of this step can be saved: where that exists, so do the snapshots up to it.
        if self.step in self.snapshots:
            self._keep(self.snapshots[self.step])

    def _task(self, checkpoints: Path) -> Task:
        sae, statistics = self.run.sae, self.stream.statistics()
        parent = None
        if self.run.parent is not None:
            parent = read_native(self.run.parent.folder(checkpoints)).sae
            read, predicted = (_inverse(statistics[site].cpu()) for site in (sae.site, sae.target))
            with torch.no_grad():
                parent.fold(read, predicted)
        return Task(
            d_in=len(statistics[sae.site].mean),
            d_out=len(statistics[sae.target].mean),
            width=sae.width,
            l0=sae.l0,
            tokens=self.run.tokens,
            generator=torch.Generator().manual_seed(sae.seed),
            transcodes=sae.target != sae.site,
            skip=False,
            parent=parent,
        )

    def _whole_sequences(self, progress: float, generator: torch.Generator) -> Lesson:
        sae, statistics = self.run.sae, self.stream.statistics()[self.run.sae.site]
        passage = self.stream.passage(sae.site, self.step)
        x = statistics.apply(passage.x)

        def downstream(x_hat: Tensor, later: bool) -> Downstream:
            raw = x_hat * statistics.scale + statistics.mean
            return Downstream(*passage.divergence(raw, later))

        return Lesson(x, x, progress, generator, downstream)

    def save(self) -> None:
        """The state of the training, written whole."""
        if self._exported() is None:
            return
        state = {
            "step": self.step,
            "training": self.training.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        # By way of memory: torch hides what the disk says when it writes itself.
        content = io.BytesIO()
        torch.save(state, content)
        with results.whole_file(self.state, content.tell()) as file:
            file.write(content.getbuffer())

    def finish(self) -> bool:
        """Writes the checkpoint, the record last, and drops the training state.

        What is trained again leaves its snapshots alone, and none where it has become another SAE: then False.
        """
        sae = self._exported()
        if sae is None:
            return True
        same = not self.again or _checksum(_content(sae)) == recorded_checksum(self.folder)
        if not self.again:
            write_checkpoint(self.folder, sae, self.run)
        elif same:
            self._hand_over()
        _tidy(self.folder, keep_retraining=False)
        return same

    def _keep(self, tokens: int) -> None:
        """A snapshot of what is trained so far."""
        place = self.work / _SNAPSHOTS / str(tokens)
        seen = self.step * self.stream.batch_tokens
        if (sae := self._exported()) is not None:
            write_checkpoint(place, sae, self.run, tokens_seen=seen)

    def _hand_over(self) -> None:
        """New snapshots move to where the finished SAE is."""
        for made in (self.work / _SNAPSHOTS).iterdir():
            place = self.folder / _SNAPSHOTS / made.name
            if _is_whole(place) or not _is_whole(made):
                continue
            if place.exists():  # what a killed process left half written
                shutil.rmtree(place)
            place.parent.mkdir(exist_ok=True)
            made.rename(place)

    def _exported(self) -> Dictionary | None:
        """The SAE as it is now, of raw activations; None where it has diverged."""
        statistics = self.stream.statistics()
        read, predicted = (
            statistics[site].cpu() for site in (self.run.sae.site, self.run.sae.target)
        )
        with torch.no_grad():
            sae = self.training.export().cpu()
            sae.fold(read, predicted)
        if all(bool(torch.isfinite(w).all()) for w in sae.state_dict().values()):
            return sae
        if not self.diverged:
            say(
                f"{self.run.sae.name} has weights that are not finite at step {self.step} of "
                f"{self.stream.steps} and learns no more"
            )
        self.diverged = True
        return None

    def _snapshots_until(self, step: int) -> bool:
        """Whether all that were to be made by this step are there."""
        due = [str(tokens) for at, tokens in self.snapshots.items() if at <= step]
        places = [folder / _SNAPSHOTS for folder in (self.work, self.folder)]
        return all(any(_is_whole(place / tokens) for place in places) for tokens in due)

    def _restore(self, device: str) -> None:
        """Where the training was stopped; at the start, where a snapshot is wanted now that it has gone past."""
        try:
            state = torch.load(self.state, map_location=device, weights_only=True)
            if not self._snapshots_until(int(state["step"])):
                return
            self.training.load_state_dict(state["training"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except torch.OutOfMemoryError:
            raise  # a RuntimeError too, and none of the file's making
        except _DAMAGED:
            raise UserError(
                f"{self.state} is damaged: expected the state of a stopped training; delete it to "
                "train from the start"
            ) from None


def optimizer_of(training: Training, recipe: Variant) -> torch.optim.Adam:
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.Adam(training.parameters(), lr=recipe.lr, betas=betas, fused=True)


def learn(
    training: Training,
    optimizer: torch.optim.Adam,
    recipe: Variant,
    lesson: Lesson,
    share: float,
) -> Float[Tensor, ""]:
    """One step, which is this share of the whole training. Returns the loss."""
    if recipe.input_noise > 0:
        lesson = lesson._replace(x=_noisy(lesson.x, recipe.input_noise, lesson.generator))
    loss = training.loss(lesson)
    loss.backward()
    training.after_backward()
    torch.nn.utils.clip_grad_norm_(training.parameters(), recipe.grad_clip)
    after = lesson.progress + share
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * _schedule(
            lesson.progress, after, recipe.lr_warmup, recipe.lr_decay
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    training.after_step(optimizer)
    return loss.detach()


def _noisy(
    x: Float[Tensor, "n d"], length: float, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + length / math.sqrt(x.shape[1]) * noise


def _inverse(scaling: Scaling) -> Scaling:
    """Takes scaled activations back to raw ones."""
    return Scaling(-scaling.mean / scaling.scale, 1 / scaling.scale)


def write_checkpoint(folder: Path, sae: Dictionary, run: TrainRun, **beside: int) -> None:
    """`sae.safetensors`, then `sae.json`: a record that exists is a checkpoint that is whole.

    `beside` is recorded beside the training that the weights are from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(sae)
    record = {
        "format": FORMAT,
        "architecture": type(sae).__module__.rpartition(".")[2],
        "arguments": sae.arguments(),
        "site": dataclasses.asdict(run.sae.site),
        "target": dataclasses.asdict(run.sae.target),
        "checksum": _checksum(content),
        "training": run.spec(),
        **beside,
        "software": {
            "saebench": saebench.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    results.write_bytes_whole(folder / "sae.safetensors", content)
    results.write_text_whole(folder / "sae.json", json.dumps(record, indent=2) + "\n")


def _content(sae: Dictionary) -> bytes:
    """As safetensors."""
    content: bytes = save({name: w.contiguous() for name, w in sae.state_dict().items()})
    return content


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tidy(folder: Path, keep_retraining: bool) -> None:
    """Removes what only unfinished training needs, and what a killed process left half written."""
    for leftover in [folder / "training.pt", *folder.rglob(".*.partial")]:
        leftover.unlink(missing_ok=True)
    if not keep_retraining and (folder / _RETRAINING).exists():
        shutil.rmtree(folder / _RETRAINING)


def _train_group(pupils: list[_Pupil], stream: Stream, device: str, what: str) -> list[str]:
    """Finishes all but those whose training diverges, whose names it gives."""
    first = min(pupil.step for pupil in pupils)
    if first:
        say(f"continuing at step {first} of {stream.steps}")
    saved, pause = time.monotonic(), SECONDS_BETWEEN_SAVES
    alone = not any(pupil.run.sae.recipe.end_to_end for pupil in pupils)
    with (
        Meter(
            what, stream.steps * stream.batch_tokens, "tokens", first * stream.batch_tokens
        ) as meter,
        ThreadPoolExecutor(1) as thread,
    ):
        # On a CPU both would share the cores, and nothing be gained.
        ahead = thread if alone and device.startswith("cuda") else None
        for step, batch in enumerate(stream.batches(first, ahead), first):
            for pupil in pupils:
                if pupil.step == step and not pupil.diverged:
                    pupil.learn(batch)
            meter.advance(stream.batch_tokens)
            if all(pupil.diverged for pupil in pupils):
                break
            if time.monotonic() - saved > pause:
                began = time.monotonic()
                for pupil in pupils:
                    pupil.save()
                saved = time.monotonic()
                pause = max(SECONDS_BETWEEN_SAVES, 20 * (saved - began))
    if differing := [pupil for pupil in pupils if not pupil.finish()]:
        raise UserError(
            f"trained again for its snapshots, {', '.join(pupil.run.sae.name for pupil in differing)} ended in other "
            "weights than those there are: they are from another machine, version of torch or number of threads. "
            f"Nothing was overwritten. Delete {', '.join(str(pupil.folder) for pupil in differing)} to train anew with "
            "snapshots, or take training.snapshots out of the suite"
        )
    return [pupil.run.sae.name for pupil in pupils if pupil.diverged]


def _schedule(before: float, after: float, warmup: float, decay: float) -> float:
    """Share of the peak learning rate for a step that takes training from `before` to `after`."""
    up = after / warmup if warmup > 0 else 1.0
    down = (1 - before) / decay if decay > 0 else 1.0
    return min(1.0, up, down)


def _statistics(site: Site, x: Float[Tensor, "n d"]) -> Scaling:
    exact = x.double()
    mean = exact.mean(0)
    scale = (exact - mean).square().sum(1).mean().sqrt().item()
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(
            f"the activations at {site} have a spread of {scale}; there is nothing to train on"
        )
    return Scaling(mean.float(), scale)


def memory_for_training(device: str) -> float:
    """Bytes that the SAEs of a group may take together."""
    return free_memory(device) * _MEMORY_SHARE


def free_memory(device: str) -> int:
    """Bytes that nobody uses now."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
