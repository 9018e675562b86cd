"""How a checkpoint of this project is read: `sae.json` and `sae.safetensors`, on raw activations."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saebench.errors import UserError
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import build
from saebench.saes._dictionary import Dictionary
from saebench.sites import parse_site
from saebench.types import Site

FORMAT = 2
_NEEDED = {"format", "architecture", "arguments", "site", "target", "checksum"}


class Loaded(NamedTuple):
    sae: Dictionary
    site: Site
    """What it reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""


def read_native(folder: Path) -> Loaded:
    """Loads and checks a checkpoint. Raises `UserError` where a file is missing, foreign or damaged."""
    source = Source(folder, Limits(max_bytes=sys.maxsize))
    record = native_record(source)
    sae = native_sae(source, record)
    return Loaded(sae, site_of(record, "site", source), site_of(record, "target", source))


def native_record(source: Source) -> dict[str, Any]:
    record = source.json("sae.json")
    if lacks := sorted(_NEEDED - record.keys()):
        raise UserError(f"{source.path / 'sae.json'} lacks {', '.join(lacks)}")
    if record["format"] != FORMAT:
        raise UserError(
            f"{source.path}: format {record['format']!r}; this version of saebench reads {FORMAT}"
        )
    return record


def native_sae(source: Source, record: Mapping[str, Any]) -> Dictionary:
    weights = source.tensors("sae.safetensors")
    with (source.root / "sae.safetensors").open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record["checksum"]:
            raise UserError(
                f"{source.path / 'sae.safetensors'} is not the file that sae.json describes (its SHA-256 differs); "
                "delete the folder to train the SAE again, or restore the file"
            )
    arguments = record["arguments"]
    if not isinstance(arguments, dict) or not isinstance(record["architecture"], str):
        raise UserError(f"{source.path / 'sae.json'}: architecture or arguments are none")
    return build(record["architecture"], arguments, weights, str(source.path))


def site_of(record: Mapping[str, Any], name: str, source: Source) -> Site:
    """Of `{stream, layer}` as the trainer writes it."""
    found = record[name]
    if not isinstance(found, dict) or set(found) != {"stream", "layer"}:
        raise UserError(f"{source.path / 'sae.json'}: {name} is {found!r}, which is not a site")
    written = found if found["layer"] is not None else str(found["stream"])
    return parse_site(written)
