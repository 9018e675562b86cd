"""Documents, the split, packing into rows, and what is kept on disk."""

import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from itertools import count
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saebench import cache as cache_module
from saebench import text
from saebench.cache import Cache, spec_hash
from saebench.errors import UserError
from saebench.text import Builtin, Document, Files, HubDataset, TokenDocument
from tests.models import byte_tokenizer

BYTES = byte_tokenizer()
BOS = BYTES.bos_token_id


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def jsonl(folder, texts, name="text.jsonl"):
    write_lines(folder / name, [{"text": t} for t in texts])
    return Files(name, folder=folder, field="text")


def stories(n, length=50):
    return [f"Story {i}: " + "word " * (length // 5) for i in range(n)]


# Where documents come from


def test_the_builtin_text_is_the_standard_library_in_no_order_of_names():
    found = list(text.documents(Builtin("python-stdlib")))
    assert sorted(found) == sorted(text.stdlib_documents())
    names = [document.name for document in found]
    assert {"argparse", "collections.abc"} <= set(names)
    half = len(names) // 2
    early = [sum(name < "j" for name in part) for part in (names[:half], names[half:])]
    assert min(early) > 0.8 * max(early)
    assert [d.name for d in text.documents(Builtin("python-stdlib"))] == names
    argparse = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    assert dict(found)["argparse"] == argparse.read_text()


def test_a_big_txt_file_becomes_documents_of_whole_blocks(tmp_path):
    blocks = [f"Speaker {i}:\n" + "word " * 60 + "\n" for i in range(40)]
    whole = "\n".join(blocks)
    (tmp_path / "plays.txt").write_text(whole)
    found = list(text.documents(Files("*.txt", folder=tmp_path, field="text")))
    assert "".join(d.text for d in found) == whole
    assert all(2_000 <= len(d.text) < 2_000 + 2 * len(blocks[0]) for d in found[:-1])
    assert all(d.text.startswith("Speaker") for d in found)


def test_files_give_the_same_texts_whatever_their_format(tmp_path):
    texts = stories(3)
    jsonl(tmp_path, texts, "a.jsonl")
    table = pyarrow.table({"text": texts, "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for pattern in ("*.jsonl", "a.parquet", str(tmp_path / "*.parquet")):
        found = list(text.documents(Files(pattern, folder=tmp_path, field="text")))
        assert [d.text for d in found] == texts


def test_token_ids_are_taken_as_they_are(tmp_path):
    write_lines(tmp_path / "ids.jsonl", [{"ids": [BOS, 5, 6, 7]}, {"ids": [8, 9]}, {"ids": [10]}])
    source = Files("ids.jsonl", folder=tmp_path, field="ids")
    found = list(text.documents(source))
    assert [d.ids.tolist() for d in found] == [[BOS, 5, 6, 7], [8, 9], [10]]
    side = [d for d in found if not text.is_eval(d, 0.5)]
    assert side
    tokens = text.tokenize(source, BYTES, 3, 2, 0, eval_share=1e-9)
    assert tokens.train.tolist() == [
        [BOS, 5, 6]
    ]  # the BOS that the document brought is not doubled


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"story": "x"}], r"t\.jsonl:1: no field 'text'; there are: story"),
        (
            [{"text": "x"}, {"text": {"a": 1}}],
            "t.jsonl:2: field 'text' holds dict; expected a text",
        ),
        ([{"text": [0.5]}], "holds list; expected a text or a list of token ids"),
        (["x"], "no field 'text'; there are: none"),
    ],
)
def test_a_row_without_text_is_named_with_its_line(tmp_path, rows, message):
    write_lines(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match=message):
        list(text.documents(Files("t.jsonl", folder=tmp_path, field="text")))


def test_a_broken_line_a_missing_file_and_a_strange_file_are_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "text.docx").write_text("x")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    for pattern, message in [
        ("broken.jsonl", r"broken\.jsonl:2: not a JSON object"),
        ("none/*.jsonl", "no file matches 'none/\\*.jsonl'.*relative to the folder of the suite"),
        ("*.docx", r"expected a file that ends in one of \.jsonl, \.txt, \.parquet"),
        ("a.parquet", "no field 'text'; there are: body"),
    ]:
        with pytest.raises(UserError, match=message):
            list(text.documents(Files(pattern, folder=tmp_path, field="text")))


def test_an_unreachable_data_set_says_what_to_do(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    source = HubDataset("nobody/nothing", None, "train", "text", "main", streaming=True)
    with pytest.raises(UserError, match="'nobody/nothing' .*HF_HUB_OFFLINE=1.*local files"):
        list(text.documents(source))


def test_a_data_set_is_read_with_its_revision_and_without_its_code(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return ({"text": str(i), "label": 1} for i in count())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = text.documents(HubDataset("a/b", "en", "train", "text", "abc", streaming=True))
    assert [next(found) for _ in range(2)] == [Document("a/b:0", "0"), Document("a/b:1", "1")]
    assert asked.pop("streaming") is True
    assert asked == {"name": "a/b", "config": "en", "split": "train", "revision": "abc"}


# The split


def test_the_side_of_a_document_depends_on_its_text_alone():
    digest = hashlib.sha256(b"some text").digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    for name in ("a", "b"):
        assert text.is_eval(Document(name, "some text"), share + 1e-9)
        assert not text.is_eval(Document(name, "some text"), share - 1e-9)
    ids = np.array([1, 2, 3], dtype=np.int32)
    assert text.is_eval(TokenDocument("a", ids), 0.7) == text.is_eval(
        TokenDocument("b", ids.astype(np.int64)), 0.7
    )


def test_about_as_many_documents_are_kept_for_evaluation_as_asked():
    kept = sum(text.is_eval(Document("x", f"text {i}"), 0.3) for i in range(4_000))
    assert abs(kept - 1_200) < 4 * (4_000 * 0.3 * 0.7) ** 0.5


def test_no_text_is_on_both_sides_even_when_it_comes_twice(tmp_path):
    texts = stories(60)
    source = jsonl(tmp_path, [*texts, *reversed(texts)])
    tokens = text.tokenize(source, BYTES, 16, 1_000, 1_000, eval_share=0.5)
    decoded = [
        BYTES.decode(rows.flatten(), skip_special_tokens=True)
        for rows in (tokens.train, tokens.evaluation)
    ]
    numbers = [{part.split(":")[0] for part in d.split("Story ")[1:-1]} for d in decoded]
    assert all(numbers)
    assert not numbers[0] & numbers[1]


def test_documents_kept_from_training_are_dealt_into_texts_that_share_none(tmp_path):
    source = jsonl(tmp_path, stories(400))
    one_row = len(BYTES(stories(1)[0])["input_ids"]) + 1

    def drawn(*draw):
        return text.tokenize(source, BYTES, one_row, 500, 1_000, 0.5, 1, text.Draw(*draw))

    hands = [text.hand_of(document, 3) for document in text.documents(source)]
    assert min(np.bincount(hands)) > 100
    whole, *parts = drawn(0, 1), *(drawn(i, 3) for i in range(3))
    rows = [{bytes(row) for row in part.evaluation} for part in parts]
    assert all(len(found) >= 1_000 // one_row for found in rows)
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert all(part.fingerprint_train == whole.fingerprint_train for part in parts)
    plain = text.tokenize(source, BYTES, one_row, 500, 1_000, 0.5)
    assert whole.fingerprint_eval == plain.fingerprint_eval
    assert len({part.fingerprint_eval for part in (whole, *parts)}) == 4


def test_a_part_of_the_documents_may_be_too_short(tmp_path):
    source = jsonl(tmp_path, stories(40))
    assert len(text.tokenize(source, BYTES, 16, 10, 500, 0.5).evaluation)
    with pytest.raises(text.TooShort, match="evaluation tokens"):
        text.tokenize(source, BYTES, 16, 10, 500, 0.5, 1, text.Draw(0, 20))


# Packing


def part_of(ids, most):
    """From the place that the hash of the document's ids says."""
    digest = hashlib.sha256(b"part of " + struct.pack(f"<{len(ids)}q", *ids)).digest()
    start = struct.unpack(">Q", digest[:8])[0] % max(1, len(ids) - most + 1)
    return ids[start : start + most]


def packed_by_hand(source, context, separator, special, needed, evaluation, share):
    """Rows by the definition, one token at a time."""
    stream = []
    for document in text.documents(source):
        if text.is_eval(document, share) == evaluation:
            ids = BYTES(document.text, add_special_tokens=False)["input_ids"]
            ids = part_of(ids, 16 * context) if evaluation else ids
            stream += ([separator] if stream else []) + ids
    rows, seen = [], 0
    while seen < needed:
        row, stream = [separator, *stream[: context - 1]], stream[context - 1 :]
        assert len(row) == context, "the text is too short for this test"
        rows.append(row)
        seen += sum(token not in special for token in row)
    return rows


@pytest.mark.parametrize("context", [2, 7, 64])
def test_rows_are_those_of_the_definition(tmp_path, context):
    source = jsonl(tmp_path, stories(40))
    tokens = text.tokenize(source, BYTES, context, 500, 200, eval_share=0.3)
    special = {BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id}
    assert tokens.special_ids == special
    assert tokens.context == context
    for rows, needed, evaluation in [(tokens.train, 500, False), (tokens.evaluation, 200, True)]:
        expected = packed_by_hand(source, context, BOS, special, needed, evaluation, 0.3)
        assert rows.tolist() == expected
        assert rows.dtype == np.int32


def test_a_row_is_of_the_document_that_it_begins_in(tmp_path):
    """Documents of 3, 5 and 9 bytes with a separator between, in rows of 4 bytes after their BOS."""
    source = jsonl(tmp_path, ["abc", "defgh", "ijklmnopq"])
    tokens = text.tokenize(source, BYTES, 5, 0, 14, eval_share=1 - 1e-9)
    letters = "".join(BYTES.convert_ids_to_tokens(tokens.evaluation.ravel()))
    assert letters == "<bos>abc<bos><bos>defg<bos>h<bos>ij<bos>klmn"
    assert tokens.documents.tolist() == [0, 1, 1, 2]


def test_no_more_of_a_document_is_evaluated_than_sixteen_rows(tmp_path):
    """However long it is; training takes all of it."""
    source = jsonl(tmp_path, ["x" * 1000, *stories(40)])
    held_out = text.tokenize(source, BYTES, 8, 0, 300, eval_share=1 - 1e-9)
    assert np.bincount(held_out.documents)[0] <= 16 + 3
    assert len(set(held_out.documents.tolist())) > 2
    train = text.tokenize(source, BYTES, 8, 900, 0, eval_share=1e-9).train
    assert (train == BYTES.convert_tokens_to_ids("x")).sum() >= 880


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(2, 40))
def test_there_is_not_one_row_more_than_needed(needed, context):
    source = Files("*.py", folder=Path(__file__).parent, field="text")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(text, "documents", lambda _s: iter(Document(str(i), t) for i, t in TEXTS))
    with monkey.context():
        rows = text.tokenize(source, BYTES, context, needed, 0, eval_share=1e-9).train
    monkey.undo()
    counts = (~text.special_mask(rows, frozenset({0, 1, 2}))).sum(1)
    assert counts.sum() >= needed > counts[:-1].sum()


TEXTS = list(enumerate(stories(20)))


def test_without_bos_the_eos_separates_and_without_both_nothing_does(tmp_path):
    source = jsonl(tmp_path, ["abc", "defg", "hij"])
    only_eos = byte_tokenizer(bos=None)
    rows = text.tokenize(source, only_eos, 4, 6, 0, eval_share=1e-9).train
    assert only_eos.batch_decode(rows) == ["<eos>abc", "<eos><eos>de", "<eos>fg<eos>"]
    neither = byte_tokenizer(bos=None, eos=None)
    rows = text.tokenize(source, neither, 4, 8, 0, eval_share=1e-9).train
    assert neither.batch_decode(rows) == ["abcd", "efgh"]


def test_special_tokens_are_masked_wherever_they_come_from(tmp_path):
    rows = text.tokenize(jsonl(tmp_path, ["ab<eos>cd"] * 9), BYTES, 5, 6, 0, 1e-9).train
    assert BYTES.batch_decode(rows) == ["<bos>ab<eos>c", "<bos>d<bos>ab"]
    mask = text.special_mask(rows, text.special_ids(BYTES))
    assert mask.tolist() == [[True, False, False, True, False], [True, False, True, False, False]]
    assert not text.special_mask(rows, frozenset()).any()


def test_reading_stops_as_soon_as_both_sides_have_enough(monkeypatch):
    taken = []

    def endless(_source):
        for i in count():
            taken.append(i)
            yield Document(str(i), f"{i} " * 1_000)

    monkeypatch.setattr(text, "documents", endless)
    tokens = text.tokenize(Builtin("python-stdlib"), BYTES, 32, 10_000, 1_000)
    assert len(tokens.train) * 31 >= 10_000
    assert len(taken) < 500


def test_passes_over_the_text_make_less_text_do_and_use_all_there_is(tmp_path):
    source = jsonl(tmp_path, stories(40))
    all_of_it = text.tokenize(source, BYTES, 16, 10**6, 10, train_passes=10**6).train
    n = int((~text.special_mask(all_of_it, text.special_ids(BYTES))).sum())
    with pytest.raises(UserError, match="ends too early"):
        text.tokenize(source, BYTES, 16, 2 * n + 2, 10, train_passes=2)
    twice = text.tokenize(source, BYTES, 16, 2 * n, 10, train_passes=2)
    assert np.array_equal(twice.train, all_of_it)
    # Nothing is repeated where there is enough.
    plenty = text.tokenize(source, BYTES, 16, n // 2, 10, train_passes=9)
    once = text.tokenize(source, BYTES, 16, n // 2, 10)
    assert np.array_equal(plenty.train, once.train)


def test_a_text_that_is_too_short_is_refused_with_what_it_has(tmp_path):
    source = jsonl(tmp_path, ["x" * 20])
    with pytest.raises(UserError) as error:
        text.tokenize(source, BYTES, 8, 100, 5, eval_share=1e-9)
    # 20 tokens are two whole rows of 7, and 6 that fill no row.
    assert "14 of 100 training tokens and 0 of 5 evaluation tokens" in str(error.value)
    assert "Lower train_tokens or eval_tokens, raise train_passes" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "context 1"),
        ({"eval_share": 1.0}, "eval_share 1.0"),
        ({"train_passes": 0}, "train_passes 0"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(tmp_path, arguments, message):
    given = {"context": 8, "train_tokens": 5, "eval_tokens": 0, **arguments}
    with pytest.raises(UserError, match=message):
        text.tokenize(jsonl(tmp_path, stories(3)), BYTES, **given)


def test_the_fingerprint_changes_with_the_tokens_and_not_with_the_file(tmp_path):
    (tmp_path / "moved").mkdir()

    def prints(source, context=16, eval_tokens=50):
        tokens = text.tokenize(source, BYTES, context, 200, eval_tokens, eval_share=0.5)
        return tokens.fingerprint_train, tokens.fingerprint_eval

    first = prints(jsonl(tmp_path, stories(20)))
    assert prints(jsonl(tmp_path / "moved", stories(20), "b.jsonl")) == first
    other_text = prints(jsonl(tmp_path, stories(20, 60), "c.jsonl"))
    other_context = prints(jsonl(tmp_path, stories(20)), context=17)
    more = prints(jsonl(tmp_path, stories(20)), eval_tokens=100)
    assert len({*first, *other_text, *other_context}) == 6
    assert more[0] == first[0]
    assert more[1] != first[1]


# What is kept on disk

SPEC = {"kind": "test", "site": "1.resid_post", "rows": 3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool]


def written(folder, dtype=torch.float32, spec=SPEC):
    array = (torch.arange(24).reshape(6, 4) % 7).to(dtype)
    with Cache(folder).writing(spec, (6, 4), dtype) as writer:
        for piece in array.split(4):
            writer.append(piece)
    return array


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_array_comes_back_as_it_was(tmp_path, dtype):
    array = written(tmp_path, dtype)
    found = Cache(tmp_path).array(SPEC, (6, 4), dtype)
    assert found.dtype == dtype
    assert torch.equal(found, array)
    found[:] = 0  # a copy in memory: the file stays
    assert torch.equal(Cache(tmp_path).array(SPEC, (6, 4), dtype), array)


def test_arrays_of_the_same_bits_and_other_dtypes_are_not_confused(tmp_path):
    written(tmp_path, torch.bfloat16)
    assert Cache(tmp_path).array(SPEC, (6, 4), torch.float16) is None
    assert Cache(tmp_path).array(SPEC, (4, 6), torch.bfloat16) is None
    assert Cache(tmp_path).array({**SPEC, "rows": 4}, (6, 4), torch.bfloat16) is None


def test_the_order_of_a_specs_keys_does_not_matter():
    assert spec_hash({"a": 1, "b": {"c": 2, "d": 3}}) == spec_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert spec_hash({"a": 1}) != spec_hash({"a": 2})


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"x", lambda _: b"not an array"]
)
def test_a_damaged_array_is_as_good_as_none(tmp_path, damage):
    written(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert Cache(tmp_path).array(SPEC, (6, 4), torch.float32) is None
    array = written(tmp_path)
    assert torch.equal(Cache(tmp_path).array(SPEC, (6, 4), torch.float32), array)


def test_small_tensors_come_back_and_damaged_ones_do_not(tmp_path):
    tensors = {"mean": torch.arange(3.0, dtype=torch.float64), "half": torch.ones(2).bfloat16()}
    Cache(tmp_path).keep_tensors(SPEC, tensors)
    found = Cache(tmp_path).tensors(SPEC)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert Cache(tmp_path).tensors(SPEC) is None


def test_without_a_folder_nothing_is_kept():
    cache = Cache(None)
    with cache.writing(SPEC, (6, 4), torch.float32) as writer:
        assert writer is None
    cache.keep_tensors(SPEC, {"x": torch.ones(1)})
    assert cache.array(SPEC, (6, 4), torch.float32) is None
    assert cache.tensors(SPEC) is None


def test_a_folder_that_cannot_be_written_to_is_read_alone(tmp_path, monkeypatch, caplog):
    array, other = written(tmp_path), SPEC | {"rows": 4}
    abandoned = tmp_path / "x.npy.0.999999999.0.part"
    abandoned.touch()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # permissions bind no superuser
    cache = Cache(tmp_path)
    assert torch.equal(cache.array(SPEC, (6, 4), torch.float32), array)
    with cache.writing(other, (6, 4), torch.float32) as writer:
        assert writer is None
    cache.keep_tensors(other, {"x": torch.ones(1)})
    assert sorted(tmp_path.iterdir()) == before
    assert "cannot be written to" in caplog.text


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Cache(tmp_path).writing(SPEC, (6, 4), torch.float32) as w,
    ):
        w.append(torch.zeros(2, 4))
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for free, begun in [(100, False), (101, True)]:  # 96 bytes and 5 % are 100.8
        monkeypatch.setattr(shutil, "disk_usage", lambda _p, f=free: usage._replace(free=f))
        with Cache(tmp_path).writing(SPEC, (6, 4), torch.float32) as writer:
            assert (writer is not None) == begun
            if writer:
                writer.append(torch.zeros(6, 4))


def test_a_disk_that_fills_up_in_the_middle_costs_the_file_and_not_the_run(
    tmp_path, monkeypatch, caplog
):
    whole, calls = cache_module._write_all, []

    def full_after_two(file, content):
        calls.append(len(content))
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(file, content)

    monkeypatch.setattr(cache_module, "_write_all", full_after_two)
    with Cache(tmp_path).writing(SPEC, (6, 4), torch.float32) as writer:
        for _ in range(3):
            writer.append(torch.zeros(2, 4))
    assert len(calls) == 3  # after the disk was found full nothing more is tried
    assert list(tmp_path.iterdir()) == []
    assert "the disk filled up" in caplog.text


def test_two_writers_of_the_same_array_do_no_harm(tmp_path):
    array = torch.arange(24.0).reshape(6, 4)
    first, second = Cache(tmp_path), Cache(tmp_path)
    with (
        first.writing(SPEC, (6, 4), torch.float32) as one,
        second.writing(SPEC, (6, 4), torch.float32) as two,
    ):
        for piece in array.split(2):
            one.append(piece)
            two.append(piece)
    assert torch.equal(first.array(SPEC, (6, 4), torch.float32), array)
    assert len(list(tmp_path.iterdir())) == 1


def test_only_unfinished_files_of_the_dead_are_removed(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    here = cache_module._host()
    old = tmp_path / "d.npy.elsewhere.7.x.part"
    files = {
        tmp_path / f"a.npy.{here}.{int(dead.stdout)}.x.part": False,
        tmp_path / f"b.npy.{here}.{os.getpid()}.x.part": True,
        tmp_path / "c.npy.elsewhere.7.x.part": True,
        old: False,
        tmp_path / "notes.part": True,
    }
    for path in files:
        path.touch()
    os.utime(old, (0, 0))
    Cache(tmp_path)
    assert {path: path.exists() for path in files} == files
