"""Has a conversation of a thousand turns with a tiny hybrid model and watches that memory stays flat and answers right.

    python scripts/checks/soak_chat.py [--turns N] [--streaming SPEC] [--seed N]

Each turn is a new message, an edit of an earlier one, the same question once more, a branch in the middle of an answer, a return to
a saved state, or a new conversation. Ends with an error if KV bytes change from turn to turn, if snapshots take more than their
limit, if the process grows by more than --tolerance in the second half of the turns, or if, every --every turns, the logits
differ from those of a fresh context that read the same prompts and decoded the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.native import C, Model, log
from tiny_model import N_VOCAB, write_tiny_model

from lt_gguf import Llama

STREAMING = "layers=1,3;sink=4;window=124;prefill=full"
N_CTX, N_BATCH, N_UBATCH = 4096, 256, 64
N_MESSAGE_LONG, N_ANSWER = 1500, 60  # most tokens
N_SAVED = 3  # states that are kept
LOGIT_TOLERANCE = 1e-3  # of logits of size 1, with keys and values in f32; where cells lie changes the order of sums
SETTINGS = dict(n_ctx=N_CTX, n_batch=N_BATCH, n_ubatch=N_UBATCH)
ACTIONS = {"message": 8, "edit": 4, "regenerate": 3, "branch": 2, "return": 1, "reset": 1}  # how often each is done


class SoakError(Exception):
    """What did not stay as it was, or was wrong."""


class Piece(NamedTuple):
    """Tokens that were read as one prompt, or decoded one by one."""

    is_prompt: bool
    tokens: list[int]


class History:
    """What a context holds and how it was fed: the model that `Llama` is compared with."""

    def __init__(self, pieces: list[Piece] | None = None):
        self.pieces = list(pieces or [])

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    def ask(self, prompt: list[int]) -> None:
        """The prompt is given; what it has in common with the context isn't read again."""
        held = self.tokens
        n = next((i for i, (a, b) in enumerate(zip(held, prompt)) if a != b), min(len(held), len(prompt)))
        kept: list[Piece] = []
        for piece in self.pieces:
            part = piece.tokens[: max(0, n - sum(len(k.tokens) for k in kept))]
            if part:
                kept.append(Piece(piece.is_prompt, part))
        if n < len(prompt):
            # a prompt that lost its end goes on
            is_cut = bool(kept) and kept[-1].is_prompt and len(kept[-1].tokens) < len(self.pieces[len(kept) - 1].tokens)
            begin = kept.pop().tokens if is_cut else []
            kept.append(Piece(True, begin + prompt[n:]))
        self.pieces = kept

    def decode(self, tokens: list[int]) -> None:
        if tokens:
            self.pieces.append(Piece(False, tokens))

    def copy(self) -> History:
        return History(self.pieces)


class Chat:
    """A conversation of random messages, and what a context that had it must hold."""

    def __init__(self, llm: Llama, seed: int):
        self.llm = llm
        self.random = random.Random(seed)
        self.history = History()
        self.asked: list[list[int]] = []  # the prompt of each turn of this conversation
        self.said: list[list[int]] = []  # and its answer
        self.saved: list[tuple[Any, History, list[list[int]], list[list[int]]]] = []
        self.done: Counter[str] = Counter()

    def turn(self) -> str:
        """Does one of the actions; returns its name."""
        action = self.random.choices(list(ACTIONS), list(ACTIONS.values()))[0]
        if not self.asked or len(self.conversation()) > N_CTX - N_MESSAGE_LONG - 2 * N_ANSWER:
            action = "reset"
        getattr(self, f"_{action}")()
        self.done[action] += 1
        if self.random.random() < 0.05:
            self.saved = self.saved[1 - N_SAVED :] + [(self.llm.save_state(), self.history.copy(), self.asked[:], self.said[:])]
        return action

    def conversation(self) -> list[int]:
        return self.asked[-1] + self.said[-1] if self.asked else []

    def _message(self) -> None:
        self._ask(self.conversation() + self._text())

    def _edit(self) -> None:
        """Changes a message, from somewhere in it on; what followed it is gone."""
        turn = self._go_back()
        before = self.conversation()
        message = turn[0][len(before) :]
        self._ask(before + message[: self.random.randrange(len(message))] + self._text())

    def _regenerate(self) -> None:
        """Asks again what the last message, or an earlier one, asked."""
        self._ask(self._go_back()[0])

    def _branch(self) -> None:
        """Goes on in the middle of an answer."""
        prompt, said = self._go_back()
        self._ask(prompt + said[: self.random.randrange(len(said))] + self._text())

    def _return(self) -> None:
        """Restores a saved state, of this conversation or of one before."""
        if self.saved:
            state, history, asked, said = self.random.choice(self.saved)
            self.llm.load_state(state)
            self.history, self.asked, self.said = history.copy(), asked[:], said[:]
        self._message()

    def _reset(self) -> None:
        self.asked, self.said = [], []
        if self.random.random() < 0.5:
            self.llm.reset()
            self.history = History()
        self._ask(self._text())

    def _go_back(self) -> tuple[list[int], list[int]]:
        """Removes a turn and those after it, mostly the last one; returns its prompt and answer."""
        n = max(0, len(self.asked) - 1 - int(self.random.expovariate(1)))
        turn = self.asked[n], self.said[n]
        del self.asked[n:], self.said[n:]
        return turn

    def _text(self) -> list[int]:
        n_most = N_MESSAGE_LONG if self.random.random() < 0.1 else 150
        return self.random.choices(range(3, N_VOCAB), k=self.random.randint(1, n_most))

    def _ask(self, prompt: list[int]) -> None:
        said = list(itertools.islice(self.llm.generate(prompt, temp=0), self.random.randint(1, N_ANSWER)))
        self.history.ask(prompt)
        self.history.decode(said[:-1])  # the last one has not been computed
        self.asked.append(prompt)
        self.said.append(said)


def check_answer(chat: Chat, model: Model) -> float:
    """Largest difference of the logits from those of a fresh context. Raises SoakError if it is too large."""
    held = chat.llm.input_ids[: chat.llm.n_tokens].tolist()
    if held != chat.history.tokens:
        raise SoakError(f"the context holds {len(held)} tokens, other ones than the {len(chat.history.tokens)} of the conversation")
    row = C.llama_get_logits_ith(chat.llm.ctx, -1)
    logits = np.ctypeslib.as_array(row, (N_VOCAB,)).copy()
    n_done = 0
    with model.context(**SETTINGS, kv="f32", n_threads=1) as fresh:
        for piece in chat.history.pieces:
            read = fresh.read_prompt if piece.is_prompt else fresh.decode_one_by_one
            if len(piece.tokens) == 1 and piece.is_prompt:
                fresh.prompt_begin(1)
            expected = read(piece.tokens, n_done)[-1]
            n_done += len(piece.tokens)
    difference = float(np.abs(logits - expected).max())
    if not difference <= LOGIT_TOLERANCE:
        raise SoakError(f"the logits after {n_done} tokens differ by {difference:.2e} from those of a fresh context")
    return difference


def soak(chat: Chat, model: Model, options: argparse.Namespace) -> None:
    """Raises SoakError if something isn't as it should be."""
    process = psutil.Process()
    kv_bytes = chat.llm.kv_bytes()
    baseline = largest_rss = largest_difference = 0.0
    largest_snapshots = n_checks = 0
    start = time.monotonic()
    for turn in track(range(1, options.turns + 1), "turns", console=Console(stderr=True)):
        action = chat.turn()
        where = f"turn {turn} ({action})"
        if (now := chat.llm.kv_bytes()) != kv_bytes and not chat.llm.auto:
            raise SoakError(f"{where}: KV bytes were {kv_bytes} and are {now}")
        n_bytes = chat.llm._snapshots.n_bytes
        largest_snapshots = max(largest_snapshots, n_bytes)
        if n_bytes > options.snapshot_limit:
            raise SoakError(f"{where}: snapshots take {n_bytes:,} bytes, the limit is {options.snapshot_limit:,}")
        if turn % options.every == 0 or turn == options.turns:
            try:
                largest_difference = max(largest_difference, check_answer(chat, model))
            except SoakError as error:
                raise SoakError(f"{where}: {error}") from None
            n_checks += 1
        rss = process.memory_info().rss / 2**20
        largest_rss = max(largest_rss, rss)
        if turn <= options.turns / 2:
            baseline = largest_rss
        if largest_rss > baseline + options.tolerance:
            raise SoakError(f"{where}: the process grew from {baseline:.1f} to {largest_rss:.1f} MiB")
    done = ", ".join(f"{chat.done[action]} x {action}" for action in ACTIONS)
    print(f"{options.turns:,} turns in {time.monotonic() - start:.0f} s: {done}")
    print(
        f"flat: process at most {baseline:.1f} MiB in the first half, {largest_rss:.1f} MiB in all; KV {kv_bytes['total']:,} bytes; snapshots {largest_snapshots:,} bytes at most, "
        f"limit {options.snapshot_limit:,}; {n_checks} comparisons with a fresh context, largest difference {largest_difference:.1e}; "
        f"{chat.llm.n_read:,} tokens read, {chat.llm.n_decoded:,} decoded"
    )


def keep_line(_level: int, text: bytes, _user_data: int | None) -> None:
    """Keeps the last lines of llama.cpp's log, from which errors are quoted, and shows none."""
    log.lines.append(text.decode(errors="replace").rstrip("\n"))
    if len(log.lines) > 1000:
        del log.lines[:500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--every", type=int, default=20, help="turns from one comparison with a fresh context to the next")
    parser.add_argument("--streaming", default=STREAMING, help="also auto:0.5;sink=4;window=124")
    parser.add_argument("--snapshot-limit", type=int, default=2**20, help="bytes")
    parser.add_argument(
        "--tolerance", type=float, default=8.0, help="MiB by which the process may grow in the second half of the turns"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet = C.llama_log_callback(keep_line)
    C.llama_log_set(quiet, None)
    with tempfile.TemporaryDirectory() as directory:
        path = write_tiny_model(Path(directory) / "tiny.gguf", n_layer=4)
        own = dict(snapshot_limit=options.snapshot_limit, type_k=0, type_v=0, n_threads=1, n_threads_batch=1, verbose=False)
        try:
            with closing(Llama(str(path), streaming=options.streaming, **SETTINGS, **own)) as llm, Model(path) as model:
                model.set_streaming(options.streaming.replace("auto:", "auto="))
                soak(Chat(llm, options.seed), model, options)
        except (RuntimeError, SoakError, ValueError) as error:
            sys.exit(f"soak_chat: error: {error}")


if __name__ == "__main__":
    main()
