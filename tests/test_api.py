"""`saebench.load` and `saebench.score`: what people call in a notebook."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saebench
from saebench import results, runner
from saebench.errors import UserError
from saebench.wrapped import Wrapped
from tests.conftest import EVALS, Finished
from tests.test_submit import trained

D = 16


class Theirs(nn.Module):
    """The plain class of a thousand notebooks: two Linears with a ReLU, which keep weights the other way round."""

    def __init__(self, d: int = D, d_sae: int = 32) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(d, d_sae), nn.Linear(d_sae, d)

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x).relu()

    def decode(self, z: Tensor) -> Tensor:
        return self.dec(z)


class Bare:
    """A function and its inverse, of another number of latents."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], 1)

    def decode(self, z: Tensor) -> Tensor:
        return z[:, : z.shape[1] // 2] - z[:, z.shape[1] // 2 :]


def draw(n: int = 20, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


# Any object as an SAE


def test_a_wrapped_object_does_what_the_object_does():
    torch.manual_seed(0)
    theirs, x = Theirs(), draw()
    sae = Wrapped(theirs, x, D)
    with torch.no_grad():
        z = theirs.encode(x)
        x_hat = theirs.decode(z)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (D, 32, D)
    code = sae.encode_sparse(x)
    assert torch.equal(code.offsets.diff(), (z != 0).sum(1))
    torch.testing.assert_close(code.values, z[z != 0])
    torch.testing.assert_close(sae.decode_sparse(code), x_hat)
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat)


def test_weights_are_passed_on_where_they_have_the_right_shape_alone():
    class Named(Bare):
        W_enc, W_dec, b_dec = torch.ones(D, 2 * D), torch.ones(D, 2 * D), [0.0] * D

    sae: Any = Wrapped(Named(), draw(), D)
    assert torch.equal(sae.W_enc, torch.ones(D, 2 * D))
    assert sae.W_dec is None and sae.b_dec is None


def test_modules_in_another_dtype_are_asked_in_it_and_answer_in_float32():
    sae: Any = Wrapped(Theirs().to(torch.float64), draw(), D)
    assert sae.encode(draw()).dtype == sae.decode(torch.zeros(2, 32)).dtype == torch.float32


class Wrong:
    def __init__(self, z: Any, x_hat: Any) -> None:
        self.z, self.x_hat = z, x_hat

    def encode(self, x: Tensor) -> Any:
        return self.z(x)

    def decode(self, z: Tensor) -> Any:
        return self.x_hat(z)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (object(), "has no encode"),
        (Wrong(lambda x: x.T, None), r"encode gave shape \[16, 20\]"),
        (Wrong(lambda x: x[0], None), r"encode gave shape \[16\]"),
        (Wrong(lambda x: x.numpy(), None), "encode gave ndarray"),
        (Wrong(lambda x: x, lambda z: z[:, :3]), r"decode gave shape \[20, 3\]"),
        (Wrong(lambda x: x, lambda z: (z, z)), "decode gave tuple"),
        (Wrong(lambda x: x * (x > x.mean()), lambda z: z), "alone differently"),
        (Wrong(lambda x: x * torch.rand(1), lambda z: z), "alone differently"),
    ],
)
def test_what_is_no_sae_is_refused_with_what_it_gave(of: Any, message: str):
    with pytest.raises(UserError, match=message):
        Wrapped(of, draw(), D)


def test_the_checksum_is_of_what_it_does():
    x = draw()
    first, same, other = Wrapped(Bare(), x, D), Wrapped(Bare(), x, D), Wrapped(Bare(), 2 * x, D)
    assert first.checksum(x) == same.checksum(x) != other.checksum(2 * x)
    assert len(first.checksum(x)) == 64


# Scoring


def test_an_exact_object_scores_as_the_identity_and_nothing_is_written(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    table = saebench.score(Bare(), finished.suite)
    value = table.set_index("metric")["value"]
    assert value["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert value["loss_recovered"] == pytest.approx(1, abs=1e-6)
    assert value["l0"] == pytest.approx(D)  # each number is above zero or below it
    assert set(table["sae"]) == {"my-sae"}
    assert "geometry" not in set(table["eval"])  # it has no W_dec
    assert list(tmp_path.iterdir()) == []


def test_our_own_sae_has_the_scores_that_it_has_in_its_suite(finished: Finished):
    loaded = saebench.load(trained(finished, "jumprelu"), "native")
    assert str(loaded.site) == "1.resid_post" and loaded.format == "native"
    assert loaded.origin == {"from": "local"}
    table = saebench.score(loaded, finished.suite, site="1.resid_post")
    read = results.read(finished.place.results()).scores
    there = read[read["sae"] == "jumprelu-w32-l4-s0"].set_index("metric")
    mine = table.set_index("metric")
    assert set(mine.index) == set(there.index) and set(table["eval"]) == set(EVALS)
    columns = ["value", "ci_low", "ci_high"]
    np.testing.assert_array_equal(mine[columns], there.loc[mine.index, columns])


def test_a_results_folder_makes_it_a_submission(finished: Finished, tmp_path: Path):
    saebench.score(Bare(), finished.plain, name="theirs", results=tmp_path / "results")
    folder = tmp_path / "results" / "tiny"
    record = json.loads((folder / "submissions.json").read_text())["theirs"]
    assert record["origin"] == {"from": "python", "class": "Bare"}
    assert len(record["checksum"]) == 64 and len(record["runs"]) == len(EVALS)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    saebench.score(Bare(), finished.plain, name="theirs", results=tmp_path / "results")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_an_object_that_explains_nothing_is_refused_unless_forced(finished: Finished):
    class Negative(Bare):
        def decode(self, z: Tensor) -> Tensor:
            return -super().decode(z)

    with pytest.raises(UserError, match="self-check refuses"):
        saebench.score(Negative(), finished.suite)
    table = saebench.score(Negative(), finished.suite, force=True).set_index("metric")
    assert table.loc["explained_variance", "value"] < 0


def test_an_object_of_another_width_or_of_an_unknown_site_is_refused(finished: Finished):
    with pytest.raises(
        UserError, match="reads activations of 16 dimensions; those at 1.mlp_hidden"
    ):
        saebench.score(
            saebench.load(trained(finished, "topk"), "native").sae,
            finished.suite,
            site="1.mlp_hidden",
        )
    with pytest.raises(UserError, match="has layers 0 to 2"):
        saebench.score(Bare(), finished.suite, site="7.resid_post")


def test_runs_that_all_fail_are_an_error(finished: Finished, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(runner._Scoring, "update", fail)
    with pytest.raises(UserError, match="5 runs failed, and none is finished"):
        saebench.score(Bare(), finished.suite)


def test_the_package_has_no_other_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        saebench.scores  # noqa: B018
