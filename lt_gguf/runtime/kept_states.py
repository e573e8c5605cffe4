"""A `Llama` and the store of saved states: what its context holds is kept, and restored where a prompt begins with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lt_gguf.gguf.fingerprint import content_hash
from lt_gguf.models.package import user_cache
from lt_gguf.runtime import api
from lt_gguf.runtime.library import BINDING_VERSION, load_llama_cpp
from lt_gguf.runtime.prompts import Prompts
from lt_gguf.runtime.saved import Saved
from lt_gguf.runtime.snapshots import Snapshot
from lt_gguf.runtime.state_file import DamagedError, StateHeader
from lt_gguf.runtime.state_store import TOKENS, Entry, StateStore

if TYPE_CHECKING:
    from lt_gguf.runtime.reading_ahead import ReadingLlama

_binding = load_llama_cpp()

_FORMAT = 1  # counted up when what a state holds changes
# Of a context: what decides what its cache holds, beside the model, the spec and the tokens.
_PARAMETERS = (
    "type_k", "type_v", "flash_attn_type", "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
    "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip


def identity(llm: ReadingLlama) -> str:
    """64 hex digits that are the same for contexts that may share states: of the same model (its bytes, not its name), with the
    same spec, types of the cache, rotation and adapter, on the same release of llama.cpp.

    Raises:
        OSError: the model's file can't be read.
    """
    parameters = llm.context_params
    metadata = llm.metadata
    # note: some models rotate otherwise in a context that is longer than the first one they were trained with
    original = int(metadata.get(f"{metadata.get('general.architecture')}.rope.scaling.original_context_length", 0))
    hashes = user_cache() / "hashes"
    adapter = [content_hash(llm.lora_path, hashes), llm.lora_scale] if llm.lora_path else None
    said = {
        "format": [_FORMAT, BINDING_VERSION],
        "model": content_hash(llm.model_path, hashes),
        "spec": api.model_spec(llm._model.model),  # without the layers that a prompt chose
        "parameters": [float(getattr(parameters, name)) for name in _PARAMETERS],
        "long": 0 < original < llm.n_ctx(),
        "adapter": adapter,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class KeptStates:
    """What one `Llama` keeps in a store.

    Args:
        llm: whose states they are.
        store: where they are.
    """

    def __init__(self, llm: ReadingLlama, store: StateStore) -> None:
        self.llm = llm
        self.store = store
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        # note: hashing a model of gigabytes takes seconds the first time, so it is done when it is asked for
        if self._identity is None:
            self._identity = identity(self.llm)
        return self._identity

    def find(self, tokens: Sequence[int]) -> tuple[Entry, int] | None:
        """The state that spares most of a prompt, if that is more than the context itself does; and how many tokens."""
        if self.store.limit == 0:
            return None
        found = self.store.find(self.identity, tokens)
        return found if found and found[1] > self.llm.n_reusable(tokens) else None

    def restore(self, tokens: Sequence[int]) -> int:
        """Brings back the state that spares most of a prompt. Returns how many of its tokens needn't be read, that the context
        itself would have had to read; 0 if there is none, or it turns out to be damaged or foreign."""
        while found := self.find(tokens):
            entry, n = found
            before = self.llm.n_reusable(tokens)
            try:
                self.load(entry)
                return n - before
            except (DamagedError, OSError):  # noticed, and removed or not there: there may be another one
                continue
            except RuntimeError as error:
                self.store.drop(entry.path, f"{entry.path.name}: {error}")
        return 0

    def load(self, entry: Entry) -> None:
        """Raises DamagedError, OSError; RuntimeError: this context doesn't take it, and is empty now."""
        with self.store.opened(entry) as (header, parts):
            self.llm.load_state(stored_state(header, parts, self.llm.n_vocab()))

    def keep(self, label: str = "", say: Callable[[str], None] = lambda _: None) -> bool:
        """Keeps what the context holds now; false if it can't be, and `say` gets one line with the reason.

        Args:
            label: what a person calls it.
        """
        if self.store.limit == 0 or self.llm.n_tokens == 0:
            return False
        try:
            state = self.llm.save_state()
            if self.put(state, label):
                return True
            reason = f"it is larger than the limit of the cache ({self.store.limit / 2**20:.0f} MiB, --cache-limit)"
        except OSError as error:
            reason = f"{self.store.folder}: {error.strerror or error}"
        except MemoryError:
            reason = "there isn't enough memory to copy it"
        say(f"not kept on disk: {reason}")
        return False

    def put(self, state: Any, label: str = "") -> bool:
        """Keeps what `Llama.save_state` returned; false if it is larger than the limit. Raises OSError."""
        tokens = np.ascontiguousarray(state.input_ids[: state.n_tokens], np.int32)
        saved: Saved = state.lt_gguf
        parts: dict[str, Any] = {"state": state.llama_state}
        for i, snapshot in enumerate(saved.snapshots):
            parts[f"snapshot {i}"] = snapshot.state
            if snapshot.logits is not None:
                parts[f"logits {i}"] = np.ascontiguousarray(snapshot.logits)
        fields = {
            "model": Path(self.llm.model_path).name,
            "label": label,
            "streams": saved.streams,
            "cuts": [snapshot.n_tokens for snapshot in saved.snapshots],
            "prompts": saved.prompts.spans,
            "broken_at": saved.broken_at,
            "seed": state.seed,
        }
        return self.store.put(self.identity, tokens.tolist(), fields, parts)


def stored_state(header: StateHeader, parts: dict[str, memoryview], n_vocab: int) -> Any:
    """The `LlamaState` of an opened file. Its bytes are the file's, where they are: it is loaded before that is closed.

    Raises:
        DamagedError: the header isn't one of a state.
    """
    fields = header.fields
    try:
        tokens = np.frombuffer(parts[TOKENS], np.int32).astype(np.intc)
        spans = [(int(begin), None if end is None else int(end)) for begin, end in fields["prompts"]]
        snapshots = []
        for i, n_tokens in enumerate(fields["cuts"]):
            logits = parts.get(f"logits {i}")
            array = None if logits is None else np.frombuffer(logits, np.float32).copy()
            snapshots.append(Snapshot(int(n_tokens), bytearray(parts[f"snapshot {i}"]), array))
        broken_at = fields["broken_at"]
        saved = Saved(Prompts(spans), snapshots, None if broken_at is None else int(broken_at), bool(fields["streams"]))
        seed = int(fields["seed"])
        data = parts["state"]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"its header lacks what a state needs ({error})") from None
    scores = np.zeros((0, n_vocab), np.float32)  # nobody reads them
    state = _binding.LlamaState(
        input_ids=tokens, scores=scores, n_tokens=len(tokens), llama_state=data, llama_state_size=data.nbytes, seed=seed
    )
    state.lt_gguf = saved
    return state
