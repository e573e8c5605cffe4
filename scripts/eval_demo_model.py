"""Measure the demo model on held-out text and held-out lookups, and draw its training curves.

    python scripts/eval_demo_model.py models/demo --log build/demo-train/log.jsonl

writes `evaluation.json` and, with `--log`, `training.png` into the model's folder. Needs what
`train_demo_model.py` needs, and matplotlib.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import demo_data as data
from train_demo_model import RowMaker

N_TEXT_ROWS = 100
TEXT_LENGTH = 512
LENGTHS = (128, 256, 512, 1024, 2000)
N_DISTRACTORS = 4
EVAL_SEED = 1_000_003  # training's generators are seeded (seed, 1, step): never with this


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: RowMaker, kind: str) -> dict[str, float]:
    """Per-token perplexity and bits per byte over `N_TEXT_ROWS` rows of BOS and `TEXT_LENGTH` tokens of `kind`."""
    rng = np.random.default_rng((EVAL_SEED, 0))
    total, n_tokens, n_bytes = 0.0, 0, 0
    for _ in track(range(N_TEXT_ROWS), description=f"perplexity, {kind}"):
        segments = data.document(rng, 4 * TEXT_LENGTH, rows.texts, {kind: 1})
        ids = rows.encode(segments)[0][:TEXT_LENGTH]
        logits = model(torch.tensor([[rows.bos, *ids]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum").item()
        n_tokens += len(ids)
        n_bytes += len(rows.sp.decode(ids).encode())
    return dict(perplexity=math.exp(total / n_tokens), bits_per_byte=total / math.log(2) / n_bytes, tokens=n_tokens)


def lookup_prompt(rows: RowMaker, rng: np.random.Generator, length: int, chat: bool, held_out: bool):
    """`(ids, n_answer)`: one question about one of `1 + N_DISTRACTORS` facts, prompt and answer together `length`
    tokens or up to 15 % fewer; the answer is the last `n_answer` tokens."""
    n_chars = int(3.7 * length)
    while True:
        segments, _ = data.retrieval(
            rng, n_chars, rows.texts, held_out=held_out, n_facts=1 + N_DISTRACTORS, n_questions=1, chat=chat,
        )
        answer = segments[-4:] if chat else segments[-3:]  # statement, value, full stop, and the end of a chat's turn
        ids, n_answer = rows.encode(segments)[0], len(rows.encode(answer)[0])
        if len(ids) + 1 > length:
            n_chars = int(0.97 * n_chars)
        elif len(ids) + 1 < 0.85 * length:
            n_chars = int(1.03 * n_chars)
        else:
            return [rows.bos, *ids], n_answer


@torch.no_grad()
def lookup_accuracy(model, rows: RowMaker, length: int, n: int, held_out: bool) -> float:
    """Share of `n` prompts (half of them chats) whose whole answer greedy decoding gives exactly.

    Greedy decoding gives the answer exactly iff every answer token is the most likely one after the true tokens
    before it, so one forward pass is enough.
    """
    rng = np.random.default_rng((EVAL_SEED, 1, length, int(held_out)))
    right = 0
    for i in track(range(n), description=f"lookup, {length} tokens, {'held-out' if held_out else 'training'} keys"):
        ids, n_answer = lookup_prompt(rows, rng, length, chat=i % 2 == 0, held_out=held_out)
        logits = model(torch.tensor([ids[:-1]]), logits_to_keep=n_answer).logits[0]
        right += int((logits.argmax(-1) == torch.tensor(ids[-n_answer:])).all())
    return right / n


def draw_training(log: Path, out: Path) -> None:
    """The losses of plain text and of looked-up answers over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    millions = [r["tokens"] / 1e6 for r in records]
    figure, (losses, hits) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    losses.plot(millions, [r["text"] for r in records], label="text")
    losses.plot(millions, [r["answer"] for r in records], label="looked-up answers")
    losses.set(xlabel="million tokens", ylabel="training loss (nats a token)", ylim=(0, None))
    losses.legend(loc="upper right")
    hits.plot(millions, [100 * r["hits"] for r in records], color="tab:orange")
    hits.set(xlabel="million tokens", ylabel="answer tokens right (%)", ylim=(0, 101))
    for axes in (losses, hits):
        for before, record in zip(records, records[1:]):
            if before["length"] != record["length"]:
                axes.axvline(before["tokens"] / 1e6, color="0.8", linewidth=1, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Training of the demo model (grey lines: rows get longer, 256 to 2048 tokens)", fontsize=10)
    partial = out.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    os.replace(partial, out)


def main(
    model_dir: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="the checkpoint"),
    ] = Path("models/demo"),
    log: Annotated[Path | None, typer.Option(exists=True, help="training log to draw")] = None,
    n: Annotated[int, typer.Option(min=1, help="lookups a length and kind of key")] = 100,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Held-out perplexity and lookup accuracy by length."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = RowMaker(model_dir / "tokenizer.model", data.python_texts()[1])
    result = dict(
        uniform_perplexity=model.config.vocab_size,
        perplexity={kind: perplexity(model, rows, kind) for kind in ("story", "python", "chat")},
        lookup={
            keys: {length: lookup_accuracy(model, rows, length, n, held_out) for length in LENGTHS}
            for keys, held_out in (("held-out keys", True), ("training keys", False))
        },
        lookup_n=n,
    )
    partial = model_dir / "evaluation.partial.json"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, model_dir / "evaluation.json")
    if log:
        draw_training(log, model_dir / "training.png")
    Console().print_json(data=result)


if __name__ == "__main__":
    typer.run(main)
