"""No memory for a prompt: said when it is announced, once, and what other sequences hold stays as it is."""

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
from support.native import PROMPT, DecodeError, Model, Token
from support.oracle import random_tokens

model = Model({path!r})
model.set_streaming({spec!r})
context = model.context(n_ctx=400_000, n_batch=512, n_ubatch=64, n_seq_max=2, kv_unified=True)


def decode(seq, start, n):
    return context.decode_batch([Token(int(t), start + i, (seq,), i == n - 1) for i, t in enumerate(random_tokens(n, seed=seq))])


decode(1, 0, 20)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (8 << 20), resource.RLIM_INFINITY))
try:
    context.prompt_begin(200_000, 0)
except ValueError as error:
    print("refused:", error)
assert context.kv_bytes(PROMPT) == 0
decode(1, 20, 1)
try:
    for batch in range(400):
        context.decode_batch([Token(int(t), batch * 512 + i, (0,), False) for i, t in enumerate(random_tokens(512, seed=9))])
except DecodeError as error:
    print("undeclared:", error.code)
decode(1, 21, 1)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert context.seq_rm(0, -1, -1)
context.prompt_begin(200_000, 0)
print("granted:", context.kv_bytes(PROMPT) > 50_000_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space are Linux's")
def test_a_prompt_for_which_there_is_no_memory(tmp_path):
    subject = Subject.build("llama", 4, tmp_path)
    code = CHILD.format(tests=str(TESTS), path=str(subject.native.path), spec="layers=1,3;sink=4;window=60;prefill=full")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, undeclared, granted = done.stdout.splitlines()
    assert refused.startswith("refused: no memory for") and "prefill=stream" in refused
    assert undeclared == "undeclared: 1"
    assert granted == "granted: True"
