"""A `llama_cpp.Llama` that reads as little as possible again when it goes back, and is never wrong about what it holds.

llama-cpp-python keeps the first `n_tokens` of `input_ids` in the context and cuts off what follows. Streaming layers can
only be cut a little: beyond that a snapshot of them is restored, and what follows it is read again, prompts as prompts and
decoded tokens as decoded ones. The answers are those of a fresh context that was fed the same way.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import sys
from collections.abc import Callable, Generator, Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from lt_gguf.runtime import api, crash
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.prompts import Piece, Prompts
from lt_gguf.runtime.saved import Saved, state_bytes
from lt_gguf.runtime.snapshots import DEFAULT_LIMIT, Snapshots
from lt_gguf.runtime.whole_prompt import WholePrompt
from lt_gguf.spec import AutoSpec, StreamingSpec, parse_running

_binding = load_llama_cpp()
_llama_cpp = _binding.llama_cpp
if TYPE_CHECKING:
    from llama_cpp import Llama as _Llama
else:
    _Llama = _binding.Llama
_GENERATE = inspect.signature(_binding.Llama.generate)

# Tokens that were decoded one by one are read again so many at once: each needs room for its logits.
_DECODED_AT_ONCE = 32

# Of the last prompt: before it, and at its end.
_N_SAVED_SNAPSHOTS = 2


class Role(Enum):
    """What the tokens are that `generate` gives to `eval`."""

    PROMPT = 1
    DRAFT = 2  # of which a draft model guessed all but the first


class RewindingLlama(_Llama):
    """`llama_cpp.Llama` with snapshots.

    Args:
        snapshot_limit: most bytes that the snapshots take together; the oldest go first. 0: none is kept.

    Attributes:
        n_read: number of tokens that have been computed since the model was loaded as part of a prompt, or once more.
        n_decoded: number of all others.
        auto: how the layers that stream are chosen for a conversation, `None` if they are fixed.
    """

    def __init__(self, model_path: str, *, snapshot_limit: int = DEFAULT_LIMIT, **kwargs: Any) -> None:
        self.n_read = 0
        self.n_decoded = 0
        self._snapshots = Snapshots(snapshot_limit)
        self._prompts = Prompts()
        self._role: Role | None = None
        # Number of tokens after which the logits in llama.cpp's last row are, None if it has no row.
        self._logits_at: int | None = None
        # An operation that hasn't ended may have changed the memory from this position on.
        self._broken_at: int | None = None
        # Tokens before this position have been computed since the memory was last cut.
        self._computed_to = 0
        self._reads_by_layer = False
        super().__init__(model_path, **kwargs)
        self._spec, self.auto = self._running_spec()
        self._reads_in_full = self._spec.prefill == "full" and (bool(self._spec.layers) or self.auto is not None)
        # A prompt that comes in one batch is read layer by layer. Made when the first one comes.
        self._whole: WholePrompt | None = None
        if self._reads_in_full and not self._logits_all and not self.context_params.embeddings:
            self._reads_by_layer = True

    @property
    def streaming(self) -> StreamingSpec | None:
        """Which layers stream in this context now, `None` if none does."""
        if self.auto is not None and self.ctx is not None:
            self._spec, _ = self._running_spec()
        return self._spec if self._spec.layers else None

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens that follow the first `n_tokens` of the context; others after those are removed.

        More than one token is a prompt, whatever `n_batch` is. Logits are computed for its last token, or for all if
        `logits_all` is set. Where streaming layers have dropped what the first `n_tokens` need, they go back to a
        snapshot and read what follows it again.

        If this ends with an exception, the context holds a part of the tokens (`n_tokens` says how many) or none.

        Raises:
            ValueError: a prompt doesn't fit the context or the prompt limit; none of the tokens has been read.
            RuntimeError: llama_decode failed.
        """
        self._eval(tokens)

    def _eval(self, tokens: Sequence[int], ends: bool = True, progress: Callable[[int, int, int], None] | None = None) -> None:
        """As `eval`; unless it `ends`, the prompt goes on. `progress`: tokens before a piece, all, and those of the piece that are read."""
        new = np.asarray(tokens, dtype=np.intc)
        if not len(new):
            return
        n_kept = self.n_tokens
        start = self._go_back(n_kept)
        self._prompts.truncate(n_kept)
        text = np.concatenate([self.input_ids[start:n_kept], new])
        is_prompt = self._role is Role.PROMPT or (len(new) > 1 and self._role is not Role.DRAFT)
        begun = self._prompts.open_begin
        for piece in self._pieces(start, n_kept, n_kept + len(new), is_prompt):
            part = text[piece.begin - start : piece.end - start].tolist()
            is_new = piece.end > n_kept
            report = None if progress is None else partial(progress, piece.begin - start, len(text))
            try:
                self._read(part, piece, is_new=is_new, ends=ends or not is_new, report=report)
            except ValueError:
                if begun is None or not ends or not self.reads_by_layer(n_kept + len(new) - begun):
                    raise
                # what was read ahead of a prompt leaves too little for its rest, so it is read anew, as a whole
                self._say(f"eval: all {n_kept + len(new) - begun} tokens of the prompt are read together")
                self.n_tokens = begun
                self._eval([*self.input_ids[begun:n_kept].tolist(), *new.tolist()], progress=progress)
                return

    def reads_by_layer(self, n_tokens: int) -> bool:
        """Whether a prompt of so many tokens is read layer by layer if it comes as a whole and is the only one, and fits the prompt
        limit then."""
        return self._reads_by_layer and api.fits_by_layer(self.ctx, 0, n_tokens)

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As `llama_cpp.Llama.generate`. What the context and the prompt have in common isn't read again; where the
        prompt is the one that was answered last, nothing is."""
        call = _GENERATE.bind(self, *args, **kwargs)
        if call.arguments.get("reset", True):
            call.arguments["tokens"] = self._reuse(list(call.arguments["tokens"]))
            call.arguments["reset"] = False
        generator = super().generate(*call.args[1:], **call.kwargs)
        role: Role | None = Role.PROMPT
        sent = None
        while True:
            self._role = role
            try:
                token = generator.send(sent)
            except StopIteration:
                return
            finally:
                self._role = None
            sent = yield token
            role = None if self.draft_model is None else Role.DRAFT

    def reset(self) -> None:
        super().reset()
        self._snapshots.clear()
        self._prompts.truncate(0)

    def close(self) -> None:
        # note: llama_cpp.Llama.__del__ calls it also where __init__ has refused an argument
        if "_stack" in self.__dict__:
            super().close()

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        if self.context_params.embeddings:  # else it raises an error and touches nothing
            self._begin_change(0)
        embeddings = super().embed(*args, **kwargs)
        self._broken_at = None
        return embeddings

    def save_state(self) -> Any:
        """As `llama_cpp.Llama.save_state`. The last snapshots go with it: what llama.cpp saves can't be cut at all."""
        n = self.n_tokens
        # note: llama_cpp's own makes three copies, and one of logits that nobody has computed
        data = state_bytes(self.ctx)
        scores = self._scores.copy() if self._logits_all else np.zeros((0, self._n_vocab), np.single)
        input_ids = self.input_ids.copy()
        state = _binding.LlamaState(input_ids, scores, n, data, len(data), self._seed)
        prompts = self._prompts.copy()
        prompts.truncate(n)
        streams = self.streaming is not None or self.auto is not None
        state.lt_gguf = Saved(prompts, self._snapshots.newest(n, _N_SAVED_SNAPSHOTS), self._broken_at, streams)
        return state

    def load_state(self, state: Any) -> None:
        """Restores what `save_state` returned.

        Raises:
            RuntimeError: llama.cpp doesn't take it.
            ValueError: it has more tokens than this context has room for, or lacks the logits of all tokens.
        """
        if state.n_tokens > self._n_ctx:
            raise ValueError(f"it has {state.n_tokens} tokens, more than the context's {self._n_ctx}")
        # the saved context may have had another size
        state = copy.copy(state)
        input_ids = np.zeros((self._n_ctx,), dtype=np.intc)
        input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        state.input_ids = input_ids
        scores = self.scores[: state.n_tokens]
        if state.scores.shape != scores.shape:
            if self._logits_all:
                raise ValueError("it lacks the logits of all tokens, which this context has with logits_all")
            state.scores = scores.copy()  # nobody reads them
        # note: a state that llama_cpp.Llama saved doesn't say what was a prompt
        unknown = Saved(Prompts([(0, state.n_tokens)] if state.n_tokens else []))
        kept: Saved = getattr(state, "lt_gguf", unknown)
        self._begin_change(0)
        self.n_tokens = 0
        self._prompts = kept.prompts.copy()
        super().load_state(state)
        for snapshot in kept.snapshots:
            self._snapshots.keep(snapshot)
        self._broken_at = kept.broken_at
        self._computed_to = self._n_ctx + 1  # what came before isn't known

    # ------------------------------------------------------------------------------------ going back

    def _reuse(self, tokens: list[int]) -> list[int]:
        """Sets `n_tokens` to what the context and the prompt have in common; returns what is left to be read."""
        n = self._n_common(tokens)
        if 0 < n == len(tokens):
            if self._logits_at == n == self.n_tokens or self._recall_logits(n):
                self.n_tokens = n
                self._say(f"generate: the logits after all {n} prompt tokens are there, nothing is read")
                return []
            n -= 1  # there must be a token to compute them from
        if n == 0:
            self.reset()
            return tokens
        self.n_tokens = n
        self._requires_eval = True
        self._say(f"generate: {n} prompt tokens are there, {len(tokens) - n} are read")
        return tokens[n:]

    def _n_common(self, tokens: Sequence[int]) -> int:
        """How many tokens the context and a text begin with in common."""
        shorter = min(self.n_tokens, len(tokens))
        differs = np.nonzero(self.input_ids[:shorter] != np.asarray(tokens[:shorter], dtype=np.intc))[0]
        return int(differs[0]) if len(differs) else shorter

    def _recall_logits(self, n: int) -> bool:
        """Goes back to the end of a prompt of which a snapshot is kept, and shows its logits to samplers."""
        snapshot = self._snapshots.at(n)
        if snapshot is None or snapshot.logits is None or self._logits_all:
            return False
        self._requires_eval = True
        if self._go_back(n) != n or (self._logits_at is None and not self._make_row(n)):
            return False
        row = _llama_cpp.llama_get_logits_ith(self.ctx, -1)
        if not row:
            return False
        ctypes.memmove(row, snapshot.logits.ctypes.data, snapshot.logits.nbytes)
        self._logits_at = n
        self._requires_eval = False
        return True

    def _make_row(self, n: int) -> bool:
        """Makes llama.cpp have a row of logits, which it lacks after a state was restored: by a token behind the `n` that are there,
        which is taken back. False if there is no room for it."""
        if not 0 < n < self._n_ctx:
            return False
        self._decode([int(self.input_ids[n - 1])], n, asks_all=True, asks_last=True)
        if self._ctx.kv_cache_seq_rm(-1, n, -1):
            self._broken_at = None
        return self._broken_at is None

    def _go_back(self, n: int) -> int:
        """Makes the memory hold the first `n` tokens of `input_ids`, or fewer; returns how many."""
        wanted = n
        # note: it holds fewer where reading them again was interrupted
        n = min(n, 1 + _llama_cpp.llama_memory_seq_pos_max(self._ctx.memory, 0))
        n = n if self._broken_at is None else min(n, self._broken_at)
        is_chosen_anew = False
        if self.auto is not None and n < self._computed_to:
            if self.streaming is None:
                # the layers are chosen by the last queries, of which those before n may have been overwritten
                n = max(0, n - self.auto.w_last)
            else:
                # the layers were chosen for a prompt that is about to become another one
                is_chosen_anew = 0 < n < self._prompts.first_end(self.auto.sink + self.auto.window)
        if not is_chosen_anew and self._ctx.kv_cache_seq_rm(-1, n, -1):
            self._broken_at = None
            self._computed_to = n
            self._snapshots.drop_after(n)
            return n
        snapshot = None if is_chosen_anew else self._snapshots.nearest(n)
        n = snapshot.n_tokens if snapshot else 0
        self._say(f"eval: can't cut to {wanted} tokens, going back to {n}")
        self._broken_at = n
        self._snapshots.drop_after(n)
        if snapshot is None or not (snapshot.restore(self.ctx) and self._ctx.kv_cache_seq_rm(-1, n, -1)):
            n = self._broken_at = 0
            self._snapshots.clear()
            self._ctx.kv_cache_clear()
        self._broken_at = None
        self._computed_to = n
        return n

    def _begin_change(self, begin: int) -> None:
        """The memory is about to change from position `begin` on."""
        self._requires_eval = True
        self._logits_at = None
        self._broken_at = begin
        self._snapshots.drop_after(begin)

    def _forget(self) -> None:
        """Empties the context."""
        self._begin_change(0)
        self.n_tokens = 0
        self._ctx.kv_cache_clear()
        self._broken_at = None

    # --------------------------------------------------------------------------------------- reading

    def _pieces(self, start: int, n_kept: int, end: int, is_prompt: bool) -> list[Piece]:
        """How the positions [start, end) are read, of which those before `n_kept` have been read before."""
        if not self._reads_in_full:
            # it makes no difference what is a prompt
            if is_prompt or start == n_kept:
                return [Piece(start, end, is_prompt)]
            return [Piece(start, n_kept, False), Piece(n_kept, end, False)]
        pieces = list(self._prompts.pieces(start, n_kept))
        if not self._prompts.is_open:
            return [*pieces, Piece(n_kept, end, is_prompt)]
        if not pieces:
            return [Piece(n_kept, end, is_prompt=True, continues=True)]
        return [*pieces[:-1], pieces[-1]._replace(end=end)]

    def _read(
        self, tokens: list[int], piece: Piece, is_new: bool, ends: bool = True, report: Callable[[int], None] | None = None
    ) -> None:
        """Computes the tokens of a piece, which follow what the memory holds. Unless it `ends`, a prompt stays open."""
        is_whole = self._reads_by_layer and piece.is_prompt and ends and not piece.continues and len(tokens) > self.n_batch
        if piece.is_prompt:
            if piece.begin > 0 and not piece.continues and not self._snapshots.at(piece.begin):
                self._take_snapshot(piece.begin)
            if self._reads_in_full:
                if self._reads_by_layer:
                    api.set_n_batch(self.ctx, self._n_ctx if is_whole else self.n_batch)
                # note: with the last token that is announced the prompt ends, so of an open one another is to come
                api.prompt_begin(self.ctx, 0, len(tokens) + (not ends))
            if is_new and self._reads_in_full:
                self._prompts.open(piece.begin)
        # what doesn't ask for all its logits is a prompt to the runtime
        is_decoded = self._reads_in_full and not piece.is_prompt
        n_batch = min(self.n_batch, _DECODED_AT_ONCE) if is_decoded and not self._logits_all else self.n_batch
        n_batch = len(tokens) if is_whole else n_batch
        for begin in range(0, len(tokens), n_batch):
            batch = tokens[begin : begin + n_batch]
            end = piece.begin + begin + len(batch)
            is_last = end == piece.end and ends
            doing = f"reading a prompt, {len(batch)} tokens" if piece.is_prompt or not is_new else "decoding"
            with crash.step(f"{doing} from position {piece.begin + begin} on, {self.model_path}"):
                if is_whole:
                    self._decode_whole(batch, piece.begin, report)
                else:
                    self._decode(batch, piece.begin + begin, asks_all=self._logits_all or is_decoded, asks_last=is_last)
            if piece.is_prompt or not is_new:
                self.n_read += len(batch)
            else:
                self.n_decoded += len(batch)
            if is_last and piece.is_prompt and is_new and self._reads_in_full:
                self._prompts.close(end)
            self.n_tokens = max(self.n_tokens, end)
            self._broken_at = None  # note: last, so that Ctrl-C in between makes this batch be read again
            if report is not None:
                report(begin + len(batch))
        # note: with prefill = full the streaming layers of an open prompt hold all of it, which is no small snapshot
        if piece.is_prompt and (ends or not self._reads_in_full):
            self._take_snapshot(piece.end, with_logits=ends)

    def _decode(self, tokens: list[int], begin: int, asks_all: bool, asks_last: bool) -> None:
        """One llama_decode; `_broken_at` stays set. Raises RuntimeError if it fails."""
        end = begin + len(tokens)
        self._batch.set_batch(batch=tokens, n_past=begin, logits_all=asks_all)
        self._batch.batch.logits[len(tokens) - 1] = asks_all or asks_last
        self._begin_change(begin)
        self._computed_to = end
        self._ctx.decode(self._batch)
        self.input_ids[begin:end] = tokens
        if self._logits_all:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(tokens), self._n_vocab))
            rows = self.scores[begin:end]  # note: too few where a draft model has set _logits_all without logits_all
            rows[:] = logits[: len(rows)]
        if asks_all or asks_last:
            self._logits_at = end
            self._requires_eval = False

    def _decode_whole(self, tokens: list[int], begin: int, report: Callable[[int], None] | None) -> None:
        """A whole prompt in one llama_decode, as `_decode`. Ctrl-C stops it, and then none of it is there."""
        if self._whole is None:
            self._whole = WholePrompt(self._n_ctx)
        self._begin_change(begin)
        self._computed_to = begin + len(tokens)
        self._whole.decode(self._ctx, tokens, begin, report)
        self.input_ids[begin : begin + len(tokens)] = tokens
        self._logits_at = begin + len(tokens)
        self._requires_eval = False

    def _take_snapshot(self, n_tokens: int, with_logits: bool = False) -> None:
        if self._snapshots.limit == 0 or self.streaming is None:
            return
        logits = None
        if with_logits and not self.context_params.embeddings:
            row = _llama_cpp.llama_get_logits_ith(self.ctx, -1)
            logits = np.ctypeslib.as_array(row, (self._n_vocab,)).copy() if row else None
        with crash.step(f"taking a snapshot of {n_tokens} tokens"):
            self._snapshots.take(self.ctx, n_tokens, logits)

    # ------------------------------------------------------------------------------------------ rest

    def _running_spec(self) -> tuple[StreamingSpec, AutoSpec | None]:
        return parse_running(api.context_spec(self.ctx), self._n_layer())

    def _n_layer(self) -> int:
        model = self._model.model
        n_layer = _llama_cpp.llama_model_n_layer(model) + _llama_cpp.llama_model_n_layer_nextn(model)
        return max(1, n_layer)  # note: with vocab_only no layer is read, and a spec has at least one

    def _say(self, line: str) -> None:
        if self.verbose:
            print(f"Llama.{line}", file=sys.stderr)
