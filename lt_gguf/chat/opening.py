"""`open_documents`: a conversation about documents in one call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lt_gguf.chat.conversation import Conversation, Reading
from lt_gguf.documents import find_files, read_file
from lt_gguf.runtime.kept_states import KeptStates
from lt_gguf.runtime.state_store import StateStore

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama


def open_documents(
    llm: Llama,
    *paths: str | os.PathLike[str],
    system: str | None = None,
    n_predict: int = -1,
    temperature: float = 0.8,
    store: StateStore | None = None,
    progress: Reading | None = None,
) -> Conversation:
    """A conversation about documents, which are read now; from the disk, if they have been read before.

    Args:
        llm: the model; nobody else uses its context meanwhile.
        paths: files, patterns and folders, as `lt-gguf chat` takes them.
        system: what the model is told first.
        n_predict: most tokens of an answer; -1: no limit but the context.
        temperature: of sampling; 0: always the most likely token.
        store: where what was read is kept; `None`: in the user cache. `StateStore(limit=0)` keeps nothing.
        progress: called while they are read, with the tokens that have been read, and how many are to be.

    Raises:
        DocumentError: a path means no document, or one has no text.
        DoesNotFitError: they don't fit the context.
        OSError: a file can't be read.
    """
    conversation = Conversation(llm, system, n_predict, temperature, KeptStates(llm, StateStore() if store is None else store))
    documents = [read_file(path) for path in find_files([os.fspath(path) for path in paths])]
    if documents:
        conversation.attach(documents, progress)
    return conversation
