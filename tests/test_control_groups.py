"""What a container may use, read from made-up folders in the place of /proc/self and of the mounted groups."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from pymllm.control_groups import cpu_quota, group_folders, whole_cpus


def process(root: Path, cgroup: str, mounts: Mapping[str, str], files: Mapping[str, str]) -> Path:
    """Write /proc/self and the groups.  mounts: "root inside the tree, folder" -> the end of a mountinfo line."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    lines = [
        f"{31 + i} 23 0:28 {inside} {str(root / folder).replace(' ', chr(92) + '040')} rw,relatime shared:9 - {kind}"
        for i, ((inside, folder), kind) in enumerate((key.split(", "), kind) for key, kind in mounts.items())
    ]
    (root / "self").mkdir()
    (root / "self" / "mountinfo").write_text(
        "22 1 254:0 / / rw - ext4 /dev/root rw\n" + "\n".join(lines) + "\n"
    )
    (root / "self" / "cgroup").write_text(cgroup)
    return root / "self"


SECOND = {"/, groups": "cgroup2 cgroup2 rw,nsdelegate"}
FIRST = {"/, cpu": "cgroup cgroup rw,cpu,cpuacct", "/, memory": "cgroup cgroup rw,memory"}
CASES = {
    "version 2": ("0::/\n", SECOND, {"groups/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ("0::/a\n", SECOND, {"groups/a/cpu.max": "max 100000\n"}, None),
    "the group above allows less": (
        "0::/pod/box\n",
        SECOND,
        {"groups/pod/cpu.max": "50000 100000\n", "groups/pod/box/cpu.max": "400000 100000\n"},
        0.5,
    ),
    "the group above has no limit": (
        "0::/pod/box\n",
        SECOND,
        {"groups/pod/cpu.max": "max 100000\n", "groups/pod/box/cpu.max": "400000 100000\n"},
        4,
    ),
    "a neighbour's limit": (
        "0::/pod\n",
        SECOND,
        {"groups/pod/cpu.max": "max 100000\n", "groups/other/cpu.max": "1000 100000\n"},
        None,
    ),
    "version 1": (
        "4:memory:/\n3:cpu,cpuacct:/box\n0::/\n",
        FIRST,
        {"cpu/box/cpu.cfs_quota_us": "250000\n", "cpu/box/cpu.cfs_period_us": "100000\n"},
        2.5,
    ),
    "version 1, no limit": (
        "3:cpu,cpuacct:/\n",
        FIRST,
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "both versions": (
        "3:cpu,cpuacct:/box\n0::/box\n",
        FIRST | SECOND,
        {
            "cpu/box/cpu.cfs_quota_us": "300000\n",
            "cpu/box/cpu.cfs_period_us": "100000\n",
            "groups/box/cgroup.procs": "",
        },
        3,
    ),
    "a container that sees its group as the root": (
        "0::/docker/4f2a\n",
        {"/docker/4f2a, groups": "cgroup2 cgroup rw"},
        {"groups/cpu.max": "200000 100000\n"},
        2,
    ),
    "a path outside of what is mounted": (
        "0::/../../other\n",
        SECOND,
        {"groups/cpu.max": "200000 100000\n", "other/cpu.max": "1000 100000\n"},
        2,
    ),
    "a folder with a space": (
        "0::/\n",
        {"/, my groups": "cgroup2 cgroup2 rw"},
        {"my groups/cpu.max": "7 2\n"},
        3.5,
    ),
    "nonsense": (
        "::\nx\n",
        SECOND | {"/, odd": "cgroup2"},
        {"groups/cpu.max": "a lot\n", "odd/cpu.max": "0 0"},
        None,
    ),
    "a neighbour whose name begins like the root": (
        "0::/box2/a\n",
        {"/box, groups": "cgroup2 cgroup2 rw"},
        {"groups/cpu.max": "200000 100000\n", "groups/2/a/cpu.max": "1000 100000\n"},
        2,
    ),
    "digits that are no number": ("0::/\n", SECOND, {"groups/cpu.max": "\u00b200 100000\n"}, None),
    "a number of no machine": ("0::/\n", SECOND, {"groups/cpu.max": f"{'9' * 5000} 100000\n"}, None),
    "a number of no CPU": ("0::/\n", SECOND, {"groups/cpu.max": f"{'9' * 400} 100000\n"}, None),
    "one number of two": ("0::/\n", SECOND, {"groups/cpu.max": "150000\n"}, None),
    "a name that no file can have": (f"0::/{'x' * 5000}\n", SECOND, {"groups/cpu.max": "7 2\n"}, 3.5),
    "no groups": ("", {}, {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_quota_is_the_least_of_the_groups_that_the_process_is_in(case, tmp_path):
    cgroup, mounts, files, quota = CASES[case]
    assert cpu_quota(process(tmp_path, cgroup, mounts, files)) == quota


def test_controllers_have_folders_of_their_own_the_process_own_group_first(tmp_path):
    files = {"memory/a/b/tasks": "", "cpu/c/tasks": ""}
    where = process(tmp_path, "4:memory:/a/b\n3:cpu,cpuacct:/c\n", FIRST, files)
    assert group_folders("memory", where) == [tmp_path / "memory" / name for name in ("a/b", "a", "")]
    assert group_folders("cpu", where) == [tmp_path / "cpu" / "c", tmp_path / "cpu"]


def test_a_folder_that_may_not_be_entered_is_passed_over(tmp_path, monkeypatch):
    where = process(tmp_path, "0::/a\n", SECOND, {"groups/a/cpu.max": "7 2\n", "groups/cpu.max": "9 2\n"})
    stat = os.stat

    def refuse(path, *args, **options):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert cpu_quota(where) == 4.5


def test_a_system_without_groups_has_none(tmp_path):
    assert group_folders("cpu", tmp_path / "none") == [] and cpu_quota(tmp_path / "none") is None


@pytest.mark.parametrize(("quota", "threads"), ((0.05, 1), (1.0, 1), (1.01, 2), (2.5, 3)))
def test_a_part_of_a_cpu_is_worth_a_thread(quota, threads):
    assert whole_cpus(quota) == threads
