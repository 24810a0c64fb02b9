"""Kept weights that others use too: removed, replaced or made at once, of ranks and of drafts, where nothing fits."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys

import pytest

from pymllm.kernels.native.extension import native_available
from pymllm.loading import packed_cache
from pymllm.parallel import Parallel

from ..checkpoints import AWQ, Plain, write_checkpoint
from ..processes import SECONDS, environment
from .test_packed_cache import assert_same, load, taken

pytestmark = pytest.mark.skipif(
    not native_available(), reason="packed weights are kept with the native kernels alone"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("good"), "llama", AWQ(64), num_hidden_layers=1).folder


def files(cache):
    return sorted(cache.glob("*"))


def test_what_was_used_longest_ago_goes_first_and_runs_on(folder, tmp_path, monkeypatch):
    cache = tmp_path / "kept"
    rules = [["**.down_proj=int8"], ["**.up_proj=int8"], ["**.q_proj=int8"]]
    for rule in rules[:2]:
        load(folder, cache, quant=rule)
    models = [load(folder, cache, quant=rule) for rule in rules[:2]]
    first, second = (model.load_report.taken_from for model in models)
    # The first one was used last.
    os.utime(first, (2e9, 2e9))
    os.utime(second, (1e9, 1e9))
    size = sum(path.stat().st_size for path in files(cache))
    monkeypatch.setattr(packed_cache, "MOST_KEPT", size + size // 4)
    third = load(folder, cache, quant=rules[2]).load_report.kept_in
    assert {str(path) for path in files(cache)} == {first, third}
    # Who has mapped the file that went keeps it.
    assert_same(models[1], load(folder, "off", quant=rules[1]))


def test_a_file_that_is_made_anew_leaves_the_old_one_to_who_has_mapped_it(folder, tmp_path, monkeypatch):
    cache = tmp_path / "kept"
    load(folder, cache)
    model = load(folder, cache)
    (file,) = files(cache)
    before = file.stat().st_ino
    monkeypatch.setattr("pymllm.loading.packed_key._code", lambda: ("another build",))
    assert not taken(load(folder, cache))
    assert files(cache) == [file] and file.stat().st_ino != before, (
        "it takes the other's place, and is another"
    )
    assert_same(model, load(folder, "off"))


def test_a_kept_file_is_not_to_be_written_to(folder, tmp_path):
    """A mapped file that is cut off ends who has mapped it (SIGBUS); one that is edited changes their weights."""
    load(folder, tmp_path / "kept")
    (file,) = files(tmp_path / "kept")
    assert stat.S_IMODE(file.stat().st_mode) == 0o400
    if os.geteuid():
        with pytest.raises(PermissionError):
            os.open(file, os.O_RDWR)
    assert taken(load(folder, tmp_path / "kept")), "its time of use is still set"


LOADS = """
import json, sys
import torch
from pymllm import load_model
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(4):
    model = load_model(sys.argv[1], packed_cache=sys.argv[2], progress=False, check_memory=False)
    print(json.dumps([model.load_report.kept_in, model.load_report.taken_from]), flush=True)
"""


def test_processes_that_keep_and_take_at_once(folder, tmp_path):
    cache = tmp_path / "kept"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOADS, str(folder), str(cache)],
            env=environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, err
        found = [json.loads(line) for line in out.splitlines()]
        assert all(bool(kept) != bool(of) for kept, of in found), "each load keeps or takes"
        assert found[-1][1], "in the end there is one to take"
        assert "not kept" not in err and "not used" not in err
    assert len(files(cache)) == 1
    model = load(folder, cache)
    assert taken(model)
    assert_same(model, load(folder, "off"))


def test_processes_of_one_number_write_files_of_their_own(folder, tmp_path, monkeypatch):
    """Containers number their processes alike: neither may write to what the other has put in its place."""
    names, real = [], packed_cache.write_packed

    def recording(path, *rest):
        names.append(path)
        return real(path, *rest)

    monkeypatch.setattr(packed_cache, "write_packed", recording)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    for name in ("one", "other"):
        load(folder, tmp_path / name)
    assert names[0].name != names[1].name
    assert all(name.suffix == ".tmp" for name in names), "what is left by a process that is killed is removed"


def test_an_interruption_while_keeping_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_cache.os, "chmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tmp_path / "kept")
    assert files(tmp_path / "kept") == []


@pytest.fixture
def no_large_files():
    """Has the system refuse to write files beyond 4 KiB, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_on_the_way_leaves_nothing(folder, tmp_path, no_large_files, caplog):
    assert not taken(load(folder, tmp_path / "kept"))
    assert "not kept" in caplog.text and files(tmp_path / "kept") == []


def test_a_disk_without_room_is_said_with_its_numbers(folder, tmp_path, monkeypatch, caplog):
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _: usage)
    assert not taken(load(folder, tmp_path / "kept"))
    assert "0.0 GB free" in caplog.text and files(tmp_path / "kept") == []


def test_a_file_is_taken_where_nothing_can_be_written(folder, tmp_path, monkeypatch):
    load(folder, tmp_path / "kept")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(packed_cache.os, "utime", refuse)
    monkeypatch.setattr(packed_cache.os, "replace", refuse)
    assert taken(load(folder, tmp_path / "kept"))


def test_another_users_folder_is_left_alone(folder, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "kept"
    load(folder, cache)
    before = [(path, path.stat().st_ino) for path in files(cache)]
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    assert not taken(load(folder, cache))
    assert "belongs to user" in caplog.text
    assert [(path, path.stat().st_ino) for path in files(cache)] == before


def test_each_rank_has_a_file_of_its_own(folder, tmp_path):
    cache = tmp_path / "kept"

    def ranks(where):
        for rank in range(2):
            with Parallel(rank, 2):
                yield load(folder, where)

    assert not any(map(taken, ranks(cache)))
    assert len(files(cache)) == 2
    again = list(ranks(cache))
    assert all(map(taken, again))
    assert len({model.load_report.taken_from for model in again}) == 2
    for model, loaded in zip(again, ranks("off"), strict=True):
        assert_same(model, loaded)
    assert not taken(load(folder, cache)), "the whole model is another"


def test_a_draft_is_kept_beside_its_model(folder, tmp_path):
    draft = write_checkpoint(tmp_path / "draft", "llama", Plain(), num_hidden_layers=1).folder
    cache = tmp_path / "kept"
    reports = []
    for _ in range(2):
        model = load(folder, cache, strategy=f"draft_model:path={draft}")
        reports.append([model.load_report, model.strategy.draft.load_report])
    assert [bool(report.kept_in) for report in reports[0]] == [True, True]
    assert [bool(report.taken_from) for report in reports[1]] == [True, True]
    assert len(files(cache)) == 2
