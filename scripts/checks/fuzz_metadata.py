"""Loads files with random streaming metadata, and specs with random text: never a crash, and both readers of it agree.

    python scripts/checks/fuzz_metadata.py [--cases N] [--seed S]

What the runtime (C++) accepts must be what `lt_gguf` (Python) accepts, and mean the same; what is refused must be refused
by a line that names the key. Cut, flipped and overwritten files must only not crash, and be refused in one line. Runs in child processes, so that a crash is
reported with the number of its case; scripts/checks/sanitizers.sh runs it on libraries that notice more than crashes.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.gguf_edit import TYPES, add_metadata, encode
from tiny_model import write_tiny_model

N_LAYER = 3
CASES_A_CHILD = 250
LARGEST_WEIGHT = 1e3
PREFIX = "llama.attention.streaming."
RIGHT = {
    "layers": ("array of bool", [False, True, True]),
    "sink": ("uint32", 2),
    "window": ("uint32", 9),
    "prefill": ("string", "stream"),
}
INTEGERS = [0, 1, 2, 3, 4, 255, 1020, 2**15, 2**31 - 33, 2**31 - 1, 2**31, 2**32 - 1, -1, -(2**31)]
TEXTS = ["stream", "full", "", "Stream", "off", " stream", "ß" * 40, "x" * 3000, "%s%n", "\n", '"']
ITEMS = ["layers", "sink", "window", "prefill", "=", ";", ",", "-", "all", "none", "off", " ", "0", "1", "2", "3", "-1", "99"]
ITEMS += [
    "999999999999999999999",
    "stream",
    "full",
    "1-2",
    "0,2",
    "layers=1",
    "window=5",
    "sink=0",
    "prefill=stream",
    "\t",
    "+1",
    "1e3",
    "é",
]


class Finding(Exception):
    """What a case showed that must not be."""


def random_value(rng: random.Random) -> tuple[str, object]:
    """A GGUF value of any type, its integers within the type."""
    type_ = rng.choice(list(TYPES))
    if rng.random() < 0.4:
        n = rng.choice([0, 1, N_LAYER - 1, N_LAYER, N_LAYER, N_LAYER + 1, 2000])
        return f"array of {type_}", [scalar(rng, type_) for _ in range(n)]
    return type_, scalar(rng, type_)


def scalar(rng: random.Random, type_: str) -> object:
    if type_ == "string":
        return rng.choice(TEXTS)
    if type_ == "bool":
        return rng.random() < 0.5
    if type_.startswith("float"):
        return rng.choice([0.0, 4.0, -1.5, float("nan"), float("inf")])
    bits = int(type_.lstrip("uint"))
    low, high = (0, 2**bits) if type_[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return rng.choice([n for n in INTEGERS if low <= n < high])


def random_metadata(rng: random.Random) -> dict[str, tuple[str, object]]:
    """The right keys, of which some are missing, of another type, or out of range."""
    keys = dict(RIGHT)
    for name in rng.sample(list(keys), rng.choice([1, 1, 1, 2, 3, 4])):
        how = rng.random()
        if how < 0.15:
            del keys[name]
        elif how < 0.6:
            keys[name] = (
                keys[name][0],
                scalar(rng, keys[name][0]) if name != "layers" else [rng.random() < 0.5] * rng.choice([0, 1, 2, 3, 4]),
            )
        else:
            keys[name] = random_value(rng)
    return keys


def file_case(rng: random.Random, plain: Path, path: Path) -> None:
    """A well-formed file: Python and the runtime agree on it."""
    from lt_gguf.gguf.file import read_model

    keys = random_metadata(rng)
    add_metadata(plain, path, [encode(PREFIX + name, *value) for name, value in keys.items()])
    try:
        expected, refusal = read_model(path).spec, None
    except ValueError as error:
        expected, refusal = None, str(error)
    spec, log = load(path)
    if (spec is None) != (refusal is not None):
        raise Finding(f"{keys}: Python says {refusal or expected}, the runtime says {spec or log}")
    if refusal is None and spec != str(expected or "off"):
        raise Finding(f"{keys}: Python reads {expected}, the runtime {spec}")
    if refusal is not None and not any(PREFIX + name in log for name in RIGHT):
        raise Finding(f"{keys}: refused by no line that names a key: {log}")


def damaged_case(rng: random.Random, plain: Path, path: Path) -> None:
    """Bytes of the keys overwritten, or the file cut: anything but a crash."""
    add_metadata(plain, path, [encode(PREFIX + name, *value) for name, value in RIGHT.items()])
    data = bytearray(path.read_bytes())
    first = data.index(PREFIX.encode()) - 8
    last = data.index(b"stream", data.index(f"{PREFIX}prefill".encode()) + 30) + 6
    if rng.random() < 0.3:
        del data[rng.randrange(first, last + 40) :]
    else:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(first, last)] = rng.choice([0, 1, 8, 9, 255, rng.randrange(256)])
    path.write_bytes(data)
    load(path)


def torn_case(rng: random.Random, plain: Path, path: Path) -> None:
    """A whole hybrid file with bytes flipped, overwritten or cut off anywhere, header and tensors: it is read, flagged and run, or
    each of them says in one line why not; a copy that isn't whole never has its name."""
    from lt_gguf.gguf.file import read_model
    from lt_gguf.gguf.flagging import flag
    from lt_gguf.spec import StreamingSpec

    add_metadata(plain, path, [encode(PREFIX + name, *value) for name, value in RIGHT.items()])
    data = bytearray(path.read_bytes())
    end = rng.choice([64, 2000, len(data)])  # most of a file is tensors, and most of what can be refused is at its beginning
    kind = rng.choice(["flip", "overwrite", "cut"])
    if kind == "cut":
        del data[rng.randrange(end) :]
    for _ in range(rng.choice([1, 1, 2, 8]) if kind == "flip" else 0):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    if kind == "overwrite":
        first = rng.randrange(end)
        data[first : first + 64] = rng.randbytes(min(64, len(data) - first))
    path.write_bytes(data)

    copy = path.with_name("copy.gguf")
    copy.unlink(missing_ok=True)
    for what in (lambda: read_model(path), lambda: flag(path, copy, StreamingSpec((1,), N_LAYER, 4, 20, "full"))):
        try:
            what()
        except ValueError as error:
            if not str(error).strip() or "\n" in str(error).strip():
                raise Finding(f"{kind}: refused by {str(error)!r}, which is not one line") from None
            if copy.exists():
                raise Finding(f"{kind}: refused, but {copy.name} is there") from None
    load(path, compute=has_sane_weights(path))


def text_case(rng: random.Random, model) -> None:
    """A spec as text: Python and the runtime agree on it."""
    from lt_gguf.spec import StreamingSpec

    text = "".join(rng.choice(ITEMS) for _ in range(rng.randrange(1, 9)))
    if rng.random() < 0.5:
        parts = [f"{rng.choice(['layers', 'sink', 'window', 'prefill'])}={rng.choice(ITEMS)}" for _ in range(rng.randrange(1, 5))]
        text = ";".join(parts)
    try:
        expected = str(StreamingSpec.parse(text, N_LAYER))
    except ValueError as error:
        expected, refusal = None, str(error)
    try:
        model.set_streaming(text)
        spec = model.streaming()
    except ValueError as error:
        spec, reason = None, str(error)
        if not reason.strip() or "\n" in reason.strip():
            raise Finding(f"{text!r}: refused by {reason!r}, which is not one line") from None
    finally:
        model.set_streaming(None)
    if spec != expected:
        raise Finding(f"{text!r}: Python says {expected or refusal}, the runtime says {spec or reason}")


def has_sane_weights(path: Path) -> bool:
    """Whether they are such as a model has. Of others come infinities, which llama.cpp asserts against where it was built with asserts."""
    import gguf
    import numpy as np

    try:
        tensors = gguf.GGUFReader(path).tensors
        return all(
            bool((np.abs(tensor.data.astype(np.float64)) < LARGEST_WEIGHT).all()) for tensor in tensors
        )  # of NaN that is false
    except Exception:  # whatever a torn file does to another reader
        return False


def load(path: Path, compute: bool = True) -> tuple[str | None, str]:
    """The spec that the runtime reads from a file (None: it refuses the file), and its log."""
    from support.native import Model, log

    start = log.mark()
    try:
        with Model(path) as model:
            spec = model.streaming()
            if compute and "prefill=full" not in spec:
                with model.context(n_ctx=256) as context:
                    context.decode([3, 4, 5])
            return spec, ""
    except ValueError:
        return None, " | ".join(log.since(start))


def run_cases(first: int, last: int, seed: int) -> None:
    """The cases of one child; prints the number of each before it begins."""
    from support.native import Model

    with tempfile.TemporaryDirectory() as directory:
        plain = write_tiny_model(Path(directory) / "plain.gguf", N_LAYER)
        path = Path(directory) / "case.gguf"
        with Model(plain) as model:
            for case in range(first, last):
                print(case, flush=True)
                rng = random.Random(f"{seed}-{case}")
                kind = rng.random()
                if kind < 0.4:
                    file_case(rng, plain, path)
                elif kind < 0.6:
                    damaged_case(rng, plain, path)
                elif kind < 0.8:
                    torn_case(rng, plain, path)
                else:
                    for _ in range(20):
                        text_case(rng, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to repeat one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    end = options.first + options.cases
    if options.child:
        try:
            run_cases(options.first, end, options.seed)
        except Finding as finding:
            sys.exit(f"fuzz_metadata: {finding}")
        return
    for first in range(options.first, end, CASES_A_CHILD):
        n = min(CASES_A_CHILD, end - first)
        arguments = ["--child", "--first", str(first), "--cases", str(n), "--seed", str(options.seed)]
        child = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
        if child.returncode:
            case = child.stdout.split()[-1] if child.stdout else first
            print(child.stderr[-4000:], file=sys.stderr)
            ended = f"was ended by signal {-child.returncode}" if child.returncode < 0 else "failed"
            sys.exit(f"fuzz_metadata: error: case {case} {ended}; repeat it with --seed {options.seed} --first {case} --cases 1")
        print(f"{first + n:,} cases", flush=True)
    print(f"fuzz_metadata: {options.cases:,} cases, no crash, no disagreement")


if __name__ == "__main__":
    main()
