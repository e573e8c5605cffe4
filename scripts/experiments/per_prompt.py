"""Is there a signal that says, for each prompt, which layers may stream? Compares signals with a fixed choice by loss.

    python scripts/experiments/per_prompt.py FILE.gguf FOLDER --fixed 0,1,8-13 [--share 0.5] [--questions 32] [--length 4096]

FILE is a model that transformers can load from GGUF (a Llama or Qwen2, say), FOLDER keeps what was measured: a run that was interrupted
goes on. For each conversation the attention of the first message's last 16 queries is taken from transformers, head by head, and
this share of the layers is chosen by each signal:

- mean: the lazy ratio as the paper has it, a mean over heads and queries: `auto=0.5;lazy=mean`;
- laziest head last: the smallest lazy ratio of a layer's heads, mean over queries: one head that looks far away keeps its layer;
- one look: the largest share that one head's one query gives to what a streaming layer wouldn't see, smallest first: `auto:0.5`.

Then the patched runtime answers the first question and the later one with these layers streaming, and its predictions are compared with
those of the full model (KL divergence, nats, weighted by what the full model knows; 95 % intervals over conversations).
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.progress import track

from lt_gguf import calibration
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.facts import JUDGING
from lt_gguf.evaluation.outcomes import KnownOutcomes
from lt_gguf.evaluation.probes import Document, make_documents
from lt_gguf.evaluation.results import write_text
from lt_gguf.evaluation.runtime_bench import RuntimeBench
from lt_gguf.runtime.log import captured_errors
from lt_gguf.runtime.text_model import TextModel
from lt_gguf.selection.evidence import FIRST, LATER, TEXT, Evidence, Outcome
from lt_gguf.selection.lazy_ratio import laziest
from lt_gguf.spec import DEFAULT_AUTO_W_LAST, DEFAULT_SINK, DEFAULT_WINDOW, StreamingSpec, parse_layers

SIGNALS = ("mean", "laziest head last", "one look")
FIXED = "fixed, by loss"
_SEED = (5, 17)  # other questions than a choice is made or judged by


def attention_of(model: Any, document: Document) -> list[np.ndarray]:
    """For each conversation: the attention of the last queries of its first message, float32 (layers, heads, queries, keys)."""
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        cache = model(input_ids=torch.tensor([document.prefix]), use_cache=True, logits_to_keep=1).past_key_values
        model.set_attn_implementation("eager")
        found = []
        for first, _ in document.conversations:
            message = torch.tensor([first.message])
            known = deepcopy(cache)  # note: it grows
            weights = model(input_ids=message, past_key_values=known, use_cache=True, output_attentions=True).attentions
            found.append(np.stack([layer[0, :, -DEFAULT_AUTO_W_LAST:].float().numpy() for layer in weights]))
    return found


def signals_of(attention: np.ndarray, sink: int, window: int) -> dict[str, list[float]]:
    """How lazy each layer is by each signal."""
    n_queries, n_keys = attention.shape[-2:]
    positions = np.arange(n_keys)
    queries = np.arange(n_keys - n_queries, n_keys)[:, None]
    seen = (positions < sink) | (queries - positions < window)
    ratio = (attention * seen).sum(axis=-1)  # (layers, heads, queries)
    signals = ratio.mean(axis=(1, 2)), ratio.mean(axis=2).min(axis=1), ratio.min(axis=(1, 2))
    return {name: signal.tolist() for name, signal in zip(SIGNALS, signals, strict=True)}


def measure(bench: RuntimeBench, document: Document, sets: list[dict[str, tuple[int, ...]]]) -> dict[str, list[Outcome]]:
    """What each choice comes to in the conversations that it was made for; `sets` has the choices of each."""
    asked = list(dict.fromkeys(layers for choices in sets for layers in choices.values()))
    found = dict(zip(asked, bench.measure_all(asked), strict=True))
    outcomes: dict[str, list[Outcome]] = {}
    for number, choices in enumerate(sets):
        for name, layers in choices.items():
            answers = [outcome for outcome in found[layers].outcomes if outcome.where != TEXT]
            outcomes.setdefault(name, []).extend(answers[2 * number : 2 * number + 2])
    assert len(sets) == len(document.conversations)
    return outcomes


def main(
    file: Path,
    folder: Path,
    fixed: Annotated[str, typer.Option(help="as many layers, chosen by loss, as lt-gguf analyze --streaming-fraction 0.5 says")],
    share: float = 0.5,
    questions: Annotated[int, typer.Option(min=4)] = 32,
    length: int = 4096,
    threads: int = 0,
) -> None:
    """Compares choices for each prompt with a fixed one."""
    folder.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    model = TextModel(file)
    with captured_errors(forward=False):
        documents = make_documents(
            model, calibration.read_texts(None).halves()[1], JUDGING, questions, length, DEFAULT_WINDOW, _SEED
        )
    n_streaming = int(share * model.n_layer + 1e-4)
    by_loss = parse_layers(fixed, model.n_layer)
    if len(by_loss) != n_streaming:
        raise typer.BadParameter(f"--fixed has {len(by_loss)} layers, must have {share:g} of them, {n_streaming}")
    transformer = None
    outcomes: dict[str, list[Outcome]] = {}
    for number, document in enumerate(track(documents, "documents")):
        done = folder / f"{file.stem}-{number}.json"
        if done.exists():
            said = json.loads(done.read_text())
        else:
            if transformer is None:
                transformer = transformers.AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32
                )
            attention = attention_of(transformer, document)
            by_signal = [signals_of(each, DEFAULT_SINK, DEFAULT_WINDOW) for each in attention]
            sets = [{name: laziest(signal, n_streaming) for name, signal in each.items()} | {FIXED: by_loss} for each in by_signal]
            spec = StreamingSpec((), model.n_layer)
            options = ScorerOptions(flash_attn=False, n_threads=threads or None)
            bench = RuntimeBench(model, options, spec, [document], KnownOutcomes())
            with captured_errors(forward=False):
                found = measure(bench, document, sets)
                bench.close()
            said = {name: [asdict(outcome) for outcome in answers] for name, answers in found.items()}
            write_text(done, json.dumps(said))
        for name, answers in said.items():
            numbered = [Outcome(**answer | {"prompt": number * 100 + i // 2}) for i, answer in enumerate(answers)]
            outcomes.setdefault(name, []).extend(numbered)
    model.close()
    print(f"\n{file.name}, {questions} conversations of {length:,} tokens, {n_streaming} of {model.n_layer} layers stream\n")
    print("| chosen | KL, first question | KL, later question | lost of what the full model finds |\n| --- | --- | --- | --- |")
    for name, answers in outcomes.items():
        evidence = Evidence(tuple(answers))
        kl = [evidence.kl_where(where) for where in (FIRST, LATER)]
        numbers = [f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in kl]
        loss = evidence.loss
        print(f"| {name} | {' | '.join(numbers)} | {loss.value:.1%} ({loss.low:.1%} to {loss.high:.1%}) |")


if __name__ == "__main__":
    typer.run(main)
