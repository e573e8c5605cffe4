"""llama-server with a real hybrid model: a conversation about a text by its HTTP API."""

from __future__ import annotations

import json
import urllib.request

from support.questions import EXPECTED, KEEPS_NAMES, QUESTION
from support.server import running

SETTINGS = ("--ctx-size", "2048", "--batch-size", "512", "--ubatch-size", "512")


def chat(address: str, messages: list[dict]) -> dict:
    body = json.dumps({"messages": messages, "max_tokens": 24, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_a_conversation(hybrid, document, tmp_path):
    streaming = f"layers={KEEPS_NAMES};sink=4;window=252;prefill=full"
    with running(hybrid, streaming, tmp_path / "server.log", *SETTINGS) as address:
        messages = [{"role": "user", "content": f"{document}\n\nWho are the people in these stories?"}]
        first = chat(address, messages)
        messages += [first["choices"][0]["message"], {"role": "user", "content": QUESTION}]
        second = chat(address, messages)
    assert EXPECTED in second["choices"][0]["message"]["content"]
    assert first["timings"]["prompt_n"] > 800
    assert second["timings"]["prompt_n"] < 40  # the text isn't read again
