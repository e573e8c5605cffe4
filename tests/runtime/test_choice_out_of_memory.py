"""Layers that are chosen for the prompt, where there is no memory for others: the context goes on, or says so and recovers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.oracle import Subject

TESTS = Path(__file__).resolve().parents[1]

CHILD = """
import resource, sys
sys.path.insert(0, {tests!r})
from support.native import DecodeError, Model, Token
from support.oracle import random_tokens

model = Model({path!r})
model.set_streaming("auto=0.5;sink=4;window=60;w_last=16")
context = model.context(n_ctx=300_000, n_batch=512, n_ubatch=64)


def read():
    return context.decode_batch([Token(int(t), i, (0,), i == 299) for i, t in enumerate(random_tokens(300))])


def limit(spare):
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (spare if spare < 0 else in_use + spare, resource.RLIM_INFINITY))


def chosen():
    return context.streaming().split(";")[1]


def is_refused():
    try:
        read()
    except DecodeError:
        return True


first = read()
context.decode([5], 300)  # with the compute buffers of these layers
state = context.save_seq()
context.seq_rm(0, -1, -1)
limit(16 << 20)
print("empty:", chosen())
read()
print("no memory for their cells:", chosen())
context.decode([5], 300)
limit(-1)
context.seq_rm(0, -1, -1)
again = read()
print("anew:", (again == first).all())
context.seq_rm(0, -1, -1)

resource.setrlimit(resource.RLIMIT_AS, (200 << 20, resource.RLIM_INFINITY))  # less than what is there
print("refused: state", not context.restore_seq(state))
print("refused: batch", is_refused())
limit(-1)
print("recovers:", read().shape == first.shape)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space are Linux's")
def test_no_memory_for_other_layers(tmp_path):
    subject = Subject.build("llama", 4, tmp_path)
    code = CHILD.format(tests=str(TESTS), path=str(subject.native.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-1500:])
    said = [
        "empty: layers=none",
        "no memory for their cells: layers=none",
        "anew: True",
        "refused: state True",
        "refused: batch True",
        "recovers: True",
    ]
    assert done.stdout.splitlines() == said, done.stderr[-3000:]
    assert "all layers stay full: " in done.stderr
