"""A disk that is full, a file that may not grow, a short write: some calls of an output; `tests/faults` tries all."""

from __future__ import annotations

import os
import resource

import pytest

from pymllm.disk import write_whole
from pymllm.errors import CheckpointError, ConfigError
from pymllm.searching.journal import Journal
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.writing.output import Output

from ..faults.test_outputs import sweep, write


@pytest.mark.parametrize("name, out", [("full", "folder"), ("broken", "file.gguf"), ("short", "folder")])
def test_a_fault_is_one_error_and_the_next_run_gives_the_same_bytes(name, out, tmp_path):
    sweep(name, out, tmp_path, every=13)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system limits no file's size")
def test_a_file_that_may_not_grow_is_one_error_and_leaves_nothing(tmp_path):
    """No mock: the system's own limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ConfigError, match="ulimit -f") as caught:
            write_whole(tmp_path / "large", [bytes(60_000)] * 3, 180_000, again="Go on.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.code, caught.value.file) == ("file-too-large", str(tmp_path / "large"))
    assert str(caught.value).endswith("Go on.") and os.listdir(tmp_path) == []
    write_whole(tmp_path / "large", [bytes(60_000)] * 3)
    assert (tmp_path / "large").stat().st_size == 180_000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_device_says_how_much_to_free(tmp_path):
    os.symlink("/dev/full", tmp_path / "out.tmp")
    with pytest.raises(ConfigError, match="No space left on device; expected room for 5 bytes") as caught:
        write_whole(tmp_path / "out", [b"12345"], 5)
    assert caught.value.code == "disk-full" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_what_is_not_finished_is_no_checkpoint(out, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "pymllm.writing.output.Output.publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        write(tmp_path / out)
    with pytest.raises(CheckpointError, match="goes on where it was") as caught:
        open_checkpoint(resolve_model_path(tmp_path / out))
    assert caught.value.code == "unfinished"


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
@pytest.mark.parametrize("make", [lambda path: Output(path, {}), lambda path: Journal(path, {})])
def test_what_the_system_takes_for_no_path_is_one_error(make, name, tmp_path):
    with pytest.raises(ConfigError, match="this is no path") as caught:
        make(tmp_path / name)
    assert caught.value.code == "path" and os.listdir(tmp_path) == []
