"""`quantize`, `batch` and a search's journal, killed at every stage: what is there is never mistaken, and goes on."""

from __future__ import annotations

import json

import pytest

from ..checkpoints import write_checkpoint
from ..processes import python


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep of kills.  Gives what the whole work wrote, and a report a kill, the last of one that was none."""

    def run(work, every, **sizes):
        write_checkpoint(tmp_path / "model", "llama", "none-bf16", **sizes)
        done = python("-m", "tests.faults.killed", work, tmp_path, every, check=True)
        first, *reports = map(json.loads, done.stdout.splitlines())
        assert len(reports) > 3 and [one["code"] for one in reports] == [-9] * (len(reports) - 1) + [0]
        return first["whole"], reports

    return run


SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("work, every", [("folder", 11), ("gguf", 7), ("mlx", 11)])
def test_a_killed_run_leaves_no_half_checkpoint_and_goes_on_to_the_same_bytes(sweep, work, every):
    whole, reports = sweep(work, every, **SMALL)
    for one in reports:
        last = "out/config.json" if work != "gguf" else "out.gguf"
        if one["state"] == "whole":
            assert one["kept"].items() >= whole.items()
        else:
            assert last not in one["kept"]
            assert one["state"] in ("unfinished", "config-missing", "folder-missing", "model-not-found")
            if any("journal.jsonl" in name for name in one["kept"]):
                assert one["state"] == "unfinished"
        # A checkpoint that is there as a whole is not written again.
        assert one["again"] == (3 if one["state"] == "whole" and one["again"] else 0)
        assert one["files"] == whole


def test_a_killed_batch_answers_every_line_once(sweep):
    whole, reports = sweep("batch", 1, **SMALL)

    def answers(found):
        lines = bytes.fromhex(found["out.jsonl"]).splitlines()
        return {
            (one := json.loads(line))["custom_id"]: one["response"]["body"]["choices"] for line in lines
        }, len(lines)

    expected, count = answers(whole)
    assert count == 6
    for one in reports:
        assert one["again"] == 0 and answers(one["files"]) == (expected, 6)


def test_a_killed_search_keeps_what_it_has_measured(sweep):
    whole, reports = sweep("journal", 1, **SMALL)
    assert all(one["again"] == 0 and one["files"] == whole for one in reports)
    assert len({len(one["kept"].get("kept/journal.jsonl", "")) for one in reports}) > 5
