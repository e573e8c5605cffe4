"""Models on the hub, without the hub: the cache is used if it is whole, and what is wrong is said in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.checkpoint import resolver
from lt_gguf.gguf.file import read_model
from lt_gguf.models import hub

NAME = "somebody/Tiny-Llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path) -> Path:
    """huggingface_hub's folder with one downloaded model."""
    home = tmp_path / "home"
    repository = home / "hub" / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    write_checkpoint(repository / "snapshots" / COMMIT)
    return home


def command(home: Path, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # note: a port that nobody listens at stands for a network without the hub
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "*"} | environment
    run = [sys.executable, "-c", "from lt_gguf.cli import main; main()", "convert", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=cwd, env=os.environ | settings)


@pytest.mark.slow
def test_a_cached_model_is_converted_without_the_hub(cache, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result = command(cache, NAME, "--streaming-layers", "1", "--outtype", "f16", cwd=out)
    assert result.returncode == 0, result.stderr
    assert f"{NAME}: can't reach the hub" in result.stderr and "the local cache has it" in result.stderr
    (file,) = out.iterdir()
    assert file.name.startswith("Tiny-Llama") and file.name.endswith("-F16.gguf")
    assert read_model(file).name == "Tiny Llama"  # not the commit's hash


@pytest.mark.slow
def test_what_the_cache_does_not_have(cache, tmp_path):
    snapshot = cache / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
    out = tmp_path / "out"
    out.mkdir()
    for name, environment, complaint in (
        ("somebody/else", {}, "error: somebody/else: can't reach the hub"),
        ("somebody/else", {"HF_HUB_OFFLINE": "1"}, "error: somebody/else: HF_HUB_OFFLINE keeps us from the hub"),
    ):
        result = command(cache, name, "--streaming-layers", "1", cwd=out, **environment)
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(complaint) and "the local cache doesn't have all of it" in result.stderr
        assert "127.0.0.1" not in result.stderr and "http" not in result.stderr
    (snapshot / "model.safetensors").unlink()
    result = command(cache, NAME, "--streaming-layers", "1", cwd=out)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {NAME}: has no weights")
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    "model, is_id",
    [("org/name", True), ("Org-1/Name_2.5-7B", True), ("name", False), ("a/b/c", False), ("./name", False), ("../x", False)],
)
def test_what_is_taken_for_an_id(model, is_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id(model) == is_id
    if is_id:  # a folder of that name goes first
        (tmp_path / model).mkdir(parents=True)
        assert not hub.is_hub_id(model)
        assert resolver.resolve(model) == Path(model)
    else:
        with pytest.raises(ValueError, match="must be the folder of a Hugging Face checkpoint, or a hub id"):
            resolver.resolve(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "status, body, complaint",
    [
        (401, "RepoNotFound", "no such model on the hub"),
        (404, "RepoNotFound", "no such model on the hub"),
        (403, "GatedRepo", "is gated: must be agreed to on the hub"),
    ],
)
def test_what_the_hub_refuses(status, body, complaint, tmp_path):
    """A server that answers as the hub does."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", body)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        result = command(tmp_path, NAME, "--streaming-layers", "1", cwd=tmp_path, HF_ENDPOINT=endpoint)
        server.shutdown()
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and complaint in result.stderr
    assert "127.0.0.1" not in result.stderr
