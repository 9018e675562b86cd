"""SAELens: its checkpoints read by ours, and ours read by it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saebench import registry
from saebench.checkpoints import open_checkpoint
from saebench.errors import UserError
from saebench.exports._export import Origin
from saebench.exports.sae_lens import SAELens
from saebench.loaders._files import Limits
from saebench.loaders._loader import Member, Told
from saebench.saes._dictionary import Dictionary
from saebench.saes._normalized import Normalized
from saebench.types import Site
from tests.parity.conftest import Agree

sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)

D_IN, D_SAE, D_OUT = 7, 23, 5
HOOK = "blocks.1.hook_resid_post"
SITE, AFTER = Site("resid_post", 1), Site("mlp_out", 1)
OURS = {
    "standard": "ReLU",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "topk": "TopK",
    "batchtopk": "JumpReLU",
    "matryoshka_batchtopk": "JumpReLU",
    "transcoder": "ReLU",
    "skip_transcoder": "ReLU",
    "jumprelu_transcoder": "JumpReLU",
    "jumprelu_skip_transcoder": "JumpReLU",
}
TRANSCODERS = [name for name in OURS if "transcoder" in name]
TRAINED = ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"]
MORE: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 2.5},
    "matryoshka_batchtopk": {"k": 2.5, "matryoshka_widths": [5, 11, 23]},
}


@pytest.fixture
def x() -> Tensor:
    """Of about the size of real activations, off centre."""
    return 3 * torch.randn(400, D_IN, generator=torch.Generator().manual_seed(1)) + 1


def theirs(architecture: str, training: bool = False, **options: Any) -> Any:
    """One of their SAEs, with random weights, decoder rows of any length."""
    if architecture in TRANSCODERS:
        options = {"apply_b_dec_to_input": False, "d_out": D_OUT} | options
    find = sae_lens.registry.get_sae_training_class if training else sae_lens.registry.get_sae_class
    sae_class, config_class = find(architecture)
    config = config_class(d_in=D_IN, d_sae=D_SAE, **MORE.get(architecture, {}), **options)
    config.metadata.hook_name, config.metadata.model_name = HOOK, "some/model"
    if architecture in TRANSCODERS:
        config.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    sae = sae_class(config)
    random = torch.Generator().manual_seed(0)
    for name, weight in sae.named_parameters():
        values = torch.randn(weight.shape, generator=random)
        weight.data = (values.abs() if name == "threshold" else values).to(weight.dtype)
    return sae


def opened(folder: Path, told: Told = Told()) -> Member:  # noqa: B008  (a tuple, never changed)
    """By ours, recognised by its files."""
    checkpoint = open_checkpoint(str(folder), None, told, Limits(), None, folder)
    assert checkpoint.format == "sae_lens"
    (member,) = checkpoint.members
    return member


def in_float32(folder: Path) -> Any:
    return sae_lens.SAE.load_from_disk(folder, dtype="float32")


def output(sae: Any, x: Tensor) -> Tensor:
    """Of ours, everything that is predicted."""
    beside = sae.beside(x)
    decoded = sae.decode(sae.encode(x))
    return decoded if beside is None else decoded + beside


@torch.no_grad()
def check(agree: Agree, name: str, dtype: str, ours: Any, its: Any, x: Tensor) -> None:
    """Latents, what is decoded of them, and both paths together."""
    z = its.encode(x)
    active = (z != 0).float().mean().item()
    assert 0.02 < active < 0.98, "latents that are all on, or all off, would prove little"
    agree("sae_lens", name, dtype, ours.encode(x), z)
    agree("sae_lens", name, dtype, ours.decode(z), its.decode(z))
    agree("sae_lens", name, dtype, output(ours, x), its(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [a for a in OURS if "batch" not in a])
def test_what_it_saves_for_inference_is_read(
    architecture: str, dtype: str, tmp_path: Path, x: Tensor, agree: Agree
):
    theirs(architecture, dtype=dtype).save_model(tmp_path)
    member = opened(tmp_path)
    ours = member.load()
    assert type(ours).__name__ == OURS[architecture]
    target = AFTER if architecture in TRANSCODERS else SITE
    assert (member.site, member.target, member.model) == (SITE, target, "some/model")
    check(agree, architecture, dtype, ours, in_float32(tmp_path), x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "rescale"),
    [(a, False) for a in TRAINED] + [(a, True) for a in TRAINED if "topk" in a],
)
def test_a_checkpoint_of_its_training_is_what_it_would_save_for_inference(
    architecture: str, rescale: bool, dtype: str, tmp_path: Path, x: Tensor, agree: Agree
):
    options = {"rescale_acts_by_decoder_norm": rescale} if "topk" in architecture else {}
    sae = theirs(architecture, training=True, dtype=dtype, **options)
    if "batch" in architecture:
        sae.topk_threshold = torch.tensor(2.3, dtype=torch.float64)
    sae.save_model(tmp_path / "training")
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training", dtype="float32")
    again.save_inference_model(tmp_path / "inference")
    its = in_float32(tmp_path / "inference")
    name = f"{architecture}, training{', by norm' if rescale else ''}"
    for folder in ("training", "inference"):
        ours = opened(tmp_path / folder).load()
        assert type(ours).__name__ == OURS[architecture]
        check(agree, name, dtype, ours, its, x)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_a_bias_that_is_not_subtracted_is_not(
    architecture: str, tmp_path: Path, x: Tensor, agree: Agree
):
    theirs(architecture, apply_b_dec_to_input=False).save_model(tmp_path)
    ours = opened(tmp_path).load()
    check(agree, f"{architecture}, b_dec apart", "float32", ours, in_float32(tmp_path), x)


def test_thresholds_below_zero_let_nothing_negative_through(
    tmp_path: Path, x: Tensor, agree: Agree
):
    sae = theirs("jumprelu")
    sae.threshold.data -= 1
    assert (sae.threshold < 0).any() and (sae.threshold > 0).any()
    sae.save_model(tmp_path)
    check(
        agree, "jumprelu, below zero", "float32", opened(tmp_path).load(), in_float32(tmp_path), x
    )


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "transcoder"])
@torch.no_grad()
def test_normalisation_token_by_token_is_carried(
    architecture: str, normalization: str, tmp_path: Path, x: Tensor, agree: Agree
):
    x = (
        10 * x
    )  # the 1e-5 that is added to the deviation, and not undone there, is far below rounding
    theirs(architecture, normalize_activations=normalization).save_model(tmp_path)
    ours, its = opened(tmp_path).load(), in_float32(tmp_path)
    assert isinstance(ours, Normalized)
    name = f"{architecture}, {normalization}"
    scale = x.std(-1, keepdim=True)
    if normalization == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / math.sqrt(D_IN)
    if architecture == "transcoder":
        scale = torch.ones_like(scale)
    agree("sae_lens", name, "float32", ours.encode(x), its.encode(x) * scale)
    agree("sae_lens", name, "float32", output(ours, x), its(x))


@pytest.mark.parametrize("architecture", TRAINED)
@torch.no_grad()
def test_a_scale_of_all_activations_is_folded(
    architecture: str, tmp_path: Path, x: Tensor, agree: Agree
):
    """From the file beside a checkpoint of its training, and from the user for what it saved without folding."""
    sae = theirs(architecture, training=True, normalize_activations="expected_average_only_in")
    if "batch" in architecture:
        sae.topk_threshold = torch.tensor(1.3, dtype=torch.float64)
    factor = math.sqrt(D_IN) / 12.5
    scaler = sae_lens.training.activation_scaler.ActivationScaler(scaling_factor=factor)
    sae.save_model(tmp_path / "training")
    scaler.save(str(tmp_path / "training" / "activation_scaler.json"))
    sae.save_inference_model(tmp_path / "inference")
    its = in_float32(tmp_path / "inference")
    for folder, told in (("training", Told()), ("inference", Told(norm=12.5))):
        ours = opened(tmp_path / folder, told).load()
        name = f"{architecture}, scaled"
        z = its.encode(x * factor)
        agree("sae_lens", name, "float32", ours.encode(x), z / factor)
        agree("sae_lens", name, "float32", output(ours, x), its.decode(z) / factor)


@pytest.mark.parametrize("architecture", TRAINED)
@torch.no_grad()
def test_whitening_is_folded(architecture: str, tmp_path: Path, x: Tensor, agree: Agree):
    options = {"rescale_acts_by_decoder_norm": True} if "topk" in architecture else {}
    sae = theirs(architecture, True, normalize_activations="covariance_whitening", **options)
    if "batch" in architecture:
        sae.topk_threshold = torch.tensor(1.3, dtype=torch.float64)
    scaler = sae_lens.training.activation_scaler.ActivationScaler()
    mixing = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(2))
    scaler.estimate_whitening(D_IN, iter((x @ mixing).split(100)), n_batches_for_norm_estimate=4)
    sae.save_model(tmp_path / "training")
    scaler.save(str(tmp_path / "training" / "activation_scaler.json"))
    sae.save_inference_model(tmp_path / "inference")
    its, ours = in_float32(tmp_path / "inference"), opened(tmp_path / "training").load()
    z = its.encode(scaler.scale(x @ mixing))
    name = f"{architecture}, whitened"
    agree("sae_lens", name, "float32", ours.encode(x @ mixing), z)
    agree("sae_lens", name, "float32", output(ours, x @ mixing), scaler.unscale(its.decode(z)))


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", TRAINED)
def test_what_its_trainer_leaves_is_read(
    architecture: str, normalization: str, tmp_path: Path, x: Tensor, agree: Agree
):
    """Half way, with the scale beside it, and at the end, where the trainer has folded that."""
    torch.manual_seed(0)
    config = sae_lens.config.SAETrainerConfig(
        total_training_samples=12 * 64,
        train_batch_size_samples=64,
        lr=0.01,
        lr_end=0.01,
        n_checkpoints=1,
        checkpoint_path=str(tmp_path),
        save_final_checkpoint=True,
        n_batches_for_norm_estimate=4,
    )
    find = sae_lens.registry.get_sae_training_class(architecture)
    sae = find[0](
        find[1](
            d_in=D_IN,
            d_sae=D_SAE,
            normalize_activations=normalization,
            **MORE.get(architecture, {}),
        )
    )
    stream = iter(lambda: 3 * torch.randn(64, D_IN) + 1, None)
    trainer = sae_lens.SAETrainer(config, sae, stream)
    trainer.fit()
    folders = sorted(p for p in tmp_path.iterdir())
    assert len(folders) == 2 and "final" in folders[-1].name
    for folder in folders:
        scaler = json.loads((folder / "activation_scaler.json").read_text())["scaling_factor"]
        assert (scaler is None) == (normalization == "none" or "final" in folder.name)
        again = sae_lens.TrainingSAE.load_from_disk(folder)
        again.save_inference_model(folder / "inference")
        its = in_float32(folder / "inference")
        factor = scaler or 1.0
        ours = opened(folder, Told(site=SITE)).load()
        with torch.no_grad():
            z = its.encode(x * factor)
            assert (z != 0).any()
            name = f"{architecture}, trained"
            agree("sae_lens", name, "float32", ours.encode(x), z / factor)
            agree("sae_lens", name, "float32", output(ours, x), its.decode(z) / factor)


def made(architecture: str, d_out: int | None = None, skip: bool = False) -> Dictionary:
    """One of ours, with random weights."""
    k = {"k": 3} if architecture == "topk" else {}
    sae = registry.get("saes", architecture)(D_IN, D_SAE, d_out, skip, **k)
    random = torch.Generator().manual_seed(3)
    for name, weight in sae.named_parameters():
        values = torch.randn(weight.shape, generator=random)
        weight.data = values.abs() if name == "threshold" else values
    return sae


Make = Callable[[], Dictionary]
EXPORTED: dict[str, tuple[Make, Site]] = {
    "standard": (lambda: made("relu"), SITE),
    "gated": (lambda: made("gated"), SITE),
    "jumprelu": (lambda: made("jumprelu"), SITE),
    "topk": (lambda: made("topk"), SITE),
    "transcoder": (lambda: made("relu", D_OUT), AFTER),
    "skip_transcoder": (lambda: made("relu", D_OUT, True), AFTER),
    "jumprelu_transcoder": (lambda: made("jumprelu"), AFTER),
    "jumprelu_skip_transcoder": (lambda: made("jumprelu", D_OUT, True), AFTER),
}


@pytest.mark.parametrize("architecture", EXPORTED)
def test_what_is_written_for_it_computes_the_same_and_comes_back_bit_by_bit(
    architecture: str, tmp_path: Path, x: Tensor, agree: Agree
):
    make, target = EXPORTED[architecture]
    ours = make()
    SAELens().write(ours, Origin(SITE, target, "some/model"), tmp_path)
    its = sae_lens.SAE.load_from_disk(tmp_path)
    assert its.cfg.architecture() == architecture
    assert its.cfg.metadata.hook_name == HOOK and its.cfg.metadata.model_name == "some/model"
    check(agree, f"{architecture}, exported", "float32", ours, its, x)
    its.save_model(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        member = opened(folder)
        assert (member.site, member.target, member.model) == (SITE, target, "some/model")
        back = member.load()
        assert isinstance(back, Dictionary) and back.arguments() == ours.arguments()
        assert type(back) is type(ours)
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, back.state_dict()[name]), name


def test_heads_are_flattened_as_in_its_hook(tmp_path: Path, agree: Agree):
    ours = made("relu")
    SAELens().write(ours, Origin(Site("attn_z", 2), Site("attn_z", 2), None), tmp_path)
    its = sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        by_head = its.encode(x[:, :, None])
        agree("sae_lens", "standard, hook_z", "float32", ours.encode(x), by_head)
        decoded = its.decode(by_head)[:, :, 0]
        agree("sae_lens", "standard, hook_z", "float32", output(ours, x), decoded)
    assert opened(tmp_path).site == Site("attn_z", 2)


def test_before_version_6_it_is_read_as_that_reads_it(tmp_path: Path, x: Tensor, agree: Agree):
    sae = theirs("topk")
    sae.save_model(tmp_path)
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "some/model",
        "hook_point": HOOK,
        "hook_point_layer": 1,
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "normalize_activations": False,
        "prepend_bos": True,
        "sae_lens_version": "5.10.7",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    member = opened(tmp_path)
    assert (member.site, member.model) == (SITE, "some/model")
    check(agree, "topk, version 5", "float32", member.load(), in_float32(tmp_path), x)


@pytest.mark.parametrize("architecture", ["matching_pursuit", "abstopk"])
def test_what_has_no_class_here_is_refused_by_name(architecture: str, tmp_path: Path):
    theirs(architecture, **({"k": 3} if architecture == "abstopk" else {})).save_model(tmp_path)
    with pytest.raises(UserError, match=f"'{architecture}' is not read: it "):
        opened(tmp_path)
