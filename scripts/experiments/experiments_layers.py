"""Which layers the experiments let stream: what each strategy chooses for a checkpoint, measured once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from experiments_settings import FRACTIONS, N_RANDOM, W_LAST

from lt_gguf.calibration import read_texts
from lt_gguf.evaluation.candidates import open_candidates
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.haystack import Haystack
from lt_gguf.evaluation.prompts import Tokenizer, make_prompt
from lt_gguf.evaluation.results import write_text
from lt_gguf.evaluation.tasks import TASKS
from lt_gguf.hf import analysis
from lt_gguf.selection import Model, Request, strategy
from lt_gguf.spec import StreamingSpec

_SEED = 20_000  # of calibration prompts: never that of an evaluation
_SAMPLES = 40  # that lazy ratios are measured on
_QUESTIONS = 16  # conversations that candidates are chosen by

Layers = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and by which ratios if by any.

    Args:
        layers: by name, as `lazy-ratio 50 %` or `random 3`.
        ratios: mean lazy ratio of each layer at the ends of the calibration prompts, by w_last.
    """

    layers: dict[str, Layers]
    ratios: dict[int, list[float]]


def choose(
    path: Path,
    checkpoint: Path,
    file: Path,
    tokenizer: Tokenizer,
    length: int,
    sink: int,
    window: int,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> Choice:
    """What all strategies choose; read from `path` if an earlier run has left it there.

    Lazy ratios are measured on prompts of all tasks whose keys and wordings the evaluation doesn't ask for, with their answers:
    question and answer together, as in section 4 of the paper.

    Args:
        checkpoint: the model's folder.
        file: the same model, GGUF.
        tokenizer: the checkpoint's.
        length: tokens of a prompt, at most.
    """
    if path.exists():
        content = json.loads(path.read_text())
        return Choice({k: tuple(v) for k, v in content["layers"].items()}, {int(k): v for k, v in content["ratios"].items()})
    samples = _calibration(tokenizer, length)
    config = json.loads((checkpoint / "config.json").read_text())
    n_layer = config["num_hidden_layers"]
    model = Model(config["model_type"], checkpoint.name, n_layer, n_layer, config)
    of_w_last = {
        w_last: analysis.measure(checkpoint, samples, sink=sink, window=window, w_last=w_last, progress=progress)
        for w_last in W_LAST
    }
    ratios = of_w_last[32]
    layers: dict[str, Layers] = {}

    def add(name: str, key: str, fraction: float = 0.5, **more) -> None:
        request = Request(model, fraction=fraction, sink=sink, window=window, **more)
        layers[key] = strategy(name).select(request).layers

    for fraction in FRACTIONS:
        add("lazy-ratio", _percent("lazy-ratio", fraction), fraction, ratios=ratios)
    for w_last, found in of_w_last.items():
        add("lazy-ratio", f"w_last {w_last}", ratios=found)
    add("frequency", "frequency 50 %", ratios=ratios)
    lazy = layers["lazy-ratio 50 %"]
    layers["reverse of lazy-ratio"] = tuple(np.argsort(ratios.mean(axis=0), kind="stable")[: len(lazy)].tolist())
    add("interleave-odd", "interleave-odd")
    add("interleave-even", "interleave-even")
    for i in range(N_RANDOM):
        drawn = np.random.default_rng([_SEED, i]).choice(n_layer, n_layer // 2, replace=False)
        layers[f"random {i + 1}"] = tuple(sorted(drawn.tolist()))
    spec = StreamingSpec((), n_layer, sink, window, "full")
    numbers = {"questions": _QUESTIONS, "length": length, "progress": progress}
    options = ScorerOptions(n_threads=threads)
    with open_candidates(file, spec, read_texts(None), **numbers, options=options) as candidates:
        for fraction in FRACTIONS:
            add("kl", _percent("kl", fraction), fraction, candidates=candidates)
        for fraction in FRACTIONS:
            add("auto", _percent("auto", fraction), fraction, candidates=candidates, ratios=ratios)
    layers = {name: tuple(sorted(int(il) for il in chosen)) for name, chosen in layers.items()}
    choice = Choice(layers, {w_last: found.mean(axis=0).tolist() for w_last, found in of_w_last.items()})
    write_text(path, json.dumps({"layers": choice.layers, "ratios": choice.ratios}, indent=1) + "\n")
    return choice


def _calibration(tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Prompts with their answers, all tasks in turn."""
    samples = []
    for i in range(_SAMPLES):
        rng = np.random.default_rng([_SEED, i])
        task = list(TASKS.values())[i % len(TASKS)]
        prompt = make_prompt(tokenizer, task, rng, length, None, Haystack(), held_out=False)
        samples.append([*prompt.tokens, *prompt.answer])
    return samples


def _percent(name: str, fraction: float) -> str:
    return f"{name} {100 * fraction:.0f} %"
