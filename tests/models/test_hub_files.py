"""GGUF files on the hub, with huggingface_hub itself against a server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lt_gguf.models import hub_files

pytest.importorskip("huggingface_hub")

REPO = "somebody/Tiny-GGUF"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = (
    "import json, sys\nfrom lt_gguf.models import hub_files\n"
    "try:\n    print(getattr(hub_files, sys.argv[3])(*json.loads(sys.argv[1]), **json.loads(sys.argv[2])))\n"
    "except (ValueError, OSError, ImportError) as error:\n    sys.exit(f'{type(error).__name__}: {error}')"
)


class Hub:
    """The files of one model. `cut`: each download breaks off after that many bytes; `goes_away`: nothing is answered then."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.goes_away = self.gone = False
        self.ranges: list[str | None] = []  # of the downloads
        self.address = ""

    def fetch(
        self, pattern: str | None = None, repo: str = REPO, function: str = "fetch", **settings: object
    ) -> subprocess.CompletedProcess[str]:
        """Runs a function of `hub_files` in a process of its own: huggingface_hub reads its environment when it is imported."""
        offline = settings.pop("offline", False)
        environment = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.address, "no_proxy": "*", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        arguments = [repo, pattern] if function == "fetch" else [repo]
        command = [sys.executable, "-c", FETCH, json.dumps(arguments), json.dumps(settings), function]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    model = Hub(tmp_path / "home")

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if model.gone:
                self.close_connection = True
                return None
            if self.path.startswith(f"/api/models/{REPO}"):
                siblings = [{"rfilename": name} for name in model.files]
                return self._send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), {})
            name = self.path.split("?")[0].removeprefix(f"/{REPO}/resolve/main/").removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if name not in model.files:
                code = "EntryNotFound" if self.path.startswith(f"/{REPO}/") else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            content = model.files[name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(content, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

        def _send(self, content, headers):
            begin = 0
            asked = self.headers.get("Range")
            if self.command == "GET" and "ETag" in headers:
                model.ranges.append(asked)
            if asked and self.command == "GET":
                begin = int(re.match(r"bytes=(\d+)-", asked)[1])
                headers = headers | {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if model.cut is not None and "ETag" in headers:
                self.wfile.write(content[begin : begin + model.cut])
                self.wfile.flush()
                model.gone = model.goes_away
                self.close_connection = True
                return
            self.wfile.write(content[begin:])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model.address = f"http://127.0.0.1:{server.server_port}"
        yield model
        server.shutdown()


NAMES = ["README.md", "m-Q8_0.gguf", "m-F16.gguf", "m-Q4_K_M.gguf", "mmproj-m-Q4_K_M.gguf", "m-imatrix.gguf"]
SPLIT = [f"big/b-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]


@pytest.mark.parametrize(
    "files, pattern, chosen, others",
    [
        (["a.gguf"], None, "a.gguf", 0),
        (NAMES, None, "m-Q4_K_M.gguf", 2),
        (["m-F16.gguf", "m-Q8_0.gguf"], None, "m-Q8_0.gguf", 1),
        (["m-F16.gguf", "m-BF16.gguf"], None, "m-BF16.gguf", 1),
        (NAMES, "q8_0", "m-Q8_0.gguf", 0),
        (NAMES, "F16", "m-F16.gguf", 0),
        (["m-BF16.gguf", "m-F16.gguf"], "F16", "m-F16.gguf", 0),
        (NAMES, "*q8_0*.gguf", "m-Q8_0.gguf", 0),
        (NAMES, "m-F16.gguf", "m-F16.gguf", 0),
        (NAMES, "mmproj-m-Q4_K_M.gguf", "mmproj-m-Q4_K_M.gguf", 0),  # who names it wants it
        (SPLIT, None, SPLIT[0], 0),
        ([*NAMES, *SPLIT], "Q4_K_M", SPLIT[0], 1),
        (SPLIT, "b-*.gguf", SPLIT[0], 0),
    ],
)
def test_which_file_is_meant(files, pattern, chosen, others, capsys):
    assert hub_files.choose(REPO, files, pattern) == chosen
    err = capsys.readouterr().err
    assert err.count("\n") == (others > 0)
    if others:
        assert err.startswith(f"{REPO}: taking {chosen}; others that fit: ") and err.count(".gguf") == 1 + others


@pytest.mark.parametrize(
    "files, pattern, complaint",
    [
        ([], None, "has no GGUF file"),
        (["model.safetensors"], None, f"has no GGUF file: it is a checkpoint, lt-gguf convert {REPO} makes one"),
        (NAMES, "Q5_K_M", "it has no file for Q5_K_M, must be one of m-F16.gguf, m-Q4_K_M.gguf, m-Q8_0.gguf"),
        (NAMES, "*.gguf", "*.gguf fits 3 files, must fit one: m-F16.gguf, m-Q4_K_M.gguf, m-Q8_0.gguf"),
        ([f"{i:02}.gguf" for i in range(20)], "x.gguf", "07.gguf and 12 more"),
    ],
)
def test_which_file_cannot_be_told(files, pattern, complaint):
    with pytest.raises(ValueError) as error:
        hub_files.choose(REPO, files, pattern)
    assert str(error.value).startswith(f"{REPO}: ") and complaint in str(error.value)


@pytest.mark.slow
def test_a_download_and_the_cache_without_the_hub(hub):
    hub.files = {"m-Q8_0.gguf": b"eight", "m-Q4_K_M.gguf": b"four"}
    result = hub.fetch("Q8_0")
    assert result.returncode == 0, result.stderr
    path = Path(result.stdout.strip())
    assert path.read_bytes() == b"eight" and path.is_relative_to(hub.home)
    assert len(hub.ranges) == 1
    assert hub.fetch("Q8_0").stdout == result.stdout and len(hub.ranges) == 1  # not downloaded again
    for offline in (True, False):
        hub.address = hub.address if offline else "http://127.0.0.1:9"
        for pattern in ("Q8_0", None, "m-*.gguf"):
            again = hub.fetch(pattern, offline=offline)
            assert again.stdout == result.stdout, again.stderr
            assert "the local cache has it" in again.stderr
        missing = hub.fetch("Q4_K_M", offline=offline)
        assert missing.stderr.strip() == f"ValueError: {REPO}: the local cache has no file for Q4_K_M, must be one of m-Q8_0.gguf"
        unknown = hub.fetch(repo="somebody/else", offline=offline)
        assert unknown.stderr.startswith("OSError: somebody/else: ") and "must be a file, or try again" in unknown.stderr
        assert unknown.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_download_that_breaks_off(hub, comes_back):
    content = bytes(range(256)) * 65536  # 16 MiB: huggingface_hub reads 10 at a time
    hub.files = {"m.gguf": content}
    hub.cut, hub.goes_away = 12 << 20, not comes_back
    result = hub.fetch()
    if comes_back:
        assert hub.ranges == [None, "bytes=10485760-"]  # goes on where it stopped, but for what wasn't written yet
    else:
        assert result.returncode == 1
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"OSError: {REPO}: the download broke off (") and last.endswith("try again with a connection")
        assert not list(hub.home.rglob("*.gguf"))
        hub.cut, hub.gone = None, False
        result = hub.fetch()
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == content


@pytest.mark.slow
def test_a_split_model_comes_whole(hub):
    hub.files = {name: name.encode() for name in [*SPLIT, "mmproj-b.gguf"]}
    result = hub.fetch("Q4_K_M", additional_files=["mmproj*"])
    assert result.returncode == 0, result.stderr
    first = Path(result.stdout.strip())
    assert first.name == SPLIT[0].rsplit("/")[-1] and first.with_name(SPLIT[1].rsplit("/")[-1]).is_file()
    assert (first.parents[1] / "mmproj-b.gguf").is_file()
    hub.files = {SPLIT[0]: b""}
    result = hub.fetch()
    assert f"{SPLIT[0]} is the first of 2 files, of which 1 are missing: {SPLIT[1]}" in result.stderr


def test_a_download_to_a_folder(hub, tmp_path):
    hub.files = {"m.gguf": b"four"}
    folder = tmp_path / "folder"
    for offline in (False, True):
        result = hub.fetch(local_dir=str(folder), offline=offline)
        assert result.stdout.strip() == str(folder / "m.gguf"), result.stderr
    assert (folder / "m.gguf").read_bytes() == b"four"


@pytest.mark.slow
@pytest.mark.parametrize(
    "files, only", [(["m.gguf", "README.md"], True), (["m.gguf", "model.safetensors"], False), (["model.safetensors"], False)]
)
def test_a_model_without_a_checkpoint(hub, files, only):
    hub.files = dict.fromkeys(files, b"")
    assert hub.fetch(function="has_only_gguf").stdout.strip() == str(only)


def test_what_the_hub_does_not_have(hub):
    result = hub.fetch(repo="somebody/else")
    assert result.stderr.startswith("ValueError: somebody/else: there is no such file, and no such model on the hub")
    result = hub.fetch(repo="some--body/else.git")
    assert result.stderr.startswith(
        "ValueError: some--body/else.git: there is no such file, and no model on the hub can have that name"
    )


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub is needed: pip install 'lt-gguf\[hub\]'"):
        hub_files.fetch(REPO)
