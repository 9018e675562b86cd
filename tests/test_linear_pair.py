"""Two nn.Linear with ReLU between, as a file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saebench.checkpoints import open_checkpoint
from saebench.errors import UserError
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import Told
from saebench.loaders.linear_pair import LinearPair
from saebench.saes._dictionary import Dictionary
from saebench.types import Site

SITE = Site("resid_post", 1)
TOLD = Told(SITE)
D, N = 3, 5


class Plain(nn.Module):
    """As somebody would write it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, N), nn.Linear(N, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(9, D, generator=torch.Generator().manual_seed(0))


def opened(
    path: Path, format: str | None = None, told: Told = TOLD, pickle: bool = False
) -> Dictionary:
    limits = Limits(allow_pickle=pickle)
    members = open_checkpoint(str(path), format, told, limits, None, path.parent).members
    assert [(m.site, m.target, m.model) for m in members] == [(SITE, SITE, None)]
    sae = members[0].load()
    assert isinstance(sae, Dictionary)
    return sae


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_module_does(tmp_path: Path, x: Tensor, bias: bool):
    torch.manual_seed(0)
    module = Plain(bias)
    save_file(module.state_dict(), tmp_path / "mine.safetensors")
    with torch.no_grad():
        latents, output = module.up(x).relu(), module(x)
    for path in (tmp_path, tmp_path / "mine.safetensors"):
        sae = opened(path)
        assert (latents == 0).any() and (latents > 0).any()
        torch.testing.assert_close(sae.encode(x), latents)
        torch.testing.assert_close(sae.decode(sae.encode(x)), output)


def test_a_pickled_file_is_read_where_that_is_allowed(tmp_path: Path, x: Tensor):
    module = Plain()
    torch.save(module.state_dict(), tmp_path / "mine.pt")
    with pytest.raises(UserError, match="no known format"):
        opened(tmp_path)
    with pytest.raises(UserError, match="has to be unpickled"):
        opened(tmp_path, "linear_pair")
    sae = opened(tmp_path, "linear_pair", pickle=True)
    with torch.no_grad():
        torch.testing.assert_close(sae.decode(sae.encode(x)), module(x))


def test_a_pickled_file_of_other_things_is_refused(tmp_path: Path):
    torch.save({"state_dict": Plain().state_dict()}, tmp_path / "mine.pt")
    with pytest.raises(UserError, match="state_dict is .*expected a tensor"):
        opened(tmp_path, "linear_pair", pickle=True)


def shaped(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


OTHERS = {
    "a further vector": shaped(
        a__weight=(N, D), a__bias=(N,), b__weight=(D, N), b__bias=(D,), b_dec=(D,)
    ),
    "a vector instead of a bias": shaped(
        a__weight=(N, D), a__bias=(N,), b__weight=(D, N), bias=(D,)
    ),
    "no bias of the encoder": shaped(a__weight=(N, D), b__weight=(D, N), b__bias=(D,)),
    "three layers": shaped(
        a__weight=(N, D), a__bias=(N,), b__weight=(N, N), b__bias=(N,), c__weight=(D, N)
    ),
    "widths that differ": shaped(a__weight=(N, D), a__bias=(N,), b__weight=(D + 1, N)),
    "as many latents as inputs": shaped(
        a__weight=(D, D), a__bias=(D,), b__weight=(D, D), b__bias=(D,)
    ),
    "fewer latents than inputs": shaped(a__weight=(2, D), a__bias=(2,), b__weight=(D, 2)),
    "no layers": shaped(W_enc=(D, N), W_dec=(N, D)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_tensors_are_neither_recognised_nor_read(tmp_path: Path, what: str):
    save_file(OTHERS[what], tmp_path / "mine.safetensors")
    assert not LinearPair().fits(Source(tmp_path, Limits()))
    with pytest.raises(UserError, match="expected NAME.weight"):
        opened(tmp_path, "linear_pair")


def test_beside_a_configuration_it_is_not_recognised(tmp_path: Path):
    save_file(Plain().state_dict(), tmp_path / "mine.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert not LinearPair().fits(Source(tmp_path, Limits()))
    assert opened(tmp_path, "linear_pair").d_sae == N


def test_a_damaged_file_is_not_recognised(tmp_path: Path):
    (tmp_path / "mine.safetensors").write_bytes(b"\xff" * 20)
    assert not LinearPair().fits(Source(tmp_path, Limits()))


def test_without_a_site_it_is_refused(tmp_path: Path):
    save_file(Plain().state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="at which site"):
        opened(tmp_path, told=Told())


@pytest.mark.parametrize("told", [Told(SITE, predicts=SITE), Told(SITE, k=2), Told(SITE, norm=2.0)])
def test_what_it_has_no_use_for_is_refused(tmp_path: Path, told: Told):
    save_file(Plain().state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="has no meaning"):
        opened(tmp_path, told=told)


def test_of_several_files_one_has_to_be_named(tmp_path: Path):
    for name in ("a", "b"):
        save_file(Plain().state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"several: a.safetensors, b.safetensors"):
        opened(tmp_path, "linear_pair")
    assert opened(tmp_path / "a.safetensors").d_in == D


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match="has no .safetensors"):
        opened(tmp_path, "linear_pair")
