"""Train `builtin:pylm`, the small language model that ships with saebench, from nothing but the standard library.

    python tools/train_pylm.py OUT_DIR

Text: the modules of the running Python's standard library, its test-suite where that is installed, and
`pydoc_data.topics` (English prose). Modules whose name hashes into the held-out share are never seen by the tokenizer
or by the model; the loss in the model card is measured on those of them that are not tests. On 2 CPU cores
with AMX (bfloat16) a run takes about an hour; a stopped run continues from OUT_DIR/state.pt.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saebench.text import Document, stdlib_documents

BOS = "<|bos|>"
VOCABULARY = 4096
CONTEXT = 256
HELD_OUT_SHARE = 0.05
REFINE_FROM = 5 / 12
"""Share of the steps after which everything but tests is read twice as often as tests."""


def held_out(document: Document) -> bool:
    """Whether a document is kept from training, decided by the hash of its name alone."""
    digest = hashlib.sha256(document.name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, a BOS before each."""
    ids: list[np.ndarray] = []
    for text in texts:
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(np.array([tokenizer.bos_token_id, *encoded], dtype=np.int16))
    return np.concatenate(ids)


def rows_of(stream: np.ndarray, bos: int, offset: int = 0) -> torch.Tensor:
    """[n_rows CONTEXT]: windows of the stream, each with a BOS put before it."""
    width = CONTEXT - 1
    stream = stream[offset : offset + (len(stream) - offset) // width * width].reshape(-1, width)
    return torch.from_numpy(np.insert(stream, 0, bos, axis=1).astype(np.int64))


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none"
    )


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    """Mean next-token cross-entropy in nats, in float32, over the stream.

    Windows overlap by half and only the second half of each is counted, so that every token is predicted from at
    least half a context.
    """
    half = CONTEXT // 2
    windows = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT - 1)[::half]
    rows = torch.from_numpy(np.insert(windows, 0, stream[0], axis=1).astype(np.int64))
    total = 0.0
    for batch in rows.split(16):
        logits = model(batch).logits[:, -half - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, -half:].flatten(), reduction="sum"
        ).item()
    return total / (len(rows) * half)


def unigram_loss(train: np.ndarray, held: np.ndarray) -> float:
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[held].mean())


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: 100 steps up, flat, then down to zero in a line over the last 60 %."""
    return min(1.0, (step + 1) / 100, (steps - step) / (0.6 * steps))


def batches(stream: np.ndarray, batch: int, steps: range) -> Iterator[torch.Tensor]:
    """Rows for each of the steps: epoch after epoch, cut and shuffled anew each time."""
    per_epoch = (len(stream) - CONTEXT) // (CONTEXT - 1) // batch
    epoch = -1
    for step in steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            generator = np.random.default_rng(epoch)
            rows = rows_of(stream, 0, offset=int(generator.integers(CONTEXT)))
            order = torch.from_numpy(generator.permutation(len(rows)))
        position = step % per_epoch * batch
        yield rows[order[position : position + batch]]


def train(
    model: LlamaForCausalLM,
    streams: tuple[np.ndarray, np.ndarray],
    held: np.ndarray,
    out: Path,
    args: argparse.Namespace,
) -> None:
    losses = torch.compile(token_losses) if args.compile else token_losses
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    optimizers = [muon, adam]
    peaks = [0.02, 3e-3]
    first, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        first = saved["step"]
    turn = round(REFINE_FROM * args.steps)
    everything, refined = streams
    rows = itertools.chain(
        batches(everything, args.batch, range(first, turn)),
        batches(refined, args.batch, range(max(first, turn), args.steps)),
    )
    began = time.monotonic()
    for step, batch in enumerate(rows, first):
        loss = losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(step, args.steps)
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0:
            rate = (time.monotonic() - began) / (step - first + 1)
            print(f"step {step}/{args.steps} loss {loss.item():.4f} {rate:.3f} s/step", flush=True)
        if step % 500 == 499:
            print(f"step {step + 1} held-out loss {mean_loss(model, held):.4f}", flush=True)
            saved = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step + 1,
            }
            torch.save(saved, out / "state.part")
            (out / "state.part").rename(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; wants a C++ compiler"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    plain = [d for d in stdlib_documents() if not held_out(d)]
    names = {d.name for d in plain}
    seen = [d for d in stdlib_documents(with_tests=True) if not held_out(d)]
    tests = [d for d in seen if d.name not in names]
    unseen = [d.text for d in stdlib_documents() if held_out(d)]
    tokenizer = train_tokenizer(d.text for d in seen)
    stream, held = encode(tokenizer, [d.text for d in seen]), encode(tokenizer, unseen)
    refined = encode(tokenizer, [d.text for d in (*plain, *plain, *tests)])
    print(f"{len(seen)} documents, {len(stream)} tokens; held out {len(unseen)}, {len(held)}")

    model = build_model()
    untrained = mean_loss(model, held)
    train(model, (stream, refined), held, args.out, args)
    model = model.bfloat16().float()  # measured as it is stored
    loss = mean_loss(model, held)
    bytes_per_token = sum(len(t.encode()) for t in unseen) / len(held)
    card = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": sys.version.split()[0],
        "train_documents": len(seen),
        "train_tokens_distinct": len(stream),
        "train_tokens_seen": args.steps * args.batch * CONTEXT,
        "held_out_documents": len(unseen),
        "held_out_tokens": len(held),
        "held_out_bytes_per_token": bytes_per_token,
        "held_out_nats_per_token": loss,
        "held_out_bits_per_byte": loss / math.log(2) / bytes_per_token,
        "held_out_nats_per_token_unigram": unigram_loss(stream, held),
        "held_out_nats_per_token_untrained": untrained,
    }
    print(json.dumps(card, indent=1))
    model.bfloat16().save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    (args.out / "model" / "card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
