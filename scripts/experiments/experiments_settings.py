"""What is varied in the experiments, and what it is otherwise."""

from __future__ import annotations

from lt_gguf.spec import AutoSpec

SINK, WINDOW = 4, 124  # of prompts of 1024 tokens what 1020 are of 8192
SINKS, WINDOWS = (0, 2, 4, 6), (28, 60, 124, 252)
FRACTIONS = (0.25, 0.5, 0.75)
W_LAST = (8, 16, 32, 64)
N_RANDOM = 5
CACHE_TYPES, WEIGHT_TYPES = ("q8_0", "q4_0"), ("Q8_0", "Q4_K_M")  # besides f16
TRAINED = (
    "frequency",
    "loss",
    "interleave-odd",
)  # the paper's choice of layers, ours, and one that hurts, to see what training mends
AGREEMENT_SAMPLES = 40  # of each task

# the runtime chooses at the end of each prompt: as the paper does, and by the single look
PER_PROMPT = {lazy: str(AutoSpec(0.5, SINK, WINDOW, lazy=lazy)) for lazy in ("mean", "min")}
