"""How much memory this process may still take: what the machine has free, and what its control groups allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def available_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping and without a control group ending this process.

    Args:
        proc: Where the kernel shows processes.
        cgroups: Where it shows control groups, of either version.
    """
    return max(0, min(_fields(proc / "meminfo")["MemAvailable:"] * 1024, *_left_in_groups(proc, cgroups)))


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each control group of this process that has a limit still allows; files in the page cache count as free."""
    yield 2**63
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, (limit, usage, inactive) = (cgroups / controllers, _V1) if controllers else (cgroups, _V2)
        # In a container the path may be the host's; what is mounted at the root is then the container's own group.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if (group / limit).is_file() and (group / limit).read_text().strip() != "max":
                taken = int((group / usage).read_text()) - _fields(group / "memory.stat").get(inactive, 0)
                yield int((group / limit).read_text()) - taken
            if group == root:
                break


def _fields(path: Path) -> Mapping[str, int]:
    """The first two words of each line, a name and a number."""
    pairs = (line.split()[:2] for line in path.read_text().splitlines())
    return {name: int(value) for name, value in pairs}
