"""What the tokens of Python source are, as exact labels: the built-in probing tasks.

`tokenize` and `ast` of the running Python say of every character of a module what it belongs to; a token of the
language model has the label of its first character that is not white space (tokens of white space alone are never
examples). Every task asks its question of some tokens only, of its positives and of a contrast class that could be
mistaken for them, so that what a token looks like gives little away. The modules are those of the standard library on
the evaluation side of `text.is_eval` at a share of 0.1: no SAE of a suite with that share was trained on them. All
tokens of a module are in one split.

What an f-string holds is one string up to Python 3.11 and tokens of its own from 3.12 on. Here it is one string always,
and nothing inside it is labelled as code.
"""

import ast
import bisect
import builtins
import hashlib
import io
import keyword
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Bool, Int

from saebench import text
from saebench.types import Excerpt, Lab, Omitted

NAME = "python"
EVAL_SHARE = 0.1
"""Of the documents, as in suites that say nothing else."""
ROW = 128
"""Tokens of an excerpt, the first special one included, at the most."""
LEAST_PER_CLASS = 5
"""Examples of each class that a task needs in each split."""
SPLITS = ("train", "validation", "test")

TASKS = {
    "docstring": "inside a docstring; against other strings and comments",
    "comment": "inside a comment; against strings",
    "f_string": "inside an f-string; against other strings that are no docstrings",
    "string": "inside a string that is no docstring; against code that is no string",
    "keyword": "a keyword; against names",
    "definition": "a name that def or class defines; against other names",
    "method": "a name that def defines directly in a class; against names that def defines elsewhere",
    "call": "a name that is called; against other names",
    "import": "a name that is imported; against other names",
    "builtin": "a name of Python itself that the module does not define anew; against other names that are read",
    "keyword_argument": "the name of a keyword argument where it is given; against other names in brackets",
    "attribute": "an attribute after a dot; against other names",
    "self_attribute": "an attribute of self; against attributes of anything else",
    "parameter": "a parameter where its function or lambda declares it; against other names",
    "assigned": "a name that is assigned to; against names that are read",
    "number": "a digit of a number; against digits in names, strings and comments",
    "arithmetic": "an arithmetic or bitwise operator; against other symbols",
    "comparison": "a comparison operator; against other symbols and keywords",
    "closing_bracket": "a closing bracket whose opener is on another line; against other closing brackets",
    "block_colon": "the colon that opens a block; against other colons",
    "argument_equals": "the = of a keyword argument or a default; against the = of an assignment",
    "line_start": "the first token of a line; against other code",
    "decorator": "in a decorator; against other code",
    "multiline_brackets": "in brackets that span lines; against code in brackets that do not",
    "subscript": "in the index of a subscript; against code in other brackets",
    "default": "in the default of a parameter; against code in brackets",
    "comprehension": "in a lambda or a comprehension; against code in brackets",
    "condition": "in the condition of an if or a while; against other code in functions",
    "return": "in a return statement; against other simple statements in functions",
    "raise": "in a raise statement; against other simple statements in functions",
    "import_statement": "in an import statement; against other code outside functions",
    "depth_3": "in a line that is indented three times or more; against other code",
    "class_body": "in the body of a class; against other code",
    "loop": "in the body of a loop; against other code in functions",
    "except": "in an except clause; against the rest of try statements",
}
"""What is asked of a token. Code is what is neither a comment nor a docstring nor an f-string."""

_BUILTINS = {
    name
    for name in dir(builtins)
    if not name.startswith("_")
    and name
    not in {"copyright", "credits", "exit", "help", "license", "quit"}  # of interactive use
}
_BLOCKS = {
    *("if", "elif", "else", "for", "while", "with", "async"),
    *("try", "except", "finally", "def", "class"),
}
_CLOSES = {")": "(", "]": "[", "}": "{"}
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
_LOOPS = ast.For | ast.AsyncFor | ast.While
_COMPREHENSIONS = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_OTHERS = ast.ClassDef | ast.If | ast.With | ast.AsyncWith | ast.Try | ast.TryStar | ast.Match
_COMPOUND = _FUNCTIONS | _LOOPS | _OTHERS
_DEEP = 3
_PREFIX = re.compile("[A-Za-z]*")
_SHARES = (0.4, 0.2, 0.4)
"""Of the characters of all modules, for training, validation and test."""

Span = tuple[int, int]
Mask = Bool[np.ndarray, " characters"]


class Marked(NamedTuple):
    """One task on one source, character by character."""

    positive: Mask
    negative: Mask
    """Never both; of a character that is neither, the task asks nothing."""


class Drawn(NamedTuple):
    """The examples of one task."""

    examples: Int[np.ndarray, " n"]
    """Numbers of wanted positions, ascending."""
    y: Bool[np.ndarray, " n"]


class CodeTokens(NamedTuple):
    """Rows of source, and which of their tokens are examples of which task. Every wanted position is one example."""

    excerpts: tuple[Excerpt, ...]
    split: Int[np.ndarray, " n_wanted"]
    tasks: dict[str, Drawn]
    omitted: tuple[Omitted, ...]


class _Module(NamedTuple):
    name: str
    ids: Int[np.ndarray, " tokens"]
    marks: Int[np.ndarray, "tasks tokens"]
    """1 where a token is a positive, -1 where it is a negative, 0 where nothing is asked of it."""
    characters: int


class _Token(NamedTuple):
    kind: str
    """name, keyword, number, symbol, string, f-string or comment."""
    text: str
    start: int
    end: int
    line: int
    end_line: int
    depth: int
    """How often its line is indented."""
    leads: bool
    """Whether a logical line begins with it."""


class _Pair(NamedTuple):
    opener: _Token
    closer: _Token

    @property
    def spans_lines(self) -> bool:
        return self.opener.line != self.closer.line


def read(lab: Lab, sizes: tuple[int, int, int], seed: int) -> CodeTokens:
    """Up to `sizes` examples for training, validation and test of each task, half of them positive."""
    if not lab.tokenizer.is_fast:
        reason = "the tokenizer does not say which characters a token stands for"
        return CodeTokens((), np.empty(0, np.int64), {}, (Omitted(NAME, reason),))
    omitted: list[Omitted] = []
    modules: list[_Module] = []
    for document in held_out():
        try:
            modules.append(_module(document, lab))
        except (SyntaxError, ValueError, RecursionError, tokenize.TokenError) as error:
            reason = f"its tokens have no labels: {type(error).__name__}: {error}"
            omitted.append(Omitted(f"{NAME} module {document.name}", reason))
    if not modules:
        omitted.append(Omitted(NAME, "no module of the standard library is held out"))
        return CodeTokens((), np.empty(0, np.int64), {}, tuple(omitted))
    split = np.repeat(split_of(modules, seed), [len(m.ids) for m in modules])
    drawn, too_few = _drawn(np.concatenate([m.marks for m in modules], 1), split, sizes, seed)
    gathered = _gathered(_rows(modules, lab), split, drawn)
    return gathered._replace(omitted=(*omitted, *too_few))


def held_out() -> list[text.Document]:
    """Modules of the standard library that SAEs are never trained on, none twice."""
    modules = (d for d in text.stdlib_documents() if not d.name.startswith("pydoc_data.topics:"))
    distinct = {d.text: d for d in modules if text.is_eval(d, EVAL_SHARE)}
    return list(distinct.values())


def split_of(modules: list[_Module], seed: int) -> Int[np.ndarray, " modules"]:
    """0, 1 or 2 for each: in an order given by hashes, cut where the characters reach their shares."""
    split = np.zeros(len(modules), dtype=np.int64)
    order = sorted(range(len(modules)), key=lambda i: _digest(f"{seed} module {modules[i].name}"))
    ends = np.cumsum(_SHARES) * sum(m.characters for m in modules)
    before = 0
    for i in order:
        middle = before + modules[i].characters / 2
        split[i] = min(int(np.searchsorted(ends, middle, "right")), len(SPLITS) - 1)
        before += modules[i].characters
    return split


def lacking(positives: list[int], negatives: list[int]) -> str | None:
    """Why a task with these numbers of examples per split cannot be asked; None where it can."""
    counts = zip(SPLITS, positives, negatives, strict=True)
    for name, *pair in counts:
        for kind, n in zip(("positive", "negative"), pair, strict=True):
            if not n:
                return f"no {kind} in {name}"
            if n < LEAST_PER_CLASS:
                return f"only {n} {kind}{'s' * (n > 1)} in {name}; each split needs {LEAST_PER_CLASS} of each class"
    return None


def label(source: str) -> dict[str, Marked]:
    """Every task of `TASKS` on a source. Raises what `ast.parse` and `tokenize` raise where it is none."""
    parsed = _Parsed(source)
    found = {**_strings(parsed), **_names(parsed), **_symbols(parsed), **_regions(parsed)}
    return {
        name: Marked(found[name].positive, found[name].negative & ~found[name].positive)
        for name in TASKS
    }


@final
class _Parsed:
    """A source with its tokens and its syntax tree, all positions counted in characters from the start."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.split("\n")
        self.starts = np.cumsum([0, *(len(line) + 1 for line in self.lines)]).tolist()
        with warnings.catch_warnings():  # such as those of escapes in other people's strings
            warnings.simplefilter("ignore")
            self.tree = ast.parse(source)
            everything = list(_tokens(source, self.starts))
        self.nodes = list(_nodes(self.tree))
        self.comments = [t for t in everything if t.kind == "comment"]
        self.tokens = [t for t in everything if t.kind != "comment"]
        self._at = [t.start for t in self.tokens]
        docstrings = self.mask(self.span(node) for node in _docstrings(self.tree))
        self.docstring = self.of_kind("string", "f-string") & docstrings
        self.string = self.of_kind("string") & ~docstrings
        self.f_string = self.of_kind("f-string") & ~docstrings
        self.names = self.of_kind("name")
        # A semicolon stands between statements and is in none of them.
        separators = self.of_tokens(t for t in self.tokens if t.text == ";")
        kinds = self.of_kind("name", "keyword", "number", "symbol")
        self.code = (kinds | self.string) & ~separators
        self.pairs = list(_brackets(self.tokens))
        self._closers = {pair.opener.start: pair for pair in self.pairs}
        self.statements = {self.span(n)[0]: n for n in self.nodes if isinstance(n, ast.stmt)}

    def mask(self, spans: Iterable[Span]) -> Mask:
        mask = np.zeros(len(self.source), dtype=bool)
        for start, end in spans:
            mask[start:end] = True
        return mask

    def of_tokens(self, tokens: Iterable[_Token]) -> Mask:
        return self.mask((t.start, t.end) for t in tokens)

    def of_kind(self, *kinds: str) -> Mask:
        return self.of_tokens(t for t in self.tokens if t.kind in kinds)

    def offset(self, line: int, column: int) -> int:
        """Of a position of `ast`, which counts columns in bytes of UTF-8."""
        written = self.lines[line - 1]
        if not written.isascii():
            column = len(written.encode()[:column].decode())
        return int(self.starts[line - 1]) + column

    def span(self, node: ast.AST) -> Span:
        start = self.offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        end = self.offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return start, end

    def block(self, body: list[ast.stmt]) -> Span:
        """From the first statement, decorators included, to the end of the last."""
        first, start = body[0], self.span(body[0])[0]
        if isinstance(first, ast.ClassDef | _FUNCTIONS) and first.decorator_list:
            start = self.decorator(first.decorator_list[0])[0]
        return start, self.span(body[-1])[1]

    def decorator(self, expression: ast.expr) -> Span:
        """Its @ included."""
        start, end = self.enclosed(expression)
        return self.source.rindex("@", 0, start), end

    def enclosed(self, expression: ast.expr) -> Span:
        """With the round brackets around it, which `ast` does not count. None but its own may stand before it."""
        start, end = self.span(expression)
        before = bisect.bisect_left(self._at, start) - 1
        after = bisect.bisect_left(self._at, end)
        while self.tokens[before].text == "(":
            start, end = self.tokens[before].start, self.tokens[after].end
            before, after = before - 1, after + 1
        return start, end

    def index(self, node: ast.Subscript) -> _Pair:
        """The brackets of a subscript: the first that open after its value."""
        opener = self.after(self.span(node.value)[1])
        while opener.text == ")":
            opener = self.after(opener.end)
        return self._closers[opener.start]

    def first(self, node: ast.AST) -> _Token:
        """The token that a node begins with."""
        return self.after(self.span(node)[0])

    def last(self, node: ast.AST) -> _Token:
        return self.tokens[bisect.bisect_left(self._at, self.span(node)[1]) - 1]

    def after(self, offset: int) -> _Token:
        """The first token that begins there or later."""
        return self.tokens[bisect.bisect_left(self._at, offset)]

    def between(self, left: ast.AST, right: ast.AST) -> list[_Token]:
        """The operator of two operands: what stands between them but for brackets around either."""
        first = bisect.bisect_left(self._at, self.span(left)[1])
        stop = bisect.bisect_left(self._at, self.span(right)[0])
        return [t for t in self.tokens[first:stop] if t.text not in ("(", ")")]


def _tokens(source: str, starts: list[int]) -> Iterator[_Token]:
    """In order. f-strings are put together where `tokenize` takes them apart."""
    opens = {getattr(tokenize, n, None) for n in ("FSTRING_START", "TSTRING_START")} - {None}
    closes = {getattr(tokenize, n, None) for n in ("FSTRING_END", "TSTRING_END")} - {None}
    depth = nested = 0
    opened, leads = (0, 0), True
    for found in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (found.type == tokenize.INDENT) - (found.type == tokenize.DEDENT)
        kind, start = _kind(found), found.start
        if found.type in opens:
            opened = opened if nested else found.start
            nested += 1
        elif found.type in closes:
            nested -= 1
            kind, start = "f-string", opened
        if found.type == tokenize.NEWLINE:
            leads = True
        if kind is None or nested:
            continue
        first, end = starts[start[0] - 1] + start[1], starts[found.end[0] - 1] + found.end[1]
        if not source[first:end].endswith(found.string):
            raise ValueError(f"line {start[0]}: {found.string!r} is not where tokenize says")
        leading = leads and kind != "comment"
        yield _Token(kind, source[first:end], first, end, start[0], found.end[0], depth, leading)
        leads = leads and not leading


def _kind(token: tokenize.TokenInfo) -> str | None:
    """None of what separates lines and blocks."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    if token.type == tokenize.STRING:
        prefix = _PREFIX.match(token.string)
        return "f-string" if prefix and "f" in prefix[0].lower() else "string"
    kinds = {tokenize.NUMBER: "number", tokenize.OP: "symbol", tokenize.COMMENT: "comment"}
    return kinds.get(token.type)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All but those inside f-strings, of which Python 3.11 does not know the places."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if type(node).__name__ not in ("JoinedStr", "TemplateStr"):
            todo.extend(ast.iter_child_nodes(node))


def _docstrings(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | _FUNCTIONS) and node.body:
            first = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first


def _strings(parsed: _Parsed) -> dict[str, Marked]:
    comments = parsed.of_tokens(parsed.comments)
    plain, formatted, docstring = parsed.string, parsed.f_string, parsed.docstring
    digits = np.fromiter(map(str.isdecimal, parsed.source), bool, len(parsed.source))
    return {
        "docstring": Marked(docstring, plain | formatted | comments),
        "comment": Marked(comments, plain | formatted | docstring),
        "f_string": Marked(formatted, plain),
        "string": Marked(plain | formatted, parsed.code & ~plain),
        "number": Marked(parsed.of_kind("number") & digits, digits),
    }


def _names(parsed: _Parsed) -> dict[str, Marked]:
    names, nodes = parsed.names, parsed.nodes
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    of_self = [n for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "self"]
    called = [n.func for n in nodes if isinstance(n, ast.Call)]
    given = [n for n in nodes if isinstance(n, ast.keyword) and n.arg is not None]
    attribute = parsed.of_tokens(map(parsed.last, attributes))
    positives = {
        "call": parsed.of_tokens(
            parsed.last(f) for f in called if isinstance(f, ast.Name | ast.Attribute)
        ),
        "import": names & parsed.mask(parsed.span(n) for n in nodes if isinstance(n, ast.alias)),
        "attribute": attribute,
        "parameter": parsed.of_tokens(parsed.first(n) for n in nodes if isinstance(n, ast.arg)),
    }
    return {
        **{name: Marked(positive, names) for name, positive in positives.items()},
        **_defined(parsed),
        **_read_and_assigned(parsed),
        "keyword": Marked(parsed.of_kind("keyword"), names),
        "keyword_argument": Marked(
            parsed.of_tokens(map(parsed.first, given)), names & _inside(parsed, parsed.pairs)
        ),
        "self_attribute": Marked(parsed.of_tokens(map(parsed.last, of_self)), attribute),
    }


def _defined(parsed: _Parsed) -> dict[str, Marked]:
    """Of def and class, whose name is the token after the word."""
    words = zip(parsed.tokens, parsed.tokens[1:], strict=False)
    named = [(word.text, name) for word, name in words if word.kind == "keyword"]
    functions = [name for word, name in named if word == "def"]
    classes = [name for word, name in named if word == "class"]
    bodies = [n.body for n in parsed.nodes if isinstance(n, ast.ClassDef)]
    direct = {parsed.span(s)[0] for body in bodies for s in body if isinstance(s, _FUNCTIONS)}
    # A method begins with `def`, or with `async` before it, and its name is what comes next.
    methods = {_name_of_function(parsed, start).start for start in direct}
    return {
        "definition": Marked(parsed.of_tokens([*functions, *classes]), parsed.names),
        "method": Marked(
            parsed.of_tokens(t for t in functions if t.start in methods),
            parsed.of_tokens(functions),
        ),
    }


def _name_of_function(parsed: _Parsed, start: int) -> _Token:
    word = parsed.after(start)
    while word.text != "def":
        word = parsed.after(word.end)
    return parsed.after(word.end)


def _read_and_assigned(parsed: _Parsed) -> dict[str, Marked]:
    names = [n for n in parsed.nodes if isinstance(n, ast.Name)]
    read = [n for n in names if isinstance(n.ctx, ast.Load)]
    bound = set(_bound(parsed.tree))
    own = [n for n in read if n.id in _BUILTINS and n.id not in bound]
    others = [n for n in read if n.id not in _BUILTINS]
    stored = [n for n in names if isinstance(n.ctx, ast.Store)]
    return {
        "builtin": Marked(*(parsed.mask(map(parsed.span, group)) for group in (own, others))),
        "assigned": Marked(*(parsed.mask(map(parsed.span, group)) for group in (stored, read))),
    }


def _bound(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives a meaning anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ClassDef | _FUNCTIONS):
            yield node.name
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest


def _brackets(tokens: list[_Token]) -> Iterator[_Pair]:
    opened: list[_Token] = []
    for token in tokens:
        if token.kind == "symbol" and token.text in _CLOSES.values():
            opened.append(token)
        elif token.kind == "symbol" and token.text in _CLOSES:
            yield _Pair(opened.pop(), token)


def _inside(parsed: _Parsed, pairs: Iterable[_Pair]) -> Mask:
    return parsed.mask((pair.opener.end, pair.closer.start) for pair in pairs)


def _symbols(parsed: _Parsed) -> dict[str, Marked]:
    symbols = parsed.of_kind("symbol")
    pairs = parsed.pairs
    split = parsed.of_tokens(p.closer for p in pairs if p.spans_lines)
    return {
        "arithmetic": Marked(parsed.of_tokens(_arithmetic(parsed)), symbols),
        "comparison": Marked(
            parsed.of_tokens(_comparisons(parsed)), symbols | parsed.of_kind("keyword")
        ),
        "closing_bracket": Marked(split, parsed.of_tokens(p.closer for p in pairs)),
        **_colons_and_equals(parsed),
    }


def _arithmetic(parsed: _Parsed) -> Iterator[_Token]:
    for node in parsed.nodes:
        if isinstance(node, ast.BinOp):
            yield from parsed.between(node.left, node.right)
        elif isinstance(node, ast.AugAssign):
            yield from parsed.between(node.target, node.value)
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            yield parsed.first(node)


def _comparisons(parsed: _Parsed) -> Iterator[_Token]:
    for node in parsed.nodes:
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, right in zip(operands, operands[1:], strict=False):
                yield from parsed.between(left, right)


def _colons_and_equals(parsed: _Parsed) -> dict[str, Marked]:
    """What a colon or a = is for, from the brackets and lambdas that are open before it."""
    opening, colons, arguments, equals = (
        list[_Token](),
        list[_Token](),
        list[_Token](),
        list[_Token](),
    )
    lambdas = [0]  # open ones, for each open bracket
    header = False
    for token in parsed.tokens:
        if token.leads:
            header = _begins_block(parsed, token)
        if token.text == "lambda" and token.kind == "keyword":
            lambdas[-1] += 1
        elif token.kind != "symbol":
            continue
        elif token.text in _CLOSES.values():
            lambdas.append(0)
        elif token.text in _CLOSES:
            lambdas.pop()
        elif token.text == "=":
            (arguments if len(lambdas) > 1 or lambdas[-1] else equals).append(token)
        elif token.text == ":":
            (opening if header and lambdas == [0] else colons).append(token)
            header = header and lambdas != [0]
            lambdas[-1] = max(0, lambdas[-1] - 1)
    return {
        "block_colon": Marked(parsed.of_tokens(opening), parsed.of_tokens(colons)),
        "argument_equals": Marked(parsed.of_tokens(arguments), parsed.of_tokens(equals)),
    }


def _begins_block(parsed: _Parsed, first: _Token) -> bool:
    """Of the first token of a logical line. `match` and `case` are names elsewhere."""
    if first.kind == "keyword":
        return first.text in _BLOCKS
    if first.text == "case":
        return first.start not in parsed.statements
    return isinstance(parsed.statements.get(first.start), ast.Match)


def _regions(parsed: _Parsed) -> dict[str, Marked]:
    code, brackets = parsed.code, _inside(parsed, parsed.pairs)
    positives = _in_brackets(parsed)
    found = {name: Marked(code & mask, code & brackets) for name, mask in positives.items()}
    return found | _statements(parsed) | _blocks(parsed) | _lines(parsed)


def _in_brackets(parsed: _Parsed) -> dict[str, Mask]:
    nodes = parsed.nodes
    functions = [n.args for n in nodes if isinstance(n, ast.Lambda | _FUNCTIONS)]
    defaults = [d for f in functions for d in (*f.defaults, *f.kw_defaults) if d is not None]
    indices = [parsed.index(n) for n in nodes if isinstance(n, ast.Subscript)]
    comprehensions = [n for n in nodes if isinstance(n, _COMPREHENSIONS)]
    return {
        "multiline_brackets": _inside(parsed, (p for p in parsed.pairs if p.spans_lines)),
        "subscript": _inside(parsed, indices),
        "default": parsed.mask(map(parsed.enclosed, defaults)),
        "comprehension": parsed.mask(map(parsed.span, comprehensions)),
    }


def _statements(parsed: _Parsed) -> dict[str, Marked]:
    code, nodes = parsed.code, parsed.nodes
    functions = parsed.mask(parsed.block(n.body) for n in nodes if isinstance(n, _FUNCTIONS))
    simple = [n for n in nodes if isinstance(n, ast.stmt) and not isinstance(n, _COMPOUND)]
    in_functions = code & functions & parsed.mask(map(parsed.span, simple))
    tests = [parsed.enclosed(n.test) for n in nodes if isinstance(n, ast.If | ast.While)]
    loops = [parsed.block(n.body) for n in nodes if isinstance(n, _LOOPS)]

    def of(*kinds: type[ast.AST]) -> Mask:
        found: Mask = code & parsed.mask(parsed.span(n) for n in nodes if isinstance(n, kinds))
        return found

    return {
        "return": Marked(of(ast.Return), in_functions),
        "raise": Marked(of(ast.Raise), in_functions),
        "import_statement": Marked(of(ast.Import, ast.ImportFrom), code & ~functions),
        "except": Marked(of(ast.ExceptHandler), of(ast.Try, ast.TryStar)),
        "condition": Marked(code & parsed.mask(tests), code & functions),
        "loop": Marked(code & parsed.mask(loops), code & functions),
    }


def _blocks(parsed: _Parsed) -> dict[str, Marked]:
    code, nodes = parsed.code, parsed.nodes
    classes = [parsed.block(n.body) for n in nodes if isinstance(n, ast.ClassDef)]
    decorated = [n for n in nodes if isinstance(n, ast.ClassDef | _FUNCTIONS)]
    decorators = [parsed.decorator(d) for n in decorated for d in n.decorator_list]
    return {
        "class_body": Marked(code & parsed.mask(classes), code),
        "decorator": Marked(code & parsed.mask(decorators), code),
    }


def _lines(parsed: _Parsed) -> dict[str, Marked]:
    code = parsed.code
    ends = [0, *(t.end_line for t in parsed.tokens)]
    first = [t for t, before in zip(parsed.tokens, ends, strict=False) if t.line > before]
    deep = parsed.of_tokens(t for t in parsed.tokens if t.depth >= _DEEP)
    return {
        "line_start": Marked(code & parsed.mask((t.start, t.start + 1) for t in first), code),
        "depth_3": Marked(code & deep, code),
    }


def _module(document: text.Document, lab: Lab) -> _Module:
    encoded = lab.tokenizer(
        document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    spans = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    first = _first_visible(document.text)[spans[:, 0]]
    asked = (first < spans[:, 1]) & ~text.special_mask(ids, text.special_ids(lab.tokenizer))
    marks = np.zeros((len(TASKS), len(ids)), dtype=np.int8)
    for row, marked in zip(marks, label(document.text).values(), strict=True):
        row[asked] = marked.positive[first[asked]].astype(np.int8) - marked.negative[first[asked]]
    return _Module(document.name, ids, marks, len(document.text))


def _first_visible(source: str) -> Int[np.ndarray, " characters_plus_1"]:
    """For each place the next character that is not white space: the length where there is none."""
    n = len(source)
    space = np.fromiter(map(str.isspace, source), bool, n)
    places = np.append(np.where(space, n, np.arange(n)), n)
    following: np.ndarray = np.minimum.accumulate(places[::-1])[::-1]
    return following


def _drawn(
    marks: Int[np.ndarray, "tasks tokens"],
    split: Int[np.ndarray, " tokens"],
    sizes: tuple[int, int, int],
    seed: int,
) -> tuple[dict[str, Drawn], list[Omitted]]:
    """As many positives as negatives in each split; `examples` still count all tokens here."""
    found: dict[str, Drawn] = {}
    omitted: list[Omitted] = []
    for task, row in zip(TASKS, marks, strict=True):
        groups = [[np.flatnonzero((row == m) & (split == s)) for m in (1, -1)] for s in range(3)]
        reason = lacking(*([len(group[side]) for group in groups] for side in (0, 1)))
        if reason is not None:
            omitted.append(Omitted(f"{NAME}:{task}", reason))
            continue
        chosen: list[np.ndarray] = []
        for group, size, name in zip(groups, sizes, SPLITS, strict=True):
            draw = np.random.default_rng(list(_digest(f"{seed} {task} {name}")))
            n = min(size // 2, *map(len, group))
            chosen += [draw.choice(side, n, replace=False) for side in group]
        examples = np.sort(np.concatenate(chosen))
        found[task] = Drawn(examples, row[examples] == 1)
    return found, omitted


class _Rows(NamedTuple):
    """Where each token of all modules stands."""

    ids: list[np.ndarray]
    row: Int[np.ndarray, " tokens"]
    position: Int[np.ndarray, " tokens"]


def _rows(modules: list[_Module], lab: Lab) -> _Rows:
    """The tokens of a module in rows of their own, each after the token that puts documents apart."""
    front = text.separator(lab.tokenizer)
    before = np.array([] if front is None else [front], dtype=np.int64)
    width = min(ROW, lab.longest) - len(before)
    cut = [m.ids[i : i + width] for m in modules for i in range(0, len(m.ids), width)]
    return _Rows(
        ids=[np.concatenate([before, ids]) for ids in cut],
        row=np.repeat(np.arange(len(cut)), [len(ids) for ids in cut]),
        position=np.concatenate([np.arange(len(ids)) + len(before) for ids in cut]),
    )


def _gathered(
    rows: _Rows, split: Int[np.ndarray, " tokens"], drawn: dict[str, Drawn]
) -> CodeTokens:
    """Rows with no example are left out, and the others sorted by length."""
    wanted = np.unique(
        np.concatenate([np.empty(0, np.int64), *(d.examples for d in drawn.values())])
    )
    used = np.unique(rows.row[wanted])
    order = used[np.argsort([len(rows.ids[r]) for r in used], kind="stable")]
    rank = np.zeros(len(rows.ids), dtype=np.int64)
    rank[order] = np.arange(len(order))
    # Tokens of a row are in order already, so that a stable sort by the row's rank gives the order of the examples.
    wanted = wanted[np.argsort(rank[rows.row[wanted]], kind="stable")]
    number = np.zeros(len(split), dtype=np.int64)
    number[wanted] = np.arange(len(wanted))
    ends = np.searchsorted(rank[rows.row[wanted]], np.arange(len(order)), "right")
    positions = np.split(rows.position[wanted], ends[:-1]) if len(order) else []
    tasks = {}
    for name, (tokens, y) in drawn.items():
        by_number = np.argsort(number[tokens])
        tasks[name] = Drawn(number[tokens][by_number], y[by_number])
    excerpts = tuple(Excerpt(rows.ids[r], p) for r, p in zip(order, positions, strict=True))
    return CodeTokens(excerpts, split[wanted], tasks, ())


def _digest(written: str) -> bytes:
    return hashlib.sha256(written.encode()).digest()
