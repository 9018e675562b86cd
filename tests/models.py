"""Tiny language models with random weights, and a tokenizer, made from configs: no network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutput

from saebench.text import TextTokens, special_mask

VOCABULARY = 40
D_MODEL = 16
D_MLP = 24
LAYERS = 3
CONTEXT = 12
BOS, EOS, PAD = 0, 1, 2

_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": D_MODEL,
    "n_inner": D_MLP,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 32,
}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}


class Names(NamedTuple):
    """Where the parts of a block are, written down by hand: what structural discovery must find."""

    block: str
    attn_out: str
    mlp: str
    mlp_out: str
    mlp_last: str
    before_mlp: str
    """The norm whose input is resid_mid."""
    attn_last: str | None
    """The matrix that mixes the heads; None where there is none."""


_LLAMA = Names(
    "model.layers.{}",
    "self_attn",
    "mlp",
    "mlp",
    "mlp.down_proj",
    "post_attention_layernorm",
    "self_attn.o_proj",
)
_GPT_NEOX = Names(
    "gpt_neox.layers.{}",
    "attention",
    "mlp",
    "mlp",
    "mlp.dense_4h_to_h",
    "post_attention_layernorm",
    "attention.dense",
)
NAMES = {
    "gpt2": Names("transformer.h.{}", "attn", "mlp", "mlp", "mlp.c_proj", "ln_2", "attn.c_proj"),
    "gpt_neox": _GPT_NEOX,
    "gpt_neox_sequential": _GPT_NEOX,
    "llama": _LLAMA,
    "gemma2": Names(
        "model.layers.{}",
        "post_attention_layernorm",
        "mlp",
        "post_feedforward_layernorm",
        "mlp.down_proj",
        "pre_feedforward_layernorm",
        "self_attn.o_proj",
    ),
    "qwen2": _LLAMA,
    "tuples": Names("blocks.{}", "attn", "mlp", "mlp", "mlp.down", "norm_2", None),
}
PARALLEL = "gpt_neox"
LACKING = {(PARALLEL, "resid_mid"), ("tuples", "attn_z")}
"""Streams that a family does not have."""
MODELS = [
    *[(name, "eager") for name in NAMES],
    *[(name, "sdpa") for name in NAMES if name not in ("gemma2", "tuples")],  # these have no sdpa
]


def tiny_model(name: str, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A three-layer model of one family, every weight random (norms and biases too)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "tuples":
            model: PreTrainedModel = TupleLM(TupleConfig())
        else:
            config = _config(name)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter) + (0.7 if parameter.ndim == 1 else 0)
    return model.eval().requires_grad_(False)


def _config(name: str) -> PreTrainedConfig:
    if name == "gpt2":
        return GPT2Config(**_GPT2, **_IDS)
    if name.startswith("gpt_neox"):
        return GPTNeoXConfig(**_COMMON, **_IDS, use_parallel_residual=name == "gpt_neox")
    if name == "llama":
        return LlamaConfig(**_COMMON, **_IDS, num_key_value_heads=1, mlp_bias=True)
    if name == "gemma2":
        return Gemma2Config(
            **_COMMON,
            **_IDS,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=4,
            query_pre_attn_scalar=8,
        )
    assert name == "qwen2", name
    return Qwen2Config(**_COMMON, **_IDS, num_key_value_heads=1)


class TupleConfig(PreTrainedConfig):
    model_type = "tuples"
    vocab_size = VOCABULARY
    hidden_size = D_MODEL
    num_hidden_layers = LAYERS
    max_position_embeddings = 32


class _Attention(nn.Module):
    """Every token takes the mean of itself and those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.value(x).cumsum(1) / counts, None, None


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MLP, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class _Block(nn.Module):
    """Returns a tuple, as blocks of older and of remote code do, and shares a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.attn, self.mlp, self.dropout = _Attention(), _MLP(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        attended, _, _ = self.attn(self.norm_1(x))
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.norm_2(x))), None


class TupleLM(PreTrainedModel):
    config_class = TupleConfig

    def __init__(self, config: TupleConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, D_MODEL)
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, VOCABULARY, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, **_kwargs: Any) -> CausalLMOutput:
        x = self.embed(input_ids)
        seen = [x]
        for block in self.blocks:
            x, _ = block(x)
            seen.append(x)
        return CausalLMOutput(logits=self.head(self.norm(x)), hidden_states=tuple(seen))


def tiny_tokens(n_train: int = 6, n_eval: int = 7, seed: int = 0) -> TextTokens:
    """Rows that begin with BOS and have another BOS here and there; no two sides are alike."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(3, VOCABULARY, size=(n_train + n_eval, CONTEXT), dtype=np.int32)
    rows[rng.random(rows.shape) < 0.1] = BOS
    rows[:, 0] = BOS
    special = frozenset({BOS, EOS, PAD})
    assert special_mask(rows, special).sum() > len(rows), "some rows hold a BOS inside"
    return TextTokens(
        train=rows[:n_train],
        evaluation=rows[n_train:],
        fingerprint_train=f"train {n_train} {seed}",
        fingerprint_eval=f"eval {n_eval} {seed}",
        special_ids=special,
        context=CONTEXT,
        documents=np.arange(n_eval),
    )


def byte_tokenizer(bos: str | None = "<bos>", eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One token per byte: the special tokens come first, then the 256 bytes."""
    specials = [token for token in (bos, eos, "<pad>") if token is not None]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    given = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
    present = {name: token for name, token in given.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **present)


@contextmanager
def calls_of(modules: dict[str, nn.Module]) -> Iterator[list[str]]:
    """The names of those modules that were called meanwhile, in order."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in modules.items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
