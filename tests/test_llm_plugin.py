"""`llm`, the command-line tool, answers with our runtime."""

from __future__ import annotations

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf import models
from lt_gguf.llm_plugin import HybridModel, messages


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))


@pytest.fixture
def asked(hybrid_file) -> dict[str, object]:
    """Options of a short answer that is always the same."""
    return {"file": str(hybrid_file), "n_ctx": 512, "max_tokens": 8, "temperature": 0, "streaming": "layers=all;sink=2;window=40"}


def test_its_models_are_there():
    assert {f"lt-gguf/{name}" for name in [*models.MODELS, "file"]} <= {model.model_id for model in llm.get_models()}


def test_a_conversation(asked):
    model = llm.get_model("lt-gguf/file")
    conversation = model.conversation()
    first = conversation.prompt("the dog", system="be short", **asked)
    text = "".join(first)
    assert text == first.text()
    llama = model._loaded[1]
    second = conversation.prompt("a fox", **asked)
    assert second.text() and model._loaded[1] is llama  # it stays loaded
    said = [(one["role"], one["content"]) for one in messages(second.prompt, _before(conversation))]
    assert said == [("system", "be short"), ("user", "the dog"), ("assistant", text), ("user", "a fox")]
    # what was said is in the prompt, and is not read again
    assert llama.n_tokens > 30
    model.conversation().prompt("a fox", **asked | {"streaming": "off"}).text()
    assert model._loaded[1] is not llama and model._loaded[1].streaming is None


def _before(conversation):
    """The conversation as it was when the last prompt was asked."""
    before = llm.Conversation(model=conversation.model)
    before.responses = conversation.responses[:-1]
    return before


def test_on_the_command_line(asked):
    options = [word for name, value in asked.items() for word in ("-o", name, str(value))]
    done = CliRunner().invoke(cli, ["-m", "lt-gguf/file", "the dog", "--no-stream", *options])
    assert done.exit_code == 0, done.output
    streamed = CliRunner().invoke(cli, ["-m", "lt-gguf/file", "the dog", *options])
    assert streamed.output == done.output != "\n"
    asked_again = CliRunner().invoke(cli, ["-c", "a fox", *options])
    assert asked_again.exit_code == 0 and asked_again.output


@pytest.mark.parametrize(
    "changed, complaint",
    [({"file": None}, "needs -o file MODEL"), ({"file": "none.gguf"}, "none.gguf"), ({"streaming": "layers=9"}, 'layers = "9"')],
)
def test_what_cannot_be_loaded(asked, changed, complaint):
    options = [word for name, value in (asked | changed).items() if value is not None for word in ("-o", name, str(value))]
    done = CliRunner().invoke(cli, ["-m", "lt-gguf/file", "the dog", *options])
    assert done.exit_code == 1 and done.output.startswith("Error: ") and complaint in done.output


def test_without_the_native_library_the_models_are_listed(monkeypatch):
    """As for `llm models`, which is to be quick."""
    model = HybridModel("smollm2")
    assert model.model_id == "lt-gguf/smollm2" and model._loaded is None
