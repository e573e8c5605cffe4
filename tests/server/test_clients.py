"""Programs that people have talk with `lt-gguf serve` as with OpenAI's servers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
from langchain_openai import ChatOpenAI
from openai import APIConnectionError, AuthenticationError, BadRequestError, OpenAI
from pydantic import BaseModel
from support.rpc import free_port
from support.serve import Served, serving
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf import Llama

pytestmark = pytest.mark.slow

KEY = "right"
QUESTION = [{"role": "user", "content": "the quick brown fox"}]
FIXED = {"temperature": 0, "seed": 1, "max_tokens": 12}


class Animal(BaseModel):
    """What only a grammar can make random weights write, and what ends."""

    name: Literal["fox", "dog"]
    legs: Literal[2, 4]


@pytest.fixture(scope="module")
def served(hybrid_file) -> Iterator[Served]:
    options = "--threads", "1", "--ctx", "2048", "--streaming", "layers=all;sink=2;window=60;prefill=full"
    with serving(hybrid_file, *options, environment={"LT_GGUF_API_KEY": KEY}) as served:
        yield served


@pytest.fixture(scope="module")
def client(served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat_and_its_stream(client):
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=QUESTION, **FIXED)
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **FIXED
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content and answer.usage.completion_tokens <= 12
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_a_stream_that_is_left_in_the_middle(client):
    stream = client.chat.completions.create(
        model="any", messages=QUESTION, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    # the slot is free at once, else this would wait for a thousand tokens
    assert client.chat.completions.create(model="any", messages=QUESTION, **FIXED).usage.completion_tokens <= 12


def test_completions(client):
    answer = client.completions.create(model="any", prompt="the quick brown fox", **FIXED)
    assert answer.usage.prompt_tokens >= 4 and answer.choices[0].finish_reason in ("stop", "length")


def test_a_json_schema(client):
    schema = {"name": "animal", "strict": True, "schema": Animal.model_json_schema()}
    answer = client.chat.completions.create(
        model="any",
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": schema},
        **FIXED | {"max_tokens": 100},
    )
    Animal.model_validate_json(answer.choices[0].message.content)


def test_tools(client):
    """Whether one is called is the model's own affair; the conversation about it is accepted, and read."""
    tool = {"type": "function", "function": {"name": "count_legs", "parameters": Animal.model_json_schema()}}
    call = {"id": "1", "type": "function", "function": {"name": "count_legs", "arguments": '{"name": "fox"}'}}
    said = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "4"}]
    with_tools = client.chat.completions.create(model="any", messages=QUESTION + said, tools=[tool], **FIXED)
    without = client.chat.completions.create(model="any", messages=QUESTION, **FIXED)
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 10


def test_errors(client, served):
    with pytest.raises(BadRequestError, match="context"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "the quick brown fox " * 900}], **FIXED)
    with pytest.raises(AuthenticationError, match="API key is missing or wrong"):
        OpenAI(base_url=f"{served.address}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(APIConnectionError):
        OpenAI(base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0).models.list()


def test_langchain(served):
    model = ChatOpenAI(base_url=f"{served.address}/v1", api_key=KEY, model="any", temperature=0, max_tokens=12)
    answer = model.invoke("the quick brown fox")
    assert answer.response_metadata["token_usage"]["completion_tokens"] <= 12
    assert "".join(chunk.content for chunk in model.stream("the quick brown fox")) == answer.content


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(served):
    body = json.dumps({"messages": QUESTION, "stream": True} | FIXED)
    command = ["curl", "-sN", f"{served.address}/v1/chat/completions", "-H", f"Authorization: Bearer {KEY}", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert lines[-2:] == ["data: [DONE]", ""] or "data: [DONE]" in lines


def test_llama_cpps_own_server_runs_on_our_libraries(hybrid_file):
    """As docs/how-to/llama-cpp-tools.md says; LT_STREAMING reaches it."""
    spec, text = "layers=1,3;sink=2;window=60;prefill=full", "the quick brown fox jumps over the lazy dog " * 20
    code = "import lt_gguf, runpy; runpy.run_module('llama_cpp.server', run_name='__main__')"
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-c", code, "--model", hybrid_file, "--port", str(port), "--n_ctx", "1024"]
    with subprocess.Popen(
        command, env=os.environ | {"LT_STREAMING": spec}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = iter(process.stdout.readline, "")
        said = [next(lines)]
        while "Uvicorn running" not in said[-1]:
            said.append(next(lines))
        with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(model="any", prompt=text, **FIXED).choices[0].text
        process.terminate()
        process.communicate(timeout=30)
    assert any(f"streaming layers: {spec} (LT_STREAMING)" in line for line in said)
    llm = Llama(str(hybrid_file), streaming=spec, n_ctx=1024, verbose=False)
    assert llm(text, **FIXED)["choices"][0]["text"] == answer
    llm.close()


def test_embeddings_where_llama_server_is_asked_for_them(hybrid_file):
    """Those of llama_cpp, with the same layers streaming."""
    text, other = "the quick brown fox jumps over the lazy dog", "and runs away"
    options = [hybrid_file, "--threads", "1", "--ctx", "512", "--streaming", "layers=1,3;sink=2;window=6;prefill=full"]
    with (
        serving(*options, "--", "--embeddings", "--pooling", "mean") as served,
        OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.embeddings.create(model="any", input=[text, other])
    llm = Llama(str(hybrid_file), streaming=options[-1], n_ctx=512, embedding=True, pooling_type=1, verbose=False)
    for item, said in zip(answer.data, (text, other), strict=True):
        expected = np.array(llm.embed(said, normalize=True))
        assert np.dot(item.embedding, expected) > 0.9999
    llm.close()
    assert abs(np.dot(answer.data[0].embedding, answer.data[1].embedding)) < 0.999
