"""`LlamaDiskCache`: llama-cpp-python's cache of prompts on disk, on the store that `lt-gguf chat` uses, too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lt_gguf.runtime.kept_states import KeptStates, stored_state
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.state_file import DamagedError
from lt_gguf.runtime.state_store import DEFAULT_LIMIT, StateStore

if TYPE_CHECKING:
    from llama_cpp.llama_cache import BaseLlamaCache as _Base

    from lt_gguf.runtime.reading_ahead import ReadingLlama
else:
    _Base = load_llama_cpp().llama_cache.BaseLlamaCache


class LlamaDiskCache(_Base):
    """As `llama_cpp.LlamaDiskCache`, for `Llama.set_cache`: what was read for one prompt isn't read again for another one that begins
    with it, in later processes, too.

    States are found by the model's bytes, the spec and the cache's types beside the tokens, so that models may share a folder.
    They have checksums, are written under another name and renamed, and aren't pickles: a folder that somebody else has written
    to runs no code. What can't be kept, for example because the disk is full, isn't, without an error.

    Args:
        cache_dir: the folder; `None`: the one that `lt-gguf chat` uses, in the user cache.
        capacity_bytes: most bytes that all states in the folder take; those go first that were used longest ago.
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None, capacity_bytes: int = DEFAULT_LIMIT) -> None:
        super().__init__(capacity_bytes)
        self.store = StateStore(cache_dir, capacity_bytes)
        self._kept: KeptStates | None = None

    @property
    def cache_size(self) -> int:
        """Bytes of all states in the folder."""
        return self.store.n_bytes

    def bound_to(self, llm: ReadingLlama) -> LlamaDiskCache:
        """The same folder for one model's contexts; `Llama.set_cache` calls it."""
        cache = LlamaDiskCache(self.store.folder, self.capacity_bytes)
        cache._kept = KeptStates(llm, cache.store)
        return cache

    def __getitem__(self, key: Sequence[int]) -> Any:
        """The state that spares most of reading these tokens. Raises KeyError: none does."""
        kept = self._for_a_model()
        while found := self.store.find(kept.identity, key):
            with ExitStack() as stack:
                try:
                    header, parts = stack.enter_context(self.store.opened(found[0]))
                    state = stored_state(header, parts, kept.llm.n_vocab())
                    state.llama_state = bytes(state.llama_state)
                    return state
                except (DamagedError, OSError):
                    continue
        raise KeyError("no state begins as these tokens do")

    def __contains__(self, key: Sequence[int]) -> bool:
        return self.store.find(self._for_a_model().identity, key) is not None

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        try:
            self._for_a_model().put(value)
        except OSError:
            return  # note: an answer that has been made isn't lost for that

    def _for_a_model(self) -> KeptStates:
        if self._kept is None:
            raise RuntimeError("LlamaDiskCache: belongs to no model yet, give it to Llama.set_cache first")
        return self._kept


def of(llm: ReadingLlama, cache: Any) -> Any:
    """The cache as `llm` uses it: bound to it if it is on disk, else as it is."""
    if isinstance(cache, LlamaDiskCache):
        return cache.bound_to(llm)
    if isinstance(cache, load_llama_cpp().LlamaDiskCache):
        # note: in the folder beside the data base that it has made there
        return LlamaDiskCache(Path(cache.cache.directory) / "states", cache.capacity_bytes).bound_to(llm)
    return cache
