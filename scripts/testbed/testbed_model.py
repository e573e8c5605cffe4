"""The testbed model before training: its tokenizer, its shape, its first weights; and how it is written when it is done."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import testbed_data as data
import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

VOCAB_SIZE = 1536
BOS, UNK = "<s>", "<unk>"
MAX_LENGTH = 4096
ROPE_BASE = 10_000_000.0  # so large that half of the rotary pairs hardly turn over the whole context
MATCHING_LAYERS = (3, 7)  # the heads that look things up begin here

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(path: Path, texts: list[str], seed: int) -> None:
    """Train the SentencePiece model `path` (BPE with byte fallback) on a sample of the training documents."""
    rng = np.random.default_rng((seed, 0))
    shares = {"map": 1, "repeat": 1, "puzzles": 4, "chat": 1, "story": 1, "python": 4}
    sample = []
    for _ in range(6000):
        text = "".join(text for text, _ in data.document(rng, 600, texts, shares))
        for symbol in (data.USER, data.ASSISTANT, data.END):
            text = text.replace(symbol, "\n")
        sample += [line for line in text.split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # a prefix space would differ between tokenizers
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=data.END,
        control_symbols=[data.USER, data.ASSISTANT],
        num_threads=1,
        minloglevel=2,
    )
    partial = path.with_suffix(".partial")
    partial.write_bytes(with_first_digits(model.getvalue()))
    os.replace(partial, path)


def with_first_digits(model: bytes) -> bytes:
    """The same tokenizer with the pieces `▁0` to `▁9` in place of the ten latest merges.

    SentencePiece splits digits from the space before them, too. A lone space would stand between a number and the words that say
    which number it is.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    merges = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    first = max(piece.score for piece in merges)
    for digit, piece in enumerate(sorted(merges, key=lambda piece: piece.score)[:10]):
        piece.piece, piece.score = f"▁{digit}", first
    return proto.SerializeToString()


def hf_tokenizer(model_file: Path) -> LlamaTokenizer:
    """The same tokenizer for transformers, with the chat template."""
    return LlamaTokenizer.from_pretrained(
        str(model_file.parent),
        unk_token=UNK,
        bos_token=BOS,
        eos_token=data.END,
        add_bos_token=True,
        add_eos_token=False,
        add_prefix_space=False,
        legacy=False,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"user_token": data.USER, "assistant_token": data.ASSISTANT},
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
    )


class RowMaker:
    """Turns documents into rows of token ids with a loss weight a token."""

    def __init__(self, tokenizer_file: Path, texts: list[str]):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
        self.texts = texts
        self.bos = self.sp.bos_id()
        self.control = {symbol: self.sp.piece_to_id(symbol) for symbol in (data.USER, data.ASSISTANT, data.END)}

    def encode(self, segments: data.Segments) -> tuple[list[int], list[float]]:
        """Token ids and weights of a document, without BOS; control symbols in the text become their tokens."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in segments:
            for part in _split_control(text):
                new = [self.control[part]] if part in self.control else self.sp.encode(part)
                ids += new
                weights += [weight] * len(new)
        return ids, weights

    def row(self, rng: np.random.Generator, length: int, shares: dict[str, float]) -> tuple[list[int], list[float]]:
        """One row: BOS, then documents until it is full. A document that doesn't fit is made again, shorter,
        because its questions stand at its end."""
        ids, weights = [self.bos], [0.0]
        n_chars = int(3.3 * length * (1 if rng.random() < 0.6 else rng.uniform(0.2, 0.8)))
        while len(ids) < length:
            new_ids, new_weights = self.encode(data.document(rng, n_chars, self.texts, shares))
            room = length - len(ids)
            if len(new_ids) > room and n_chars > 150:
                n_chars = int(n_chars * 0.8)
                continue
            ids += new_ids[:room]
            weights += new_weights[:room]
            if len(ids) < length:
                separator = self.sp.encode("\n\n")[: length - len(ids)]
                ids += separator
                weights += [1.0] * len(separator)
        return ids, weights

    def batch(self, rng: np.random.Generator, n_rows: int, length: int, shares: dict[str, float]):
        """`(ids, weights)`, each of shape (n_rows, length)."""
        rows = [self.row(rng, length, shares) for _ in range(n_rows)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def _split_control(text: str) -> Iterator[str]:
    while text:
        found = [(text.find(symbol), symbol) for symbol in (data.USER, data.ASSISTANT, data.END) if symbol in text]
        if not found:
            yield text
            return
        at, symbol = min(found)
        if at:
            yield text[:at]
        yield symbol
        text = text[at + len(symbol) :]


# ----------------------------------------------------------------------------------------------- model


def make_model(bos: int, eos: int) -> LlamaForCausalLM:
    """Hidden and feed-forward sizes are multiples of 256 so that every k-quant works; heads are 64 wide."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        bos_token_id=bos,
        eos_token_id=eos,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    start_with_induction(model)
    return model


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Random weights, except that some heads start near the two-step circuit that looks things up.

    An induction head (Olsson et al., arXiv 2209.11895) needs heads that bring the identity of previous tokens along
    and a later head that matches the current tokens with them. From purely random weights a CPU doesn't get there in
    hours. Here the four heads of layer 0 look one, two, three and four positions back, and in `MATCHING_LAYERS` the heads
    of one KV head match the last two tokens and those of the other the last four with the tokens before the key's. What they do is then trained like everything else.
    """
    config = model.config
    size, half, width = config.head_dim, config.head_dim // 2, 32
    for layer in model.model.layers:  # small residual steps, so that tokens stay recognizable at the start
        layer.self_attn.o_proj.weight.mul_(0.25)
        layer.mlp.down_proj.weight.mul_(0.25)
    constant = 0  # a residual dimension that is the same for every token: position-only attention reads it
    model.model.embed_tokens.weight[:, constant] = 0.3
    basis = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))[0]
    # note: back[n] is where the identity of the token n positions back is found; back[0]: the token's own
    back = [basis[:, i * width : (i + 1) * width] for i in range(5)]
    output = basis[:, -width:]

    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    n, gain = 10, 0.6  # the n fastest rotary pairs tell neighbours apart
    first = model.model.layers[0].self_attn
    for kv_head in range(2):
        k = first.k_proj.weight[kv_head * size : (kv_head + 1) * size]
        k.zero_()
        k[:n, constant] = gain
        v = first.v_proj.weight[kv_head * size : (kv_head + 1) * size]
        v[:width] = back[0].T
        v[:width, constant] = 0
    for head in range(4):
        distance = head + 1
        q = first.q_proj.weight[head * size : (head + 1) * size]
        q.zero_()  # the query is turned back by `distance`
        q[:n, constant] = gain * torch.cos(distance * frequency[:n])
        q[half : half + n, constant] = -gain * torch.sin(distance * frequency[:n])
        first.o_proj.weight[:, head * size : head * size + width] = 0.06 * back[distance]

    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, size)])  # pairs that hardly turn
    for il in MATCHING_LAYERS:
        match = model.model.layers[il].self_attn
        for kv_head, n_tokens in enumerate((2, 4)):
            turns = [torch.linalg.qr(torch.randn(width, width))[0] for _ in range(n_tokens)]
            queries = sum(turn @ back[i].T for i, turn in enumerate(turns))
            keys = sum(turn @ back[i + 1].T for i, turn in enumerate(turns))
            queries[:, constant] = 0
            keys[:, constant] = 0
            k = match.k_proj.weight[kv_head * size : (kv_head + 1) * size]
            k[slow] = 1.4 * keys
            for head in (2 * kv_head, 2 * kv_head + 1):
                match.q_proj.weight[head * size : (head + 1) * size][slow] = 1.4 * queries
                match.o_proj.weight[:, head * size : head * size + width] = 0.03 * output
            match.v_proj.weight[kv_head * size : kv_head * size + width] = back[0].T


def save_checkpoint(path: Path, **state) -> None:
    """Writes a training checkpoint, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def export(model: LlamaForCausalLM, tokenizer_file: Path, out: Path) -> None:
    """Write the Hugging Face checkpoint (float16, safetensors); other files of `out` stay as they are."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temp:
        half = LlamaForCausalLM(model.config).to(torch.float16)
        half.load_state_dict({name: value.to(torch.float16) for name, value in model.state_dict().items()})
        half.config.dtype = "float16"
        half.generation_config = GenerationConfig(
            bos_token_id=model.config.bos_token_id,
            eos_token_id=model.config.eos_token_id,
        )
        half.save_pretrained(temp)
        shutil.copy(tokenizer_file, Path(temp) / "tokenizer.model")
        hf_tokenizer(Path(temp) / "tokenizer.model").save_pretrained(temp)
        for file in sorted(Path(temp).iterdir()):
            os.chmod(file, 0o644)
            os.replace(file, out / file.name)
