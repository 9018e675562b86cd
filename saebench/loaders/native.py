"""The format of this project: a folder with `sae.safetensors` and `sae.json`.

`sae.json` names the architecture (a module of `saes/`) with its arguments, the site that it reads and the one that
it predicts (the same, but for transcoders), the SHA-256 of the weights file, and how the SAE was trained: on which
revision of which model, among others. The weights take raw activations.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from saebench import registry
from saebench.errors import UserError
from saebench.loaders._loaded import Loaded
from saebench.types import Site

FORMAT = 2


def native(folder: Path) -> Loaded:
    """Loads and checks a checkpoint. Raises `UserError` where a file is missing, foreign or damaged."""
    record = _record(folder)
    content = _read(folder / "sae.safetensors")
    if hashlib.sha256(content).hexdigest() != record["checksum"]:
        raise UserError(
            f"{folder / 'sae.safetensors'} is not the file that sae.json describes (its SHA-256 differs); "
            "delete the folder to train the SAE again, or restore the file"
        )
    try:
        weights = load(content)
    except SafetensorError as error:
        raise UserError(
            f"{folder / 'sae.safetensors'} is not a safetensors file: {error}"
        ) from None
    build = registry.get("saes", record["architecture"])
    try:
        sae = build(**record["arguments"])
        sae.load_state_dict(weights)  # strict: a missing or extra weight is an error, not a default
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: weights and sae.json do not fit together: {error}") from None
    if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
        raise UserError(f"{folder}: some weights are not finite numbers")
    return Loaded(sae, Site(**record["site"]), Site(**record["target"]))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read(folder / "sae.json"))
    except ValueError as error:
        raise UserError(f"{folder / 'sae.json'} is not valid JSON: {error}") from None
    needed = {"format", "architecture", "arguments", "site", "target", "checksum"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise UserError(f"{folder / 'sae.json'} lacks one of the keys {', '.join(sorted(needed))}")
    if record["format"] != FORMAT:
        raise UserError(
            f"{folder}: format {record['format']}; this version of saebench reads {FORMAT}"
        )
    return record


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; expected a folder with sae.json and sae.safetensors"
        ) from None
