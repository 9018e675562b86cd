"""The trainers of dictionary_learning (PyPI) on given batches, and their SAEs as ours.

Settings are those that its own baselines were made with (dictionary_learning_demo: activations of unit mean square,
Adam, one grid of penalties), with what it counts in steps of a run of 244,000 (500 M tokens) scaled to the length
of this one. Warm-ups are longer than their share: four steps would be none.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from saebench import results
from saebench.loaders._native import FORMAT
from saebench.saes._dictionary import Dictionary
from saebench.saes.gated import Gated
from saebench.saes.jumprelu import JumpReLU
from saebench.saes.relu import ReLU
from saebench.saes.topk import TopK
from saebench.types import Site

LR_WARMUP = 0.02
SPARSITY_WARMUP = 0.1
DECAY_FROM = 0.8
ANNEAL_FROM = 0.1
THRESHOLD_FROM = 0.1
THRESHOLD_MEMORY = 0.02
"""Share of the steps that the running threshold looks back over; 1,000 steps of theirs are less."""
DEAD_AFTER = 0.02
"""10 M tokens of 500 M."""
MATRYOSHKA_GROUPS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
P_END = 0.2


@dataclass(frozen=True)
class Lessons:
    """What all peers learn from: raw activations in batches, and the factor that gives them unit mean square."""

    batches: Path
    batch_tokens: int
    factor: float
    site: Site
    width: int


@dataclass(frozen=True)
class Pupil:
    """One SAE of the peer's to train; `knob` is its penalty, or k, or the wanted L0."""

    variant: str
    knob: float
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"peer-{self.variant}-{self.knob:g}-lr{self.lr:g}-s{self.seed}"


def train(pupil: Pupil, lessons: Lessons, folder: Path) -> None:
    """Trains, converts, checks and writes one SAE. One that is there already is left alone."""
    place = folder / pupil.name
    if (place / "sae.json").exists():
        return
    torch.manual_seed(pupil.seed)
    batches = np.load(lessons.batches, mmap_mode="r")
    steps, d = len(batches) // lessons.batch_tokens, batches.shape[1]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = _trainer(pupil, steps, d, lessons)
        for step in range(steps):
            start = step * lessons.batch_tokens
            x = torch.from_numpy(np.array(batches[start : start + lessons.batch_tokens]))
            trainer.update(step, x / lessons.factor)
    sae = converted(trainer.ae, lessons.factor)
    _check(sae, trainer.ae, lessons.factor, torch.from_numpy(np.array(batches[:512])))
    _write(place, sae, lessons.site, pupil)


def _trainer(pupil: Pupil, steps: int, d: int, lessons: Lessons) -> Any:
    shared = {
        "steps": steps,
        "activation_dim": d,
        "dict_size": lessons.width,
        "layer": lessons.site.layer,
        "lm_name": "local",
        "lr": pupil.lr,
        "seed": pupil.seed,
        "device": "cpu",
        "warmup_steps": max(1, round(LR_WARMUP * steps)),
        "decay_start": round(DECAY_FROM * steps),
    }
    trainer = _BUILD[pupil.variant](pupil.knob, steps, shared)
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = round(DEAD_AFTER * steps * lessons.batch_tokens)
    return trainer


def _penalised(build: Any) -> Callable[[float, int, dict[str, Any]], Any]:
    def start(knob: float, steps: int, shared: dict[str, Any]) -> Any:
        warmup = round(SPARSITY_WARMUP * steps)
        return build(l1_penalty=knob, sparsity_warmup_steps=warmup, **shared)

    return start


def _p_anneal(knob: float, steps: int, shared: dict[str, Any]) -> Any:
    return PAnnealTrainer(
        sparsity_function="Lp^p",
        initial_sparsity_penalty=knob,
        sparsity_warmup_steps=round(SPARSITY_WARMUP * steps),
        anneal_start=round(ANNEAL_FROM * steps),
        p_end=P_END,
        **shared,
    )


def _with_k(build: Any, **options: Any) -> Callable[[float, int, dict[str, Any]], Any]:
    def start(knob: float, steps: int, shared: dict[str, Any]) -> Any:
        return build(
            k=round(knob),
            threshold_start_step=round(THRESHOLD_FROM * steps),
            threshold_beta=1 - 1 / max(2, round(THRESHOLD_MEMORY * steps)),
            **shared,
            **options,
        )

    return start


def _jumprelu(knob: float, steps: int, shared: dict[str, Any]) -> Any:
    warmup = round(SPARSITY_WARMUP * steps)
    return JumpReluTrainer(target_l0=knob, sparsity_warmup_steps=warmup, **shared)


_BUILD: dict[str, Callable[[float, int, dict[str, Any]], Any]] = {
    "relu": _penalised(StandardTrainer),
    "relu_april": _penalised(StandardTrainerAprilUpdate),
    "gated": _penalised(GatedSAETrainer),
    "p_anneal": _p_anneal,
    "topk": _with_k(TopKTrainer),
    "batch_topk": _with_k(BatchTopKTrainer),
    "matryoshka": _with_k(MatryoshkaBatchTopKTrainer, group_fractions=MATRYOSHKA_GROUPS),
    "jumprelu": _jumprelu,
}


@torch.no_grad()
def converted(theirs: Any, factor: float) -> Dictionary:
    """One of their dictionaries, of activations over `factor`, as one of ours, of raw activations."""
    return _CONVERT[type(theirs).__name__](theirs, factor)


def _relu(theirs: Any, factor: float) -> Dictionary:
    bias = theirs.encoder.bias - theirs.encoder.weight @ theirs.bias
    weights = {"W_enc": theirs.encoder.weight.T, "W_dec": theirs.decoder.weight.T}
    return _filled(ReLU, weights, {"b_enc": bias, "b_dec": theirs.bias}, factor)


def _gated(theirs: Any, factor: float) -> Dictionary:
    shift = theirs.encoder.weight @ theirs.decoder_bias
    weights = {
        "W_enc": theirs.encoder.weight.T,
        "W_dec": theirs.decoder.weight.T,
        "r_mag": theirs.r_mag,
    }
    scaled = {
        "b_gate": theirs.gate_bias - shift,
        "b_mag": theirs.mag_bias - theirs.r_mag.exp() * shift,
        "b_dec": theirs.decoder_bias,
    }
    return _filled(Gated, weights, scaled, factor)


def _topk(theirs: Any, factor: float) -> Dictionary:
    bias = theirs.encoder.bias - theirs.encoder.weight @ theirs.b_dec
    weights = {"W_enc": theirs.encoder.weight.T, "W_dec": theirs.decoder.weight.T}
    scaled = {"b_enc": bias, "b_dec": theirs.b_dec}
    return _filled(TopK, weights, scaled, factor, k=int(theirs.k))


def _batch_topk(theirs: Any, factor: float) -> Dictionary:
    bias = theirs.encoder.bias - theirs.encoder.weight @ theirs.b_dec
    weights = {"W_enc": theirs.encoder.weight.T, "W_dec": theirs.decoder.weight.T}
    return _thresholded(weights, bias, theirs, factor)


def _matryoshka(theirs: Any, factor: float) -> Dictionary:
    bias = theirs.b_enc - theirs.b_dec @ theirs.W_enc
    return _thresholded({"W_enc": theirs.W_enc, "W_dec": theirs.W_dec}, bias, theirs, factor)


def _jumping(theirs: Any, factor: float) -> Dictionary:
    weights = {"W_enc": theirs.W_enc, "W_dec": theirs.W_dec}
    return _thresholded(weights, theirs.b_enc, theirs, factor)


def _thresholded(
    weights: dict[str, Tensor], b_enc: Tensor, theirs: Any, factor: float
) -> Dictionary:
    """Their ReLU comes before the threshold, so that one below zero is one at zero."""
    threshold = torch.as_tensor(theirs.threshold).clamp_min(0).expand(len(b_enc))
    scaled = {"b_enc": b_enc, "b_dec": theirs.b_dec, "threshold": threshold}
    return _filled(JumpReLU, weights, scaled, factor)


def _filled(
    build: Any, weights: dict[str, Tensor], scaled: dict[str, Tensor], factor: float, **options: Any
) -> Dictionary:
    """`weights` as they are, `scaled` in units of raw activations."""
    d_in, d_sae = weights["W_enc"].shape
    sae: Dictionary = build(d_in, d_sae, **options)
    state = weights | {name: factor * weight for name, weight in scaled.items()}
    sae.load_state_dict({name: w.detach().clone().contiguous() for name, w in state.items()})
    return sae


_CONVERT: dict[str, Callable[[Any, float], Dictionary]] = {
    "AutoEncoder": _relu,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumping,
}


@torch.no_grad()
def _check(sae: Dictionary, theirs: Any, factor: float, x: Float[Tensor, "n d"]) -> None:
    """Both give back the same, but for the few tokens that rounding takes across a threshold."""
    ours, wanted = sae.decode(sae.encode(x)), factor * theirs(x / factor)
    same = torch.isclose(ours, wanted, rtol=1e-3, atol=1e-3 * factor).all(-1)
    assert same.double().mean() > 0.98, "a converted SAE differs from the peer's own"


def _write(place: Path, sae: Dictionary, site: Site, pupil: Pupil) -> None:
    """A native checkpoint: what its record says of the training is what was asked of the peer."""
    content = save({name: w.contiguous() for name, w in sae.state_dict().items()})
    record = {
        "format": FORMAT,
        "architecture": type(sae).__module__.rpartition(".")[2],
        "arguments": sae.arguments(),
        "site": asdict(site),
        "target": asdict(site),
        "checksum": hashlib.sha256(content).hexdigest(),
        "training": {"trainer": "dictionary_learning"} | asdict(pupil),
    }
    results.make_folder(place)
    results.write_bytes_whole(place / "sae.safetensors", content)
    results.write_text_whole(place / "sae.json", json.dumps(record, indent=2) + "\n")
