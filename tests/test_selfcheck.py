"""The self-check of an SAE: what it measures, and what it says of SAEs from elsewhere."""

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from saebench import sparse
from saebench.saes.linear import Linear
from saebench.saes.relu import ReLU
from saebench.selfcheck import Read, SelfCheck, Tokens, check
from saebench.types import Site, SparseCode

D, N = 8, 256
HERE, THERE, BELOW = (Site("resid_post", layer) for layer in (2, 3, 1))


class Toy:
    """Gives back f(x), through latents that are f(x) itself."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.f, self.d_in, self.d_sae = f, D, D

    def encode(self, x: Tensor) -> Tensor:
        return self.f(x)

    def decode(self, z: Tensor) -> Tensor:
        return z

    def encode_sparse(self, x: Tensor) -> SparseCode:
        return sparse.from_dense(self.encode(x))

    def decode_sparse(self, code: SparseCode) -> Tensor:
        return sparse.to_dense(code, D)


def of(streams: dict[Site, Tensor]) -> Read:
    """The tokens in two pieces, of sequences of 16."""
    first = torch.arange(N) % 16 == 0

    def read(sites: Sequence[Site]) -> Iterator[Tokens]:
        for part in (slice(0, 100), slice(100, N)):
            yield Tokens({site: streams[site][part] for site in sites}, first[part])

    return read


def told_of(sae: object, x: Tensor) -> SelfCheck:
    return check(sae, (HERE, HERE), of({HERE: x}), lambda: [])  # type: ignore[arg-type]


def draw(seed: int) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def nowhere() -> list[tuple[Site, Site]]:
    raise AssertionError("other places are asked for only where nothing is explained")


def test_explained_variance_l0_and_norms_are_those_worked_out_by_hand():
    x = draw(0) + 3
    sae = Linear(D, 3)
    sae.W_enc.copy_(torch.eye(D)[:, :3])
    sae.W_dec.copy_(torch.diag(torch.tensor([1.0, 1.5, 2.0]))[:, [0, 1, 2]] @ torch.eye(D)[:3])
    x_hat = torch.zeros(N, D)
    x_hat[:, 0], x_hat[:, 1], x_hat[:, 2] = x[:, 0], 1.5 * x[:, 1], 2 * x[:, 2]
    expected = 1 - ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    told = told_of(sae, x)
    assert told.explained_variance == pytest.approx(float(expected), rel=1e-5)
    assert (told.l0, told.live_fraction, told.n_tokens) == (3.0, 1.0, N)
    assert told.decoder_norms == (1.0, 1.5, 2.0)
    assert told.numbers()["decoder_norms"] == [1.0, 1.5, 2.0]


def test_a_perfect_sae_is_not_refused_and_no_other_place_is_looked_at():
    told = check(Toy(lambda x: x), (HERE, HERE), of({HERE: draw(0)}), nowhere)
    assert told.refused is None and told.explained_variance == 1
    assert "explains 1 of the variance at 2.resid_post" in told.lines()[0]


def test_latents_that_fire_once_are_live_and_those_that_never_do_are_not():
    sae = ReLU(D, 4)
    sae.W_enc.copy_(torch.eye(D)[:, :4])
    sae.W_dec.copy_(torch.eye(D)[:4])
    x = torch.zeros(N, D)
    x[:, 0], x[0, 1] = torch.linspace(1, 2, N), 5.0
    told = told_of(sae, x)
    assert told.live_fraction == 2 / 4
    assert told.l0 == pytest.approx((N + 1) / N)


def test_an_sae_of_another_layer_is_told_where_it_was_trained():
    streams = {HERE: draw(1), THERE: 5 + draw(2), BELOW: 5 + 3 * draw(3)}
    places = [(BELOW, BELOW), (THERE, THERE)]
    sae = Toy(lambda x: 5 + (x - 5) * ((x - 5).abs().amax(1, keepdim=True) < 5))
    told = check(sae, (HERE, HERE), of(streams), lambda: places)
    assert told.explained_variance < 0
    assert told.causes[0].explained_variance == pytest.approx(1, abs=1e-6)
    assert told.causes[0].what == "at 3.resid_post"
    assert told.refused is not None
    assert "of the variance at 2.resid_post, and 1 at 3.resid_post" in told.refused
    assert told.refused.endswith(": it was probably trained there")


def test_a_transcoder_that_was_taken_for_an_sae_is_told_what_it_predicts():
    x, other = draw(0), Site("mlp_out", 2)
    streams = of({HERE: x, other: -3 * x})
    told = check(Toy(lambda x: -3 * x), (HERE, HERE), streams, lambda: [(HERE, other)])
    assert told.refused is not None and "1 at 2.resid_post to 2.mlp_out" in told.refused


def test_activations_that_lack_their_scale_are_recognised():
    near = Toy(lambda x: torch.where(x.norm(dim=1, keepdim=True) < 3 * math.sqrt(D), x, -x))
    told = told_of(near, 100 * draw(0))
    assert told.causes[0].what == "with activations scaled to a mean length of sqrt(d)"
    assert told.refused is not None and "--norm" in told.refused


def test_centred_activations_are_recognised():
    centred = Toy(lambda x: torch.where(x.mean(1, keepdim=True).abs() < 1e-4, x, -x))
    told = told_of(centred, draw(0) + 50 * draw(1)[:, :1])
    assert told.causes[0].what == "with activations centred token by token"
    assert told.causes[0].explained_variance == pytest.approx(1, abs=1e-6)


def test_first_tokens_that_are_very_long_are_recognised():
    x = draw(0)
    x[::16] *= 1000
    told = told_of(Toy(lambda x: torch.where(x.norm(dim=1, keepdim=True) < 50, x, -x)), x)
    assert "without the first token of each sequence" in [cause.what for cause in told.causes]


def test_where_nothing_helps_the_message_says_what_was_tried():
    told = told_of(Toy(lambda x: -x), draw(0))
    assert told.causes == () and told.refused is not None
    for tried in ("other places", "scaled or centred", "first token", "shorter or longer"):
        assert tried in told.refused


def test_a_decoder_that_is_three_times_too_long_is_recognised_with_its_factor():
    x = draw(0)
    mixed = 0.1 * draw(1)[:D]
    told = told_of(Toy(lambda x: 5 + 3 * (x + x @ mixed - 5)), x)
    assert told.explained_variance < 0
    # By regression of all coordinates on all predictions, each about its mean.
    guess = 3 * (x + x @ mixed)
    centred = guess - guess.mean(0)
    factor = float((x * centred).sum() / centred.square().sum())
    rest = (x - x.mean(0) - factor * centred).square().sum()
    expected = 1 - float(rest / (x - x.mean(0)).square().sum())
    assert told.causes[0].explained_variance == pytest.approx(expected, rel=1e-5)
    assert told.refused is not None
    assert f"its predictions are {1 / factor:.1f} times too large: times {factor:.2g} they" in (
        told.refused
    )
    assert f"explain {expected:.2g}; likely a normalisation" in told.refused


def test_predictions_that_are_too_small_are_said_to_be():
    told = told_of(Toy(lambda x: x / 4), draw(0) + 50)
    assert told.refused is not None
    assert "4.0 times too small: times 4 they explain 1;" in told.refused


def test_predictions_that_are_away_by_a_constant_are_not_called_too_large():
    told = told_of(Toy(lambda x: x + 5), draw(0))
    assert told.causes[0].what == "with a constant added to its predictions"
    assert told.causes[0].explained_variance == pytest.approx(1)


def test_constant_predictions_have_no_factor():
    told = told_of(Toy(lambda x: torch.full_like(x, 3.0)), draw(0))
    assert told.causes == ()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_gives_no_numbers(wrong: float):
    told = check(Toy(lambda x: x * wrong), (HERE, HERE), of({HERE: draw(0)}), nowhere)
    assert not told.finite and told.refused is not None and "not finite" in told.refused
    assert told.numbers() == {"n_tokens": N, "finite": False}


def test_an_sae_without_active_latents_is_refused_though_its_skip_predicts_all():
    sae = ReLU(D, 4, D, skip=True)
    sae.b_enc.fill_(-1.0)
    assert sae.W_skip is not None
    sae.W_skip.copy_(torch.eye(D))
    told = told_of(sae, draw(0))
    assert told.explained_variance == pytest.approx(1)
    assert told.refused is not None and "none of its latents is active" in told.refused


def test_activations_that_do_not_vary_have_no_variance_to_explain():
    told = told_of(Toy(lambda x: x), torch.ones(N, D))
    assert told.refused is not None and told.numbers()["explained_variance"] is None


def test_an_sae_whose_latents_are_mostly_active_is_remarked_on():
    told = SelfCheck("2.resid_post", N, True, 0.5, 5.0, 1.0, None, D, ())
    assert told.refused is None and any("more than half" in line for line in told.lines())
