"""How much of the host's memory this process may still take: the machine's, and what its container leaves of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftcore.errors import Exit, FtcoreError
from ftcore.report import size

SPARE = 2**28
"""Bytes that are left to everybody else, whatever is asked for."""

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


class NoHostMemory(FtcoreError, RuntimeError):
    """The host has no room for what a GPU was to leave there."""

    code = Exit.CONFIG


def need(count: int) -> None:
    """See that so many bytes more are there. Raises NoHostMemory: a process that just took them might be killed."""
    there = available()
    if count + SPARE > there:
        raise NoHostMemory(
            f"the host has {size(max(there - SPARE, 0))} of memory left, and {size(count)} more are needed there\n"
            "    fix: set memory=least, which leaves nothing there, or give the process more"
        )


def available() -> int:
    """Bytes that this process may take: what the machine has, or the control groups that it is in, if that is less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_by_groups()])


def _left_by_groups() -> Iterator[int]:
    for folder, limit, used, cache in _groups():
        try:
            most = (folder / limit).read_text(encoding="utf-8").strip()
            if most == "max":
                continue
            taken = int((folder / used).read_text(encoding="utf-8"))
            # Pages of files are given up before anything else is refused.
            lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            fields = dict(line.split() for line in lines if line)
            cached = sum(int(fields.get(cache.format(kind), 0)) for kind in ("active", "inactive"))
            yield max(int(most) - taken + cached, 0)
        except (OSError, ValueError):
            continue


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the groups that hold this process, with the names of the files in them."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found = CGROUPS, "memory.max", "memory.current", "{}_file"
        elif "memory" in controllers.split(","):
            found = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}_file"
        else:
            continue
        folder, *names = found
        below = Path(path.lstrip("/"))
        # In a container the group's own folder is often the root; a limit may be on any folder above as well.
        for part in (below, *below.parents):
            yield (folder / part, *names)  # type: ignore[misc]
