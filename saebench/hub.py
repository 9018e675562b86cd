"""Files of a checkpoint on the Hugging Face Hub, at one commit.

Sizes are asked for before anything is downloaded, and only files that some format reads are. They are kept below the
cache by commit, so that a second look needs no network.
"""

import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from saebench.errors import UserError
from saebench.loaders._files import Limits
from saebench.progress import say

_SUFFIXES = (".json", ".yaml", ".yml", ".safetensors", ".npz", ".pt", ".pth")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Reference(NamedTuple):
    repo: str
    revision: str
    """A commit, tag or branch."""
    folder: str
    """Below the repository's root; empty for all of it. May also name one file."""


class Downloaded(NamedTuple):
    path: Path
    commit: str


def download(reference: Reference, limits: Limits, cache: Path) -> Downloaded:
    raise NotImplementedError
