"""Crashes in native code, in a process of its own, while it does something with a model.

    python crash_child.py STEP MODEL.gguf

STEP is one of those below.
"""

from __future__ import annotations

import ctypes
import sys
import threading

from lt_gguf.runtime import crash

STEP, FILE = sys.argv[1], sys.argv[2]
SETTINGS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}

if STEP != "unasked":
    crash.enable("a child of the tests")

import lt_gguf
from lt_gguf.runtime.library import library_dir, load_llama_cpp

C = load_llama_cpp().llama_cpp
GGML = ctypes.CDLL(str(next(library_dir().glob("libggml-base.*"))))


def die(*_: object) -> None:
    """Reads memory that isn't there, in a function of ggml."""
    GGML.ggml_nelements(ctypes.c_void_p(16))


def crash_in(name: str) -> None:
    """Lets the next call of a function of llama.cpp crash."""
    setattr(C, name, die)


def model(**more: object) -> lt_gguf.Llama:
    return lt_gguf.Llama(FILE, streaming="layers=1,3;sink=4;window=60", **SETTINGS, **more)


if STEP == "loading":
    crash_in("llama_model_load_from_file")
    model()
elif STEP == "prompt":
    llm = model()
    crash_in("llama_decode")
    llm.eval(list(range(3, 103)))
elif STEP == "decoding":
    llm = model()
    llm.eval(list(range(3, 103)))
    crash_in("llama_decode")
    llm.eval([3])
elif STEP == "snapshot":
    llm = model()
    crash_in("llama_state_seq_get_data_ext")
    llm.eval(list(range(3, 103)))
elif STEP == "lazy ratios":
    llm = model()
    crash_in("llama_decode")
    llm.lazy_ratios(list(range(3, 103)), sink=4, window=60)
elif STEP in ("scoring", "scoring, decoding", "context"):
    from lt_gguf.evaluation.context import ScorerOptions
    from lt_gguf.evaluation.scorer import Scorer

    if STEP == "context":
        crash_in("llama_init_from_model")
    scorer = Scorer(FILE, "off", ScorerOptions(n_ctx=256, n_threads=1))
    if STEP == "scoring":
        crash_in("llama_decode")
        next(scorer.logprobs([([3, 4, 5], [6])]))
    next(scorer.generate([([3, 4, 5], 1)]))
    decode, calls = C.llama_decode, iter([False, True])
    C.llama_decode = lambda *arguments: die() if next(calls) else decode(*arguments)
    next(scorer.generate([([3, 4, 5], 4)]))
elif STEP == "check":
    with crash.step("testing"):
        GGML.ggml_abort(b"some.c", 7, b"GGML_ASSERT(%s) failed", b"1 == 2")
elif STEP == "memory":

    class InitParams(ctypes.Structure):
        _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    GGML.ggml_init.argtypes = [InitParams]
    with crash.step("testing"):
        GGML.ggml_init(InitParams(1 << 60, None, True))
elif STEP.startswith("signal "):
    with crash.step("testing"):
        getattr(ctypes.CDLL(None), "raise")(int(STEP.split()[1]))
elif STEP == "threads":
    # as the threads of a computation do it, all at the same time
    barrier = threading.Barrier(8)
    with crash.step("testing"):
        threads = [threading.Thread(target=lambda: (barrier.wait(), die())) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
elif STEP == "library":
    with crash.step("testing"):
        crash.load_library(lambda: getattr(ctypes.CDLL(None), "raise")(4))
elif STEP == "command":
    from lt_gguf.cli import main

    crash_in("llama_decode")
    sys.argv = ["lt-gguf", "run", FILE, "-p", "a secret prompt", "--threads", "1", "--ctx", "256"]
    main()
elif STEP == "unasked":
    die()
else:
    sys.exit(f"unknown step {STEP}")
sys.exit("nothing crashed")
