"""In another unit an SAE is as good as it was."""

import numpy as np
import pytest
import torch

from saebench import registry
from saebench.rescaling import InUnitSAE, LabInUnit, SubjectInUnit, Unit
from saebench.types import Site
from tests import toys

SITE = Site("toy", 0)
SCALED, MOVED = Unit(10.0, 0.0), Unit(1.0, 3.0)
UNIT = Unit(10.0, 3.0)
IN_THE_UNIT = {"mse": SCALED.scale**2}
"""The power of the scale that they move by."""
ABOUT_ZERO = {"cosine", "shrinkage", "l2_ratio", "rescale_gain"}
"""Metrics whose formula measures lengths or angles from where zero is."""


class ToySubject:
    identity = {"id": "toy"}

    def __init__(self, world):
        self.world = world

    def facts(self, *_):
        return self.world.facts()

    def evaluation(self, *_):
        return self.world.batches()


class InUnitWorld:
    """As much of a toy world as scoring asks for."""

    def __init__(self, world, unit):
        self.subject = SubjectInUnit(ToySubject(world), unit)

    def facts(self):
        return self.subject.facts(SITE, SITE)

    def batches(self, _groups=None):
        return self.subject.evaluation(SITE)


def linear_sae():
    return toys.aligned(toys.sae_of("relu").double())


def before_and_after(unit):
    sae, world = linear_sae(), toys.world()
    before, after = (
        toys.values(sae, world),
        toys.values(InUnitSAE(sae, unit), InUnitWorld(world, unit)),
    )
    assert before.keys() == after.keys() and len(before) > 20
    return before, after


def test_a_scale_moves_nothing_but_what_is_measured_in_the_unit():
    before, after = before_and_after(SCALED)
    for name, value in before.items():
        expected = value * IN_THE_UNIT.get(name, 1)
        assert after[name] == pytest.approx(expected, rel=1e-6, abs=1e-9), name


def test_an_offset_moves_what_is_measured_from_zero_and_nothing_else():
    before, after = before_and_after(MOVED)
    moved = {n for n in before if after[n] != pytest.approx(before[n], rel=1e-6, abs=1e-9)}
    assert moved == ABOUT_ZERO


def test_a_variance_that_is_not_centred_moves():
    """explained variance with E|x|^2 in the place of the variance."""

    def uncentred(sae, world):
        batch = next(iter(world.batches()))
        x, x_hat = batch.x, sae.decode(sae.encode(batch.x))
        return float(1 - (x - x_hat).square().sum() / x.square().sum())

    sae, world = linear_sae(), toys.world()
    found = uncentred(InUnitSAE(sae, MOVED), InUnitWorld(world, MOVED))
    assert found != pytest.approx(uncentred(sae, world), abs=1e-3)


def test_what_is_beside_the_latents_is_in_the_unit_too():
    sae = registry.get("saes", "relu")(toys.D, toys.D_SAE)
    x = torch.randn(5, toys.D)
    assert InUnitSAE(sae, UNIT).beside(x) is None
    sae.beside = lambda x: 2 * x
    found = InUnitSAE(sae, UNIT).beside(UNIT.of(x))
    torch.testing.assert_close(found, UNIT.scale * 2 * x)


def test_a_lab_gives_its_activations_in_the_unit_and_computes_what_depends_on_them_anew():
    lab = toys.ToyLab()
    inside = LabInUnit(lab, UNIT)
    excerpts = [toys.Excerpt(np.array([3, 4]), np.array([1]))]
    torch.testing.assert_close(
        inside.activations(SITE, excerpts), UNIT.of(lab.activations(SITE, excerpts))
    )
    inside.kept({"what": "probes"}, dict)
    assert lab.computed == [{"what": "probes", "unit": [10.0, 3.0]}]
    assert inside.longest == lab.longest


def test_units_have_names():
    assert [unit.name for unit in (SCALED, MOVED, UNIT)] == ["10 x", "x + 3", "10 x + 3"]


def test_the_way_back_undoes_the_way():
    x = torch.randn(3, 4)
    torch.testing.assert_close(UNIT.back(UNIT.of(x)), x)
