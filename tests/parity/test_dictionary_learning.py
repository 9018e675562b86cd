"""dictionary_learning's own checkpoints, read by ours; and ours, read by theirs.

Theirs is loaded by its `load_dictionary`, the function that its evaluation uses.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from saebench.checkpoints import open_checkpoint
from saebench.exports._export import Origin
from saebench.exports.dictionary_learning import DictionaryLearning
from saebench.loaders._files import Limits
from saebench.loaders._loader import Told
from saebench.types import Site
from tests import toys

pytest.importorskip("dictionary_learning", exc_type=ImportError)

from dictionary_learning import dictionary, training, utils  # noqa: E402
from dictionary_learning.trainers import (  # noqa: E402
    batch_top_k,
    gdm,
    jumprelu,
    matryoshka_batch_top_k,
    p_anneal,
    standard,
    top_k,
)

D, N, K = 7, 23, 4
SITE = Site("resid_post", 3)
MAKE = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D, N),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D, N),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D, N),
    "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(D, N, K),
    "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(D, N, K),
    "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(
        D, N, K, [6, 17]
    ),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D, N),
}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def x():
    return torch.randn(200, D) * 2 + 1


def randomised(ae):
    """Weights without structure: directions of many lengths, biases that matter."""
    state = ae.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * 0.5)
        if name == "threshold":
            tensor.abs_()
    return ae


def write(folder, dict_class, state):
    trainer = {"dict_class": dict_class, "layer": 3, "lm_name": "org/model", "k": K}
    trainer |= {"submodule_name": "resid_post_layer_3"}
    folder.mkdir()
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    return folder


def read(folder):
    """By ours, and recognised without being told."""
    found = open_checkpoint(str(folder), None, Told(), Limits(allow_pickle=True), None, Path())
    assert found.format == "dictionary_learning"
    (member,) = found.members
    assert member.site == member.target == SITE
    return member.load()


def both_agree(agree, name, dtype, ours, theirs, x):
    with torch.no_grad():
        z = theirs.encode(x)
        x_hat = theirs.decode(z)
    assert 0.02 < (z != 0).float().mean() < 0.98, "nothing would be shown"
    agree("dictionary_learning", name, dtype, ours.encode(x), z)
    agree("dictionary_learning", name, dtype, ours.decode(ours.encode(x)), x_hat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dict_class", MAKE)
def test_what_they_wrote_is_the_same_function_here(tmp_path, agree, x, dict_class, dtype):
    state = randomised(MAKE[dict_class]()).state_dict()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    folder = write(tmp_path / "sae", dict_class, state)
    theirs, _ = utils.load_dictionary(str(folder), "cpu")
    both_agree(agree, dict_class, dtype, read(folder), theirs, x)


def test_an_autoencoder_that_theirs_does_not_rescale_gives_the_same_reconstructions(
    tmp_path, agree, x
):
    ae = randomised(MAKE["AutoEncoder"]())
    folder = write(tmp_path / "sae", "AutoEncoder", ae.state_dict())
    theirs = dictionary.AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
    ours = read(folder)
    with torch.no_grad():
        x_hat = theirs(x)
    agree("dictionary_learning", "AutoEncoder", torch.float32, ours.decode(ours.encode(x)), x_hat)


COMMON = {"activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "org/model", "device": "cpu"}
STEPS = {"steps": 40, "warmup_steps": 5, "seed": 0}
TRAINERS = {
    "StandardTrainer": (standard.StandardTrainer, {"sparsity_warmup_steps": 5}),
    "StandardTrainerAprilUpdate": (
        standard.StandardTrainerAprilUpdate,
        {"sparsity_warmup_steps": 5},
    ),
    "PAnnealTrainer": (
        p_anneal.PAnnealTrainer,
        {
            "sparsity_warmup_steps": 5,
            "anneal_start": 20,
            "initial_sparsity_penalty": 0.01,
            "sparsity_function": "Lp^p",
            "p_end": 0.2,
        },
    ),
    "GatedSAETrainer": (gdm.GatedSAETrainer, {"sparsity_warmup_steps": 5}),
    "TopKTrainer": (top_k.TopKTrainer, {"k": K, "threshold_start_step": 10}),
    "BatchTopKTrainer": (batch_top_k.BatchTopKTrainer, {"k": K, "threshold_start_step": 10}),
    "MatryoshkaBatchTopKTrainer": (
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        {"k": K, "threshold_start_step": 10, "group_fractions": [0.25, 0.75]},
    ),
    "JumpReluTrainer": (jumprelu.JumpReluTrainer, {"sparsity_warmup_steps": 5, "target_l0": 4.0}),
}


@pytest.mark.parametrize("normalised", [False, True], ids=["", "normalised"])
@pytest.mark.parametrize("name", TRAINERS)
def test_what_their_trainers_train_is_the_same_function_here(tmp_path, agree, name, normalised):
    """By `trainSAE`, which writes weights and configuration as it does for everybody."""
    trainer, settings = TRAINERS[name]
    batches = [torch.randn(64, D) @ torch.randn(D, D) + 1 for _ in range(150)]
    config = {"trainer": trainer, "submodule_name": "resid_post_layer_3"}
    config |= COMMON | STEPS | settings
    training.trainSAE(
        batches,
        [config],
        steps=40,
        save_dir=str(tmp_path),
        normalize_activations=normalised,
        device="cpu",
    )
    theirs, written = utils.load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    dict_class = written["trainer"]["dict_class"]
    ours = read(tmp_path)  # the run, with its one trainer
    both_agree(agree, dict_class, torch.float32, ours, theirs, batches[-1])


ORIGIN = Origin(SITE, SITE, "org/model")
FOLDED = {"relu": set(), "jumprelu": set(), "topk": {"b_enc"}, "gated": {"b_gate", "b_mag"}}


@pytest.mark.parametrize("architecture", FOLDED)
def test_what_ours_wrote_is_the_same_function_there_and_comes_back(
    tmp_path, agree, x, architecture
):
    ours = toys.sae_of(architecture, D, N)
    DictionaryLearning().write(ours, ORIGIN, tmp_path)
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    both_agree(agree, f"{architecture} exported", torch.float32, ours, theirs, x)
    back = copy.deepcopy(theirs).state_dict()
    folder = write(tmp_path / "back", type(theirs).__name__, back)
    again = read(folder).state_dict()
    for name, weight in ours.state_dict().items():
        if name in FOLDED[architecture]:
            torch.testing.assert_close(again[name], weight, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(again[name], weight), name
