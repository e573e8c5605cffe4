"""Whom `lt-gguf bench --peers` compares with: llama.cpp as it is, transformers, and kvpress on it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lt_gguf.bench.contender import Contender
from lt_gguf.bench.measure import Plan
from lt_gguf.gguf.file import GGUFModel
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE

SIMLAYERKV_THRESHOLD = 0.9  # what kvpress recommends for Llama 3, the largest that it names
ABSENT_PEERS = (
    "DuoAttention (kvpress): needs a pattern that was trained for the model, so it isn't compared",
    "ik_llama.cpp: in no package registry, so it isn't compared",
    "MLX: runs on Apple's chips only, so it isn't compared",
)


def find_peers(model: GGUFModel, contenders: Sequence[Contender], plan: Plan) -> tuple[list[Contender], list[str]]:
    """Who else can run the model here, beside these of ours; and a line for each of those who can't.

    Raises:
        ValueError: the Python that is to have them can't be run.
    """
    hybrid = next((c for c in contenders if c.is_hybrid), None)
    spec = StreamingSpec.parse(hybrid.streaming, model.n_layer) if hybrid else StreamingSpec.off(model.n_layer)
    peers = stock_peers(dict.fromkeys(c.type_k for c in contenders), spec.sink + spec.window)
    absent = list(ABSENT_PEERS)
    if not plan.prompts:
        return peers, ["transformers, kvpress: have no cache but one that was read, and --prompts none reads none", *absent]
    if not has_module(plan.peer_python, "transformers") or not has_module(plan.peer_python, "torch"):
        return peers, ["transformers, kvpress: aren't in this Python, give the one that has them as --peer-python", *absent]
    n_ctx = max(plan.prompts)
    kept = 1.0 if hybrid is None else hybrid.kv_bytes(model, n_ctx) / contenders[0].kv_bytes(model, n_ctx)
    has_presses = hybrid is not None and has_module(plan.peer_python, "kvpress")
    if not has_presses:
        absent.insert(0, "kvpress: isn't in this Python, give one that has it (pip install kvpress gguf) as --peer-python")
    return [*peers, *torch_peers(has_presses, kept, spec.window, spec.sink)], absent


def has_module(python: str, name: str) -> bool:
    """Whether a Python finds a module. Raises ValueError: it is no Python."""
    command = [python, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec('{name}') is None)"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError as error:
        raise ValueError(f"--peer-python = {python}: can't be run: {error.strerror}") from None


def stock_peers(cache_types: Iterable[str], shift_at: int) -> list[Contender]:
    """llama.cpp as it is without this project: the same library, in which nothing streams and its own attention runs."""
    stock = Contender("llama.cpp, f16", own_attention=False)
    quantized = (
        replace(stock, name=f"llama.cpp, {type_}", type_k=type_, type_v=type_)
        for type_ in cache_types
        if type_ != DEFAULT_CACHE_TYPE
    )
    return [
        stock,
        replace(stock, name="llama.cpp, f16, flash attention off", flash_attn=False),
        *quantized,
        replace(stock, name=f"llama.cpp, context of {shift_at:,}, shifted", shift_at=shift_at),
    ]


def torch_peers(presses: bool, kept: float, window: int, sink: int) -> list[Contender]:
    """transformers with the same weights in 32 bits, and kvpress on it.

    Args:
        presses: kvpress is there.
        kept: the share of a cache that they keep who can be told it: that which the hybrid keeps.
        window: of the hybrid, as SimLayerKV has one, too.
        sink: the same.
    """

    def peer(name: str, **options: Any) -> Contender:
        return Contender(name, own_attention=False, library="transformers", options={"dtype": "float32", **options})

    peers = [peer("transformers, float32")]
    if presses:
        ratio = {"compression_ratio": round(1 - kept, 4)}
        lazy = {"lazy_threshold": SIMLAYERKV_THRESHOLD, "n_recent": window, "n_initial": sink}
        peers += [
            peer("kvpress, SimLayerKV", press="SimLayerKVPress", arguments=lazy),
            peer("kvpress, StreamingLLM", press="StreamingLLMPress", arguments=ratio),
            peer("kvpress, SnapKV", press="SnapKVPress", arguments=ratio),
        ]
    return peers
