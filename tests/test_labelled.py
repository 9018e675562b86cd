"""Labelled datasets: what is read, what is left out, and how examples are split."""

import csv
import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter, ValidationError

from saebench import codelabels, text
from saebench.errors import UserError
from saebench.labelled import Options, Texts, read
from saebench.types import Reading
from tests.models import byte_tokenizer

BYTES = byte_tokenizer()
BOS = BYTES.bos_token_id
SMALL = Options(train=40, validation=20, test=40, seed=0)
REAL = Path(__file__).parents[2] / "shared" / "assets" / "probing" / "sae_probes"


def lab(folder=Path(), tokenizer=BYTES, longest=64):
    def never(*_):
        raise AssertionError("reading runs no model")

    return SimpleNamespace(
        identity={},
        tokenizer=tokenizer,
        longest=longest,
        folder=folder,
        truth=None,
        known_tokens=never,
        width=never,
        activations=never,
        kept=never,
    )


def write_csv(path, rows, header=("prompt", "target")):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def prompts(n, target, about="a story"):
    return [(f"{about} {i} of {target}", target) for i in range(n)]


def read_rows(folder, rows, name="toy.csv", options=SMALL, pool="last", **lab_options):
    write_csv(folder / name, rows)
    return read((Texts(files=name, pool=pool),), lab(folder, **lab_options), options)


def texts_of(probe_set):
    return [BYTES.decode(e.ids[1:]) for e in probe_set.excerpts]


def asked(probe_set):
    """For each task and split the prompts of its positives and of its negatives."""
    written = np.array(texts_of(probe_set))
    found = {}
    for task in probe_set.tasks:
        for split in range(3):
            here = probe_set.split[task.examples] == split
            for y in (True, False):
                chosen = task.examples[here & (task.y == y)]
                found[task.name, split, y] = set(written[chosen].tolist())
    return found


# One question of two classes


def test_two_classes_are_one_question_whose_positive_is_the_second_in_order(tmp_path):
    rows = prompts(60, "yes") + prompts(70, "no")
    (found,) = read_rows(tmp_path, rows).sets
    assert [task.name for task in found.tasks] == [""] and not found.each_alone
    assert (found.name, found.source, found.pool) == ("toy", "toy", "last")
    for (_, split, y), chosen in asked(found).items():
        assert len(chosen) == (20, 10, 20)[split]
        assert all(prompt.endswith("yes" if y else "no") for prompt in chosen)


@pytest.mark.parametrize(
    ("targets", "positive"), [(("2", "10"), "10"), (("True", "False"), "True"), (("-1", "1"), "1")]
)
def test_numbers_are_in_the_order_of_their_values(tmp_path, targets, positive):
    rows = [row for target in targets for row in prompts(50, target)]
    (found,) = read_rows(tmp_path, rows).sets
    assert all(p.endswith(f"of {positive}") for p in asked(found)["", 0, True])


def test_the_split_is_cut_from_the_order_of_hashes(tmp_path):
    rows = prompts(30, "a") + prompts(80, "b")
    (found,) = read_rows(tmp_path, rows).sets
    for target, sizes in {"a": (12, 6, 12), "b": (20, 10, 20)}.items():
        members = [prompt for prompt, t in rows if t == target]
        members.sort(key=lambda p: hashlib.sha256(f"0 {p}".encode()).hexdigest())
        start = 0
        for split, size in enumerate(sizes):
            part = members[start : start + size]
            start += size
            # b has more than a, and a task has as many of one as of the other
            assert asked(found)["", split, target == "b"] == set(part[: (12, 6, 12)[split]])


def test_the_order_of_rows_and_other_datasets_change_nothing(tmp_path):
    rows = prompts(60, "a") + prompts(60, "b") + prompts(60, "c")
    alone = read_rows(tmp_path, rows)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert read_rows(tmp_path, shuffled).fingerprint == alone.fingerprint
    write_csv(tmp_path / "more.csv", prompts(60, "x", "a tale") + prompts(60, "y", "a tale"))
    both = read((Texts(files="*.csv"),), lab(tmp_path), SMALL)
    assert [s.name for s in both.sets] == ["more", "toy"]
    assert asked(both.sets[1]) == asked(alone.sets[0])
    assert both.fingerprint != alone.fingerprint
    other_seed = read_rows(tmp_path, rows, options=SMALL._replace(seed=1))
    assert asked(other_seed.sets[0]) != asked(alone.sets[0])


@pytest.mark.parametrize("changed", ["prompt", "target", "pool", "seed"])
def test_the_fingerprint_sees_every_change(tmp_path, changed):
    rows = prompts(60, "a") + prompts(60, "b")
    options, pool = SMALL, "last"
    before = read_rows(tmp_path, rows).fingerprint
    if changed == "prompt":
        rows = [(p.replace("story", "stori"), t) for p, t in rows]
    elif changed == "target":
        rows = [(p, {"a": "b", "b": "a"}[t]) for p, t in rows]
    elif changed == "pool":
        pool = "mean"
    else:
        options = SMALL._replace(seed=3)
    assert read_rows(tmp_path, rows, options=options, pool=pool).fingerprint != before


# Several classes


def test_each_class_is_asked_for_against_equal_parts_of_the_others(tmp_path):
    rows = [row for target in "abc" for row in prompts(60, target)]
    (found,) = read_rows(tmp_path, rows).sets
    assert [task.name for task in found.tasks] == ["a", "b", "c"]
    for (name, split, y), chosen in asked(found).items():
        size = (20, 10, 20)[split]
        counts = Counter(prompt[-1] for prompt in chosen)
        others = set("abc") - {name}
        assert counts == ({name: size} if y else dict.fromkeys(others, size // 2))


def test_negatives_come_from_larger_classes_where_a_small_one_is_used_up(tmp_path):
    rows = prompts(50, "a") + prompts(15, "b") + prompts(50, "c")
    (found,) = read_rows(tmp_path, rows).sets
    negatives = [Counter(p[-1] for p in asked(found)["a", split, False]) for split in range(3)]
    assert negatives == [{"b": 6, "c": 14}, {"b": 3, "c": 7}, {"b": 6, "c": 14}]


def test_a_class_that_is_most_of_a_dataset_is_asked_for_as_often_as_there_are_others(tmp_path):
    rows = prompts(90, "a") + prompts(25, "b") + prompts(26, "c")
    (found,) = read_rows(tmp_path, rows, options=Options(100, 50, 100, 0)).sets
    ours = asked(found)
    assert len(ours["a", 2, True]) == len(ours["a", 2, False]) == 21
    # Of b 10, 5, 10 and of c, cut at 10.4 and 15.6 of 26, 10, 5, 11


def test_a_class_with_too_few_rows_is_left_out_and_serves_the_others(tmp_path):
    rows = prompts(50, "a") + prompts(50, "b") + prompts(10, "few") + prompts(1, "once")
    found = read_rows(tmp_path, rows)
    assert [task.name for task in found.sets[0].tasks] == ["a", "b"]
    assert found.omitted == (
        ("toy:few", "only 4 positives in train; each split needs 5 of each class"),
        ("toy:once", "no positive in train"),
    )
    assert any(p.endswith("few") for p in asked(found.sets[0])["a", 0, False])


# Rows and datasets that cannot be used


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    good = prompts(50, "a") + prompts(50, "b")
    bad = [
        ("no target", ""),
        ("not a number", "nan"),
        ("", "a"),
        ("<pad><eos>", "b"),
        ("twice", "a"),
        ("twice", "a"),
        ("twice", "a"),
        ("both", "a"),
        ("both", "b"),
    ]
    found = read_rows(tmp_path, good + bad)
    assert found.omitted == (
        ("toy", "2 of 109 rows have no target"),
        ("toy", "2 of 109 rows have prompts of no tokens"),
        ("toy", "2 of 109 rows have a prompt that is there with another target too"),
        ("toy", "2 of 109 rows repeat other rows"),
    )
    everything = read_rows(tmp_path, good + bad, options=Options(200, 40, 40, 0)).sets[0]
    written = texts_of(everything)
    assert len(set(written)) == len(written)
    assert not {"", "both", "no target", "not a number"} & set(written)


def test_what_is_no_text_is_counted_and_lines_may_lack_a_column(tmp_path):
    rows = [{"prompt": p, "target": t} for p, t in prompts(50, 1) + prompts(50, 2.0)]
    rows += [{"prompt": 3, "target": 1}, {"prompt": "\ud800", "target": 1}, {"target": 2}]
    rows += [{"prompt": "x"}, {"prompt": "x", "target": None}, {"prompt": "x", "target": [1]}]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read((Texts(files="toy.jsonl"),), lab(tmp_path), SMALL)
    assert [o.reason for o in found.omitted] == [
        "3 of 106 rows have no target",
        "3 of 106 rows have no text",
    ]
    assert len(found.sets[0].tasks) == 1


def test_prompts_that_are_one_to_the_model_are_one(tmp_path):
    """Of a long prompt the last tokens are read, and two may end alike."""
    rows = (
        prompts(50, "a") + prompts(50, "b") + [("x" * 9 + "z" * 40, "a"), ("y" * 9 + "z" * 40, "b")]
    )
    found = read_rows(tmp_path, rows, longest=31)
    assert [o.reason for o in found.omitted] == [
        "2 of 102 rows have a prompt that is there with another target too"
    ]


UNUSABLE = {
    "one class": (prompts(50, "a"), "1 class ('a') in 50 usable rows; a probe needs two"),
    "no rows": ([], "no class in 0 usable rows; a probe needs two"),
    "all targets missing": (
        [(f"p{i}", "NaN") for i in range(9)],
        "no class in 0 usable rows; a probe needs two",
    ),
    "many numbers": (
        [(f"p{i}", i) for i in range(4326)],
        "target has 4,326 values, so it is a regression; probes here are for classes",
    ),
    "many words": (
        [(f"p{i}", f"w{i % 21}") for i in range(210)],
        "target has 21 values, at most 20 classes are probed",
    ),
    "fractions": (
        [(f"p{i}", (0, 0.5)[i % 2]) for i in range(99)],
        "target has values that are no whole numbers, such as 0.5, so it is a regression; "
        "probes here are for classes",
    ),
    "too few rows": (
        prompts(20, "a") + prompts(20, "b"),
        "only 4 positives in validation; each split needs 5 of each class",
    ),
    "no positive in a split": (prompts(50, "a") + prompts(1, "b"), "no positive in train"),
    "too few of every class": (
        [row for target in "abc" for row in prompts(8, target)],
        "none of its classes can be asked for",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_dataset_that_cannot_be_used_is_left_out_with_the_reason(tmp_path, case):
    rows, reason = UNUSABLE[case]
    write_csv(tmp_path / "good.csv", prompts(50, "a") + prompts(50, "b"))
    write_csv(tmp_path / "toy.csv", rows)
    found = read((Texts(files="*.csv"),), lab(tmp_path), SMALL)
    assert [s.name for s in found.sets] == ["good"]
    assert found.omitted[-1] == ("toy", reason)


def broken_files(folder):
    write_csv(folder / "columns.csv", [("x", 1)], header=("text", "label"))
    (folder / "empty.csv").write_text("")
    (folder / "ragged.csv").write_text("prompt,target\na,1,2,3\n")
    (folder / "latin.csv").write_bytes(b"prompt,target\n\xe9\xff,1\n")
    (folder / "not.csv.zst").write_bytes(b"prompt,target\nx,1\n")
    (folder / "not.csv.gz").write_bytes(b"prompt,target\nx,1\n")
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"prompt,target\n" * 999)[:30])
    (folder / "line.jsonl").write_text('{"prompt": "x", "target": 1}\n[1]\n')
    (folder / "syntax.jsonl").write_text('{"prompt": \n')
    (folder / "not.parquet").write_bytes(b"PAR1 no")
    (folder / "README").write_text("about")
    table = pyarrow.table({"prompt": ["x"], "label": [1]})
    pyarrow.parquet.write_table(table, folder / "columns.parquet")


def test_a_file_that_cannot_be_read_is_left_out_and_the_rest_goes_on(tmp_path):
    broken_files(tmp_path)
    n_broken = len(list(tmp_path.iterdir()))
    write_csv(tmp_path / "good.csv", prompts(50, "a") + prompts(50, "b"))
    found = read((Texts(files="*"),), lab(tmp_path), SMALL)
    assert [s.name for s in found.sets] == ["good"]
    assert len(found.omitted) == n_broken
    reasons = [reason for _, reason in found.omitted]
    assert "no column 'prompt'; there are: text, label" in reasons
    assert "no column 'target'; there are: prompt, label" in reasons
    assert "it cannot be read: ValueError: line 2 is no JSON object" in reasons
    assert any("Expected 2 fields in line 2, saw 4" in reason for reason in reasons)
    assert any("expected a file that ends in one of .csv, .csv.gz" in r for r in reasons)
    assert not any(str(tmp_path) in reason or "\n" in reason for reason in reasons)


def test_every_format_says_the_same(tmp_path):
    rows = prompts(50, 0) + [(f'"é,\n{i}"', 1) for i in range(50)]
    write_csv(tmp_path / "a.csv", rows)
    whole = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(whole))
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.csv.zst"), "zstd") as file:
        file.write(whole)
    lines = [json.dumps({"target": t, "prompt": p}) for p, t in rows]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"prompt": [p for p, _ in rows], "target": [float(t) for _, t in rows]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    found = read((Texts(files="*"),), lab(tmp_path), SMALL)
    assert [s.name for s in found.sets] == list("abcde") and not found.omitted
    assert {s.source for s in found.sets} == {"a"}
    first = asked(found.sets[0])
    assert len(first["", 0, True]) == 20 and all(asked(s) == first for s in found.sets)


# Tokens


def test_the_last_token_or_all_that_are_not_special_are_wanted(tmp_path):
    rows = [(f"{t}{'é' * (i % 9)}{i:02}<pad>", t) for t in "ab" for i in range(50)]
    (last,) = read_rows(tmp_path, rows).sets
    (mean,) = read_rows(tmp_path, rows, pool="mean").sets
    assert last.n_examples == mean.n_examples == 100
    for excerpt in last.excerpts:
        assert excerpt.ids[0] == BOS and (excerpt.ids[1:] != BOS).all()
        assert excerpt.wanted.tolist() == [len(excerpt.ids) - 2]  # the pad token is special
    for excerpt in mean.excerpts:
        assert excerpt.wanted.tolist() == list(range(1, len(excerpt.ids) - 1))
    lengths = [len(e.ids) for e in mean.excerpts]
    assert lengths == sorted(lengths)
    assert last.example_of.tolist() == list(range(100))
    assert mean.example_of.tolist() == [i for i, n in enumerate(lengths) for _ in range(n - 2)]


@pytest.mark.parametrize("front", [True, False])
def test_of_a_long_prompt_the_last_tokens_are_kept(tmp_path, front):
    tokenizer = BYTES if front else byte_tokenizer(bos=None, eos=None)
    rows = [(f"{'x' * 50}{t}{i:02}", t) for t in "ab" for i in range(50)]
    (found,) = read_rows(tmp_path, rows, tokenizer=tokenizer, longest=8).sets
    for excerpt in found.excerpts:
        kept = tokenizer.decode(excerpt.ids[front:])
        assert len(excerpt.ids) == 8 and kept[:-3] == "x" * (5 - front)


# Sources


@pytest.mark.parametrize(("shared", "source"), [(20, "a"), (10, "b")])
def test_sets_that_share_more_than_a_tenth_of_the_smaller_are_of_one_source(
    tmp_path, shared, source
):
    first = prompts(200, "x") + prompts(200, "y")
    second = prompts(50, "x", "another") + prompts(50, "y", "another")
    write_csv(tmp_path / "a.csv", first)
    write_csv(tmp_path / "b.csv", first[:shared] + second[shared:])
    write_csv(tmp_path / "c.csv", second)
    found = read((Texts(files="*.csv"),), lab(tmp_path), SMALL)
    assert {s.name: s.source for s in found.sets} == {"a": "a", "b": source, "c": source}


# What a suite says


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of source, files and dataset; got none"),
        ({"files": "x", "dataset": "y"}, "got files and dataset"),
        ({"files": "x", "split": "train"}, "split has no meaning beside files; remove it"),
        ({"source": "builtin:python-stdlib", "revision": "1"}, "revision has no meaning beside"),
        ({"source": "builtin:python-stdlib", "pool": "mean"}, "pool has no meaning beside source"),
        ({"dataset": "x"}, "a dataset needs split, such as `split: train`"),
        ({"files": "x", "text": "target"}, "both the column 'target'; expected two columns"),
        ({"files": "x", "pool": "max"}, "'last' or 'mean'"),
        ({"source": "builtin:wikipedia"}, "builtin:python-stdlib"),
        ({"files": "x", "txet": "y"}, "txet"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(tuple[Texts, ...]).validate_python([given])


def test_a_description_is_filled_from_what_a_suite_says_and_names_no_folder():
    given = {"files": "/home/me/sets/*.csv.zst", "label": "class"}
    (texts,) = TypeAdapter(tuple[Texts, ...]).validate_python([given])
    assert texts == Texts(files="/home/me/sets/*.csv.zst", label="class")
    identity = {"files": "*.csv.zst", "text": "prompt", "label": "class", "pool": "last"}
    assert texts.identity() == identity
    code = Texts(source="builtin:python-stdlib")
    assert code.identity() == {"source": "builtin:python-stdlib"}
    hub = Texts(dataset="some/set", split="train", revision="abc", pool="mean")
    columns = {"text": "prompt", "label": "target", "pool": "mean"}
    named = {"dataset": "some/set", "split": "train", "revision": "abc"}
    assert hub.identity() == named | columns


def test_what_no_reading_can_start_from_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no file matches 'none/\*.csv' .*folder of the suite"):
        read((Texts(files="none/*.csv"),), lab(tmp_path), SMALL)
    for pattern in ("", ".", "**x.csv", "~nobody_of_that_name/x.csv"):
        with pytest.raises(UserError, match="names no files"):
            read((Texts(files=pattern),), lab(tmp_path), SMALL)
    with pytest.raises(UserError, match="validation is 8; expected 10 examples or more"):
        read((Texts(files="*.csv"),), lab(tmp_path), SMALL._replace(validation=8))
    rows = prompts(50, "a") + prompts(50, "b")
    write_csv(tmp_path / "toy.csv", rows)
    with pytest.raises(UserError, match="2 datasets are called 'toy'; rename files"):
        read((Texts(files="toy.csv"), Texts(files=str(tmp_path / "*.csv"))), lab(tmp_path), SMALL)


def hub_rows():
    rows = prompts(50, 0) + prompts(50, 1) + [("hidden", -1)]
    classes = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sport", "arts"])}
    )
    columns = {"text": [p for p, _ in rows], "label": [t for _, t in rows]}
    return datasets.Dataset.from_dict(columns, features=classes)


def test_a_dataset_of_the_hub_is_asked_for_as_described_and_its_classes_have_names(
    tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or hub_rows()
    )
    texts = Texts(
        dataset="some/set", config="en", split="test", revision="1a", text="text", label="label"
    )
    found = read((texts,), lab(tmp_path), SMALL)
    assert calls == [(("some/set", "en"), {"split": "test", "revision": "1a"})]
    assert found.sets[0].name == "some/set/en"
    assert found.omitted == (("some/set/en", "1 of 101 rows has no target"),)
    # In order of names, arts (1) comes before sport (0).
    assert all(p.endswith("of 0") for p in asked(found.sets[0])["", 0, True])
    missing = read((Texts(dataset="some/set", split="test"),), lab(tmp_path), SMALL)
    assert missing.omitted == (("some/set", "no column 'prompt'; there are: text, label"),)


def test_a_dataset_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="could not be loaded"):
        read((Texts(dataset=str(tmp_path / "none"), split="train"),), lab(tmp_path), SMALL)


def test_code_is_one_set_whose_tasks_stand_alone(tmp_path, monkeypatch):
    sources = [f"x{i} = y + {i}  # note {i}\nz = 'a'\n" for i in range(40)]
    documents = [text.Document(f"m{i}", source) for i, source in enumerate(sources)]
    monkeypatch.setattr(codelabels, "held_out", lambda: documents)
    found = read((Texts(source="builtin:python-stdlib"),), lab(tmp_path), SMALL)
    (code,) = found.sets
    assert (code.name, code.source, code.pool, code.each_alone) == (
        "python",
        "python",
        "token",
        True,
    )
    assert {"comment", "assigned", "number"} <= {task.name for task in code.tasks}
    assert code.n_examples == len(code.split) == sum(len(e.wanted) for e in code.excerpts)
    assert code.example_of.tolist() == list(range(code.n_examples))
    assert "python:docstring" in dict(found.omitted)
    assert (
        found.fingerprint
        == read((Texts(source="builtin:python-stdlib"),), lab(), SMALL).fingerprint
    )


# Published sets

needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="the probing datasets are not beside the checkout"
)
REGRESSIONS = {
    *("12_us_long", "16_us_density", "18_world_latitude", "20_world_pageviews", "28_art_year"),
    *("2_hist_fig_birthyear", "30_book_length", "40_arith_rpn", "4_hist_fig_age"),
}


@needs_real
def test_published_sets_are_read_and_their_regressions_are_named():
    patterns = ("*_nyc_*.csv.zst", "108_*.csv.zst", *(f"{name}.*" for name in REGRESSIONS))
    files = tuple(Texts(files=pattern) for pattern in patterns)
    found = read(files, lab(REAL, longest=128), Options(1024, 256, 1024, 0))
    assert isinstance(found, Reading)
    left_out = {what for what, reason in found.omitted if "is a regression" in reason}
    assert left_out == REGRESSIONS | {"8_nyc_lat"}
    sets = {s.name: s for s in found.sets}
    of_nyc = ("10_nyc_borough", "114_nyc_borough_Manhattan", "116_nyc_borough_Bronx")
    assert sets.keys() == {*of_nyc, "108_athlete_sport"}
    assert {sets[name].source for name in of_nyc} == {"10_nyc_borough"}
    assert sets["108_athlete_sport"].source == "108_athlete_sport"
    assert [t.name for t in sets["108_athlete_sport"].tasks] == [
        "baseball",
        "basketball",
        "football",
    ]
    # Counted with pandas: 140 of its 2,000 prompts repeat an earlier one, one of them with another target.
    said = [reason for what, reason in found.omitted if what == "114_nyc_borough_Manhattan"]
    assert said == [
        "2 of 2,000 rows have a prompt that is there with another target too",
        "139 of 2,000 rows repeat other rows",
    ]
    for probe_set in found.sets:
        written = texts_of(probe_set)
        assert len(set(written)) == len(written) == probe_set.n_examples
        for (_, _, y), chosen in asked(probe_set).items():
            assert len(chosen) >= 5 and isinstance(y, bool)


def test_a_file_whose_name_looks_like_a_pattern_is_found_by_its_name(tmp_path):
    rows = prompts(50, "a") + prompts(50, "b")
    assert [s.name for s in read_rows(tmp_path, rows, name="toy[1].csv").sets] == ["toy[1]"]


def test_a_column_that_is_there_twice_is_not_chosen_from(tmp_path):
    rows = [(text, target, "other") for text, target in prompts(50, "a") + prompts(50, "b")]
    write_csv(tmp_path / "toy.csv", rows, header=("prompt", "target", "target"))
    columns = [list(column) for column in zip(*rows, strict=True)]
    names = ["prompt", "target", "target"]
    table = pyarrow.Table.from_arrays([pyarrow.array(c) for c in columns], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "toy.parquet")
    found = read((Texts(files="toy.*"),), lab(tmp_path), SMALL)
    assert found.sets == ()
    reason = "it cannot be read: ValueError: the column 'target' is there 2 times"
    assert [omitted.reason for omitted in found.omitted] == [reason, reason]


def test_halves_of_characters_can_be_written_to_results(tmp_path):
    rows = [{"prompt": f"a story {i}", "target": "\ud800ab"[i % 3]} for i in range(150)]
    (tmp_path / "classes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"\udfff": f"a story {i}", "target": i % 2} for i in range(50)]
    (tmp_path / "columns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read((Texts(files="*.jsonl"),), lab(tmp_path), SMALL)
    assert [task.name for task in found.sets[0].tasks] == ["\\ud800", "a", "b"]
    reasons = [omitted.reason for omitted in found.omitted]
    assert reasons == ["no column 'prompt'; there are: \\udfff, target"]
