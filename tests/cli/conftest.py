"""What the tests of the commands share."""

from __future__ import annotations

import pytest

from lt_gguf.cli import build_app
from lt_gguf.cli.common import run


@pytest.fixture
def lt_gguf_command(capfd):
    """Runs `lt-gguf ARGUMENTS` in this process; returns its exit status, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(build_app(), "lt-gguf", [str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return command
