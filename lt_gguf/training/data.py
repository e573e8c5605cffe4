"""Conversations to train on: read from JSONL, written out by the checkpoint's chat template, and cut into tokens.

A line is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that torch's cross entropy leaves out

Example = dict[str, list[int]]  # input_ids, and labels of the same length: the token, or IGNORED

_FORM = 'must be {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}'


@dataclass(frozen=True)
class Conversation:
    """A line of a file.

    Args:
        where: file and line, for messages.
        messages: each with a role and a content.
    """

    where: str
    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Data:
    """A file's name, the sha256 of its bytes, and its conversations, at least one."""

    name: str
    sha256: str
    conversations: tuple[Conversation, ...]


def read_data(path: Path) -> Data:
    """Reads a JSONL file of conversations; empty lines don't count.

    Raises:
        ValueError: it isn't one; one line that names the file, the line and what would be right.
        OSError: it can't be read.
    """
    data = path.read_bytes()
    try:
        # note: not splitlines(), which also splits at characters that JSON strings may hold
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8, see byte {error.start}") from None
    conversations = tuple(_conversation(line, f"{path}: line {i}") for i, line in enumerate(lines, 1) if line.strip())
    if not conversations:
        raise ValueError(f"{path}: has no conversations, a line of it {_FORM}")
    return Data(path.name, hashlib.sha256(data).hexdigest(), conversations)


def examples_of(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int, loss: str = "assistant"
) -> list[Example]:
    """The training examples of a conversation: tokens and labels.

    One, or one an answer where the template writes an earlier answer otherwise once others follow it (some leave out its
    thoughts): each then ends with the answer that is trained, as it will be written when the model is used.

    Args:
        tokenizer: a fast one with a chat template.
        max_length: tokens after that are left out; an example that has no label then isn't made.
        loss: on what: "assistant", the answers up to the end of their turns; or "all".

    Raises:
        ValueError: the template doesn't take the conversation.
    """
    messages = list(conversation.messages)
    texts = [(_written(conversation, tokenizer, messages), [])] if loss == "all" else _answers(conversation, tokenizer)
    examples = []
    for text, spans in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=loss != "all", verbose=False)
        tokens = encoded["input_ids"][:max_length]
        if loss == "all":
            labels = list(tokens)
        else:
            begins = [begin for begin, _ in encoded["offset_mapping"][:max_length]]
            is_answer = [any(first <= begin < last for first, last in spans) for begin in begins]
            labels = [token if answer else IGNORED for token, answer in zip(tokens, is_answer)]
        if any(label != IGNORED for label in labels[1:]):  # the first token is never predicted
            examples.append({"input_ids": tokens, "labels": labels})
    return examples


def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: input_ids, attention_mask and labels, int64 (len(examples), longest)."""
    tokens = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor(example["labels"]) for example in examples]
    ones = [torch.ones_like(each) for each in tokens]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence(ones, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _conversation(line: str, where: str) -> Conversation:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is no JSON ({error}), {_FORM}") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: has no list "messages", {_FORM}')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'{where}: message {i} has no strings "role" and "content", {_FORM}')
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise ValueError(f"{where}: has the roles {', '.join(roles)}, must have an assistant's answer after a user's message")
    return Conversation(where, tuple(messages))


def _answers(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[tuple[int, int]]]]:
    """Texts, and where the answers that are trained begin and end in them, in characters."""
    messages = list(conversation.messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = [_written(conversation, tokenizer, messages[:i], add_generation_prompt=True) for i in turns]
    answered = [_written(conversation, tokenizer, messages[: i + 1]) for i in turns]
    for question, answer in zip(asked, answered):
        if not answer.startswith(question):
            raise ValueError(
                f"{conversation.where}: the chat template writes a question otherwise once it is answered, must be one that "
                "appends the answer, or the loss must be on all tokens"
            )
    spans = [(len(question), len(answer)) for question, answer in zip(asked, answered)]
    # note: what follows the last answer isn't read at all
    if all(answered[-1].startswith(text) for text in (*asked, *answered)):
        return [(answered[-1], spans)]
    return [(answer, [span]) for answer, span in zip(answered, spans)]


def _written(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise ValueError(f"{conversation.where}: the chat template doesn't take it: {error}") from None
    assert isinstance(text, str)  # not tokens, and of one conversation
    return text


@dataclass(frozen=True)
class Samples:
    """What is trained on and what is held out.

    Args:
        name: of the data's file.
        sha256: of the data, and of the held-out data if that is a file of its own.
        training: at least one.
        held_out: may be empty.
    """

    name: str
    sha256: tuple[str, ...]
    training: list[Example]
    held_out: list[Example]


def make_samples(
    data: Path,
    eval_data: Path | None,
    eval_share: float,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss: str,
    seed: int,
) -> Samples:
    """Reads the data; without a file of held-out conversations, a random share of the data's is held out.

    Raises:
        ValueError: as `read_data` and `examples_of`, or nothing is left to train on.
        OSError: a file can't be read.
    """
    source = read_data(data)
    sha256: tuple[str, ...] = (source.sha256,)
    training, held_out = list(source.conversations), []
    if eval_data is not None:
        other = read_data(eval_data)
        sha256, held_out = (source.sha256, other.sha256), list(other.conversations)
    else:
        n = len(training)
        numbers = shuffled_split(n, round(eval_share * n), seed)
        training, held_out = ([source.conversations[i] for i in sorted(part)] for part in numbers)
    examples = [[e for each in part for e in examples_of(each, tokenizer, max_length, loss)] for part in (training, held_out)]
    if not examples[0]:
        raise ValueError(f"{data}: no answer begins within {max_length} tokens, must have shorter texts or a larger --max-length")
    return Samples(source.name, sha256, *examples)


def shuffled_split(n: int, n_second: int, seed: int) -> tuple[list[int], list[int]]:
    """The numbers below `n` in two random parts; the second has `n_second` of them."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[n_second:], order[:n_second]
