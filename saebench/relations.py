"""What the numbers of one SAE owe to each other, by the definitions of their metrics.

A metric's units are sums over the tokens of a sequence, or counts of a latent, and several metrics are made of the
same sums:

    explained_variance   den - num = squared error = num of mse
    loss_recovered       num = ce_loss_zero - ce_loss_sae, den = ce_loss_zero - ce_loss_clean
    rescale_gain         num follows from num and den of shrinkage
    density              n * sum = num of l0, summed

So a unit that is changed alone is found without any model. Within one eval these hold up to rounding in float64; from
one eval to another the activations may have been computed twice, and so may differ as float32 does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saebench.results import Units
from saebench.stats import Floats

_ROUNDING = 1e-9
_COMPUTED_TWICE = 1e-4
_DENSE = 0.1

_STREAM = (
    "l0",
    "mse",
    "cosine",
    "explained_variance",
    "shrinkage",
    "shrinkage_centred",
    "l2_ratio",
    "rescale_gain",
)
_LOSSES = (
    "ce_loss_clean",
    "ce_loss_sae",
    "ce_loss_zero",
    "ce_loss_mean",
    "ce_loss_increase",
    "kl_divergence",
    "top1_agreement",
)
_PREDICTIONS = (*_LOSSES, "loss_recovered", "loss_recovered_mean")
_RATES = ("density", "dead_fraction", "dense_fraction")
_ALIGNMENT = (
    "encoder_decoder_cosine",
    "encoder_decoder_cosine_q05",
    "encoder_decoder_cosine_q95",
    "encoder_decoder_cosine_weighted",
)
_SAME_UNITS = (_STREAM, _PREDICTIONS, (*_RATES, *_ALIGNMENT))
_SAME_N = ((*_STREAM, *_RATES), _PREDICTIONS)
_SAME_DEN = (("l0", "mse", "cosine"), _LOSSES, _RATES, _ALIGNMENT[:3])


class Counted(NamedTuple):
    units: Units
    n: int
    """Tokens, latents or texts that lie behind it, as the score has it."""


Numbers = Mapping[str, Counted]
"""By metric."""


class _Equation(NamedTuple):
    says: str
    needs: tuple[str, ...]
    terms: Callable[[Numbers], list[Floats]]
    """They sum to zero, unit by unit or all in all."""
    rounding: float = _ROUNDING


def collected(runs: Iterable[Numbers]) -> tuple[dict[str, Counted], list[str]]:
    """The numbers of all runs, and the metrics about which two runs do not say the same."""
    found: dict[str, Counted] = {}
    related = {metric for group in _SAME_UNITS for metric in group}
    problems = []
    for run in runs:
        for metric in sorted(related & set(run)):
            if metric in found and not _same(found[metric].units, run[metric].units):
                problems.append(f"two of its runs have different units of {metric}")
            found.setdefault(metric, run[metric])
    return found, problems


def broken(numbers: Numbers, width: int) -> Iterator[str]:
    """Every relation that does not hold. Metrics that are not there take part in none."""
    finite = {
        metric: one
        for metric, one in numbers.items()
        if np.isfinite(one.units.num).all() and np.isfinite(one.units.den).all()
    }
    problems = [*_of_other_units(finite), *_of_other_n(finite), *_not_all_latents(finite, width)]
    yield from problems
    if problems:
        return
    with np.errstate(all="ignore"):
        for equation in (*_same_denominators(finite), *_EQUATIONS):
            if all(metric in finite for metric in equation.needs):
                yield from _wrong(equation, finite)
        yield from _no_counts(finite)
        yield from _longer_than_possible(finite)


def squared_length(numbers: Numbers) -> Floats:
    """sum |x|^2 of each sequence, which is the same for every SAE: |x - x_hat|^2 - |x_hat|^2 + 2 x_hat . x"""
    error, products = numbers["mse"].units.num, numbers["shrinkage"].units
    return np.asarray(error - products.num + 2 * products.den)


def _same(a: Units, b: Units) -> bool:
    return np.array_equal(a.num, b.num) and np.array_equal(a.den, b.den)


def _of_other_units(numbers: Numbers) -> Iterator[str]:
    for group in _SAME_UNITS:
        there = [metric for metric in group if metric in numbers]
        for metric in there[1:]:
            first, other = numbers[there[0]].units, numbers[metric].units
            if _named(first.ids) != _named(other.ids):
                yield f"{metric} is of other units than {there[0]}"
            elif _named(first.clusters) != _named(other.clusters):
                yield f"units of {metric} are said to be from other sources than those of {there[0]}"


def _named(names: NDArray[Any] | None) -> list[str] | None:
    return None if names is None else [str(name) for name in names]


def _of_other_n(numbers: Numbers) -> Iterator[str]:
    for group in _SAME_N:
        there = [metric for metric in group if metric in numbers]
        for metric in there[1:]:
            first, other = numbers[there[0]].n, numbers[metric].n
            if first != other:
                yield f"{metric} is of {other:,} tokens, and {there[0]} of {first:,}"


def _not_all_latents(numbers: Numbers, width: int) -> Iterator[str]:
    for metric in (*_RATES, *_ALIGNMENT):
        if metric in numbers and (n := len(numbers[metric].units.num)) != width:
            yield f"{metric} is of {n:,} latents; the SAE has {width:,}"


def _same_denominators(numbers: Numbers) -> Iterator[_Equation]:
    for group in _SAME_DEN:
        there = [metric for metric in group if metric in numbers]
        for metric in there[1:]:
            first = there[0]
            yield _Equation(
                f"{metric} and {first} have the same denominators",
                (first, metric),
                lambda numbers, a=first, b=metric: [_den(numbers, a), -_den(numbers, b)],  # type: ignore[misc]
            )


def _wrong(equation: _Equation, numbers: Numbers) -> Iterator[str]:
    terms = equation.terms(numbers)
    off = np.abs(np.sum(terms, axis=0))
    wrong = np.flatnonzero(~(off <= equation.rounding * np.sum(np.abs(terms), axis=0)))
    if not len(wrong):
        return
    units = numbers[equation.needs[0]].units
    where = ""
    if len(off) == len(units.ids):
        where = (
            f" in {len(wrong):,} of {len(off):,} units, first in {str(units.ids[wrong[0]])!r:.80}"
        )
    yield f"{equation.says}: this does not hold{where} (off by {off[wrong[0]]:.6g})"


def _num(numbers: Numbers, metric: str) -> Floats:
    return numbers[metric].units.num


def _den(numbers: Numbers, metric: str) -> Floats:
    return numbers[metric].units.den


def _saved_by_rescaling(numbers: Numbers) -> list[Floats]:
    hat_hat, hat_x = _num(numbers, "shrinkage"), _den(numbers, "shrinkage")
    gamma = hat_hat.sum() / hat_x.sum()
    return [
        _num(numbers, "rescale_gain"),
        -hat_hat,
        hat_hat / gamma**2,
        2 * hat_x,
        -2 * hat_x / gamma,
    ]


def _dense(numbers: Numbers) -> list[Floats]:
    density, given = _num(numbers, "density"), _num(numbers, "dense_fraction")
    at_the_edge = np.isclose(density, _DENSE, rtol=1e-12, atol=0)
    return [given, -np.where(at_the_edge, given, density > _DENSE)]


def _recovered(ablation: str, metric: str) -> tuple[_Equation, _Equation]:
    needs = (metric, ablation, "ce_loss_sae", "ce_loss_clean")
    return (
        _Equation(
            f"num of {metric} = {ablation} - ce_loss_sae",
            needs,
            lambda n: [_num(n, metric), -_num(n, ablation), _num(n, "ce_loss_sae")],
        ),
        _Equation(
            f"den of {metric} = {ablation} - ce_loss_clean",
            needs,
            lambda n: [_den(n, metric), -_num(n, ablation), _num(n, "ce_loss_clean")],
        ),
    )


_EQUATIONS = (
    _Equation(
        "den - num of explained_variance = num of mse",
        ("explained_variance", "mse"),
        lambda n: [_den(n, "explained_variance"), -_num(n, "explained_variance"), -_num(n, "mse")],
    ),
    _Equation(
        "explained_variance and rescale_gain have the same denominators",
        ("explained_variance", "rescale_gain"),
        lambda n: [_den(n, "explained_variance"), -_den(n, "rescale_gain")],
        _COMPUTED_TWICE,
    ),
    _Equation(
        "rescale_gain follows from shrinkage",
        ("rescale_gain", "shrinkage"),
        _saved_by_rescaling,
    ),
    _Equation(
        "ce_loss_increase = ce_loss_sae - ce_loss_clean",
        ("ce_loss_increase", "ce_loss_sae", "ce_loss_clean"),
        lambda n: [
            _num(n, "ce_loss_increase"),
            -_num(n, "ce_loss_sae"),
            _num(n, "ce_loss_clean"),
        ],
    ),
    *_recovered("ce_loss_zero", "loss_recovered"),
    *_recovered("ce_loss_mean", "loss_recovered_mean"),
    _Equation(
        "densities have the denominator 1",
        ("density",),
        lambda n: [_den(n, "density"), -np.ones(len(_den(n, "density")))],
    ),
    _Equation(
        "a latent is dead where its density is 0",
        ("dead_fraction", "density"),
        lambda n: [_num(n, "dead_fraction"), -(_num(n, "density") == 0).astype(np.float64)],
    ),
    _Equation(
        "a latent is dense where its density is above 0.1",
        ("dense_fraction", "density"),
        _dense,
    ),
    _Equation(
        "densities add up to l0",
        ("density", "l0"),
        lambda n: [
            n["density"].n * _num(n, "density").sum(keepdims=True),
            -_num(n, "l0").sum(keepdims=True),
        ],
    ),
    *(
        _Equation(
            f"{metric} and encoder_decoder_cosine have the same units",
            (metric, "encoder_decoder_cosine"),
            lambda n, metric=metric: [_num(n, metric), -_num(n, "encoder_decoder_cosine")],  # type: ignore[misc]
        )
        for metric in _ALIGNMENT[1:3]
    ),
    _Equation(
        "encoder_decoder_cosine is weighted by density",
        ("encoder_decoder_cosine_weighted", "encoder_decoder_cosine"),
        lambda n: [
            _num(n, "encoder_decoder_cosine_weighted"),
            -_num(n, "encoder_decoder_cosine") * _den(n, "encoder_decoder_cosine_weighted"),
        ],
    ),
    _Equation(
        "encoder_decoder_cosine is of the latents that are active",
        ("encoder_decoder_cosine", "encoder_decoder_cosine_weighted"),
        lambda n: [
            _den(n, "encoder_decoder_cosine"),
            -(_den(n, "encoder_decoder_cosine_weighted") > 0).astype(np.float64),
        ],
    ),
    _Equation(
        "weights of encoder_decoder_cosine_weighted add up to densities",
        ("encoder_decoder_cosine_weighted", "density"),
        lambda n: [
            _den(n, "encoder_decoder_cosine_weighted").sum(keepdims=True),
            -_num(n, "density").sum(keepdims=True),
        ],
        _COMPUTED_TWICE,
    ),
)


def _no_counts(numbers: Numbers) -> Iterator[str]:
    for metric, times in (("l0", 1), ("top1_agreement", 1), ("density", None)):
        if metric in numbers:
            counts = _num(numbers, metric) * (times or numbers[metric].n)
            if (np.abs(counts - np.round(counts)) > 1e-6).any():
                yield f"{metric} counts tokens, and some of its units are no whole numbers of them"


def _longer_than_possible(numbers: Numbers) -> Iterator[str]:
    """|x_hat . x|^2 is at most |x_hat|^2 |x|^2, in sums over tokens too."""
    if not {"mse", "shrinkage"} <= set(numbers):
        return
    hat_hat, hat_x = _num(numbers, "shrinkage"), _den(numbers, "shrinkage")
    slack = _COMPUTED_TWICE * (_num(numbers, "mse") + hat_hat + 2 * np.abs(hat_x))
    wrong = ~(hat_x**2 <= hat_hat * (squared_length(numbers) + slack))
    if wrong.any():
        yield f"mse and shrinkage cannot both be right in {int(wrong.sum()):,} sequences"
