"""Checkpoints of the oracle's families: saved in Hugging Face format, then through upstream's converter to GGUF."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from support.families import Family

from lt_gguf.runtime.library import upstream_dir

WORKER = Path(__file__).with_name("convert_worker.py")


def save_gguf(model, family: Family, directory: Path, outtype: str = "f32") -> Path:
    """Saves the transformers `model` under `directory` and converts it with upstream's converter.

    Returns the path of the GGUF file. Raises RuntimeError if the converter fails.
    """
    checkpoint = directory / "hf"
    model.save_pretrained(checkpoint)
    out = directory / f"model-{outtype}.gguf"
    request = dict(checkpoint=str(checkpoint), outfile=str(out), outtype=outtype, hparams=family.hparams)
    worker = _worker()
    print(json.dumps(request), file=worker.stdin, flush=True)
    answer = worker.stdout.readline()
    if answer != "\n":
        raise RuntimeError(f"{family.name}: {answer.strip() or 'the converter ended without an answer'}")
    return out


@cache
def _worker() -> subprocess.Popen:
    command = [sys.executable, WORKER, upstream_dir()]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    atexit.register(worker.stdin.close)  # which ends it
    return worker
