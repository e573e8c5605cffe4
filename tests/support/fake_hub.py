"""A server that answers as the hub of models does, for huggingface_hub itself, and a process that downloads from it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "somebody/Tiny-GGUF"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PIECE = 1 << 20  # bytes that are sent at once
FETCH = (
    "import json, sys\nfrom lt_gguf.models import hub_files\n"
    "try:\n    print(getattr(hub_files, sys.argv[3])(*json.loads(sys.argv[1]), **json.loads(sys.argv[2])))\n"
    "except (ValueError, OSError, ImportError) as error:\n    sys.exit(f'{type(error).__name__}: {error}')"
)


class Hub:
    """The files of one model.

    `cut`: each download breaks off after that many bytes; `goes_away`: nothing is answered then. `pause`: seconds between two MiB.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.goes_away = self.gone = False
        self.pause = 0.0
        self.ranges: list[str | None] = []  # of the downloads
        self.address = ""

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that downloads to a cache in `home`."""
        return {
            "HF_HOME": str(home),
            "HF_ENDPOINT": self.address,
            "no_proxy": "*",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

    def fetch(
        self, pattern: str | None = None, repo: str = REPO, function: str = "fetch", **settings: object
    ) -> subprocess.CompletedProcess[str]:
        """Runs a function of `hub_files` in a process of its own: huggingface_hub reads its environment when it is imported."""
        process = self.start(pattern, repo, function, **settings)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(
        self, pattern: str | None = None, repo: str = REPO, function: str = "fetch", **settings: object
    ) -> subprocess.Popen[str]:
        """The same, without waiting for its end."""
        offline = settings.pop("offline", False)
        environment = self.environment(self.home) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
        arguments = [repo, pattern] if function == "fetch" else [repo]
        command = [sys.executable, "-c", FETCH, json.dumps(arguments), json.dumps(settings), function]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=os.environ | environment, **pipes)


@contextmanager
def running(home: Path) -> Iterator[Hub]:
    """Such a server; `home` is where `fetch` downloads to."""
    model = Hub(home)

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
            with suppress(ConnectionError):  # whoever asked was killed
                for first in range(begin, len(content), _PIECE):
                    self.wfile.write(content[first : first + _PIECE])
                    time.sleep(model.pause)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield model
        finally:
            server.shutdown()
