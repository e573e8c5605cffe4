"""Decodes a text with the libllama that LLAMA_CPP_LIB_PATH names, in a process of its own, and saves all logits.

    python decode_child.py MODEL.gguf OUT.npz SETTINGS

SETTINGS are those of the context, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.native import Model, Token


def main(path: str, out: str, settings: dict) -> None:
    text = np.random.default_rng(0).integers(3, 320, 400)
    with Model(path) as model, model.context(**settings) as context:
        rows = {"prompt": context.decode(text[:300]), "decoded": context.decode_one_by_one(text[300:], 300)}
        context.seq_rm(0, 50, 100)
        context.seq_add(0, 100, -1, -50)
        rows["shifted"] = context.decode(text[:40], 350)
        rows["state"] = np.frombuffer(context.save(), np.uint8)
        context.clear()
        together = [Token(int(text[i]), i, (seq,)) for i in range(120) for seq in range(2)]
        rows["together"] = context.decode_batch(together)
        rows["n_swa"] = np.array(model.n_swa)
    np.savez(out, **rows)


main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
