"""`pymllm plan`, as a table and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pymllm
from pymllm.cli import main
from pymllm.cli.plan import common_pattern
from tests.cli.commands import assert_one_error
from tests.processes import python


def test_plan_json_is_the_plan(awq, capsys):
    rules = ["**.mlp.**=fp8", "lm_head=none"]
    assert main(["plan", str(awq), "--quant", rules[0], "--quant", rules[1], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == pymllm.plan(str(awq), rules).to_dict()
    assert {layer["rule"] for layer in printed["layers"] if ".mlp." in layer["prefix"]} == {rules[0]}


def test_rules_of_a_file_and_of_options_keep_their_order(awq, tmp_path, capsys):
    (tmp_path / "rules").write_text("# all\n**.layers.**=fp8\n")
    for first in (True, False):
        options = [["--quant", "**.mlp.**=none"], ["--quant-file", str(tmp_path / "rules")]]
        words = [word for option in (options if first else options[::-1]) for word in option]
        code = main(["plan", str(awq), *words, "--json"])
        captured = capsys.readouterr()
        if first:
            layers = json.loads(captured.out)["layers"]
            methods = {layer["method"] for layer in layers if ".mlp." in layer["prefix"]}
            assert code == 0 and methods == {"none"}
        else:
            assert_one_error(code, captured, "never applies")


def test_plan_shows_the_share_of_a_rank(awq, capsys):
    assert main(["plan", str(awq), "--tensor-parallel-size", "2", "--rank", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["tensor_parallel"]["rank"], plan["tensor_parallel"]["size"]) == (1, 2)
    layer = next(layer for layer in plan["layers"] if layer["prefix"].endswith("0.mlp.gate_proj"))
    assert layer["shape_local"] == [layer["shape"][0] // 2, layer["shape"][1]]


def test_plan_prints_groups_or_all_layers(awq, capsys):
    assert main(["plan", str(awq), "--quant", "**.mlp.**=fp8"]) == 0
    text = capsys.readouterr().out
    for needle in (
        "awq int4 g64",
        "rule **.mlp.**=fp8",
        "model.layers.*.mlp.*",
        "more refusals",
        "KV cache",
    ):
        assert needle in text
    assert main(["plan", str(awq), "--all"]) == 0
    text = capsys.readouterr().out
    for layer in pymllm.plan(str(awq)).layers:
        assert layer.prefix in text


def test_plan_names_the_refusals_that_a_user_can_change_and_all_of_them_with_why(awq, capsys):
    arguments = ["plan", str(awq), "--device", "cuda:sm90", "--dtype", "float32", "--quant", "**.mlp.**=fp8"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("not chosen")]
    assert len(lines) == 2 and all(line.endswith("dtype=bfloat16 would allow it") for line in lines)
    assert "triton_fp8_w8a8 (6 x linear), torch_scaled_mm (6 x linear): quantises activations" in lines[0]
    assert "triton_fp8 (6 x linear), triton_int (8 x linear): multiplies float16 or bfloat16" in lines[1]
    planned = pymllm.plan(str(awq), {"**.mlp.**": "fp8"}, device="cuda:sm90", dtype="float32")
    refused = {(r["kernel"], r["why"], r["cause"]) for layer in planned.layers for r in layer.refused}
    kinds = {(layer.kind, r["kernel"], r["why"]) for layer in planned.layers for r in layer.refused}
    assert f"{len(kinds) - 4} more refusals, " in text  # four are named in the two lines
    assert "reference (linear) computes with: weights dequantised exactly" in text
    assert main([*arguments, "--why"]) == 0
    lines = " ".join(capsys.readouterr().out.split()).split("not chosen")[1:]
    for kernel, why, cause in refused:
        assert any(kernel in line and (why in line or cause == "device") for line in lines), (kernel, why)
    assert sum("for other devices" in line for line in lines) == 1


def test_another_compute_shows_what_kernels_round_and_another_cache_what_a_token_takes(awq, tmp_path, capsys):
    saved = tmp_path / "before.json"
    assert main(["plan", str(awq), "--json"]) == 0
    saved.write_text(capsys.readouterr().out)
    assert main(["plan", str(awq), "--diff", str(saved)]) == 0
    assert capsys.readouterr().out == "nothing would change\n"
    changed = ["--compute", "exact", "--kv-cache", "fp8", "--max-model-len", "64"]
    assert main(["plan", str(awq), *changed, "--diff", str(saved)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for needle in (
        "compute: auto -> exact",
        "kv_cache.max_model_len: ",
        "rounded to int8 in groups (relative error about 6e-3), sums in float32 -> inputs as they are",
        "rounds inputs to fewer bits: yes -> no",
        "KV cache in fp8",
    ):
        assert needle in text, needle
    assert main(["plan", str(awq), *changed, "--diff", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["settings"] == {"compute": ["auto", "exact"]}
        and found["further"]["kv_cache.max_model_len"][1] == 64
    )
    attention = next(layer for layer in found["changed"] if layer["prefix"].endswith("attn"))
    assert attention["after"]["kv_bytes_per_token"] < attention["before"]["kv_bytes_per_token"]


def test_plan_says_what_to_install_once(awq):
    script = (
        "import sys; sys.modules['pymllm._native'] = None\nfrom pymllm.cli import main\nmain(sys.argv[1:])"
    )
    text = python("-c", script, "plan", awq, check=True).stdout
    assert text.count("the native CPU kernels are not built") == 1
    assert "native_int4 (14 x linear), native (2 x attention): the native CPU kernels" in text


def test_names_are_covered_by_the_narrowest_pattern():
    assert common_pattern(["model.layers.3.mlp.up_proj"]) == "model.layers.3.mlp.up_proj"
    assert common_pattern(["a.0.x", "a.1.x"]) == "a.*.x"
    assert common_pattern(["a.0.m.x", "a.1.m.y"]) == "a.*.m.*"
    assert common_pattern(["a.0.m.x", "a.1.n.y"]) == "a.*.**"


def test_the_size_of_the_cache_is_asked_for_and_said(capsys):
    assert main(["plan", "--max-model-len", "100", "--kv-memory", "1MB", "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["kv_cache"]
    assert cache["max_model_len"] == 100 and cache["bytes"] <= 10**6 and cache["decided_by"] == "kv_memory"
    assert main(["plan", "--kv-memory", "1MB"]) == 0
    assert f"KV cache of {cache['tokens']} tokens" in capsys.readouterr().out
    code = main(["plan", "--max-model-len", "1000", "--kv-memory", "1MB"])
    assert_one_error(code, capsys.readouterr(), "context of 1000 tokens", "1.00 MB", "3.10 MB")
    assert_one_error(main(["plan", "--kv-memory", "much"]), capsys.readouterr(), "'much'")


# What the documents say


def test_the_plan_schema_page_has_every_key_and_no_other(awq):
    plan = pymllm.plan(str(awq)).to_dict()
    text = (Path(__file__).parents[2] / "docs" / "plan-schema.md").read_text()
    sections = dict(
        re.findall(r"^## `?([\w ]+)(?:\[\])?`?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    )
    tables = {title: re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE) for title, body in sections.items()}
    assert tables["The plan"] == list(plan)
    assert tables["layers"] == list(plan["layers"][0])
    for key in ("tensor_parallel", "totals", "kv_cache"):
        assert tables[key] == list(plan[key])
