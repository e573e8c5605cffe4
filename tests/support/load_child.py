"""Loads GGUF files one after the other, in a process of its own: a crash must not take the tests with it.

On stdin a line of JSON for each, {"path": ..., "decode": [tokens] or null}; on stdout a line of JSON for each,
{"error": the log's lines if it wasn't loaded, else null, "spec": what contexts run with, "logits": the last token's}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.native import Model, log


def load(path: str, decode: list[int] | None) -> dict:
    answer = {"error": None, "spec": None, "logits": None}
    start = log.mark()
    try:
        with Model(path) as model, model.context(n_ctx=256) as context:
            answer["spec"] = model.streaming()
            if decode:
                answer["logits"] = context.decode(decode)[-1].tolist()
    except ValueError:
        answer["error"] = "\n".join(log.since(start))
    return answer


for line in sys.stdin:
    print(json.dumps(load(**json.loads(line))), flush=True)
