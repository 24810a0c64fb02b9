"""A full, broken or read-only disk at every call of an output: one error, nothing half there, and it goes on."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
import torch

from pymllm.errors import ConfigError, PymllmError
from pymllm.writing.output import Output
from pymllm.writing.single_file import SingleFileOutput

from ..injecting import CHANGING, KINDS, Disk, ended, error, open_files, short

STEPS = {
    "first": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)},
    "second": {"c": torch.arange(40, dtype=torch.int8), "d": torch.ones(2, 2, dtype=torch.bfloat16)},
}
ROOM = (*CHANGING[:5],)  # what a full disk refuses: it lets files go


def write(out: Path) -> None:
    """Write a small checkpoint, as `CheckpointWriter` does, from where an earlier run has come to."""
    with make(out) as output:
        if not output.publishing:
            if not output.assembling:
                for step, tensors in STEPS.items():
                    if step not in output.pieces:
                        output.add(step, tensors, {step: 1})
                        output.save_state({"hidden": torch.zeros(3)}, step)
                output.load_state()
            output.assemble(list(STEPS), 1000 if out.suffix else 40, {"notes": 1})
            if out.suffix != ".gguf":
                output.add_file("1_Pooling/config.json", b"{}")
                output.add_file("config.json", b"{}")
        output.publish()


def make(out: Path) -> Output:
    if out.suffix == ".gguf":
        return SingleFileOutput(out, {"a": 1}, lambda tensors: iter([b"GGUF", *map(str.encode, tensors)]))
    return Output(out, {"a": 1})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FAULTS = {
    "full": (error(errno.ENOSPC), ROOM, True, {"disk-full"}),
    "quota": (error(errno.EDQUOT), ("write",), False, {"disk-full"}),
    "large": (error(errno.EFBIG), ("write",), False, {"file-too-large"}),
    "read-only": (error(errno.EROFS), CHANGING, True, {"read-only"}),
    "denied": (error(errno.EACCES), (*CHANGING, "open", "list", "stat"), False, {"read-only", "unreadable"}),
    "broken": (error(errno.EIO), KINDS, False, {"unwritable", "unreadable"}),
    "files": (error(errno.EMFILE), ("create", "open", "list"), False, {"unwritable", "unreadable"}),
    "ended": (ended, ("read",), False, {"resume-damaged", "truncated"}),
    "short": (short, ("read", "write"), False, set()),
}


@pytest.mark.parametrize("out", ["folder", "file.gguf"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_call_is_one_error_and_the_next_run_gives_the_same_bytes(name, out, tmp_path):
    sweep(name, out, tmp_path)


def sweep(name, out, tmp_path, every=1):
    """Have every `every`-th call fail in turn."""
    fault, kinds, stays, codes = FAULTS[name]
    write(tmp_path / "whole" / out)
    whole = files(tmp_path / "whole")
    before = open_files()
    raised = set()
    for number in range(0, 1000, every):
        root = tmp_path / f"run {number}"
        disk = Disk(root, kinds, number, fault, stays=stays)
        try:
            with disk.watch():
                write(root / out)
        except PymllmError as caught:
            raised.add(caught.code)
            assert caught.file is not None and caught.file.startswith(str(root)) and caught.fix
            final = root / out / "config.json" if out == "folder" else root / out
            # Whole, or not there.
            assert not final.exists() or files(root).items() >= whole.items()
            if name != "read-only" and disk.calls[number] != "remove":
                assert list(root.rglob("*.tmp")) == []
        if disk.failed:
            with Disk(root).watch():
                write_again(root / out)
        assert files(root) == whole
        if not disk.failed:
            break
    gc.collect()
    assert open_files() <= before
    assert number > (2 if name == "files" else 4) and raised <= codes and bool(raised) is bool(codes)


def write_again(out: Path) -> None:
    """Ask for the same again; an output that is there as a whole is not written over."""
    try:
        write(out)
    except ConfigError as caught:
        assert caught.code == "out-exists"
