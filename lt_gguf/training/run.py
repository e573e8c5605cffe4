"""The folder of a training that runs: what it was begun with, and Trainer's checkpoints to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lt_gguf.spec.in_config import read_spec, write_spec
from lt_gguf.training.layers import Chosen

_FILE = "run.json"


class Run:
    """A training's folder, which is there from the choice of the layers until the finished checkpoint is written.

    Args:
        folder: is made by `begin`.
        asked: what must be the same when a training goes on; JSON.
        resume: whether one is to go on. If none was begun, a new one begins.
        is_main: whether this process is the one that writes, of several.

    Raises:
        ValueError: the folder holds a training and none is to go on, or one with other settings.
        OSError: the folder can't be read.
    """

    def __init__(self, folder: Path, asked: dict[str, Any], resume: bool, is_main: bool) -> None:
        self.folder, self.is_main = folder, is_main
        self.losses: dict[str, float] = {}  # held-out ones before the first step
        self._asked = asked
        self._content: dict[str, Any] = {}
        file = folder / _FILE
        if not file.is_file():
            return
        if not resume:
            raise ValueError(f"{folder}: holds a training that was interrupted: use --resume to go on with it, or remove it")
        content = json.loads(file.read_text(encoding="utf-8"))
        different = [key for key in {**asked, **content["asked"]} if asked.get(key) != content["asked"].get(key)]
        if different:
            raise ValueError(
                f"{folder}: the training in it was begun with another {different[0].replace('_', '-')}, must be the same to "
                "go on; else remove the folder"
            )
        self._content, self.losses = content, content["losses"]

    @property
    def is_begun(self) -> bool:
        return bool(self._content)

    def begin(self, chosen: Chosen) -> None:
        """Writes down which layers were chosen."""
        config = SimpleNamespace()
        write_spec(config, chosen.spec, chosen.provenance)
        self._content = {
            "asked": self._asked,
            "n_layer": chosen.spec.n_layer,
            "config": vars(config),
            "reason": chosen.reason,
            "losses": {},
        }
        self.save()

    def chosen(self) -> Chosen:
        """What `begin` was given, in this process or in an earlier one."""
        found = read_spec(self._content["config"], self._content["n_layer"])
        assert found is not None
        return Chosen(*found, self._content["reason"])

    def save(self) -> None:
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f".{_FILE}"
            unfinished.write_text(json.dumps(self._content | {"losses": self.losses}), encoding="utf-8")
            unfinished.replace(self.folder / _FILE)

    def last_checkpoint(self) -> Path | None:
        """The last one that is complete: the file that is looked for is the last that Trainer writes."""
        steps = [
            int(path.name.removeprefix("checkpoint-"))
            for path in self.folder.glob("checkpoint-[0-9]*")
            if (path / "trainer_state.json").is_file()
        ]
        return self.folder / f"checkpoint-{max(steps)}" if steps else None

    def remove(self) -> None:
        shutil.rmtree(self.folder)
