"""The standard suite's core eval (PyPI sae-bench) on the SAEs of `score.py`: seconds per SAE. Needs no saebench.

python _peer_score.py OPTIONS ANSWER      what `score.py --peers` runs, with a Python that has the peers
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sae_bench.evals.core.main as core
import torch
from _common import peak_memory, versions
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    model = hooked(options["model"])
    # The suite knows models by their Hub name alone, and so would ask the Hub for it.
    core.HookedTransformer.from_pretrained_no_processing = staticmethod(lambda *_, **__: model)
    seconds = {width: _timed(options, folders) for width, folders in options["saes"].items()}
    found = versions(options["packages"])
    answer.write_text(json.dumps(seconds | {"versions": found, "peak_bytes": peak_memory()}))


def hooked(folder: str) -> Any:
    """A Llama model of a local folder in TransformerLens, checked against transformers."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = theirs.config
    d_head = c.hidden_size // c.num_attention_heads
    config = HookedTransformerConfig(
        d_model=c.hidden_size,
        d_head=d_head,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers,
        n_ctx=c.max_position_embeddings,
        eps=c.rms_norm_eps,
        d_vocab=c.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=10000,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        dtype=torch.float32,
        tokenizer_prepends_bos=False,
        default_prepend_bos=True,
        seed=0,
    )
    model = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_state_dict(convert_llama_weights(theirs, config), strict=False)
    ids = torch.randint(3, c.vocab_size, (2, 32))
    gap = (model(ids) - theirs(ids).logits).abs().max().item()
    assert gap < 1e-3, f"the hooked model differs from transformers' by {gap}"
    return model.eval()


def _timed(options: dict[str, Any], folders: list[str]) -> float:
    """Seconds of the core eval for one SAE, all of its statistics on."""
    chosen = [(Path(folder).name, _converted(options, Path(folder))) for folder in folders[:1]]
    with tempfile.TemporaryDirectory() as text, tempfile.TemporaryDirectory() as out:
        shutil.copy(options["text"], Path(text) / "train.jsonl")
        began = time.perf_counter()
        core.multiple_evals(
            chosen,
            options["sequences"] // 16,
            options["sequences"] // 16,
            eval_batch_size_prompts=16,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=text,
            context_size=options["context"],
            output_folder=out,
            dtype="float32",
            device="cpu",
            force_rerun=True,
        )
        seconds = time.perf_counter() - began
        assert list(Path(out).rglob("*.json")), "the peer failed, which it only says in its log"
    return seconds / len(chosen)


def _converted(options: dict[str, Any], folder: Path) -> SAE[Any]:
    """A checkpoint of ours in SAELens."""
    weights = load_file(folder / "sae.safetensors")
    d_in, d_sae = weights["W_enc"].shape
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False)
    config.metadata.model_name = Path(options["model"]).name
    config.metadata.prepend_bos = True
    config.metadata.context_size = options["context"]
    config.metadata.hook_name = f"blocks.{options['layer']}.hook_resid_post"
    sae = JumpReLUSAE(config)
    sae.load_state_dict(weights)
    return sae


if __name__ == "__main__":
    main()
