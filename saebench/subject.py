"""A language model at its sites: activations, losses, and passes that resume in the middle.

Blocks are found by structure, and so are the streams inside them: a short forward pass shows which
tensor each part of a block takes and gives. `attn_out` and `mlp_out` are what is added to the
residual stream, after the norms that some families put there; a stream is offered only where that
pass obeyed the arithmetic that defines it:

    resid_mid = resid_pre + attn_out        resid_post = resid_mid + mlp_out

Positions of special tokens are never replaced. A position is scored when its own token and the next
are not special.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, final

import huggingface_hub
import numpy as np
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from saebench.cache import Cache
from saebench.errors import UserError
from saebench.sites import STREAMS, nearest
from saebench.text import TextTokens, special_mask
from saebench.types import Facts, Outcome, References, Site, Spec

BUILTIN_MODEL = "builtin:pylm"
_PYLM = Path(__file__).parent / "pylm"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_IDENTIFYING = {".safetensors", ".json", ".model", ".txt", ".py"}
_PROBE_TOKENS = 8
# What transformers raises, depending on which value of a config makes no model.
_UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_RANDOM_SEED = 0
_CPU_LOGIT_BYTES = 2**28
_GPU_LOGIT_BYTES = 2**31
_CPU_TOKENS = 2**13
_GPU_TOKENS = 2**17
_CPU_CACHED = 2**19
"""Bytes that stay in a core's cache from one elementwise pass to the next."""


class LoadedModel(NamedTuple):
    """A language model that never trains."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: Spec
    """`id`, `revision` and `dtype`; no path of this machine."""


def load_model(  # noqa: PLR0913  (the fields of a suite's `model`)
    model_id: str,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """`builtin:pylm`, a local folder, or a Hub id, whose revision is resolved to a commit."""
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r}{nearest(dtype, _DTYPES)}: expected {', '.join(_DTYPES)}")
    place = _place(model_id, revision)
    asked: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if place.commit is not None:
        asked["revision"] = place.commit
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.source, **asked)
        model, report = _with_report(
            place.source,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            attn_implementation=attn_implementation,
            **asked,
        )
    except (OSError, ValueError, ImportError, EntryNotFoundError) as error:
        raise UserError(_unreachable(model_id, revision, error)) from error
    missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if missing:
        raise UserError(
            f"{model_id}: weights are missing or of another shape ({', '.join(missing[:3])} ...), "
            "so they would be random; give a checkpoint with all weights of a causal language model"
        )
    model.requires_grad_(False)
    identity = {"id": place.name, "revision": place.revision, "dtype": dtype}
    place_on: Any = model.eval().to  # transformers' own annotation of `to` takes no string
    return LoadedModel(place_on(device), tokenizer, identity)


def random_model(config: dict[str, Any], tokenizer: str, dtype: str, device: str) -> LoadedModel:
    """The architecture that a config.json of transformers describes, with its own random initial weights.

    They are drawn on the CPU from a fixed seed, so that they are the same wherever they go; what determines them is
    the revision of the model. Nothing is downloaded, unless the tokenizer is named by a Hub id.
    """
    described = _described(config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED)
            model = AutoModelForCausalLM.from_config(described, dtype=_DTYPES[dtype])
    except _UNFIT as error:
        raise UserError(
            f"no causal language model could be made of the config of type "
            f"{config['model_type']!r}: {type(error).__name__}: {_brief(error)}"
        ) from error
    words = _tokenizer(tokenizer)
    if len(words) > _vocabulary(model):
        raise UserError(
            f"the tokenizer {tokenizer} has {len(words)} tokens, but the config a vocab_size of "
            f"{_vocabulary(model)}; raise vocab_size or name another tokenizer"
        )
    model.requires_grad_(False)
    identity = {
        "id": f"random:{described.model_type}",
        "revision": f"sha256:{_config_sha256(described)}",
        "dtype": dtype,
    }
    place_on: Any = model.eval().to
    return LoadedModel(place_on(device), words, identity)


def untrained(loaded: LoadedModel) -> LoadedModel:
    """The same architecture and tokenizer with its own random initial weights, drawn as in `random_model`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        model = AutoModelForCausalLM.from_config(loaded.model.config, dtype=loaded.model.dtype)
    model.requires_grad_(False)
    place_on: Any = model.eval().to
    return LoadedModel(place_on(loaded.model.device), loaded.tokenizer, untrained_identity(loaded))


def untrained_identity(loaded: LoadedModel) -> Spec:
    """Of the model that `untrained` gives."""
    return {
        "id": f"untrained:{loaded.identity['id']}",
        "revision": f"sha256:{_config_sha256(loaded.model.config)}",
        "dtype": loaded.identity["dtype"],
    }


def _brief(error: Exception) -> str:
    """transformers lists all of its models in some messages."""
    return " ".join(str(error).split())[:200]


def _described(config: dict[str, Any]) -> PreTrainedConfig:
    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        known = AutoConfig.for_model(config["model_type"])
        described: PreTrainedConfig = AutoConfig.for_model(config["model_type"], **fields)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"the config of type {config['model_type']!r} is none that transformers knows: "
            f"{_brief(error)}"
        ) from error
    # Old files hold keys that no class has any more; only what looks misspelt is refused.
    names = [name for name in vars(known) if not name.startswith("_")]
    for name in fields:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
        if close and not hasattr(known, name):
            raise UserError(
                f"the config of type {config['model_type']!r} has no {name!r}; did you mean "
                f"{close[0]!r}?"
            )
    return described


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    source = str(_PYLM) if name == BUILTIN_MODEL else str(Path(name).expanduser())
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"tokenizer {name!r} could not be loaded: {error}. Expected {BUILTIN_MODEL!r}, a local "
            "folder or a Hub id"
        ) from error
    return found


def _config_sha256(config: PreTrainedConfig) -> str:
    """Of all that determines random weights; not of the version of the library that wrote it down."""
    volatile = {"transformers_version", "_name_or_path", "dtype"}
    said = {name: value for name, value in config.to_dict().items() if name not in volatile}
    said["seed"] = _RANDOM_SEED
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _with_report(source: str, **asked: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    found: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **asked)
    model, report = found
    return model, report


class _Place(NamedTuple):
    source: str
    commit: str | None
    name: str
    revision: str


def _place(model_id: str, revision: str | None) -> _Place:
    if model_id == BUILTIN_MODEL:
        folder, weights = _PYLM, _PYLM / "model.safetensors"
        if not weights.is_file():
            raise UserError(
                f"{model_id}: its weights are not in this installation; reinstall saebench"
            )
        return _Place(str(folder), None, model_id, _file_sha256(weights)[:40])
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        files = sorted(p for p in folder.iterdir() if p.suffix in _IDENTIFYING)
        if not (folder / "config.json").is_file():
            raise UserError(f"{model_id}: the folder has no config.json, so it holds no model")
        return _Place(str(folder), None, folder.resolve().name, f"sha256:{_folder_sha256(files)}")
    commit = _commit(model_id, revision)
    return _Place(model_id, commit, model_id, commit)


def _commit(model_id: str, revision: str | None) -> str:
    """The commit that a branch or tag stands for (offline: stood for when it was downloaded)."""
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        config = huggingface_hub.hf_hub_download(model_id, "config.json", revision=revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise UserError(_unreachable(model_id, revision, error)) from error
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(config))
    assert commit, f"the Hub's cache has no commit in {config}"
    return commit[1]


def _unreachable(model_id: str, revision: str | None, error: Exception) -> str:
    return (
        f"model {model_id!r} (revision {revision!r}) could not be loaded: {error}. Expected "
        f"{BUILTIN_MODEL!r}, a local folder, or a Hub id with safetensors weights. Without a "
        "network, download it beforehand and set HF_HUB_OFFLINE=1, or give the path of a folder; a plan alone needs no "
        "weights but the architecture, model: {config: ..., weights: random}"
    )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_sha256(files: Sequence[Path]) -> str:
    named = "".join(f"{path.name} {_file_sha256(path)}\n" for path in files)
    return hashlib.sha256(named.encode()).hexdigest()


class _Stop(Exception):
    """Ends a forward pass: what lies above is not computed."""


class _Tap(NamedTuple):
    """Where a stream can be seen and replaced."""

    module: nn.Module
    side: str


class _Call(NamedTuple):
    """What a module took and gave in one forward pass."""

    given: Tensor
    gave: Tensor
    arity: int
    """0 where it returned the tensor itself, else the length of the tuple that begins with it."""


class _Part(NamedTuple):
    module: nn.Module
    arity: int


class _Block(NamedTuple):
    """What the probe found out about one block."""

    taps: dict[str, _Tap]
    attention: _Part | None
    mlp: _Part | None
    parallel: bool


class Clean(NamedTuple):
    """What is needed to run the model from a site on, in whole rows with special positions."""

    stream: Float[Tensor, "rows context d"]
    base: Float[Tensor, "rows context d_model"] | None
    """The residual stream below the site, where the site is inside a block."""


def random_text(model: PreTrainedModel, rows: int, context: int) -> TextTokens:
    """Random token ids, none of them special."""
    drawn = np.random.default_rng(0).integers(
        _vocabulary(model), size=(rows, context), dtype=np.int32
    )
    documents = np.arange(rows)
    return TextTokens(drawn, drawn, "random", "random", frozenset(), context, documents)


def rows_per_batch(model: PreTrainedModel, context: int) -> int:
    """How many rows go through the model at once.

    Float32 logits of a batch stay under 256 MB on a CPU (2 GB on a GPU), and batches are not larger
    than speed asks for.
    """
    on_cpu = model.device.type == "cpu"
    per_token = 4 * max(_vocabulary(model), 8 * int(_text_config(model).hidden_size))
    fitting = (_CPU_LOGIT_BYTES if on_cpu else _GPU_LOGIT_BYTES) // (per_token * context)
    return max(1, min(fitting, (_CPU_TOKENS if on_cpu else _GPU_TOKENS) // context))


@final
class LanguageModel:
    """A causal language model with its text."""

    predicts = True
    """Whether there is something to lose when an activation is replaced."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: TextTokens,
        identity: Spec,
        cache: Cache,
        batch_rows: int,
    ) -> None:
        _check_tokens(model, tokens)
        self.model, self.tokens, self.identity = model, tokens, identity
        self.cache, self.batch_rows = cache, batch_rows
        self.train_rows, self.train_special = _tensors(tokens.train, tokens.special_ids)
        self.eval_rows, self.eval_special = _tensors(tokens.evaluation, tokens.special_ids)
        self.blocks = _blocks(model)
        self._found: dict[int, _Block] = {}
        self._widths: dict[Site, int] = {}
        self._arrays: dict[Site, Tensor] = {}
        self._means: dict[Site, Tensor] = {}
        self._losses: dict[Site, References] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def check_site(self, site: Site) -> None:
        """Raises `UserError`, with what there is, where the model has no such site."""
        self._tap(site)
        if site.layer is None:
            self.width(site)

    def canonical(self, site: Site) -> Site:
        """The one name of all sites with these activations: a stream's where a module path stands for one.

        What enters a block is what left the one below. Told by the activations themselves, since a module between (a
        dropout, say) may change nothing. Raises `UserError` as `check_site` does.
        """
        layer = self.layer(site)
        if site.layer is None and layer is not None:
            has = self._block(layer).taps
            streams = [Site(name, layer) for name in STREAMS if name in has]
            seen = self._taken([site, *streams], self._probe_rows)
            site = next((other for other in streams if torch.equal(seen[other], seen[site])), site)
        if site.stream == "resid_pre" and site.layer:
            return Site("resid_post", site.layer - 1)
        return site

    def width(self, site: Site) -> int:
        """Size of one activation."""
        if site not in self._widths:
            stream = self._taken([site], self._probe_rows)[site]
            if stream.ndim != 3 or stream.shape[:2] != self._probe_rows.shape:
                raise UserError(
                    f"site {site}: one activation per token was expected, [rows context d]; the "
                    f"module has {list(stream.shape)} on rows of {list(self._probe_rows.shape)}"
                )
            self._widths[site] = stream.shape[-1]
        return self._widths[site]

    def read(
        self, sites: Sequence[Site], rows: Int[Tensor, "rows context"]
    ) -> dict[Site, Float[Tensor, "rows context _"]]:
        """Activations of all sites from one forward pass, which ends at the deepest of them."""
        for site in sites:
            self.check_site(site)
        return self._taken(sites, rows)

    @torch.no_grad()
    def _taken(
        self, sites: Sequence[Site], rows: Int[Tensor, "rows context"]
    ) -> dict[Site, Tensor]:
        taps = {site: self._tap(site) for site in sites}
        seen: dict[Site, Tensor] = {}

        def take(site: Site, stream: Tensor) -> None:
            if site in seen:
                return
            if len(seen) + 1 == len(taps):
                seen[site] = stream
                raise _Stop
            seen[site] = stream.clone()  # the pass goes on, and a later module may write in place

        with ExitStack() as stack:
            for site, tap in taps.items():
                stack.enter_context(_seeing(tap, partial(take, site)))
            try:
                self._forward(rows)
            except _Stop:
                return {site: seen[site] for site in taps}
        unseen = ", ".join(str(site) for site in taps if site not in seen)
        raise UserError(f"the model never runs {unseen} on plain text; choose another module")

    def clean(self, site: Site, rows: Int[Tensor, "rows context"]) -> Clean:
        """What `splice` needs to know of the rows."""
        base = self._base(site)
        streams = self.read([site] if base is None else [site, base], rows)
        return Clean(streams[site], None if base is None else streams[base])

    def splice(
        self,
        site: Site,
        rows: Int[Tensor, "rows context"],
        replacement: Float[Tensor, "rows context d"],
        keep: Bool[Tensor, "rows context"],
        clean: Clean,
    ) -> Float[Tensor, "rows context vocabulary"]:
        """Logits of the model with the stream replaced, but for the positions to keep.

        Blocks below the site do not run. Gradients flow to the replacement.
        """
        replacement = replacement.to(clean.stream.dtype)
        stream = torch.where(keep.to(self.device)[..., None], clean.stream, replacement)
        return self._resumed(site, rows, Clean(stream, clean.base))

    def passage(
        self, site: Site, rows: Int[Tensor, "rows context"], special: Bool[Tensor, "rows context"]
    ) -> "Passage":
        """Some rows with the stream at the site to be replaced, for training through the model."""
        return Passage(self, site, rows.to(self.device), special.to(self.device))

    def later(self, site: Site) -> list[Site]:
        """The residual stream after every block that a replacement at the site goes through."""
        layer = self.layer(site)
        first = 0 if layer is None else layer + (site.stream == "resid_post")
        return [Site("resid_post", i) for i in range(first, len(self.blocks))]

    def layer(self, site: Site) -> int | None:
        """Of the block that a site is in; None for a module that is in none."""
        return self._home(self._tap(site).module) if site.layer is None else site.layer

    def prepare(self, sites: Sequence[Site]) -> None:
        """Reads the evaluation text at all sites in one pass, and keeps what has room on disk."""
        wanted = dict.fromkeys([*sites, *filter(None, map(self._base, sites))])
        missing = [site for site in wanted if not self._remembered(site)]
        if not missing:
            return
        sums = dict.fromkeys(missing, torch.zeros((), dtype=torch.float64, device=self._exact))
        with ExitStack() as stack:
            writers = {
                site: stack.enter_context(self.cache.writing(*self._array_key(site)))
                for site in missing
            }
            for start, rows in self._eval_batches():
                kept = ~self.eval_special[start : start + len(rows)].to(self.device)
                for site, stream in self.read(missing, rows).items():
                    sums[site] = sums[site] + stream[kept].to(self._exact).double().sum(0)
                    if writer := writers[site]:
                        writer.append(stream)
        for site in missing:
            mean = sums[site] / self.n_tokens
            self.cache.keep_tensors(self._spec("mean", site), {"mean": mean})
            self._means[site] = mean
            self._open_array(site)

    def facts(self, site: Site, predicted: Site) -> Facts:
        """What is known of the evaluation text before any SAE is looked at."""
        self.prepare([site, predicted])
        return Facts(site, predicted, len(self.eval_rows), self.n_tokens, self._means[predicted])

    @property
    def n_tokens(self) -> int:
        """Of the evaluation text, special ones left out."""
        return int((~self.eval_special).sum())

    def evaluation(self, site: Site, predicted: Site | None = None) -> Iterator["EvalBatch"]:
        """The evaluation text in whole sequences, always the same batches in the same order.

        An SAE reads `site`; what it gives replaces `predicted`: the same site, but for transcoders.
        """
        predicted = predicted or site
        self.prepare([site, predicted])
        for start, rows in self._eval_batches():
            with torch.no_grad():
                clean = self._clean_at(start, predicted)
                x = clean.stream if predicted == site else self._streams_at(start, [site])[site]
            yield EvalBatch(self, start, rows, Streams(x, predicted, clean))

    def references(self, predicted: Site) -> References:
        """Of all scored positions of the evaluation text."""
        if predicted not in self._losses:
            spec = self._spec("references", predicted)
            found = self.cache.tensors(spec)
            if found is None:
                found = self._ablate(predicted)
                self.cache.keep_tensors(spec, found)
            self._losses[predicted] = References(**found)
        return self._losses[predicted]

    def scored_before(self, row: int) -> int:
        """How many scored positions the rows of the evaluation text have before this one."""
        return int(self._scored_counts[row])

    @torch.no_grad()
    def _ablate(self, site: Site) -> dict[str, Tensor]:
        mean = self.facts(site, site).mean.to(self.device, self.dtype)
        losses: dict[str, list[Tensor]] = {"clean": [], "zero": [], "mean": []}
        for batch in self.evaluation(site):
            d = batch.target.shape[1]
            losses["clean"].append(batch.clean_loss().cpu())
            losses["zero"].append(batch.loss(torch.zeros_like(batch.target)).cpu())
            losses["mean"].append(batch.loss(mean.expand(len(batch.target), d)).cpu())
        return {name: torch.cat(parts) for name, parts in losses.items()}

    @cached_property
    def _scored_counts(self) -> Int[np.ndarray, " rows_plus_1"]:
        per_row = _scored(self.eval_special).sum(1).numpy()
        return np.concatenate([[0], np.cumsum(per_row)])

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def parameters_below(self, site: Site) -> int:
        """In the blocks that run until the site is known."""
        layer = self.layer(site)
        runs = len(self.blocks) if layer is None else layer + (site.stream != "resid_pre")
        return sum(p.numel() for block in self.blocks[:runs] for p in block.parameters())

    def parameters_above(self, site: Site) -> int:
        """In the blocks that run when the model is resumed at the site, and in the output matrix."""
        layer = self.layer(site)
        first = 0 if layer is None else layer + (site.stream == "resid_post")
        head: Any = self.model.get_output_embeddings()
        modules = [*self.blocks[first:], head]
        return sum(p.numel() for module in modules for p in module.parameters())

    def memory(self) -> dict[str, int]:
        """Bytes that it takes on its device."""
        # Log-probabilities with and without an SAE in float32, and some streams of the residual's width.
        hidden = int(_text_config(self.model).hidden_size)
        per_token = 4 * (2 * _vocabulary(self.model) + 8 * hidden)
        return {
            "language model": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "its working memory": self.batch_rows * self.tokens.context * per_token,
        }

    def on_random_text(self, rows: int, context: int) -> "LanguageModel":
        """The same model with a text of this shape, nothing of it special, for measurements of its speed."""
        tokens = random_text(self.model, rows, context)
        return LanguageModel(self.model, tokens, self.identity, Cache(None), rows)

    @property
    def _exact(self) -> torch.device:
        """Where float64 exists: Apple's GPUs have none."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def _eval_batches(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.eval_rows), self.batch_rows):
            yield start, self.eval_rows[start : start + self.batch_rows].to(self.device)

    def numerics(self, site: Site) -> Spec:
        """What determines activations at a site, but for the text."""
        return {
            "site": str(site),
            "model": self.identity,
            "dtype": str(self.dtype),
            "attention": str(_text_config(self.model)._attn_implementation),
            "device": self.device.type,
            "versions": [torch.__version__, transformers.__version__],
        }

    @property
    def longest(self) -> int | None:
        """Tokens that the model has positions for; None where its config does not say."""
        found = getattr(_text_config(self.model), "max_position_embeddings", None)
        return None if found is None else int(found)

    def _spec(self, kind: str, site: Site) -> Spec:
        return self.numerics(site) | {
            "kind": kind,
            "text": self.tokens.fingerprint_eval,
            "rows": len(self.eval_rows),
            "batch_rows": self.batch_rows,
        }

    def _array_key(self, site: Site) -> tuple[Spec, tuple[int, ...], torch.dtype]:
        return (
            self._spec("activations", site),
            (*self.eval_rows.shape, self.width(site)),
            self.dtype,
        )

    def _open_array(self, site: Site) -> bool:
        array = self.cache.array(*self._array_key(site))
        if array is not None:
            self._arrays[site] = array
        return array is not None

    def _remembered(self, site: Site) -> bool:
        """Whether no pass is needed: the mean is known, and activations are kept or cannot be."""
        if site in self._means:
            return True
        found = self.cache.tensors(self._spec("mean", site))
        if found is None:
            return False
        _, shape, dtype = self._array_key(site)
        if not self._open_array(site) and self.cache.has_room(int(np.prod(shape)) * dtype.itemsize):
            return False
        self._means[site] = found["mean"].to(self._exact)
        return True

    def _streams_at(self, start: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Streams of one batch, from disk where they are kept."""
        stop = start + self.batch_rows
        lacking = [site for site in sites if site not in self._arrays]
        rows = self.eval_rows[start:stop].to(self.device)
        streams = self.read(lacking, rows) if lacking else {}
        for site in sites:
            if site in self._arrays:
                streams[site] = self._arrays[site][start:stop].to(self.device)
        return streams

    def _clean_at(self, start: int, site: Site) -> Clean:
        base = self._base(site)
        streams = self._streams_at(start, [site] if base is None else [site, base])
        return Clean(streams[site], None if base is None else streams[base])

    @cached_property
    def _probe_rows(self) -> Int[Tensor, "2 context"]:
        rows = self.eval_rows if len(self.eval_rows) else self.train_rows
        # Two rows, so that what has no dimension for rows (rotary angles) is told from what has one.
        return rows[:1, :_PROBE_TOKENS].expand(2, -1).to(self.device)

    @cached_property
    def _arities(self) -> list[int]:
        """What each block returns, which is what a block that is passed over has to return."""
        calls = self._trace(list(self.blocks), until=self.blocks[-1])
        return [calls[block][0].arity for block in self.blocks]

    def _forward(self, rows: Int[Tensor, "rows context"]) -> Any:
        rows = rows.to(self.device, torch.long)
        return self.model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)

    @torch.no_grad()
    def _trace(
        self, modules: Sequence[nn.Module], until: nn.Module
    ) -> dict[nn.Module, list[_Call]]:
        """The calls of the modules in a short forward pass, in the order in which they end."""
        calls: dict[nn.Module, list[_Call]] = {}

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, gave = _first_tensor(args, kwargs), _main(output)
            if given is not None and gave is not None:
                arity = 0 if isinstance(output, Tensor) else len(output)
                calls.setdefault(module, []).append(_Call(given, gave, arity))
            if module is until:
                raise _Stop

        with ExitStack() as stack:
            for module in modules:
                handle = module.register_forward_hook(record, with_kwargs=True)
                stack.callback(handle.remove)
            with suppress(_Stop):
                self._forward(self._probe_rows)
        return calls

    def _block(self, layer: int) -> _Block:
        if layer not in self._found:
            block = self.blocks[layer]
            calls = self._trace(list(block.modules()), until=block)
            self._found[layer] = _anatomy(block, calls)
        return self._found[layer]

    def _tap(self, site: Site) -> _Tap:
        if site.layer is None:
            return self._module_tap(site)
        if not 0 <= site.layer < len(self.blocks):
            raise UserError(
                f"layer {site.layer}: {_name(self.model)} has layers 0 to {len(self.blocks) - 1}"
            )
        block = self._block(site.layer)
        if site.stream not in block.taps:
            has = [stream for stream in STREAMS if stream in block.taps]
            why = " (its attention and MLP run in parallel)" if block.parallel else ""
            raise UserError(
                f"layer {site.layer} of {_name(self.model)} has no stream {site.stream!r}{why}"
                f"{nearest(site.stream, has)}; it has: {', '.join(has)}; other places can be named "
                "by module: {module: ..., side: input or output}"
            )
        return block.taps[site.stream]

    def _module_tap(self, site: Site) -> _Tap:
        path, _, side = site.stream.rpartition(".")
        modules = dict(self.model.base_model.named_modules()) | dict(self.model.named_modules())
        if side not in ("input", "output") or path not in modules:
            raise UserError(
                f"{_name(self.model)} has no {site.stream!r}{nearest(path, modules)}: expected the "
                "path of a module followed by .input or .output"
            )
        return _Tap(modules[path], side)

    def _home(self, module: nn.Module) -> int | None:
        """The layer whose block a module is part of."""
        found = (
            i for i, block in enumerate(self.blocks) if any(m is module for m in block.modules())
        )
        return next(found, None)

    def _base(self, site: Site) -> Site | None:
        """The residual stream that a forward pass with this site replaced starts from."""
        if site.layer is None:
            layer = self._home(self._tap(site).module)
            return None if layer is None else Site("resid_pre", layer)
        if site.stream.startswith("resid"):
            return None
        self._tap(site)
        above_attention = site.stream.startswith("mlp") and self._has_mid(site.layer)
        return Site("resid_mid" if above_attention else "resid_pre", site.layer)

    def _has_mid(self, layer: int) -> bool:
        return "resid_mid" in self._block(layer).taps

    def _resumed(
        self, site: Site, rows: Int[Tensor, "rows context"], clean: Clean
    ) -> Float[Tensor, "rows context vocabulary"]:
        """Logits of the model with this stream at the site."""
        with self._resuming(site, clean):
            logits: Tensor = self._forward(rows).logits
        return logits

    @contextmanager
    def _resuming(self, site: Site, clean: Clean) -> Iterator[None]:
        """Forward passes begin with this stream at the site."""
        base = self._base(site)
        with ExitStack() as stack:
            if base is not None:
                assert clean.base is not None, f"site {site} needs the stream {base} below it"
                self._enter(stack, base, clean.base)
                if site.stream in ("attn_out", "mlp_out"):
                    part = site.stream.removesuffix("_out")
                    _skip(stack, self._part(base, part), torch.zeros_like(clean.base))
                stack.enter_context(_replacing(self._tap(site), clean.stream))
            elif site.layer is None:
                stack.enter_context(_replacing(self._tap(site), clean.stream))
            else:
                self._enter(stack, site, clean.stream)
            yield

    def _enter(self, stack: ExitStack, site: Site, stream: Tensor) -> None:
        """Lets the next forward pass begin at a stream of the residual; nothing below it runs."""
        assert site.layer is not None, "only streams of the residual can be entered"
        first = site.layer + (site.stream == "resid_post")
        for block, arity in zip(self.blocks[:first], self._arities[:first], strict=True):
            _skip(stack, _Part(block, arity), stream)
        if first == 0:
            stack.enter_context(_replacing(_Tap(self.blocks[0], "input"), stream))
        if site.stream == "resid_mid":
            # The block adds the attention's output to its input; adding nothing is exact.
            nothing = torch.zeros_like(stream)
            _skip(stack, self._part(site, "attn"), nothing)
            attn_out = self._block(site.layer).taps["attn_out"]
            stack.enter_context(_replacing(attn_out, nothing))

    def _part(self, site: Site, name: str) -> _Part:
        assert site.layer is not None, f"{site} is in no block"
        block = self._block(site.layer)
        part = block.attention if name == "attn" else block.mlp
        assert part is not None, f"{site}: streams of a part are only offered where it was found"
        return part


class Streams(NamedTuple):
    """The activations behind one batch, in whole rows with special positions."""

    x: Float[Tensor, "rows context d_in"]
    predicted: Site
    clean: Clean
    """Of the predicted site."""


@final
class EvalBatch:
    """Some whole sequences of the evaluation text (`types.Batch`); activations in float32."""

    def __init__(
        self, lm: LanguageModel, start: int, rows: Int[Tensor, "rows context"], streams: Streams
    ) -> None:
        self._lm, self._start, self._rows, self._streams = lm, start, rows, streams
        special = lm.eval_special[start : start + len(rows)].to(rows.device)
        self._tokens = ~special
        self._scored = _scored(special)
        self.x: Float[Tensor, "n d_in"] = streams.x[self._tokens].float()
        self.sequence: Int[Tensor, " n"] = self._tokens.nonzero()[:, 0] + start
        self.scored_sequence: Int[Tensor, " m"] = self._scored.nonzero()[:, 0] + start

    @cached_property
    def target(self) -> Float[Tensor, "n d_out"]:
        """Activations of the site that is predicted: `x`, but for transcoders."""
        return self._streams.clean.stream[self._tokens].float()

    @property
    def features(self) -> None:
        """Nobody knows them."""

    def references(self) -> References:
        """Cross-entropies of this batch, from the pass that computed them for all."""
        whole = self._lm.references(self._streams.predicted)
        first = self._lm.scored_before(self._start)
        last = first + len(self.scored_sequence)
        return References(*(losses[first:last].to(self._rows.device) for losses in whole))

    @torch.no_grad()
    def outcome(self, replacement: Float[Tensor, "n d_out"]) -> Outcome:
        """Resumes the language model at the predicted site, with its n tokens replaced."""
        logits = self._replaced_logits(replacement)
        found = [self._outcome(logits, part) for part in self._parts]
        loss, kl, same_top1 = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return Outcome(loss, kl, same_top1)

    @torch.no_grad()
    def loss(self, replacement: Float[Tensor, "n d_out"]) -> Float[Tensor, " m"]:
        """Only the cross-entropy of `outcome`."""
        logits = self._replaced_logits(replacement)
        return torch.cat([self._losses(self._log_p(logits, part), part) for part in self._parts])

    def clean_loss(self) -> Float[Tensor, " m"]:
        """Cross-entropy with nothing replaced."""
        return self._losses(self._clean_log_p, slice(None))

    @cached_property
    @torch.no_grad()
    def _clean_log_p(self) -> Float[Tensor, "m vocabulary"]:
        """Shared by all SAEs that look at this batch, and gone with it."""
        return self._log_p(self._logits(self._streams.clean.stream), slice(None))

    @cached_property
    def _clean_p(self) -> Float[Tensor, "m vocabulary"]:
        return self._clean_log_p.exp()

    @cached_property
    def _clean_top1(self) -> Int[Tensor, " m"]:
        return _top1(self._clean_log_p)

    @cached_property
    def _scored_at(self) -> Int[Tensor, " m"]:
        """The scored positions among all of the batch."""
        return self._scored.flatten().nonzero()[:, 0]

    @cached_property
    def _following(self) -> Int[Tensor, " m"]:
        """The token after each scored position."""
        return self._rows.roll(-1, dims=1)[self._scored].long()

    @cached_property
    def _parts(self) -> list[slice]:
        """Some scored positions at a time, so that on a CPU what is made of their logits stays in its cache."""
        on_cpu = self._rows.device.type == "cpu"
        most = _CPU_CACHED if on_cpu else _GPU_LOGIT_BYTES
        m, step = len(self._scored_at), max(1, most // (4 * _vocabulary(self._lm.model)))
        return [slice(start, start + step) for start in range(0, max(m, 1), step)]

    def _outcome(self, logits: Float[Tensor, "positions vocabulary"], part: slice) -> Outcome:
        log_p = self._log_p(logits, part)
        kl = (self._clean_log_p[part] - log_p).mul_(self._clean_p[part]).sum(-1)
        return Outcome(self._losses(log_p, part), kl, _top1(log_p) == self._clean_top1[part])

    def _replaced_logits(
        self, replacement: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "positions vocabulary"]:
        stream = self._streams.clean.stream.clone()
        stream[self._tokens] = replacement.to(stream.device, stream.dtype)
        return self._logits(stream)

    def _logits(
        self, stream: Float[Tensor, "rows context d_out"]
    ) -> Float[Tensor, "positions vocabulary"]:
        clean = Clean(stream, self._streams.clean.base)
        return self._lm._resumed(self._streams.predicted, self._rows, clean).flatten(0, 1)

    def _log_p(
        self, logits: Float[Tensor, "positions vocabulary"], part: slice
    ) -> Float[Tensor, "m_part vocabulary"]:
        return logits[self._scored_at[part]].float().log_softmax(-1)

    def _losses(
        self, log_p: Float[Tensor, "m_part vocabulary"], part: slice
    ) -> Float[Tensor, " m_part"]:
        return -log_p.gather(1, self._following[part, None])[:, 0]


@final
class Passage:
    """Some rows of text, and what becomes of the model's prediction when the stream at a site is replaced.

    Gradients flow to the replacement.
    """

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        rows: Int[Tensor, "rows context"],
        special: Bool[Tensor, "rows context"],
    ) -> None:
        self._lm, self._site, self._rows = lm, site, rows
        self._tokens, self._scored = ~special, _scored(special)
        self._clean = lm.clean(site, rows)
        self._whole: dict[bool, _Passed] = {}  # unreplaced, with later streams and without
        self.x: Float[Tensor, "n d"] = self._clean.stream[self._tokens].float()

    def divergence(
        self, replacement: Float[Tensor, "n d"], later: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
        """KL(p_clean || p_replaced), nats, mean over scored positions; and, where `later` is asked for, the squared
        error of each later residual stream over its variance in these rows, mean over layers.
        """
        stream = self._clean.stream.clone()
        stream[self._tokens] = replacement.to(stream.dtype)
        found, clean = self._run(stream, later), self._unreplaced(later)
        kl = nn.functional.kl_div(found.log_p, clean.log_p, reduction="none", log_target=True)
        error = [_unexplained(clean.later[at], found.later[at]) for at in found.later]
        return kl.sum() / len(found.log_p), torch.stack(error).mean() if error else None

    @torch.no_grad()
    def _unreplaced(self, later: bool) -> "_Passed":
        """The same for all that is put in its place."""
        if later not in self._whole:
            self._whole[later] = self._run(self._clean.stream, later)
        return self._whole[later]

    def _run(self, stream: Tensor, later: bool) -> "_Passed":
        seen: dict[Site, Tensor] = {}

        def take(site: Site, stream: Tensor) -> None:
            seen[site] = stream[self._tokens].float()

        # Found before anything is replaced or seen: looking for a place may run the model on other rows.
        taps = {site: self._lm._tap(site) for site in self._lm.later(self._site) if later}
        clean = Clean(stream, self._clean.base)
        with ExitStack() as stack:
            stack.enter_context(self._lm._resuming(self._site, clean))
            for site, tap in taps.items():
                stack.enter_context(_seeing(tap, partial(take, site)))
            logits = self._lm._forward(self._rows).logits
        return _Passed(logits[self._scored].float().log_softmax(-1), seen)


class _Passed(NamedTuple):
    """What came out of a pass, and what it went through."""

    log_p: Float[Tensor, "m vocabulary"]
    later: dict[Site, Float[Tensor, "n d"]]
    """Empty unless asked for."""


def _unexplained(target: Float[Tensor, "n d"], found: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    return (found - target).square().sum() / (target - target.mean(0)).square().sum()


def _top1(log_p: Float[Tensor, "m vocabulary"]) -> Int[Tensor, " m"]:
    """The likeliest token, the first of those that tie."""
    if log_p.device.type == "cpu":  # NumPy's search is several times faster than torch's here
        return torch.from_numpy(log_p.numpy().argmax(-1))
    return log_p.argmax(-1)


def _scored(special: Bool[Tensor, "rows context"]) -> Bool[Tensor, "rows context"]:
    """Positions that are not special and whose next token, in the same row, is not special."""
    scored = ~special
    scored[:, :-1] &= ~special[:, 1:]
    scored[:, -1] = False
    return scored


def _tensors(
    rows: Int[np.ndarray, "rows context"], special_ids: frozenset[int]
) -> tuple[Int[Tensor, "rows context"], Bool[Tensor, "rows context"]]:
    return torch.from_numpy(rows), torch.from_numpy(special_mask(rows, special_ids))


def _check_tokens(model: PreTrainedModel, tokens: TextTokens) -> None:
    longest = getattr(_text_config(model), "max_position_embeddings", None)
    if longest is not None and tokens.context > longest:
        raise UserError(
            f"context {tokens.context}: {_name(model)} takes at most {longest} tokens; lower it"
        )
    largest = max(int(rows.max(initial=0)) for rows in (tokens.train, tokens.evaluation))
    if largest >= _vocabulary(model):
        raise UserError(
            f"the text holds token id {largest}, but {_name(model)} knows only "
            f"{_vocabulary(model)} tokens; use text or token ids of the model's own tokenizer"
        )


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks: the one ModuleList as long as the model is deep, in any family."""
    depth = _text_config(model).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    nested = {id(inner) for outer in lists for inner in outer.modules() if inner is not outer}
    found = [m for m in lists if id(m) not in nested]
    if len(found) != 1:
        raise UserError(
            f"{_name(model)}: expected one list of {depth} blocks, found {len(found)}; only causal "
            "language models with one stack of blocks are supported"
        )
    return found[0]


def _anatomy(block: nn.Module, calls: dict[nn.Module, list[_Call]]) -> _Block:
    """Which module's input or output each stream of a block is."""
    # A module that runs twice (a shared dropout) is no place to read or replace one stream at.
    once = {module: found[0] for module, found in calls.items() if len(found) == 1}
    taps = {"resid_pre": _Tap(block, "input"), "resid_post": _Tap(block, "output")}
    children = [(name, module) for name, module in block.named_children() if module in once]
    heavy = [(name, module) for name, module in children if _has_matrix(module)]
    light = [module for _, module in children if not _has_matrix(module)]
    attentions = [module for name, module in heavy if _is_attention(name, module)]
    mlps = [module for name, module in heavy if not _is_attention(name, module)]
    if len(attentions) != 1 or len(mlps) != 1:
        return _Block(taps, None, None, parallel=False)

    attention, mlp = attentions[0], mlps[0]
    attn_out, mlp_out = (_last_before_sum(m, light, once) for m in (attention, mlp))
    normed = next((m for m in light if once[m].gave is once[mlp].given), mlp)
    pre, mid, post = once[block].given, once[normed].given, once[block].gave
    a, m = once[attn_out].gave, once[mlp_out].gave
    parallel = torch.equal(pre, mid)
    if _adds_up(post, pre, a, m) if parallel else _adds_up(mid, pre, a):
        taps["attn_out"] = _Tap(attn_out, "output")
    if _adds_up(post, pre, a, m) if parallel else _adds_up(post, mid, m):
        taps["mlp_out"] = _Tap(mlp_out, "output")
    if "attn_out" in taps and not parallel:
        taps["resid_mid"] = _Tap(normed, "input")
    taps["mlp_in"] = _Tap(mlp, "input")
    for stream, part in (("mlp_hidden", mlp), ("attn_z", attention)):
        if (last := _last_matrix(part, once)) is not None:
            taps[stream] = _Tap(last, "input")
    parts = [_Part(module, once[module].arity) for module in (attention, mlp)]
    return _Block(taps, attention=parts[0], mlp=parts[1], parallel=parallel)


def _last_before_sum(
    module: nn.Module, light: Sequence[nn.Module], calls: dict[nn.Module, _Call]
) -> nn.Module:
    """The norm or dropout that an output goes through last before the residual stream."""
    left = list(light)
    while following := [m for m in left if calls[m].given is calls[module].gave]:
        module = following[0]
        left.remove(module)
    return module


def _last_matrix(part: nn.Module, calls: dict[nn.Module, _Call]) -> nn.Module | None:
    """The linear map whose output is that of the MLP or the attention."""
    ending = [
        module
        for module, call in calls.items()
        if any(module is m for m in part.modules())
        and module is not part
        and any(p.ndim == 2 for p in module.parameters(recurse=False))
        and call.given.shape[:-1] == calls[part].gave.shape[:-1]
        and torch.equal(call.gave, calls[part].gave)
    ]
    return ending[-1] if ending else None


def _adds_up(total: Tensor, *parts: Tensor) -> bool:
    """Whether the parts sum to the total, up to rounding in their own precision."""
    if any(part.shape != total.shape for part in parts):
        return False
    exact = [part.cpu().double() for part in parts]
    rounding = 8 * max(torch.finfo(part.dtype).eps for part in parts)
    error = (total.cpu().double() - sum(exact)).abs()
    return bool((error <= rounding * sum(part.abs() for part in exact)).all())


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _is_attention(name: str, module: nn.Module) -> bool:
    return any(
        "attn" in n or "attention" in n for n in (name.lower(), type(module).__name__.lower())
    )


def _main(output: Any) -> Tensor | None:
    """The stream in what a module returns."""
    first = output if isinstance(output, Tensor) else output[0] if output else None
    return first if isinstance(first, Tensor) else None


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The stream in what a module is given."""
    found = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    return next(found, None)


@contextmanager
def _seeing(tap: _Tap, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands every tensor that passes the tap to `take`."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = _first_tensor(args, kwargs)
        if stream is not None:
            take(stream)

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        stream = _main(output)
        if stream is not None:
            take(stream)

    if tap.side == "input":
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replacing(tap: _Tap, stream: Tensor) -> Iterator[None]:
    """Puts a stream in the place of what passes the tap."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _first_tensor(args, kwargs)
        assert given is not None, f"{type(module).__name__} was given no tensor to replace"
        return (
            tuple(stream if v is given else v for v in args),
            {name: stream if v is given else v for name, v in kwargs.items()},
        )

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return stream if isinstance(output, Tensor) else (stream, *output[1:])

    if tap.side == "input":
        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _skip(stack: ExitStack, part: _Part, stream: Tensor) -> None:
    """Lets a module return the stream, in the form that it returns things in, uncomputed."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return stream if part.arity == 0 else (stream, *[None] * (part.arity - 1))

    own = vars(part.module)
    before = own.get("forward")

    def restore() -> None:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before

    own["forward"] = forward
    stack.callback(restore)
