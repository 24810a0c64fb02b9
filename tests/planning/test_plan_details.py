"""What a plan says of ranks, rules, other plans and memory."""

from __future__ import annotations

import json

import pytest

import pymllm
from pymllm import Parallel
from pymllm.cli import main
from pymllm.errors import ConfigError
from pymllm.planning.difference import compare_plans
from pymllm.weights import memory

from ..checkpoints import FAMILIES, write_checkpoint
from ..moe_checkpoints import write_moe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """AWQ in groups of 64: the 256 inputs of down_proj make four groups, the 128 of o_proj two."""
    return write_checkpoint(tmp_path_factory.mktemp("awq"), "llama", "awq-g64").folder


def test_sizes_that_do_not_work_have_a_reason(tmp_path):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 16, "hidden_size": 96}
    ranks = pymllm.plan(write_checkpoint(tmp_path / "six", **heads).folder).tensor_parallel
    assert 2 in ranks["legal_sizes"] and 4 not in ranks["legal_sizes"]
    assert "6 attention heads" in ranks["refused_sizes"]["4"]
    # Eight heads of four: at eight ranks a word of AWQ, which packs eight outputs, would have to be split.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    ranks = pymllm.plan(
        write_checkpoint(tmp_path / "eight", "llama", "awq-g32", **heads).folder
    ).tensor_parallel
    assert ranks["legal_sizes"] == [1, 2, 4] and set(ranks["refused_sizes"]) == {"8"}
    assert "splits a group of 8" in ranks["refused_sizes"]["8"]


def test_a_size_that_splits_the_groups_of_a_rule_is_refused_with_a_reason(tmp_path):
    """384 inputs are three groups of 128; half of them, 192, are none."""
    folder = write_checkpoint(tmp_path, intermediate_size=384).folder
    rules = {"**.down_proj": "int4:group_size=128"}
    ranks = pymllm.plan(folder, rules).tensor_parallel
    assert 2 not in ranks["legal_sizes"]
    assert "groups of 128 do not divide" in ranks["refused_sizes"]["2"]
    with Parallel(0, 2), pytest.raises(ConfigError, match="Sizes that work for this model: 1"):
        pymllm.plan(folder, rules)


def test_bytes_of_a_rank_are_what_its_own_plan_says(folder):
    one = pymllm.plan(folder).tensor_parallel
    assert one["legal_sizes"] == [1, 2, 4]
    for size, nbytes in one["weight_bytes_by_size"].items():
        with Parallel(0, int(size)):
            assert pymllm.plan(folder).totals["weight_bytes"] == nbytes


@pytest.mark.parametrize("family", ["qwen2", "olmo2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("rules", [None, {"lm_head": "int8"}, {"**": "int8"}])
def test_biases_tied_tables_and_experts_are_in_the_bytes_of_a_rank(family, rules, tmp_path):
    if family in FAMILIES:
        folder = write_checkpoint(tmp_path, family, tie_word_embeddings=family == "qwen2").folder
    else:
        folder = write_moe(tmp_path, family).folder
        rules = None if family == "gpt_oss" and rules else rules  # its experts' floats lie transposed
    ranks = pymllm.plan(folder, rules).tensor_parallel
    assert len(ranks["weight_bytes_by_size"]) > 1
    for size, nbytes in ranks["weight_bytes_by_size"].items():
        with Parallel(0, int(size)):
            assert pymllm.plan(folder, rules).totals["weight_bytes"] == nbytes


def test_rules_say_how_many_layers_they_decide(folder):
    rules = pymllm.plan(folder, ["**.q_proj=int8", "**.self_attn.**=fp8", "lm_head=int8"]).rules
    assert [(rule["matches"], rule["decides"]) for rule in rules] == [(2, 2), (8, 6), (1, 1)]
    assert [rule["shadowed_by"] for rule in rules] == [[], ["**.q_proj=int8"], []]


def test_a_difference_lists_what_changes_and_nothing_else(folder):
    before = pymllm.plan(folder)
    assert compare_plans(before.to_dict(), before).empty
    after = pymllm.plan(folder, {"**.mlp.**": "int8"}, dtype="bfloat16")
    found = compare_plans(json.loads(json.dumps(before.to_dict())), after)
    assert found.settings == {"dtype": ["float32", "bfloat16"]}
    changed = {layer.prefix: layer for layer in found.changed}
    down = changed["model.layers.0.mlp.down_proj"]
    assert down.before["method"] == "awq" and down.after["method"] == "int8"
    assert down.after["bytes"] == after.layer(down.prefix).bytes
    total = "weight_bytes"
    assert found.totals[total] == [before.totals[total], after.totals[total]]
    assert not found.added and not found.removed
    shorter = before.to_dict()
    gone = shorter["layers"].pop(0)
    assert compare_plans(shorter, before).added == [gone["prefix"]]


def test_the_command_compares_with_a_saved_plan(folder, tmp_path, capsys):
    assert main(["plan", str(folder), "--json"]) == 0
    saved = tmp_path / "plan.json"
    saved.write_text(capsys.readouterr().out)
    assert main(["plan", str(folder), "--diff", str(saved)]) == 0
    assert capsys.readouterr().out == "nothing would change\n"
    assert main(["plan", str(folder), "--quant", "**.mlp.**=fp8", "--diff", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "awq int4 g64 -> fp8" in out and "weight_bytes: " in out
    assert main(["plan", str(folder), "--quant", "**.mlp.**=fp8", "--diff", str(saved), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["changed"]) == 6
    for content in ("{}", "[1]", "no json", '{"schema_version": 1, "layers": [3]}'):
        saved.write_text(content)
        assert main(["plan", str(folder), "--diff", str(saved)]) == 1
        assert "plan" in capsys.readouterr().err


# Memory


def test_a_model_that_does_not_fit_is_refused_with_numbers_before_it_is_read(folder, monkeypatch, capsys):
    needed = pymllm.plan(folder).totals["peak_load_bytes"]
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(memory, "available_memory", lambda device, free=free: free)
        for load in (pymllm.load_model, pymllm.LLM, pymllm.verify):
            if fits:
                assert load(folder)
                continue
            with pytest.raises(ConfigError) as caught:
                load(folder)
            assert caught.value.code == "out-of-memory"
            assert str(needed) in str(caught.value) and str(free) in str(caught.value)
            assert load(folder, check_memory=False)
    assert main(["verify", str(folder)]) == 1
    assert "--no-memory-check" in capsys.readouterr().err
    assert main(["verify", str(folder), "--no-memory-check"]) == 0
    monkeypatch.setattr(memory, "available_memory", lambda device: None)  # a system that does not say
    assert pymllm.load_model(folder)


def test_available_memory_is_the_least_of_what_system_and_groups_allow(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable:     1234 kB\n")
    assert memory._system_memory(meminfo) == 1234 * 1024
    assert memory._system_memory(tmp_path / "none") is None
    assert memory._cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    assert memory._cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._cgroup_memory(tmp_path) == 1000 - 700 + 100
    first = tmp_path / "version1"
    first.mkdir()
    for name, text in (
        ("limit_in_bytes", "900"),
        ("usage_in_bytes", "650"),
        ("stat", "total_inactive_file 50"),
    ):
        (first / f"memory.{name}").write_text(text)
    assert memory._cgroup_memory(first) == 900 - 650 + 50
    monkeypatch.setattr(memory, "group_folders", lambda controller: [tmp_path, first])
    assert memory.available_memory("cpu") == 300
    monkeypatch.undo()
    assert memory.available_memory("cpu") > 0
