"""The control groups of this process: the folders in which Linux says what a container may use.

A process is in one group of a tree, and every group above it limits it, too. Version 2 has one tree for all that is
limited; version 1 has one for each controller ("memory", "cpu"). https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

PROCESS = Path("/proc/self")

_MICROSECONDS = re.compile("0*[1-9][0-9]{0,17}")  # at least 1, and no more than the kernel's 64 bits


def group_folders(controller: str, process: Path = PROCESS) -> list[Path]:
    """List the folders of this process's group and of all above it that can be seen, for one controller.

    controller: "memory" or "cpu".  process: the folder that stands for /proc/self.
    Returns [] where there are no control groups.
    """
    folders: list[Path] = []
    groups = [line.split(":", 2) for line in _lines(process / "cgroup")]
    paths = {names: path for _, names, path in (group for group in groups if len(group) == 3)}
    for line in _lines(process / "mountinfo"):
        mount, _, system = line.partition(" - ")
        fields, words = mount.split(), system.split() or [""]
        kind, options = words[0], words[-1]
        if len(fields) < 5 or not (
            kind == "cgroup2" or (kind == "cgroup" and controller in options.split(","))
        ):
            continue
        names = "" if kind == "cgroup2" else next((n for n in paths if controller in n.split(",")), "-")
        root, top = (_unescaped(field) for field in fields[3:5])
        # A container may see its group as the root of what is mounted, while the path is the host's.
        path = paths.get(names, root)
        above = root.rstrip("/")
        inside = path.removeprefix(above) if f"{path}/".startswith(f"{above}/") else ""
        parts = [part for part in inside.split("/") if part]
        parts = [] if ".." in parts else parts
        folders += [Path(top, *parts[:depth]) for depth in range(len(parts), -1, -1)]
    # Path.is_dir raises where a folder above may not be entered.
    return [folder for folder in folders if os.path.isdir(folder)]


def cpu_quota(process: Path = PROCESS) -> float | None:
    """Return how many CPUs' time this process's groups may take, 1.5 say; None: as much as there is."""
    quotas = []
    for folder in group_folders("cpu", process):
        one_file = " ".join(
            _lines(folder / "cpu.max")
        )  # "150000 100000": microseconds of a period; or "max 100000"
        two_files = " ".join(" ".join(_lines(folder / f"cpu.cfs_{part}_us")) for part in ("quota", "period"))
        for words in (one_file.split(), two_files.split()):
            if len(words) == 2 and all(map(_MICROSECONDS.fullmatch, words)):  # -1 is no limit
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def whole_cpus(quota: float) -> int:
    """Round a quota to a number of threads: up, as a thread more uses what is left of a CPU."""
    return max(math.ceil(quota), 1)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):  # ValueError: no text, or no name that a file can have
        return []


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)
