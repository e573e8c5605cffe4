"""Kills the commands that write files at random moments, and fills the disk under them: is there ever half a file under its final name?

    python scripts/checks/faults.py [--kills N] [--seed S] [--only convert,quantize,flag,flag-in-place,train]

Each command runs once undisturbed, then `--kills` times until it is killed (SIGKILL, with all that it started), then once more to its
end in the same folder: what it writes must be there whole or not at all, and whole after that. Then as often with a limit on how much
a file may hold (as a full disk, which a test can't make): it must fail with one line, and leave nothing under a final name. Prints
what was tried and what was seen, and ends with an error at the first half file.
"""

from __future__ import annotations

import argparse
import json
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.small_gguf import write_small
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.gguf.file import read_model

COMMAND = [sys.executable, "-c", "from lt_gguf.cli import main; main()"]
TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
LARGE = 256 << 20  # bytes of the file that `flag` copies, most of them a hole
MEASURE = ["--samples", "4", "--calibration-length", "200", "--window", "40", "--sink", "4"]


class Fault(Exception):
    """Half a file, or a command that can't go on."""


@dataclass
class Case:
    """A command: what it finds, its arguments, and how what it has written is looked at."""

    name: str
    prepare: Callable[[Path], None]
    arguments: Callable[[Path], list[str]]
    final: str  # what it writes, in its folder
    look: Callable[[Path], object]  # raises if it isn't whole
    again: tuple[str, ...] = ()  # arguments to go on after a kill
    in_place: bool = False


def look_at_gguf(path: Path) -> object:
    model = read_model(path)
    return model.n_bytes, str(model.spec)


def look_at_checkpoint(path: Path) -> object:
    from transformers import AutoModelForCausalLM

    json.loads((path / "config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(path).num_parameters()


def write_conversations(path: Path) -> None:
    lines = []
    for n in range(40):
        said = [{"role": "user", "content": f"word{n} " * 30}, {"role": "assistant", "content": f"answer{n} " * 20}]
        lines.append(json.dumps({"messages": said}))
    path.write_text("\n".join(lines) + "\n")


def write_large(folder: Path) -> None:
    (path,) = write_small(folder / "old.gguf")
    os.truncate(path, LARGE)


def write_flagged(folder: Path) -> None:
    (path,) = write_small(folder / "plain.gguf")
    arguments = ["flag", str(path), str(folder / "old.gguf"), "--streaming-layers", "0"]
    subprocess.run([*COMMAND, *arguments], check=True, capture_output=True)  # by the command, so that only the layers change
    path.unlink()


def write_training(folder: Path) -> None:
    (folder / "model").mkdir()
    write_checkpoint(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    write_conversations(folder / "data.jsonl")


def cases(checkpoint: Path) -> list[Case]:
    def link(folder: Path) -> None:
        (folder / "model").symlink_to(checkpoint)

    def convert(*more: str) -> Callable[[Path], list[str]]:
        return lambda f: ["convert", str(f / "model"), "--outfile", str(f / "new.gguf"), *MEASURE, *more]

    def flagged(*more: str) -> Callable[[Path], list[str]]:
        return lambda f: ["flag", str(f / "old.gguf"), *more, "--streaming-layers", "1"]

    train = ["--streaming-layers", "1,3", "--select", "manual", "--steps", "60", "--save-every", "10", "--max-length", "200"]
    return [
        Case("convert", link, convert("--outtype", "f32"), "new.gguf", look_at_gguf, ("--overwrite",)),
        Case("quantize", link, convert("--outtype", "f32", "--quantize", "Q8_0"), "new.gguf", look_at_gguf, ("--overwrite",)),
        Case("flag", write_large, lambda f: [*flagged()(f), str(f / "new.gguf")], "new.gguf", look_at_gguf, ("--overwrite",)),
        Case("flag-in-place", write_flagged, flagged("--in-place"), "old.gguf", look_at_gguf, in_place=True),
        Case(
            "train",
            write_training,
            lambda f: ["train", str(f / "model"), str(f / "data.jsonl"), str(f / "new"), *train],
            "new",
            look_at_checkpoint,
            ("--resume",),
        ),
    ]


def start(folder: Path, arguments: list[str], **settings) -> subprocess.Popen:
    """The command, with a cache of its own in `folder`, so that nothing of other runs helps it and nothing is left elsewhere."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / ".cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*COMMAND, *arguments], env=environment, start_new_session=True, **pipes, **settings)


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
        folder.mkdir()
        self.case.prepare(folder)
        return folder

    def finish(self, folder: Path, more: tuple[str, ...]) -> None:
        process = start(folder, [*self.case.arguments(folder), *more])
        said, _ = process.communicate(timeout=600)
        if process.returncode:
            raise Fault(f"{self.case.name}: doesn't end well: {said[-800:]}")

    def look(self, folder: Path) -> bool:
        """Whether it is there; an error if it is there in part."""
        path = folder / self.case.final
        if not path.exists():
            return False
        try:
            seen = self.case.look(path)
        except Exception as error:
            raise Fault(f"{self.case.name}: half of {path.name}: {error}") from error
        if seen != self.whole and not self.case.in_place:
            raise Fault(f"{self.case.name}: {path.name} is {seen}, not {self.whole}")
        return True

    def kill(self, rng: random.Random) -> None:
        folder = self.folder()
        process = start(folder, self.case.arguments(folder))
        try:
            process.wait(timeout=rng.uniform(0, 1.05 * self.seconds))
            self.counts["had ended"] += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.counts["killed"] += 1
        process.stdout.close()
        there = self.look(folder)
        self.counts["whole file" if there else "no file"] += 1
        left = [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".cache"]
        self.counts["hidden leftovers"] += bool(left)
        # a training goes on only where it has begun to save
        resumes = "--resume" in self.case.again and not there and any(folder.glob("*new*"))
        if not (there and "--resume" in self.case.again):
            self.finish(folder, self.case.again if resumes or (there and "--overwrite" in self.case.again) else ())
            self.counts["went on" if resumes else "began anew"] += 1
        if not self.look(folder) or self.case.look(folder / self.case.final) != self.whole:
            raise Fault(f"{self.case.name}: not whole after it was run again")
        shutil.rmtree(folder)

    def fill(self, rng: random.Random) -> None:
        folder = self.folder()
        limit = int(self.size * rng.uniform(0, 0.95))
        process = start(
            folder, self.case.arguments(folder), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        said, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            raise Fault(f"{self.case.name}: ends well with at most {limit} bytes a file")
        last = said.strip().splitlines()[-1] if said.strip() else ""
        if "Traceback" in said or "error" not in last:
            raise Fault(f"{self.case.name}: with a full disk says {said[-600:]!r}")
        if self.look(folder) and not self.case.in_place:
            raise Fault(f"{self.case.name}: a file in spite of a full disk")
        self.counts["disk full, one line"] += 1
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of commands, with commas")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else None
    print("| command | seconds | what was seen |\n| --- | --: | --- |")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "tiny-llama").mkdir()
        checkpoint = place / "tiny-llama"
        write_checkpoint(checkpoint)
        for case in cases(checkpoint):
            if only is not None and case.name not in only:
                continue
            try:
                runner = Runner(case, place)
                rng = random.Random(f"{options.seed}-{case.name}")
                for _ in track(range(options.kills), case.name, console=Console(stderr=True)):
                    runner.kill(rng)
                    if not case.in_place:
                        runner.fill(rng)
            except Fault as fault:
                sys.exit(f"faults: {fault}")
            seen = ", ".join(f"{what} {n}" for what, n in sorted(runner.counts.items()) if n)
            print(f"| {case.name} | {runner.seconds:.1f} | {seen} |", flush=True)


if __name__ == "__main__":
    main()
