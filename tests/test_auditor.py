"""An audit of a small suite: what it measures, that it goes on where it was, and what it catches."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import pandas as pd
import pytest
import torch
import yaml

from saebench import auditor, registry, results, suite
from saebench.auditor import Extent
from saebench.errors import UserError
from saebench.evals._sums import SequenceSums
from saebench.reliability.cards import WARNING, Card, Reliability
from saebench.reliability.files import read_card
from saebench.reliability.rows import read_measured
from saebench.runner import Options
from saebench.suite import Plugin
from saebench.types import SAE, Facts, Metric, Score, Seen, StreamEval, Tally
from tests.conftest import whole_definition

pytestmark = pytest.mark.slow
EXTENT = Extent(draws=3, references=3, seeds=2)
SAES = [
    {"variant": "topk", "width": 32, "l0": [2, 4], "lr": 0.01},
    {"variant": "relu", "width": 32, "l0": 4, "lr": 0.01},
]


@final
@dataclass(frozen=True)
class Uncentred(StreamEval):
    """Explained variance as a public suite had it: for |E x|^2 it took (E|x|^2 / d)^2."""

    version: ClassVar = 1
    metrics: ClassVar = (
        Metric("uncentred", "max", "sequence", "wrong on purpose", ends=(0.0, 1.0)),
    )

    def start(self, sae: SAE, facts: Facts) -> Tally:
        return _Tally(facts)


class _Tally:
    def __init__(self, facts: Facts) -> None:
        self.sums, self.n = SequenceSums(facts.n_sequences), 0

    def update(self, seen: Seen) -> None:
        x, x_hat, sequence = seen.batch.x.double(), seen.x_hat.double(), seen.batch.sequence
        self.sums.add("tokens", sequence, torch.ones(len(x), dtype=torch.float64))
        self.sums.add("error", sequence, (x - x_hat).square().sum(-1))
        self.sums.add("length", sequence, x.square().sum(-1))
        self.n, self.d = self.n + len(x), x.shape[1]

    def scores(self) -> list[Score]:
        length, error = self.sums["length"], self.sums["error"]
        mean = float(length.sum()) / self.n
        total = length * (1 - mean / self.d**2)
        return [self.sums.ratio("uncentred", total - error, total, self.n)]


class Audited(NamedTuple):
    folder: Path
    card: Card
    suite: suite.Suite
    file: Path
    options: Options

    def of(self, metric: str) -> Reliability:
        return next(m for m in self.card.metrics if m.metric == metric)

    @property
    def measured(self) -> pd.DataFrame:
        return read_measured(self.folder / "audit.csv")


def audited(root: Path, definition: dict, *more: Plugin) -> Audited:
    file = root / "suite.yaml"
    file.write_text(yaml.safe_dump(definition, sort_keys=False))
    loaded = suite.load(file)
    loaded = loaded.model_copy(update={"evals": [*loaded.evals, *more]})
    options = Options(root / "results", root / "checkpoints", root / "cache", "cpu", None, False)
    card = auditor.audit(loaded, file, options, EXTENT, None)
    return Audited(root / "results" / loaded.name, card, loaded, file, options)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """On a world of known features, with a metric among the evals that is wrong."""
    definition = {
        "name": "known",
        "model": {"id": "builtin:synthetic-small"},
        "sites": ["0.resid_post"],
        "text": {
            "source": "builtin:synthetic",
            "context": 32,
            "train_tokens": 20_480,
            "eval_tokens": 4_000,
        },
        "training": {"batch_tokens": 512, "buffer_tokens": 4096},
        "saes": SAES,
        "evals": ["sparsity", "reconstruction", "fidelity", "ground_truth"],
        "reports": ["leaderboard"],
    }
    root = tmp_path_factory.mktemp("known")
    return audited(root, definition, Plugin("uncentred", Uncentred()))


@pytest.fixture(scope="module")
def on_text(world, tmp_path_factory: pytest.TempPathFactory) -> Audited:
    definition = whole_definition(world) | {
        "name": "texts",
        "saes": SAES,
        "controls": ["identity", "random"],
        "evals": ["sparsity", "reconstruction", "fidelity"],
        "reports": ["leaderboard"],
    }
    definition["text"]["train_tokens"] = 1600
    definition["text"]["eval_share"] = 0.4
    definition["text"]["eval_tokens"] = 3000
    return audited(tmp_path_factory.mktemp("texts"), definition)


def counts(found: Audited, **chosen: str) -> int:
    frame = found.measured
    for name, value in chosen.items():
        frame = frame[frame[name] == value]
    return frame["sae"].nunique()


def test_every_condition_is_measured_on_the_references(on_text: Audited):
    frame = on_text.measured
    settings = frame.groupby("what")["setting"].nunique().to_dict()
    assert settings == {
        "base": 1,
        "redraw": 3,
        "snapshot": 1,
        "batch": 1,
        "dtype": 1,
        "context": 1,
        "tokens": 1,
        "unit": 2,
        "cost": 1,
    }
    for what in ("redraw", "batch", "dtype", "context", "tokens", "unit"):
        assert counts(on_text, what=what) == 3, what
    assert set(frame["eval"]) == {"sparsity", "reconstruction", "fidelity"}


def test_draws_are_of_other_documents_and_say_how_much_text_they_are(on_text: Audited):
    redraws = on_text.measured.query("what == 'redraw' and metric == 'explained_variance'")
    assert redraws.groupby("sae")["value"].nunique().tolist() == [3, 3, 3]
    assert redraws["share"].nunique() == 1 and 0 < redraws["share"].iloc[0] <= 1


def test_controls_that_the_suite_lacks_are_added_to_the_base_alone(on_text: Audited):
    families = set(on_text.measured.query("what == 'base' and kind == 'control'")["family"])
    assert families == {"random", "frozen_decoder", "permuted_decoder"}
    assert "frozen_decoder" not in {e.variant for e in results.entries(on_text.folder).values()}


def test_the_first_references_are_trained_again_with_other_seeds(on_text: Audited):
    base = on_text.measured.query("what == 'base' and kind == 'trained'")
    seeds = base.groupby(["family", "l0"])["seed"].unique().map(sorted).to_dict()
    assert seeds == {("topk", 2.0): [0, 1], ("topk", 4.0): [0, 1], ("relu", 4.0): [0, 1]}


def test_one_sae_of_each_family_has_snapshots(on_text: Audited):
    snapshots = on_text.measured.query("what == 'snapshot' and metric == 'l0'")
    assert set(snapshots["family"]) == {"topk", "relu"}
    assert snapshots.groupby("family")["tokens"].nunique().min() >= 5
    assert snapshots["tokens"].max() == 1600


def test_each_eval_has_its_cost(on_text: Audited):
    costs = on_text.measured.query("what == 'cost'")
    assert set(costs["eval"]) == {"sparsity", "reconstruction", "fidelity"}
    assert (costs["seconds"] > 0).all()


def test_the_card_and_the_figures_lie_beside_the_results(on_text: Audited):
    names = {path.name for path in on_text.folder.iterdir()}
    assert {
        "audit.csv",
        "audit.json",
        "audit.md",
        "audit_progress.pdf",
        "audit_progress.png",
    } <= names
    assert read_card(on_text.folder / "audit.json") == on_text.card


def test_without_a_panel_truth_is_missing_with_its_reason(on_text: Audited):
    assert on_text.of("explained_variance").truth.passes is None
    assert on_text.of("explained_variance").truth.missing


def test_a_second_audit_scores_nothing_again_but_what_is_timed(
    on_text: Audited, monkeypatch: pytest.MonkeyPatch
):
    from saebench import runner

    before = on_text.measured.query("what != 'cost'").reset_index(drop=True)
    scored: list[str] = []
    whole = runner.score

    def noted(bench, runs):
        scored.extend(run.candidate.name for run in runs)
        return whole(bench, runs)

    monkeypatch.setattr(runner, "score", noted)
    auditor.audit(on_text.suite, on_text.file, on_text.options, EXTENT, None)
    n_costs = on_text.measured.query("what == 'cost'")["eval"].nunique()
    assert len(scored) == 2 * n_costs  # once before it is timed
    after = on_text.measured.query("what != 'cost'").reset_index(drop=True)
    pd.testing.assert_frame_equal(after, before)


def test_explained_variance_orders_oracles_and_controls(synthetic: Audited):
    found = synthetic.of("explained_variance")
    kinds = {(pair.better, pair.worse): pair for pair in found.order.kinds}
    assert all(pair.pairs for pair in kinds.values())
    assert found.invariance.unit is not None and found.invariance.passes


def test_the_wrong_variance_is_caught(synthetic: Audited):
    """It is no share of anything: it moves with the unit of activations."""
    right, wrong = synthetic.of("explained_variance"), synthetic.of("uncentred")
    assert right.invariance.passes and not wrong.invariance.passes
    assert wrong.badge == WARNING and "unit" in " ".join(wrong.warnings)
    assert "unit" not in " ".join(right.warnings)


def test_what_needs_a_language_model_is_not_on_the_card_of_a_world(synthetic: Audited):
    assert {m.eval for m in synthetic.card.metrics} == {
        "sparsity",
        "reconstruction",
        "ground_truth",
        "uncentred",
    }


def test_degraded_oracles_are_told_apart(synthetic: Audited):
    oracles = synthetic.measured.query("family == 'oracle' and metric == 'f1'")
    assert set(oracles["degraded"]) == {"", "mixed", "dropped", "permuted"}
    f1 = oracles.set_index("sae")["value"]
    assert f1["oracle-w32"] == pytest.approx(1)
    assert (f1.drop("oracle-w32") < 1).all()


def test_the_leaderboard_carries_the_warning(synthetic: Audited):
    said = (synthetic.folder / "leaderboard.csv").read_text()
    assert WARNING in said


def test_a_suite_of_too_few_saes_is_refused(world, tmp_path: Path):
    definition = whole_definition(world) | {"saes": SAES[1:], "evals": ["sparsity"], "reports": []}
    with pytest.raises(UserError, match="3 or more"):
        audited(tmp_path, definition | {"controls": []})


def test_a_panel_that_is_none_is_refused_before_anything_is_run(world, tmp_path: Path):
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(whole_definition(world)))
    options = Options(tmp_path / "r", tmp_path / "c", None, "cpu", None, False)
    with pytest.raises(UserError, match="audit synthetic_small"):
        auditor.audit(suite.load(file), file, options, EXTENT, tmp_path)
    assert not (tmp_path / "r").exists()


def test_the_card_as_json_has_reasons_for_what_is_missing(synthetic: Audited):
    content = json.loads((synthetic.folder / "audit.json").read_text())
    metric = next(m for m in content["metrics"] if m["metric"] == "f1")
    assert metric["truth"]["passes"] is None and metric["truth"]["missing"]


def test_evals_that_split_are_drawn_with_another_seed():
    probing = registry.get("evals", "sparse_probing")()
    assert auditor._reseeded(probing, 3).seed == 3
    plain = registry.get("evals", "sparsity")()
    assert auditor._reseeded(plain, 3) == plain
