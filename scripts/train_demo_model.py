"""Train the demo model of `models/demo` from nothing, on a CPU, in about half an hour.

    python scripts/train_demo_model.py --work-dir build/demo-train --out models/demo

trains a SentencePiece tokenizer and then a small Llama-architecture decoder on what `demo_data.py` makes, logs to
`WORK_DIR/log.jsonl`, and writes a Hugging Face checkpoint. An interrupted run goes on from its last checkpoint when
started again with the same arguments. `eval_demo_model.py` measures the result. Needs torch, transformers,
sentencepiece, protobuf, typer and rich.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import sentencepiece
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import demo_data as data

VOCAB_SIZE = 1536
BOS, UNK = "<s>", "<unk>"
MAX_LENGTH = 2048
CHECKPOINT_EVERY = 100
LOG_EVERY = 10

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|user|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Phase:
    """A part of the curriculum: rows of `length` tokens until `until` (a fraction of all steps) is reached."""

    until: float
    length: int
    shares: dict[str, float]


# Dense lookups first, in short rows; then facts spread over longer and longer text.
CURRICULUM = [
    Phase(0.12, 256, dict(map=3, repeat=2, retrieval=2, story=1)),
    Phase(0.55, 256, dict(map=1, repeat=0.5, retrieval=4, chat=1, story=1.5, python=1.5)),
    Phase(0.75, 512, dict(map=0.5, repeat=0.3, retrieval=4, chat=1, story=1.5, python=1.5)),
    Phase(0.90, 1024, dict(map=0.3, repeat=0.2, retrieval=4, chat=1, story=1, python=1)),
    Phase(1.00, 2048, dict(map=0.3, repeat=0.2, retrieval=4, chat=1, story=1, python=1)),
]


# ------------------------------------------------------------------------------------------- tokenizer

def train_tokenizer(path: Path, texts: list[str], seed: int) -> None:
    """Train the SentencePiece model `path` (BPE with byte fallback) on a sample of the training documents."""
    rng = np.random.default_rng((seed, 0))
    shares = dict(map=1, repeat=1, retrieval=3, chat=1, story=1, python=4)
    sample = []
    for _ in range(6000):
        text = "".join(text for text, _ in data.document(rng, 600, texts, shares))
        for symbol in (data.USER, data.ASSISTANT, data.END):
            text = text.replace(symbol, "\n")
        sample += [line for line in text.split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample), model_writer=model, model_type="bpe", vocab_size=VOCAB_SIZE,
        byte_fallback=True, character_coverage=1.0, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False,  # a prefix space would differ between tokenizers
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, unk_piece=UNK, bos_piece=BOS, eos_piece=data.END,
        control_symbols=[data.USER, data.ASSISTANT], num_threads=1, minloglevel=2,
    )
    partial = path.with_suffix(".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)


def hf_tokenizer(model_file: Path) -> LlamaTokenizer:
    """The same tokenizer for transformers, with the chat template."""
    return LlamaTokenizer.from_pretrained(
        str(model_file.parent), unk_token=UNK, bos_token=BOS, eos_token=data.END, add_bos_token=True,
        add_eos_token=False, add_prefix_space=False, legacy=False, clean_up_tokenization_spaces=False,
        extra_special_tokens={"user_token": data.USER, "assistant_token": data.ASSISTANT},
        chat_template=CHAT_TEMPLATE, model_max_length=MAX_LENGTH,
    )


# ------------------------------------------------------------------------------------------------ rows

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
                n_chars = int(n_chars * 0.7)
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
        text = text[at + len(symbol):]


# ----------------------------------------------------------------------------------------------- model

def make_model(bos: int, eos: int) -> LlamaForCausalLM:
    """Hidden and feed-forward sizes are multiples of 256 so that every k-quant works; heads are 64 wide."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, bos_token_id=bos, eos_token_id=eos,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    start_with_induction(model)
    return model


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Random weights, except that four heads start near the two-step circuit that looks things up.

    An induction head (Olsson et al., arXiv 2209.11895) needs a head that brings the previous token's identity along
    and a later head that matches the current token with it. From purely random weights a CPU doesn't get there in
    half an hour. Here layer 0 gets a head that looks one position back and one that looks two back, and layer 2
    heads that match (current, previous) and (previous, one before) in the subspaces these write. What they do is then
    trained like everything else.
    """
    config = model.config
    size, half = config.head_dim, config.head_dim // 2
    for layer in model.model.layers:  # small residual steps, so that tokens stay recognizable at the start
        layer.self_attn.o_proj.weight.mul_(0.25)
        layer.mlp.down_proj.weight.mul_(0.25)
    constant = 0  # a residual dimension that is the same for every token: position-only attention reads it
    model.model.embed_tokens.weight[:, constant] = 0.3
    basis = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))[0]
    identity, one_back, two_back, output = (basis[:, i * size:(i + 1) * size] for i in range(4))

    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    n, gain = 12, 0.53  # the n fastest rotary pairs tell neighbours apart
    first = model.model.layers[0].self_attn
    for kv_head, (distance, target) in enumerate([(1, one_back), (2, two_back)]):
        q = first.q_proj.weight[2 * kv_head * size:(2 * kv_head + 1) * size]
        k = first.k_proj.weight[kv_head * size:(kv_head + 1) * size]
        q.zero_()
        k.zero_()
        q[:n, constant] = gain
        k[:n, constant] = gain * torch.cos(distance * frequency[:n])  # the key is turned forward by `distance`
        k[half:half + n, constant] = gain * torch.sin(distance * frequency[:n])
        first.v_proj.weight[kv_head * size:(kv_head + 1) * size] = identity.T
        first.o_proj.weight[:, 2 * kv_head * size:(2 * kv_head + 1) * size] = 0.03 * target

    match = model.model.layers[2].self_attn
    for kv_head, (query_reads, key_reads) in enumerate([(identity, one_back), (one_back, two_back)]):
        q = match.q_proj.weight[2 * kv_head * size:(2 * kv_head + 1) * size]
        k = match.k_proj.weight[kv_head * size:(kv_head + 1) * size]
        q.copy_(1.5 * query_reads.T)
        k.copy_(1.5 * key_reads.T)
        q[:, constant] = 0
        k[:, constant] = 0
        match.v_proj.weight[kv_head * size:(kv_head + 1) * size] = output.T
        match.o_proj.weight[:, 2 * kv_head * size:(2 * kv_head + 1) * size] = 0.03 * output
    first.v_proj.weight[:, constant] = 0


# -------------------------------------------------------------------------------------------- training

def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, n_steps: int) -> float:
    """Linear warm-up over 20 steps, flat, then linear to nearly zero over the last 60 %."""
    return min(1.0, (step + 1) / 20, max(0.02, (n_steps - step) / (0.6 * n_steps)))


def train_step(model, optimizers, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
    """One optimizer step on `ids` and their loss weights, both (rows, length).

    Returns the weighted loss, the loss of plain text, that of looked-up answers (nats a token), and the share of
    answer tokens that were the most likely ones.
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets, w = ids[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    losses = torch.nn.functional.cross_entropy(logits.float().reshape(len(targets), -1), targets, reduction="none")
    loss = (losses * w).sum() / w.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    losses, answers, text = losses.detach(), w >= data.ANSWER_WEIGHT, w == 1.0
    hits = (logits.detach().reshape(len(targets), -1).argmax(-1) == targets).float()
    return dict(
        loss=loss.item(), text=_mean(losses, text), answer=_mean(losses, answers), hits=_mean(hits, answers),
    )


def _mean(values: torch.Tensor, where: torch.Tensor) -> float:
    return (values * where).sum().item() / max(1, where.sum().item())


def save_checkpoint(path: Path, **state) -> None:
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
            bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id,
        )
        half.save_pretrained(temp)
        shutil.copy(tokenizer_file, Path(temp) / "tokenizer.model")
        hf_tokenizer(Path(temp) / "tokenizer.model").save_pretrained(temp)
        for file in sorted(Path(temp).iterdir()):
            os.chmod(file, 0o644)
            os.replace(file, out / file.name)


def main(
    work_dir: Annotated[
        Path, typer.Option(help="tokenizer, checkpoints and log; an earlier run here goes on"),
    ] = Path("build/demo-train"),
    out: Annotated[Path, typer.Option(help="where the finished checkpoint goes")] = Path("models/demo"),
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps")] = 640,
    batch_tokens: Annotated[int, typer.Option(min=MAX_LENGTH, help="tokens a step")] = 8192,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Train the demo model and write it as a Hugging Face checkpoint."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    arguments = dict(steps=steps, batch_tokens=batch_tokens, seed=seed, curriculum=[asdict(p) for p in CURRICULUM])
    texts, _ = data.python_texts()

    tokenizer_file = work_dir / "tokenizer.model"
    if not tokenizer_file.exists():
        train_tokenizer(tokenizer_file, texts, seed)
    rows = RowMaker(tokenizer_file, texts)
    model = make_model(rows.bos, rows.control[data.END])
    optimizers = make_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    checkpoint, log = work_dir / "checkpoint.pt", work_dir / "log.jsonl"
    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["arguments"] != arguments:
            raise typer.BadParameter(
                f"{work_dir} holds a run with other arguments: give another --work-dir or remove it",
            )
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        start, seconds = state["step"], state["seconds"]
        logged = log.read_text().splitlines() if log.exists() else []
        log.write_text("".join(line + "\n" for line in logged if json.loads(line)["step"] <= start))
    else:
        log.write_text("")

    began = time.monotonic() - seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps, completed=start)
        for step in range(start, steps):
            phase = next(p for p in CURRICULUM if step < p.until * steps)
            rng = np.random.default_rng((seed, 1, step))  # depends on the step alone: a resumed run sees the same rows
            ids, weights = rows.batch(rng, batch_tokens // phase.length, phase.length, phase.shares)
            factor = learning_rate_factor(step, steps)
            for optimizer, rate in zip(optimizers, base_rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            measured = train_step(model, optimizers, ids, weights)
            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                seconds = round(time.monotonic() - began, 1)
                record = dict(step=done, tokens=done * batch_tokens, seconds=seconds, length=phase.length)
                record |= {name: round(value, 4) for name, value in measured.items()}
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                progress.update(task, description=f"text {measured['text']:.2f}  answer {measured['answer']:.2f}")
            if done % CHECKPOINT_EVERY == 0 or done == steps:
                save_checkpoint(
                    checkpoint, arguments=arguments, model=model.state_dict(), step=done,
                    optimizers=[optimizer.state_dict() for optimizer in optimizers], seconds=time.monotonic() - began,
                )
            progress.update(task, completed=done)
    export(model, tokenizer_file, out)
    minutes = (time.monotonic() - began) / 60
    typer.echo(f"wrote {out}: {steps} steps, {steps * batch_tokens:,} tokens, {minutes:.1f} minutes")


if __name__ == "__main__":
    typer.run(main)
