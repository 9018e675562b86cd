"""Numbers of one SAE that follow from one another."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from saebench.relations import Counted, broken, squared_length
from saebench.results import Units

WIDTH = 4
Numbers = dict[str, Counted]


def counted(num: object, den: object, n: int) -> Counted:
    numbers, ones = np.array(num, np.float64), np.ones(len(np.array(num)))
    return Counted(
        Units(np.arange(len(numbers)), numbers, np.array(den, np.float64) * ones, None), n
    )


def numbers() -> Numbers:
    """Two sequences of 3 and 2 tokens, all of whose sums are written out here."""
    generator = torch.Generator().manual_seed(0)
    x, x_hat = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    x_hat = x + 0.1 * x_hat
    sequences = (slice(0, 3), slice(3, 5))

    def sums(values: torch.Tensor) -> np.ndarray:
        return np.array([float(values[s].sum()) for s in sequences])

    error, variance = sums((x - x_hat) ** 2), sums((x - x.mean(0)) ** 2)
    hat_hat, hat_x = sums(x_hat**2), sums(x_hat * x)
    gamma = hat_hat.sum() / hat_x.sum()
    gain = sums((x - x_hat) ** 2) - sums((x - x_hat / gamma) ** 2)
    fires = np.array([5.0, 3.0, 0.0, 0.0])
    return {
        "explained_variance": counted(variance - error, variance, 5),
        "mse": counted(error, [3, 2], 5),
        "cosine": counted([2.9, 1.9], [3, 2], 5),
        "shrinkage": counted(hat_hat, hat_x, 5),
        "rescale_gain": counted(gain, variance, 5),
        "l0": counted([5, 3], [3, 2], 5),
        "density": counted(fires / 5, 1, 5),
        "dead_fraction": counted([0, 0, 1, 1], 1, 5),
        "dense_fraction": counted([1, 1, 0, 0], 1, 5),
        "encoder_decoder_cosine": counted([0.5, 0.25, 0.1, 0.2], [1, 1, 0, 0], 2),
        "encoder_decoder_cosine_weighted": counted([0.5, 0.15, 0, 0], fires / 5, 2),
        "ce_loss_clean": counted([4.0, 2.0], [2, 1], 3),
        "ce_loss_sae": counted([5.0, 2.5], [2, 1], 3),
        "ce_loss_zero": counted([14.0, 7.0], [2, 1], 3),
        "ce_loss_mean": counted([12.0, 6.0], [2, 1], 3),
        "ce_loss_increase": counted([1.0, 0.5], [2, 1], 3),
        "kl_divergence": counted([0.9, 0.4], [2, 1], 3),
        "top1_agreement": counted([2, 0], [2, 1], 3),
        "loss_recovered": counted([9.0, 4.5], [10.0, 5.0], 3),
        "loss_recovered_mean": counted([7.0, 3.5], [8.0, 4.0], 3),
    }


def test_numbers_that_were_computed_as_defined_agree():
    assert list(broken(numbers(), WIDTH)) == []


def test_squared_lengths_do_not_depend_on_the_reconstruction():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    expected = [float((x[:3] ** 2).sum()), float((x[3:] ** 2).sum())]
    assert squared_length(numbers()) == pytest.approx(expected)


def put(metric: str, part: str, value: float) -> Callable[[Numbers], None]:
    def change(found: Numbers) -> None:
        getattr(found[metric].units, part)[1] = value

    return change


def both_of_explained_variance(found: Numbers) -> None:
    found["explained_variance"].units.num[1] = found["explained_variance"].units.den[1] = 1e6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (both_of_explained_variance, "den - num of explained_variance = num of mse"),
        (put("mse", "num", 0.0), "den - num of explained_variance = num of mse"),
        (put("mse", "den", 3.0), "mse and l0 have the same denominators"),
        (put("rescale_gain", "num", 0.0), "rescale_gain follows from shrinkage"),
        (put("rescale_gain", "den", 1.0), "explained_variance and rescale_gain have the same"),
        (put("ce_loss_sae", "num", 2.0), "ce_loss_increase = ce_loss_sae - ce_loss_clean"),
        (put("ce_loss_zero", "num", 9.0), "num of loss_recovered = ce_loss_zero - ce_loss_sae"),
        (put("loss_recovered", "den", 4.0), "den of loss_recovered = ce_loss_zero - ce_loss_clean"),
        (put("loss_recovered_mean", "num", 4.0), "num of loss_recovered_mean = ce_loss_mean"),
        (put("top1_agreement", "den", 2.0), "top1_agreement and ce_loss_clean have the same"),
        (put("top1_agreement", "num", 0.5), "some of its units are no whole numbers"),
        (put("l0", "num", 2.0), "densities add up to l0"),
        (put("dead_fraction", "num", 1.0), "a latent is dead where its density is 0"),
        (put("dense_fraction", "num", 0.0), "a latent is dense where its density is above 0.1"),
        (put("density", "den", 2.0), "densities have the denominator 1"),
        (put("encoder_decoder_cosine", "den", 0.0), "is of the latents that are active"),
        (put("encoder_decoder_cosine_weighted", "num", 0.6), "is weighted by density"),
        (put("encoder_decoder_cosine_weighted", "den", 0.7), "add up to densities"),
        (put("shrinkage", "den", 1e3), "mse and shrinkage cannot both be right"),
    ],
)
def test_a_unit_that_is_changed_alone_is_found(change: Callable[[Numbers], None], reason: str):
    found = numbers()
    change(found)
    assert reason in "\n".join(broken(found, WIDTH))


def test_units_of_other_sequences_or_tokens_are_found():
    found = numbers()
    found["cosine"] = found["cosine"]._replace(n=6)
    units = found["mse"].units
    found["mse"] = found["mse"]._replace(units=units._replace(ids=np.array([0, 2])))
    listed = list(broken(found, WIDTH))
    assert "mse is of other units than l0" in listed
    assert "cosine is of 6 tokens, and l0 of 5" in listed


def test_metrics_of_latents_have_all_of_them():
    assert "density is of 4 latents; the SAE has 5" in list(broken(numbers(), 5))


def test_numbers_that_are_not_there_are_not_asked_for():
    found = numbers()
    del found["mse"], found["ce_loss_clean"], found["density"], found["shrinkage"]
    assert list(broken(found, WIDTH)) == []
