"""Every plug-in keeps its contract. A new file is tested from the moment it exists."""

import dataclasses
import importlib
import inspect
import json
import re
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
import yaml

from saebench import registry, sparse, suite
from saebench.controls._control import Asked, BuiltControl, Planned, TrainedControl
from saebench.errors import UserError
from saebench.exports._export import Export, Origin
from saebench.loaders._files import Limits, Source
from saebench.loaders._loader import Loader, Told
from saebench.saes._dictionary import Dictionary, Scaling
from saebench.types import SAE, Eval, Omitted, Score, Seeded, SeedEval, Site, StreamEval, TextEval
from saebench.variants._training import Variant
from tests import toys
from tests.toys import D_SAE, D


@pytest.fixture(params=registry.names("saes"))
def sae(request):
    return toys.sae_of(request.param)


@pytest.fixture
def x():
    return torch.randn(60, D, generator=torch.Generator().manual_seed(1)) + 1


# Architectures


def test_shapes(sae, x):
    z = sae.encode(x)
    assert z.shape == (60, D_SAE) and sae.decode(z).shape == x.shape
    assert sae.W_dec.shape == (D_SAE, D)
    assert not hasattr(sae, "W_enc") or sae.W_enc.shape == (D, D_SAE)
    assert sae.b_dec.shape == (D,) and isinstance(sae, SAE)


def test_an_architecture_is_final_and_never_trains(sae):
    assert isinstance(sae, Dictionary) and type(sae).__final__
    assert not any(weight.requires_grad for weight in sae.parameters())


def test_some_latents_are_active_and_some_are_not(sae, x):
    """Otherwise what follows would show nothing."""
    active = (sae.encode(x) != 0).float().mean()
    assert active > 0.04 and (active < 0.95 or type(sae).__name__ == "Linear")


def test_a_token_is_encoded_the_same_alone_as_in_a_batch(sae, x):
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(sae.encode(x), alone)


def test_the_decoder_is_affine_in_its_dictionary(sae):
    rows = sae.decode(torch.eye(D_SAE)) - sae.decode(torch.zeros(1, D_SAE))
    torch.testing.assert_close(rows, sae.W_dec)
    assert torch.equal(sae.decode(torch.zeros(1, D_SAE))[0], sae.b_dec)


def test_the_sparse_code_is_the_dense_one_exactly(sae, x):
    code, z = sae.encode_sparse(x), sae.encode(x)
    assert torch.equal(sparse.to_dense(code, D_SAE), z)
    assert (code.values != 0).all() and len(code.indices) == int((z != 0).sum())
    for start, end in zip(code.offsets[:-1], code.offsets[1:], strict=True):
        assert (code.indices[start:end].diff() > 0).all()


def test_decoding_a_sparse_code_is_decoding_the_dense_one(sae, x):
    torch.testing.assert_close(sae.decode_sparse(sae.encode_sparse(x)), sae.decode(sae.encode(x)))


def test_no_tokens_are_encoded_into_nothing(sae, x):
    code = sae.encode_sparse(x[:0])
    assert len(code.indices) == 0 and sae.decode_sparse(code).shape == (0, D)


def test_its_arguments_and_weights_build_it_again(sae, x):
    again = type(sae)(**json.loads(json.dumps(sae.arguments())))
    again.load_state_dict(sae.state_dict())
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.decode(sae.encode(x)), sae.decode(sae.encode(x)))


def test_every_weight_matters(sae, x):
    """So that none can be left out of a fold, a checkpoint or a loader without a test noticing."""
    before = sae.decode(sae.encode(x))
    for name, weight in sae.named_parameters():
        kept = weight.clone()
        weight.add_(0.5)
        assert not torch.allclose(sae.decode(sae.encode(x)), before), name
        weight.copy_(kept)


def test_folding_gives_the_same_sae_of_raw_activations(sae, x):
    sae, x = sae.double(), x.double()
    mean, scale = torch.linspace(-3, 4, D, dtype=torch.float64), 2.5
    raw = scale * x + mean
    z, x_hat = sae.encode(x), sae.decode(sae.encode(x))
    toys.fold(sae, mean, scale)
    torch.testing.assert_close(sae.encode(raw), scale * z)
    torch.testing.assert_close(sae.decode(sae.encode(raw)), scale * x_hat + mean)


def test_folding_leaves_the_directions_alone(sae):
    before = {name: sae.state_dict()[name].clone() for name in _directions(sae)}
    toys.fold(sae, torch.ones(D), 3.0)
    assert all(torch.equal(sae.state_dict()[name], rows) for name, rows in before.items())


def _directions(sae):
    return [name for name, weight in sae.named_parameters() if weight.ndim == 2]


TRANSCODING = [
    name
    for name in registry.names("saes")
    if "d_out" in inspect.signature(registry.get("saes", name)).parameters
]
SHAPES = {"SAE": {}, "wider target": {"d_out": D + 3}, "skip": {"d_out": D + 3, "skip": True}}


def test_encoders_can_transcode_and_codes_found_without_one_cannot():
    assert set(TRANSCODING) >= {"relu", "topk", "jumprelu", "gated", "linear"}
    for name in set(registry.names("saes")) - set(TRANSCODING):
        assert not hasattr(toys.sae_of(name), "W_enc"), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", TRANSCODING)
def test_folding_knows_both_sites_of_a_transcoder(name, shape):
    """Each has its own mean and scale; what is predicted comes out in units of the target."""
    sae = toys.sae_of(name, **shape).double()
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    read = Scaling(torch.linspace(-3, 4, D, dtype=torch.float64), 2.5)
    predicted = Scaling(torch.linspace(1, -2, sae.d_out, dtype=torch.float64), 0.3)

    def predict(x):
        y_hat = sae.decode_sparse(sae.encode_sparse(x))
        return y_hat if sae.W_skip is None else y_hat + x @ sae.W_skip

    before, rows = predict(x), sae.W_dec.clone()
    sae.fold(read, predicted)
    after = predict(read.scale * x + read.mean)
    torch.testing.assert_close(after, predicted.scale * before + predicted.mean)
    assert torch.equal(sae.W_dec, rows) or name not in ("relu", "topk", "jumprelu", "gated")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", TRANSCODING)
def test_arguments_and_weights_build_a_transcoder_again(name, shape, x):
    sae = toys.sae_of(name, **shape)
    again = type(sae)(**json.loads(json.dumps(sae.arguments())))
    again.load_state_dict(sae.state_dict())
    assert again.d_out == sae.d_out == shape.get("d_out", D)
    assert (again.W_skip is not None) == shape.get("skip", False)
    assert again.decode(again.encode(x)).shape == (60, sae.d_out)
    assert torch.equal(again.decode(again.encode(x)), sae.decode(sae.encode(x)))


def test_a_folded_threshold_keeps_what_is_active():
    """Activations of another scale, and the threshold with them: otherwise L0 would not be that of training."""
    sae = toys.sae_of("jumprelu").double()
    sae.threshold.fill_(1.0)
    x = torch.randn(60, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = sae.encode(x) != 0
    assert 0.02 < before.double().mean() < 0.5
    toys.fold(sae, torch.zeros(D, dtype=torch.float64), 40.0)
    assert torch.equal(sae.encode(40 * x) != 0, before)
    assert sae.threshold.tolist() == [40.0] * D_SAE


@pytest.mark.parametrize("name", registry.names("saes"))
def test_a_wide_sae_is_encoded_a_few_tokens_at_a_time(name, monkeypatch):
    """A million latents: the dense latents of all tokens are never held at once."""
    monkeypatch.setattr(sparse, "_CHUNK", 2**21)
    sae, x = toys.sae_of(name, 2, 2**20), torch.ones(3, 2)
    held, split = [], sparse.token_chunks
    monkeypatch.setattr(sparse, "token_chunks", lambda *of: held.append(split(*of)) or held[-1])
    code = sae.encode_sparse(x)
    assert [len(chunk) for chunk in held[0]] == [2, 1] and len(code.offsets) == 4
    assert sae.decode_sparse(code).shape == (3, 2)


def test_topk_has_no_more_latents_than_there_are_positive_ones(x):
    sae = registry.get("saes", "topk")(D, D_SAE, k=4)
    sae.b_enc[:] = -1
    sae.b_enc[:3] = 2
    code = sae.encode_sparse(x)
    assert code.offsets.diff().tolist() == [3] * len(x) and (code.values == 2).all()


@pytest.mark.parametrize("k", [0, D_SAE + 1])
def test_topk_refuses_a_k_beyond_its_width(k):
    with pytest.raises(UserError, match=f"k is {k}"):
        registry.get("saes", "topk")(D, D_SAE, k=k)


# Variants


@pytest.mark.parametrize("name", registry.names("variants"))
def test_a_baseline_gives_every_field_and_no_other(name):
    path = registry.folder("baselines") / f"{name}.yaml"
    fields = [f.name for f in dataclasses.fields(registry.get("variants", name))]
    given = yaml.safe_load(path.read_text())
    # The recipe inside a transcoder is another variant's, filled in by the suite.
    assert sorted(given) == sorted(set(fields) - {"inner"})
    assert isinstance(suite.recipe(name, {}), Variant)


@pytest.mark.parametrize("name", registry.names("variants"))
def test_a_baseline_names_the_source_of_its_values(name):
    """On its own line; fields that every variant has may stand under the source of the line above."""
    header, *lines = (registry.folder("baselines") / f"{name}.yaml").read_text().splitlines()
    assert re.match(r"# .* 20\d\d[,.]", header), header
    shared = {f.name for f in dataclasses.fields(Variant)} - {"lr"}
    for line in lines:
        key, _, rest = line.partition(":")
        if not line.startswith("#") and key not in shared:
            assert len(rest.partition("#")[2]) > 5, line


def test_there_is_no_baseline_without_a_variant():
    files = sorted(path.stem for path in registry.folder("baselines").glob("*.yaml"))
    assert files == registry.names("variants")


@pytest.mark.parametrize("name", registry.names("variants"))
def test_no_field_of_a_recipe_has_a_default(name):
    for field in dataclasses.fields(registry.get("variants", name)):
        assert field.default is field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("name", registry.names("variants"))
def test_denoising_is_an_option_of_every_variant_and_off_in_its_baseline(name):
    assert suite.recipe(name, {}).input_noise == 0
    assert suite.recipe(name, {"input_noise": 0.5}).input_noise == 0.5


@pytest.mark.parametrize("name", registry.names("variants"))
def test_a_variant_refuses_what_no_sae_of_it_can_have(name):
    recipe = suite.recipe(name, {})
    for l0 in (1.0, 4.0, 32.0):
        recipe.check(32, l0)
    for l0 in (0.0, 0.5, 33.0, -1.0):
        with pytest.raises(
            ValueError, match=f"l0 is {l0:g}; with width 32 it must be from 1 to 32"
        ):
            recipe.check(32, l0)


@pytest.mark.parametrize(
    ("name", "options", "whole"),
    [
        ("topk", {}, True),
        ("transcoder", {}, True),
        ("skip_transcoder", {"activation": "topk"}, True),
        ("transcoder", {"activation": "batch_topk"}, False),
        ("batch_topk", {}, False),
        ("relu", {}, False),
    ],
)
def test_only_a_fixed_number_of_latents_per_token_has_to_be_whole(name, options, whole):
    recipe = suite.recipe(name, options)
    if not whole:
        recipe.check(32, 4.5)
        return
    with pytest.raises(ValueError, match=r"l0 is 4\.5; topk keeps k latents, a whole number"):
        recipe.check(32, 4.5)


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_fields_that_a_transcoder_shares_with_its_activation_agree(name):
    recipe = suite.recipe(name, {"activation": "jumprelu", "lr": 0.5, "bandwidth": 0.25})
    assert recipe.activation == "jumprelu"
    assert isinstance(recipe.inner, registry.get("variants", "jumprelu"))
    assert recipe.lr == recipe.inner.lr == 0.5 and recipe.inner.bandwidth == 0.25
    for field in dataclasses.fields(Variant):
        assert getattr(recipe, field.name) == getattr(recipe.inner, field.name)


# Evals


@pytest.mark.parametrize("name", registry.names("evals"))
def test_evals_are_frozen_defaults_with_declared_metrics(name):
    cls = registry.get("evals", name)
    assert issubclass(cls, Eval) and cls.version >= 1 and cls.metrics and cls.__final__
    assert cls.__dataclass_params__.frozen
    json.dumps(dataclasses.asdict(cls()))
    for metric in cls.metrics:
        assert metric.doc and metric.name.islower(), metric
        if metric.statistic != "ratio":
            assert metric.unit == "latent", "quantiles are over latents"


def test_no_two_evals_have_a_metric_of_the_same_name():
    evals = [registry.get("evals", name) for name in registry.names("evals")]
    names = [metric.name for eval_ in evals for metric in eval_.metrics]
    assert len(names) == len(set(names))


STREAM_EVALS, TEXT_EVALS, SEED_EVALS = (
    [name for name in registry.names("evals") if issubclass(registry.get("evals", name), kind)]
    for kind in (StreamEval, TextEval, SeedEval)
)


def test_an_eval_looks_at_the_stream_or_brings_its_own_text_or_compares_seeds():
    assert sorted(STREAM_EVALS + TEXT_EVALS + SEED_EVALS) == registry.names("evals")


def are_sound(scores):
    for score in scores:
        assert score.num.dtype == score.den.dtype == np.float64
        assert score.num.shape == score.den.shape and score.num.ndim == 1
        assert np.isfinite(score.num).all() and np.isfinite(score.den).all()
        assert score.n >= 1 and (score.reference is None or np.isfinite(score.reference))
        assert score.ids is None or len(set(score.ids)) == len(score.num)
        assert score.clusters is None or len(score.clusters) == len(score.num)


@pytest.mark.parametrize("name", STREAM_EVALS)
def test_scores_are_of_declared_metrics_in_float64(name):
    eval_, world = registry.get("evals", name)(), toys.world()
    sae = toys.aligned(toys.sae_of("relu").double())
    found = toys.scores(sae, world, [[0, 1, 2], [3, 4, 5, 6, 7]], [eval_])
    assert {m.name for m in eval_.metrics} == found.keys()
    are_sound(found.values())


@pytest.fixture(scope="module", params=TEXT_EVALS)
def text_eval(request):
    """An eval, and its part of a toy language model."""
    eval_, lab = registry.get("evals", request.param)(), toys.ToyLab()
    return eval_, eval_.prepare(lab, toys.labelled_text(lab), Site("toy", 0))


@pytest.mark.parametrize("shuffled", [False, True])
def test_scores_on_an_own_text_are_of_declared_metrics_in_float64(text_eval, shuffled):
    eval_, prepared = text_eval
    found = eval_.scores(toys.sae_of("relu"), prepared, shuffled)
    scores = [score for score in found if isinstance(score, Score)]
    names = [score.metric for score in scores]
    assert names and len(set(names)) == len(names)
    assert set(names) <= {m.name for m in eval_.metrics}
    are_sound(scores)
    assert [o for o in found if not isinstance(o, Score)] == [Omitted("left:out", "for a reason")]


@pytest.mark.parametrize("architecture", registry.names("saes"))
def test_every_architecture_is_scored_on_an_own_text(text_eval, architecture):
    eval_, prepared = text_eval
    assert eval_.scores(toys.sae_of(architecture), prepared, False)


def test_repeating_on_an_own_text_gives_the_same_number(text_eval):
    eval_, prepared = text_eval
    first, again = (eval_.scores(toys.sae_of("relu"), prepared, False) for _ in range(2))
    for a, b in zip(first[:-1], again[:-1], strict=True):
        assert a.metric == b.metric and a.num.tolist() == b.num.tolist()


def seeds_of(architecture, n=3):
    density = np.linspace(0, 0.2, toys.D_SAE)
    return [Seeded(toys.sae_of(architecture, seed=seed), density, 500) for seed in range(n)]


@pytest.mark.parametrize("name", SEED_EVALS)
def test_scores_between_seeds_are_of_declared_metrics_in_float64(name):
    eval_, (one, *others) = registry.get("evals", name)(), seeds_of("relu")
    found = eval_.scores(one, others)
    assert [score.metric for score in found] == [m.name for m in eval_.metrics]
    are_sound(found)
    for score in found:
        assert score.n == 500 and len(score.num) == one.sae.d_sae
    for a, b in zip(found, eval_.scores(one, others), strict=True):
        assert a.num.tolist() == b.num.tolist() and a.den.tolist() == b.den.tolist()


@pytest.mark.parametrize("name", SEED_EVALS)
@pytest.mark.parametrize("architecture", registry.names("saes"))
def test_seeds_of_every_architecture_are_compared(name, architecture):
    eval_, (one, *others) = registry.get("evals", name)(), seeds_of(architecture)
    are_sound(eval_.scores(one, others))


@pytest.mark.parametrize("name", registry.names("evals"))
def test_every_metric_of_an_eval_is_in_its_formulas(name):
    module = importlib.import_module(f"saebench.evals.{name}")
    for metric in registry.get("evals", name).metrics:
        family = metric.name.removeprefix("ce_loss_") if name == "fidelity" else metric.name
        family = re.sub(r"_(q05|q95|k\d+)$", "", family)
        assert family in module.__doc__ or metric.name in ("density",), metric.name


# Controls, reports, loaders, exports


RECIPE = suite.recipe("topk", {})
ASKED = [
    Asked("a", "topk", 32, 4.0, "hash a", Site("mlp_hidden", 1), RECIPE),
    Asked("b", "relu", 32, 4.0, "hash b", Site("mlp_hidden", 1), RECIPE),
    Asked("c", "relu", 32, 8.0, "hash c", Site("mlp_hidden", 1), RECIPE),
    Asked("d", "relu", 64, 8.0, "hash d", Site("mlp_hidden", 1), RECIPE),
]


@pytest.mark.parametrize("name", registry.names("controls"))
def test_controls_are_frozen_defaults_and_plan_distinct_saes(name):
    cls = registry.get("controls", name)
    assert issubclass(cls, BuiltControl) != issubclass(cls, TrainedControl)
    assert cls.__dataclass_params__.frozen and cls.__final__
    json.dumps(dataclasses.asdict(cls()))
    planned = cls().plan(ASKED)
    assert planned and all(isinstance(p, Planned) for p in planned)
    assert len({p.suffix for p in planned}) == len(planned)
    assert all(p.suffix == "" or p.suffix.startswith("-") for p in planned)


@pytest.mark.parametrize("name", registry.names("reports"))
def test_reports_are_frozen_and_can_be_called(name):
    cls = registry.get("reports", name)
    assert cls.__dataclass_params__.frozen and callable(cls)
    assert "folder" in inspect.signature(cls.__call__).parameters


@pytest.mark.parametrize("name", registry.names("loaders"))
def test_loaders_are_final_and_claim_no_folder_without_their_files(name, tmp_path):
    cls = registry.get("loaders", name)
    assert issubclass(cls, Loader) and cls.__final__
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "config.json").write_text("{}")
    source = Source(tmp_path, Limits())
    assert not cls().fits(source)
    with pytest.raises(UserError):
        for member in cls().members(source, Told(Site("resid_post", 0), k=2)):
            member.load()


@pytest.mark.parametrize("name", registry.names("exports"))
def test_exports_are_final_and_refuse_what_their_format_cannot_say(name, tmp_path):
    cls = registry.get("exports", name)
    assert issubclass(cls, Export) and cls.__final__
    site = Site("resid_post", 0)
    with pytest.raises(UserError):
        cls().write(toys.sae_of("codebook"), Origin(site, site, None), tmp_path)
    assert not list(tmp_path.iterdir())


# All plug-ins


EVERY = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_plugin_says_what_it_is_and_is_named_after_its_file(kind, name):
    plugin = registry.get(kind, name)
    assert len(inspect.getmodule(plugin).__doc__) > 40
    assert plugin.__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("kind", registry.KINDS)
def test_an_unknown_plugin_is_refused_with_the_names_there_are(kind):
    with pytest.raises(UserError, match=f"no 'nonsense' in {kind}.*{registry.names(kind)[0]}"):
        registry.get(kind, "nonsense")


def test_a_private_file_is_no_plugin():
    assert "_training" not in registry.names("variants")


def test_another_package_can_add_a_plugin(monkeypatch):
    added = EntryPoint("mine", "tests.toys:all_evals", "saebench.evals")
    groups = {"saebench.evals": (added,)}
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, ()))
    registry._added.cache_clear()
    try:
        assert "mine" in registry.names("evals") and "mine" not in registry.names("saes")
        assert registry.get("evals", "mine") is importlib.import_module("tests.toys").all_evals
    finally:
        registry._added.cache_clear()


def test_every_kind_of_plugin_has_some():
    assert all(registry.names(kind) for kind in registry.KINDS)
