"""Measures what `lt-gguf flag` costs over copying the file with `cp`.

    python scripts/bench/flag.py [--size 4GiB] [--repeats 5] [--folder FOLDER] [--cold]

It makes a model file of that size and copies it with `cp` and with `flag` in turn, in processes of their own, several times;
which of them begins alternates. The copies are removed before the next run, and `sync` waits until the disk has nothing left
to do, outside of the measured time unless --sync is given. Without --cold the source is in the page cache as far as it fits
there; with it, the source is dropped from the cache before each run. It prints the times and the median of the ratios of
neighbouring runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from rich.console import Console
from rich.progress import track

from lt_gguf.memory.sizes import format_bytes, parse_size

GOAL = 1.2
N_LAYER = 32
BLOCK = 16 << 20
FLAG = [sys.executable, "-c", "from lt_gguf.cli import main; main()", "flag"]


def write_model(path: Path, size: int) -> None:
    """A Llama's metadata with a vocabulary of 128k, and tensors of `size` bytes of noise."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(131072)
    writer.add_embedding_length(4096)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_token_list([f"token {i}" for i in range(128_000)])
    writer.add_token_scores([0.0] * 128_000)
    noise = np.random.default_rng(0).integers(0, 256, BLOCK, dtype=np.uint8).view(np.int8)
    for i in range(max(1, size // BLOCK)):
        writer.add_tensor(f"blk.{i}.weight", noise)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(command: list[str], source: Path, copy: Path, is_cold: bool, with_sync: bool) -> float:
    """What it takes to make the file `copy`, which is removed then."""
    os.sync()
    with open(source, "rb") as file:
        if is_cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if with_sync:
        os.sync()
    took = time.perf_counter() - start
    copy.unlink()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=parse_size, default=4 << 30, help="of the model file, as in 4GiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="on the disk to measure")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each run")
    parser.add_argument("--sync", action="store_true", help="count the time until the copy is on the disk")
    options = parser.parse_args()

    options.folder.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * options.size, shutil.disk_usage(options.folder).free
    if free < needed:
        sys.exit(f"bench/flag: {options.folder} has {format_bytes(free)} free, {format_bytes(needed)} are needed")
    with tempfile.TemporaryDirectory(prefix="flag-", dir=options.folder) as scratch:
        source, copy = Path(scratch) / "model.gguf", Path(scratch) / "copy.gguf"
        write_model(source, options.size)
        commands = {
            "cp": ["cp", str(source), str(copy)],
            "flag": [*FLAG, str(source), str(copy), "--streaming-layers", "1,3,5-9"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for command in commands.values():  # warm up: the programs themselves, and the source where it is to be warm
            seconds(command, source, copy, options.cold, options.sync)
        for repeat in track(range(options.repeats), "Copying", console=Console(stderr=True)):
            for name in sorted(commands, reverse=bool(repeat % 2)):
                times[name].append(seconds(commands[name], source, copy, options.cold, options.sync))
        size = source.stat().st_size

    ratios = [flag / cp for cp, flag in zip(times["cp"], times["flag"])]
    ratio = statistics.median(ratios)
    cache = "dropped from the page cache before each run" if options.cold else "left in the page cache by the run before"
    end = "on the disk (sync)" if options.sync else "written, not necessarily on the disk"
    print(f"{format_bytes(size)}, source {cache}, time until the copy is {end}, {options.repeats} pairs of runs\n")
    print("| | median, s | range, s | GB/s |")
    print("| --- | --: | --: | --: |")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.2f} | {min(values):.2f} to {max(values):.2f} | {size / median / 1e9:.2f} |")
    verdict = "within" if ratio <= GOAL else "over"
    print(f"\nflag ÷ cp: median {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {verdict} the goal of {GOAL}")
    print("flag's time has the start of Python in it, which doesn't grow with the file")


if __name__ == "__main__":
    main()
