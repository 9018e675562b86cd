"""The built-in probing tasks: labels of Python source, and the tokens that are examples of them."""

import argparse
import ast
import dataclasses
import keyword
import random
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

import saebench
from saebench import codelabels, text
from saebench.codelabels import TASKS, label, lacking
from tests.models import byte_tokenizer

BYTES = byte_tokenizer()
SIZES = (1024, 256, 1024)


def lab(tokenizer, longest=256):
    def never(*_):
        raise AssertionError("reading runs no model")

    return SimpleNamespace(
        identity={},
        tokenizer=tokenizer,
        longest=longest,
        folder=Path(),
        truth=None,
        known_tokens=never,
        width=never,
        activations=never,
        kept=never,
    )


MARKED = {
    "docstring": '''
def f():
    «"""Gibt é."""»
    return ‹"x"›, ‹f"{y}"› ‹# no›
class A:
    x = 1
    ‹"too late"›
''',
    "comment": "x = ‹'# é'›  «# é»\n«#!»\n",
    "f_string": "x = «f'{y!r} {{é}} {z:>{w}}'» + ‹'f{y}'› + «rF'''{z}\n'''» # f'{a}'\n",
    "string": "‹def f():›\n    'doc'\n    ‹return› «'é'» ‹+› «f'{x}'» ‹+ 1› # 'no'\n",
    "keyword": "«for» ‹é› «in» ‹y›: ‹match› = «None» # for\n",
    "definition": "class «É»(‹B›):\n    @‹d›\n    async def «f»(‹self›): ‹x›\n",
    "method": (
        "class A:\n    @d\n    def «é»(self):\n        def ‹g›(): pass\n"
        "    async def «h»(self): pass\n    if x:\n        def ‹k›(self): pass\n"
    ),
    "call": "‹é› = «f»(‹x›).‹y›.«z»((«w»)(1), ‹v›[0](2)) # f(x)\n",
    "import": "import «é».«b» as «c», «z»\nfrom ‹d›.‹e› import (\n    «f» as «g», «h»)\n‹x›\n",
    "builtin": "«print»(«len»(‹x›), input, ‹y›.len, é=f'{len}')\ninput = ‹z›\n",
    "keyword_argument": "é(«a»=‹b›, *‹c›)[‹d›]\nclass K(‹B›, «metaclass»=‹M›): x\n",
    "attribute": "‹é›.«é».«c»(‹d›).\\\n   «e» = 1. # a.b\n",
    "self_attribute": "self.«é».‹c› + a.‹d› + ('é', self).‹e› + self[0].‹f›\n",
    "parameter": "def ‹é›(«é», /, *«b», «c»: ‹int› = ‹d›, **«e»): lambda «g»=‹h›: ‹g›(‹g›=1)\n",
    "assigned": "«é», ‹a›.b = ‹c›\nfor «x» in ‹y›: ‹z›[‹i›] = («w» := ‹v›); «u» += 1\ndel t\n",
    "number": "é‹1› = «0»x«1»f + «2».«5»e«3» + '‹7›' # ‹8›\n",
    "arithmetic": "é ‹=› «-»y «+» ‹(›z‹)› «**» w‹[›0‹]›\na «@=» b\nf‹(*›c ‹==› d‹)›\n",
    "comparison": "é «<» ‹(›b‹)› «not in» c ‹and not› d ‹or› e «is not» f «==» g\n‹for› x ‹in› y‹: pass›\n",
    "closing_bracket": "é(\n  a[0‹]›, {1‹}›, '''(\n)'''  # ]\n«)»\n",
    "block_colon": (
        "if é[a‹:›b]«:» y‹:› int = c\nelse«:»\n    d = {1‹:› lambda‹:› 2}\n"
        "while lambda a=1‹:› a«:» pass\nasync def f(a‹:› b)«:» pass\n"
        "match x«:»\n    case {1‹:› y}«:» z\n    case é«:» match‹:› int\ncase ‹:› int = 3\n"
    ),
    "argument_equals": "é ‹=› f(a«=»1); y ‹=› lambda b«=»2: b == c\ndef f(c: int«=»3): z: int ‹=› 4\n",
    "line_start": "«x» ‹= (é,›\n  «y» ‹+ 1)›\n\n# no\n«i»‹f x: 'a'›\n",
    "decorator": "«@a.b('é')»\n«@(c)»\n‹class K: x @ y›\n",
    "multiline_brackets": "é(«a, [é],\n  b») + g(‹c›) # (\n",
    "subscript": "(‹é›)[«é, a[0]»] + f(‹b›)[«(1):2»]\n",
    "default": "def f(‹é=›«é»‹, *, b: c =›«(1)»‹, d›): lambda x=«2»: x\n",
    "comprehension": "é(‹a,› «[é for é in (b)]»‹,› «lambda: c») + [‹d›] + e«(x for x in y)»\n",
    "condition": "def f():\n    ‹if› «(é) and b»‹: c›\n    ‹while› «(d)»‹: e if g else h›\nif «i»: j\n",
    "return": "x\ndef f():\n    ‹é = 1›\n    if y:\n        «return (é)»\n    ‹raise z›\n",
    "raise": "raise_ = x\ndef f():\n    ‹é = 1›\n    if y: «raise A(é) from b»\n    ‹return z›\n",
    "import_statement": (
        "«import é as y»\n‹x = 1›\n‹def f():›\n    «from a import (b,\n        c)»\n    y = 2\n"
    ),
    "depth_3": "‹if a:›\n  ‹if b:›\n    ‹if c:›\n      «é(»\n«d)»\n      # no\n    ‹f›\n‹e›\n",
    "class_body": "‹class A(B):›\n    'doc'\n    «@(d)»\n    «def f(self): return é»; «x»\n‹y›\n",
    "loop": (
        "def f():\n    ‹for x in y:›\n        «é(); z»\n    ‹else: a›\n    ‹while b:› «c»\n"
        "for q in r: «s»\nt\n"
    ),
    "except": (
        "‹try: é›\n«except E as e: a»\nx\n"
        "‹try: b›\n«except: c»\n‹else: d›\n‹finally:›\n    ‹try: e›\n    «except* F: g»\n"
    ),
}
"""For each task a source with its positives in «» and its negatives in ‹›, all of both."""


def unmarked(marked):
    """The source, and the places of its positives and negatives that are not white space."""
    source, inside = "", None
    places = {"«": set(), "‹": set()}
    for character in marked:
        if character in places:
            inside = character
        elif character in "»›":
            inside = None
        else:
            if inside and not character.isspace() and character != ";":
                places[inside].add(len(source))
            source += character
    return source, *places.values()


def visible(mask, source):
    return {int(i) for i in np.flatnonzero(mask) if not source[i].isspace()}


@pytest.mark.parametrize("task", TASKS)
def test_a_source_marked_by_hand_is_labelled_so(task):
    source, positives, negatives = unmarked(MARKED[task])
    ast.parse(source)
    found = label(source)[task]
    assert visible(found.positive, source) == positives
    assert visible(found.negative, source) == negatives


def test_every_task_says_what_it_asks_and_against_what():
    assert len(TASKS) == len(MARKED) == 35
    assert all("; against " in described for described in TASKS.values())


def library(*modules):
    return [Path(module.__file__).read_text(encoding="utf-8") for module in modules]


LITERAL = re.compile(
    r"""\#[^\n]*
    | (?<!\w)(?P<prefix>[rbuRBUfF]{0,2})
      ('{3}(?:\\.|[^\\])*?'{3} | "{3}(?:\\.|[^\\])*?"{3} | '(?:\\.|[^'\\\n])*' | "(?:\\.|[^"\\\n])*")""",
    re.VERBOSE | re.DOTALL,
)
"""Comments and strings, by a pattern that knows nothing of Python's own tokenizer."""


@pytest.mark.parametrize("source", library(argparse, textwrap, random))
def test_comments_strings_and_keywords_agree_with_patterns(source):
    found = label(source)
    comments, strings, formatted = (np.zeros(len(source), dtype=bool) for _ in range(3))
    for literal in LITERAL.finditer(source):
        comment = literal["prefix"] is None
        kind = comments if comment else strings
        kind[literal.start() : literal.end()] = True
        if not comment and "f" in literal["prefix"].lower():
            formatted[literal.start() : literal.end()] = True
    assert (found["comment"].positive == comments).all()
    assert (found["f_string"].positive == formatted).all()
    assert ((found["docstring"].positive | found["string"].positive) == strings).all()
    keywords = np.zeros(len(source), dtype=bool)
    for word in re.finditer(r"\w+", source):
        if keyword.iskeyword(word[0]) and not (comments | strings)[word.start()]:
            keywords[word.start() : word.end()] = True
    assert (found["keyword"].positive == keywords).all()


@pytest.mark.parametrize("source", library(argparse, dataclasses))
def test_a_character_is_never_both_and_code_tasks_ask_nothing_of_comments(source):
    found = label(source)
    comments = found["comment"].positive
    for name, marked in found.items():
        assert not (marked.positive & marked.negative).any(), name
        if name not in ("docstring", "comment", "number"):
            assert not (comments & (marked.positive | marked.negative)).any(), name


SMALL = "# note {i}\nx{i} = y + {i}\nfor z in x{i}:\n    z -= '.'\n"
TINY = (20, 10, 20)


def small_documents(n):
    return [text.Document(f"m{i}", SMALL.format(i=i)) for i in range(n)]


def read_small(monkeypatch, n=40, seed=0, longest=256, sizes=TINY, tokenizer=BYTES):
    monkeypatch.setattr(codelabels, "held_out", lambda: small_documents(n))
    return codelabels.read(lab(tokenizer, longest), sizes, seed)


def characters_of(found, task):
    ids = np.concatenate([e.ids[e.wanted] for e in found.excerpts])
    drawn = found.tasks[task]
    return [BYTES.decode([i]) for i in ids[drawn.examples]], drawn.y


@pytest.mark.parametrize("longest", [256, 20])
def test_examples_are_the_tokens_that_their_labels_are_about(monkeypatch, longest):
    found = read_small(monkeypatch, longest=longest)
    assert sum(len(e.wanted) for e in found.excerpts) == len(found.split)
    assert all(e.ids[0] == BYTES.bos_token_id for e in found.excerpts)
    lengths = [len(e.ids) for e in found.excerpts]
    assert max(lengths) <= min(longest, 128) and lengths == sorted(lengths)
    for task, signs in {"arithmetic": "+-=", "comment": "# note0123456789"}.items():
        characters, y = characters_of(found, task)
        assert {c for c, yes in zip(characters, y, strict=True) if yes} <= set(signs)
    characters, y = characters_of(found, "number")
    assert all(c.isdigit() for c in characters)
    keywords, y = characters_of(found, "keyword")
    assert {c for c, yes in zip(keywords, y, strict=True) if yes} == set("forin")
    assert not set(BYTES.all_special_ids) & {
        int(i) for e in found.excerpts for i in e.ids[e.wanted]
    }


def test_tasks_are_balanced_within_splits_and_modules_are_in_one(monkeypatch):
    found = read_small(monkeypatch)
    for drawn in found.tasks.values():
        assert (np.diff(drawn.examples) > 0).all()
        for split, size in enumerate(TINY):
            y = drawn.y[found.split[drawn.examples] == split]
            assert 5 <= y.sum() == (~y).sum() <= size // 2
    ends = np.cumsum([len(e.wanted) for e in found.excerpts])
    for part in np.split(found.split, ends[:-1]):
        assert len(set(part.tolist())) == 1
    assert set(found.split.tolist()) == {0, 1, 2}


def same(a, b):
    return (
        len(a.excerpts) == len(b.excerpts)
        and all(
            x.tolist() == y.tolist()
            for one, other in zip(a.excerpts, b.excerpts, strict=True)
            for x, y in zip(one, other, strict=True)
        )
        and all((a.tasks[t].examples == b.tasks[t].examples).all() for t in a.tasks)
    )


def test_a_reading_repeats_and_another_seed_reads_otherwise(monkeypatch):
    assert same(read_small(monkeypatch), read_small(monkeypatch))
    assert not same(read_small(monkeypatch), read_small(monkeypatch, seed=1))


def test_a_task_too_rare_is_left_out_and_a_broken_module_too(monkeypatch):
    broken = text.Document("broken", "print 'a'\n")
    monkeypatch.setattr(codelabels, "held_out", lambda: [*small_documents(40), broken])
    found = codelabels.read(lab(BYTES), TINY, 0)
    reasons = dict(found.omitted)
    assert reasons["python module broken"].startswith("its tokens have no labels: SyntaxError")
    assert reasons["python:f_string"] == "no positive in train"
    assert {f"python:{task}" for task in TASKS if task not in found.tasks} < reasons.keys()


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_named():
    slow = SimpleNamespace(is_fast=False)
    found = codelabels.read(lab(slow), TINY, 0)
    assert found.tasks == {} and "does not say which characters" in found.omitted[0].reason


def test_where_nothing_is_held_out_it_is_said(monkeypatch):
    found = read_small(monkeypatch, n=0)
    assert found.tasks == {} and found.excerpts == ()
    assert "no module" in found.omitted[0].reason


@pytest.mark.parametrize(
    ("positives", "negatives", "reason"),
    [
        ([5, 5, 5], [5, 5, 5], None),
        ([9, 9, 0], [9, 9, 9], "no positive in test"),
        ([9, 9, 9], [9, 3, 9], "only 3 negatives in validation; each split needs 5 of each class"),
        ([1, 0, 0], [9, 9, 9], "only 1 positive in train; each split needs 5 of each class"),
    ],
)
def test_what_a_task_lacks_is_said_with_its_numbers(positives, negatives, reason):
    assert lacking(positives, negatives) == reason


@pytest.fixture(scope="module")
def whole():
    """The library of the running Python, as the bundled model reads it."""
    tokenizer = AutoTokenizer.from_pretrained(Path(saebench.__file__).parent / "pylm")
    return tokenizer, codelabels.read(lab(tokenizer), SIZES, 0)


def test_every_task_has_enough_examples_in_the_library(whole):
    _, found = whole
    assert found.tasks.keys() == TASKS.keys() and not found.omitted
    for task, drawn in found.tasks.items():
        for split in range(3):
            y = drawn.y[found.split[drawn.examples] == split]
            assert 20 <= y.sum() == (~y).sum(), task
    full = [len(drawn.examples) == sum(SIZES) for drawn in found.tasks.values()]
    assert sum(full) >= 20


def test_no_module_is_in_two_splits_and_none_is_for_training_saes(whole):
    tokenizer, found = whole
    held_out = codelabels.held_out()
    assert all(text.is_eval(document, 0.1) for document in held_out)
    splits = {document.name: set() for document in held_out}
    ends = np.cumsum([0, *(len(e.wanted) for e in found.excerpts)])
    for excerpt, example in list(zip(found.excerpts, ends[:-1], strict=True))[::10]:
        read = tokenizer.decode(excerpt.ids[1:]).strip("\ufffd")
        within = [document.name for document in held_out if read in document.text]
        assert within
        if len(within) == 1:
            splits[within[0]].add(int(found.split[example]))
    assert all(len(split) <= 1 for split in splits.values())
    assert {0, 1, 2} == set().union(*splits.values())
