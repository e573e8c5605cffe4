"""A tiny random model that reads images (Qwen2-VL, whose RoPE has positions of three kinds), and conversations with them.

All tokens of an image have the same position in time, and that is the position that sinks and window count; what tells them
apart are row and column. An image takes as many positions as its longer side has tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from support.families import COMMON, randomize
from support.native import C, Context, DecodeError, Model, Token
from support.oracle import difference, random_tokens
from support.tiny_checkpoint import write_tokenizer

from lt_gguf.conversion import convert
from lt_gguf.spec import StreamingSpec

OPEN = 2**31 - 1  # the end of a prompt that is being read
N_EMBD = COMMON["hidden_size"]
SECTIONS = [4, 6, 6]  # pairs of a head's dimensions that turn with time, row and column


class ImageModel:
    """The model in transformers and, written by our converter, in the runtime."""

    def __init__(self, directory: Path, n_layer: int = 4) -> None:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTIONS}
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": N_EMBD, "num_heads": 2}
        # note: the pinned llama.cpp doesn't read this family's epsilon and takes 0
        text = COMMON | {"num_hidden_layers": n_layer, "rope_parameters": rope, "rms_norm_eps": 1e-12}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        torch.manual_seed(23)
        self.hf = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
        randomize(self.hf, mlp_gain=0.8)
        checkpoint = directory / "hf"
        checkpoint.mkdir()
        self.hf.save_pretrained(checkpoint)
        write_tokenizer(checkpoint)
        options = {"outtype": "f32", "select": "interleave-odd", "sink": 4, "window": 60}
        self.native = Model(convert(checkpoint, directory / "model.gguf", **options).files[0])

    def context(self, spec: StreamingSpec | None, **settings) -> Context:
        self.native.set_streaming("off" if spec is None else str(spec))
        try:
            return self.native.context(**settings)
        finally:
            self.native.set_streaming(None)

    def embeddings(self, tokens: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            return self.hf.get_input_embeddings()(torch.tensor(list(tokens))).numpy()

    def expected(self, embeddings: np.ndarray, positions: np.ndarray, streaming: np.ndarray, layers: Sequence[int]) -> np.ndarray:
        """transformers' logits in float32, (n, n_vocab), where the layers see what `streaming` says and the others all before.

        Args:
            embeddings: float32 (n, n_embd).
            positions: int (3, n): time, row, column.
            streaming: bool (n, n), whether a query sees a key.
        """
        causal = np.tri(len(embeddings), dtype=bool)
        full, hybrid = (torch.where(torch.from_numpy(mask), 0.0, -torch.inf)[None, None] for mask in (causal, causal & streaming))
        text = self.hf.model.language_model

        def give_mask(module, _arguments, keywords):
            return _arguments, keywords | {"attention_mask": hybrid if module.layer_idx in layers else full}

        hooks = [layer.self_attn.register_forward_pre_hook(give_mask, with_kwargs=True) for layer in text.layers]
        try:
            with torch.no_grad():
                hidden = text(
                    inputs_embeds=torch.from_numpy(embeddings)[None],
                    position_ids=torch.from_numpy(positions)[:, None],
                    attention_mask={"full_attention": full},
                    use_cache=False,
                )
                return self.hf.lm_head(hidden.last_hidden_state)[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()


def grid(begin: int, height: int, width: int) -> np.ndarray:
    """The positions of an image's tokens, as llama.cpp's mtmd gives them, int (3, height * width): time, row, column."""
    row, column = np.divmod(np.arange(height * width), width)
    return np.stack([np.full(height * width, begin), begin + row, begin + column])


class ImageChat:
    """One sequence of a context: what was fed to it, and the logits that came back."""

    def __init__(self, model: ImageModel, spec: StreamingSpec | None, context: Context, seq: int = 0) -> None:
        self.model, self.spec, self.context, self.seq = model, spec, context, seq
        self.embeddings = np.zeros((0, N_EMBD), np.float32)
        self.positions = np.zeros((3, 0), np.int64)
        self.tokens: list[int] = []  # -1 for those of images
        self.next = 0  # position
        self.prompts: list[tuple[int, int]] = []  # positions
        self.rows: dict[int, np.ndarray] = {}  # token -> logits
        self._random = np.random.default_rng([seq, 23])

    def __len__(self) -> int:
        return len(self.embeddings)

    def text(self, n: int, *, end: bool = False) -> None:
        """Reads `n` tokens of a prompt; with `end` it is its end."""
        self._open()
        tokens = random_tokens(n, self._random)
        logits = [(i == n - 1 and end) or (i > 0 and i < n - 1) for i in range(n)]
        first, begin = len(self), self.next
        self._add_text(tokens)
        batch = [Token(int(t), begin + i, (self.seq,), wanted) for i, (t, wanted) in enumerate(zip(tokens, logits))]
        self._record(first, logits, self.context.decode_batch(batch))
        if end:
            self.prompts[-1] = self.prompts[-1][0], self.next

    def image(self, height: int, width: int, n_batch: int | None = None) -> None:
        """Reads an image of so many tokens, in batches of `n_batch`. It asks for most of its logits, but not for the last one."""
        self._open()
        n, first, begin = height * width, len(self), self.next
        embeddings = self._random.normal(size=(n, N_EMBD)).astype(np.float32)
        positions = grid(begin, height, width)
        self._add(embeddings, positions, begin + max(height, width), [-1] * n)
        for i in range(0, n, n_batch or n):
            part = slice(i, min(n, i + (n_batch or n)))
            logits = [j % 3 == 0 and j > i and j < part.stop - 1 for j in range(i, part.stop)]
            rows = decode_embeddings(self.context, embeddings[part], positions[:, part], logits, self.seq)
            self._record(first + i, logits, rows)

    def decode(self, n: int, together: int = 1) -> None:
        for done in range(0, n, together):
            size = min(together, n - done)
            tokens = random_tokens(size, self._random)
            first, begin = len(self), self.next
            self._add_text(tokens)
            self._record(first, [True] * size, self.context.decode(tokens, begin, self.seq))

    def forget(self, n: int) -> None:
        """All but the first `n` tokens."""
        self.next = int(self.positions[0, n])
        self.tokens, self.embeddings, self.positions = self.tokens[:n], self.embeddings[:n], self.positions[:, :n]
        self.rows = {i: row for i, row in self.rows.items() if i < n}
        self.prompts = [(b, e if e <= self.next else OPEN) for b, e in self.prompts if b < self.next]

    def difference(self) -> float:
        """The largest difference of a logit to transformers."""
        expected = self.model.expected(self.embeddings, self.positions, self.visible(), self.spec.layers if self.spec else ())
        return difference(np.stack(list(self.rows.values())), expected[list(self.rows)])

    def visible(self) -> np.ndarray:
        """The rule of section 4, by the positions in time: bool (queries, keys). Who comes later isn't asked here."""
        time = self.positions[0]
        if self.spec is None:
            return np.ones((len(time), len(time)), bool)
        first = time - self.spec.window + 1
        if self.spec.prefill == "full":
            for begin, end in self.prompts:
                first = np.where((time >= begin) & (time < end), begin - self.spec.window, first)
        return (time[None] < self.spec.sink) | (time[None] >= first[:, None])

    def _open(self) -> None:
        if not self.prompts or self.prompts[-1][1] != OPEN:
            self.prompts.append((self.next, OPEN))

    def _add_text(self, tokens: np.ndarray) -> None:
        end = self.next + len(tokens)
        self._add(self.model.embeddings(tokens), np.tile(np.arange(self.next, end), (3, 1)), end, tokens.tolist())

    def _add(self, embeddings: np.ndarray, positions: np.ndarray, end: int, tokens: list[int]) -> None:
        self.tokens += tokens
        self.embeddings = np.concatenate([self.embeddings, embeddings])
        self.positions = np.concatenate([self.positions, positions], axis=1)
        self.next = end

    def _record(self, first: int, logits: Sequence[bool], rows: np.ndarray) -> None:
        wanted = [first + i for i, asked in enumerate(logits) if asked]
        self.rows |= dict(zip(wanted, rows, strict=True))


def decode_embeddings(
    context: Context, embeddings: np.ndarray, positions: np.ndarray, logits: Sequence[bool], seq: int = 0
) -> np.ndarray:
    """Decodes an image, or a part of it, in one batch: float32 (number of tokens with logits, n_vocab)."""
    n = len(embeddings)
    batch = C.llama_batch_init(n, embeddings.shape[1], 1)
    room = ctypes.cast(batch.pos, ctypes.c_void_p).value  # note: for positions of one kind only
    four = np.concatenate([positions, np.zeros((1, n))]).astype(np.int32).ravel()
    try:
        batch.n_tokens = n
        ctypes.memmove(batch.embd, np.ascontiguousarray(embeddings, np.float32).ctypes.data, 4 * embeddings.size)
        batch.pos = four.ctypes.data_as(ctypes.POINTER(C.llama_pos))
        for i in range(n):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, seq, logits[i]
        if code := C.llama_decode(context.handle, batch):
            raise DecodeError(code)
        rows = [context._logits(i) for i in range(n) if logits[i]]
    finally:
        batch.pos = ctypes.cast(room, ctypes.POINTER(C.llama_pos))
        C.llama_batch_free(batch)
    return np.stack(rows) if rows else np.empty((0, context.model.n_vocab), np.float32)
