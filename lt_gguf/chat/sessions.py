"""Conversations as files: what was said, and the documents' text, so that a session is whole where a document has gone."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lt_gguf.chat.conversation import Conversation
from lt_gguf.chat.turns import Turn
from lt_gguf.documents import Document

DATA_VARIABLE = "LT_GGUF_DATA"

_FORMAT = 1
_NAME = re.compile(r"[\w][\w .-]{0,63}")


class SessionError(ValueError):
    """A session can't be kept or taken up; one line."""


@dataclass(frozen=True)
class SessionInfo:
    """What a list of sessions shows.

    Args:
        name: its own.
        model: the name of the model's file.
        n_questions: how many were answered.
        documents: the names of the documents.
        saved_at: seconds since the epoch.
    """

    name: str
    model: str
    n_questions: int
    documents: tuple[str, ...]
    saved_at: float


def user_data() -> Path:
    """`$LT_GGUF_DATA`, else `$XDG_DATA_HOME/lt-gguf`, else `~/.local/share/lt-gguf`; it need not be there."""
    if own := os.environ.get(DATA_VARIABLE):
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share").resolve() / "lt-gguf"


class Sessions:
    """A folder of sessions, `None`: that of the user's data."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = user_data() / "sessions" if folder is None else Path(folder)

    def save(self, name: str, conversation: Conversation) -> Path:
        """Keeps a conversation in place of one of that name.

        Raises:
            SessionError: the name isn't one, or the file can't be written; then all is as it was.
        """
        path = self._path(name)
        said = {
            "format": _FORMAT,
            "model": _model_name(conversation),
            "system": conversation.system,
            "turns": [turn.to_json() for turn in conversation.turns],
            "pending": [document.to_json() for document in conversation.pending],
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, encoding="utf-8", prefix=".unfinished-", delete=False) as file:
                try:
                    json.dump(said, file, ensure_ascii=False)
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            raise SessionError(f"{path}: can't be written ({error.strerror or error})") from error
        return path

    def load(self, name: str, conversation: Conversation) -> str:
        """Makes a session the conversation. Returns a line if another model had it (else empty).

        Raises:
            SessionError: there is none of that name, or it is damaged; the conversation is as it was.
        """
        said = self._read(self._path(name), name)
        try:
            system = said["system"]
            turns = [Turn.from_json(turn) for turn in said["turns"]]
            pending = [Document.from_json(document) for document in said["pending"]]
            model = str(said["model"])
            if not (system is None or isinstance(system, str)):
                raise TypeError("the system prompt must be text")
        except (KeyError, TypeError, ValueError) as error:
            raise SessionError(f"{name}: is damaged ({type(error).__name__}: {error})") from None
        conversation.reset()
        conversation.system, conversation.turns, conversation.pending = system, turns, pending
        own = _model_name(conversation)
        if model == own:
            return ""
        return f"{name}: its answers are those of {model}; it goes on with {own}, which reads all anew"

    def listed(self) -> list[SessionInfo]:
        """All sessions, the last one first; damaged ones aren't among them."""
        found = []
        with suppress(OSError):
            for path in self.folder.glob("*.json"):
                with suppress(SessionError, OSError, KeyError, TypeError, ValueError):
                    said = self._read(path, path.stem)
                    documents = [d for turn in said["turns"] for d in turn["documents"]] + list(said["pending"])
                    names = tuple(str(document["name"]) for document in documents)
                    found.append(SessionInfo(path.stem, str(said["model"]), len(said["turns"]), names, path.stat().st_mtime))
        return sorted(found, key=lambda session: -session.saved_at)

    def new_name(self) -> str:
        """A name that no session has, by the time."""
        now = time.strftime("%Y-%m-%d %H.%M")
        names = {session.name for session in self.listed()}
        return next(name for i in range(1, 1000) if (name := now if i == 1 else f"{now} {i}") not in names)

    def exists(self, name: str) -> bool:
        """Raises SessionError: the name isn't one."""
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name != name.strip():
            raise SessionError(
                f"\"{name}\": can't be a session's name: must be letters, digits, spaces, dots and dashes, at most 64"
            )
        return self.folder / f"{name}.json"

    def _read(self, path: Path, name: str) -> dict[str, Any]:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SessionError(f"{name}: there is no session of that name (/sessions lists them)") from None
        except OSError as error:
            raise SessionError(f"{path}: can't be read ({error.strerror or error})") from None
        except ValueError:
            raise SessionError(f"{name}: is damaged, {path} is no JSON") from None
        if not isinstance(said, dict) or said.get("format") != _FORMAT:
            raise SessionError(f"{name}: is of another version of lt-gguf, or no session")
        return said


def _model_name(conversation: Conversation) -> str:
    return Path(conversation.llm.model_path).name
