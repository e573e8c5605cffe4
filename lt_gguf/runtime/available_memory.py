"""How much memory this process can still take: what a context's size is chosen by."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lt_gguf.runtime.control_groups import group_folders, read_or_empty


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, as the system and this process's control groups say; `None`: nothing says it.

    What the page cache holds counts as available; a mapped model file is in it.
    """
    numbers = list(_linux(root)) if sys.platform != "darwin" else list(_macos())
    return max(0, min(numbers)) if numbers else None


def _linux(root: Path) -> Iterator[int]:
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", read_or_empty(root / "proc" / "meminfo"), re.MULTILINE):
        yield int(found[1]) << 10
    mounted = root / "sys" / "fs" / "cgroup"
    for line in read_or_empty(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left([mounted, mounted / "unified"], path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _left([mounted / controllers, mounted / "memory"], path, *names)


def _left(mounted: list[Path], path: str, limit: str, usage: str, cached: str) -> Iterator[int]:
    """What each group's limit leaves. Pages of files that nobody has looked at lately are given back when memory is short."""
    for folder in group_folders(mounted, path):
        most, used = read_or_empty(folder / limit).strip(), read_or_empty(folder / usage).strip()
        if most.isdecimal() and used.isdecimal():  # "max": no limit
            found = re.search(rf"^{cached} (\d+)$", read_or_empty(folder / "memory.stat"), re.MULTILINE)
            yield int(most) - int(used) + (int(found[1]) if found else 0)


def _macos() -> Iterator[int]:
    """Free, inactive and speculative pages; what is compressed or wired stays where it is."""
    try:
        said = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    pages = dict(re.findall(r"^Pages (free|inactive|speculative):\s+(\d+)\.", said, re.MULTILINE))
    if "free" in pages:
        yield sum(map(int, pages.values())) * os.sysconf("SC_PAGE_SIZE")
