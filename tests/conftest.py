"""What all tests share: the import path of `support`, one thread a library, and the `--full` matrix."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from lt_gguf.runtime.cpu import usable_cores

sys.path.insert(0, str(Path(__file__).parent))

DEMO = Path(__file__).parents[1] / "models" / "demo"

# before torch and the libraries read it: the tests measure small models, where threads only cost
CORES = usable_cores()
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORKER_BYTES = 2 << 30  # most that a process of pytest-xdist takes, with room to spare

# a shell starts what runs in the background with Ctrl-C ignored, and the processes that the tests interrupt would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="the whole matrix of the oracle, and long random walks: half an hour or so"
    )
    parser.addoption("--measurements", type=Path, help="append what the oracle measures to this file, a JSON a line")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_model: runs SmolLM2-135M-Instruct; leave them out with -m 'not real_model'")
    config.addinivalue_line("markers", "slow: takes more than seconds; make test-fast leaves them out")
    config.addinivalue_line("markers", "full: only with --full, in a run of the whole matrix")
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist have this process's environment
        forget_what_was_measured(config)


def forget_what_was_measured(config: pytest.Config) -> None:
    """A user cache without earlier runs' results, which would hide what is computed now; downloads are in their place."""
    from lt_gguf.models.package import CACHE_VARIABLE, user_cache

    downloads = user_cache()
    (downloads / "models").mkdir(parents=True, exist_ok=True)
    cache = tempfile.TemporaryDirectory(prefix="lt-gguf-test-cache-")
    config.add_cleanup(cache.cleanup)
    for path in downloads.iterdir():
        if path.name not in ("analysis", "measured", "chosen", "states", "hashes"):
            (Path(cache.name) / path.name).symlink_to(path)
    os.environ[CACHE_VARIABLE] = cache.name


@pytest.hookimpl(optionalhook=True)  # where pytest-xdist is installed
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What -n auto means: a process for each core that we may use, as far as the memory goes."""
    return max(1, min(CORES, psutil.virtual_memory().available // WORKER_BYTES))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skipped = pytest.mark.skip(reason="part of the whole matrix: needs --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skipped)
    if os.environ.get("PYTEST_XDIST_WORKER"):
        longest_files_first(items)


def longest_files_first(items: list[pytest.Item]) -> None:
    """For processes that take one file after the other: none is to begin with a long one when the others are done."""
    seconds: Counter[Path] = Counter()
    for item in items:
        if not item.get_closest_marker("skip"):
            seconds[item.path] += 15 if "real_model" in item.keywords else 3 if "slow" in item.keywords else 0.1
    items.sort(key=lambda item: -seconds[item.path])


def pytest_sessionstart(session: pytest.Session) -> None:
    """One line, and no tests, where native code crashes on this machine or computes something else: they would only die of it."""
    from lt_gguf.runtime import self_check
    from lt_gguf.runtime.library import LibraryError, library_dir

    # note: workers of pytest-xdist have a session of their own each
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    try:
        library_dir()
    except LibraryError:  # what needs no library can be tested without
        return
    if problems := self_check.check():
        raise pytest.UsageError(*problems)  # which pytest shows as a line each


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as a GGUF file, its weights exact."""
    from lt_gguf.conversion import convert

    settings = {"outtype": "f32", "select": "interleave-odd", "no_report": True}
    return convert(DEMO, tmp_path_factory.mktemp("demo") / "demo.gguf", **settings).files[0]


@pytest.fixture(scope="session")
def stories_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on, in words that the demo model knows."""
    from lt_gguf.evaluation.stories import story

    rng = np.random.default_rng(1)
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text("\n\n".join(story(rng) for _ in range(40)))
    return file


@pytest.fixture
def lt_gguf_command(capfd):
    """Runs `lt-gguf ARGUMENTS` in this process; returns its exit status, stdout and stderr."""
    from lt_gguf.cli import build_app
    from lt_gguf.cli.common import run

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(build_app, "lt-gguf", [str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return command
