"""transformers, and kvpress on it, as peers of `lt-gguf bench`: a script that any Python with them runs.

It takes a `Job` of `contender.py` on stdin and prints what it measures, a line of JSON for each depth. It imports nothing of this
project: kvpress asks for another transformers than the one this project is tested with, so it lives in a Python of its own. The
weights are those of the GGUF file, as transformers reads them: dequantized.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(sys.stdin.readline())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # note: the model is here; a peer downloads nothing
    try:
        for measured in run(job):
            print(json.dumps(measured), flush=True)
    except Exception as error:  # note: a peer may fail in any way, and then that is its result
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}), flush=True)


def run(job: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options = job["contender"]["options"]
    torch.set_num_threads(job["n_threads"])
    torch.manual_seed(0)
    path = Path(job["model"])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, options["dtype"]))
    model.eval()
    press = make_press(options)
    for depth in job["depths"]:
        with torch.no_grad():
            yield {"depth": depth, **measure(model, press, depth, job["n_tokens"])}


def measure(model: Any, press: Any, depth: int, n_tokens: int) -> dict[str, Any]:
    """Reads a prompt of `depth` random tokens at once, as these libraries do, then decodes."""
    import torch
    from transformers import DynamicCache

    tokens = torch.randint(0, model.config.vocab_size, (1, depth))
    cache: Any = DynamicCache()
    start = time.perf_counter()
    with press(model) if press else contextlib.nullcontext():
        model(tokens, past_key_values=cache, logits_to_keep=1)
    first = time.perf_counter() - start
    n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    token = tokens[:, -1:]
    for i in range(n_tokens + 1):
        if i == 1:
            start = time.perf_counter()
        position = torch.tensor([depth + i])
        model(token, past_key_values=cache, position_ids=position[None], logits_to_keep=1)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "first_token_seconds": first,
        "tokens_per_second": depth / first,
        "decode_tokens_per_second": n_tokens / seconds,
        "kv_bytes": n_bytes,
        "peak_bytes": peak,
    }


def make_press(options: dict[str, Any]) -> Any:
    """What drops a part of the cache at the end of a prompt; `None`: nothing does."""
    name = options.get("press")
    if name is None:
        return None
    import kvpress  # type: ignore[import-not-found]

    return getattr(kvpress, name)(**options.get("arguments", {}))


if __name__ == "__main__":
    main()
