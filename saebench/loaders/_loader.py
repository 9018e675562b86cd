"""What every loader is: it knows a format by the structure of its files, and makes SAEs of it for raw activations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saebench import registry
from saebench.errors import UserError
from saebench.loaders._files import Source
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.types import Site

WIDEST = 2**22
_WIDEST_SITE = 2**17
_MOST_ITERATIONS = 10_000


class Told(NamedTuple):
    """What the user says of a checkpoint because its files do not."""

    site: Site | None = None
    """What it reads."""
    predicts: Site | None = None
    """Of a transcoder."""
    k: int | None = None
    """Active latents per token."""
    norm: float | None = None
    """Mean length of an activation of the text it was trained on."""


class Member(NamedTuple):
    """One SAE of a checkpoint, known before its weights are read."""

    site: Site
    """What it reads."""
    target: Site
    """What it predicts: the same site, but for transcoders."""
    model: str | None
    """The language model, as the files name it."""
    load: Callable[[], Dictionary | Normalized]
    """In float32, on the CPU, checked. Raises `UserError`."""


class Loader(ABC):
    """One format. Subclasses are final, and are found by the names of their files."""

    @abstractmethod
    def fits(self, source: Source) -> bool:
        """Whether the files have the structure of this format: names and keys, without reading weights.

        Never raises for files of another format.
        """

    @abstractmethod
    def members(self, source: Source, told: Told) -> Sequence[Member]:
        """All SAEs of the checkpoint; at least one.

        Raises `UserError` for an unknown key, for what contradicts what the user says, and where something is needed
        that neither says.
        """


def the_site(told: Site | None, found: Site | None, where: str, option: str = "site") -> Site:
    """The one that the files name, or else the user."""
    if found is None:
        if told is None:
            raise UserError(
                f"{where} does not say at which site it was trained; say so with {option}, such as 4.resid_post "
                f"({option}: in a suite file, --{option} on the command line)"
            )
        return told
    if told is not None and told != found:
        raise UserError(
            f"{where} was trained at {found}, and {option} says {told}; remove {option}"
        )
    return found


def needless(told: Told, where: str, *names: str) -> None:
    """Raises `UserError` where the user says what this format says itself."""
    for name in names:
        if getattr(told, name) is not None:
            raise UserError(f"{where}: {name} has no meaning for this checkpoint; remove it")


def whole(found: Mapping[str, Any], name: str, where: str) -> int:
    value = found.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} is {value!r}; expected a whole number above 0")
    return value


def flag(found: Mapping[str, Any], name: str, where: str) -> bool:
    """False where it is left out, as by architectures and versions that do not have it."""
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {name} is {value!r}; expected true or false")
    return value


def build(
    architecture: str, arguments: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> Dictionary:
    """An SAE of `saes/` with exactly these weights, as float32. `where` is for messages.

    Nothing is allocated for what the arguments claim. Raises `UserError` where they do not fit the weights, and where
    a weight is not finite.
    """
    if architecture not in registry.names("saes"):
        known = ", ".join(registry.names("saes"))
        raise UserError(f"{where}: there is no architecture {architecture!r}; there are: {known}")
    _check_size(arguments, where)
    try:
        with torch.device("meta"):
            sae: Dictionary = registry.get("saes", architecture)(**arguments)
    except (UserError, TypeError, RuntimeError, ValueError, OverflowError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{where}: {architecture} cannot be built: {first}") from None
    expected = {name: tuple(weight.shape) for name, weight in sae.state_dict().items()}
    _check_weights(weights, expected, where)
    try:
        ready = {n: w.detach().to(torch.float32).contiguous() for n, w in weights.items()}
    except (MemoryError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{where}: the weights do not fit into memory: {first}") from None
    sae.load_state_dict(ready, assign=True)
    return sae.requires_grad_(False)


def _check_size(arguments: Mapping[str, Any], where: str) -> None:
    for name, most in (
        ("d_in", _WIDEST_SITE),
        ("d_out", _WIDEST_SITE),
        ("d_sae", WIDEST),
        ("k", WIDEST),
        ("iterations", _MOST_ITERATIONS),
    ):
        given = arguments.get(name)
        if given is None and name not in ("d_in", "d_sae"):
            continue
        if type(given) is not int or not 0 < given <= most:
            raise UserError(
                f"{where}: {name} is {given!r}; expected a whole number from 1 to {most:,}"
            )


def _check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        names = ", ".join(dict.fromkeys(name for name, _ in wrong))
        raise UserError(
            f"{where}: the weights do not fit together ({names[:400]}): got {str(found)[:1000]}, expected {expected}"
        )
    for name, weight in weights.items():
        if not weight.is_floating_point() or not _is_finite(weight):
            raise UserError(f"{where}: {name} has values that are not finite numbers")


def _is_finite(weight: Tensor) -> bool:
    """In float32, and a part at a time where that needs no copy."""
    parts = weight.detach().reshape(-1).split(2**24) if weight.is_contiguous() else (weight,)
    return all(bool(torch.isfinite(part.float()).all()) for part in parts)
