"""`pymllm bench`: the work that is timed, the least that it could take, and what is said beside the figures."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from pymllm.api import LLM
from pymllm.cli import main
from pymllm.cli.bench import _with_room
from pymllm.errors import ConfigError
from pymllm.measuring import bench, others
from pymllm.measuring.cases import Case, check_cases, default_sizes, make_cases
from pymllm.measuring.cost import Bound, _seen, bound_of, cost_of
from pymllm.planning.make_plan import plan
from tests.checkpoints import write_checkpoint
from tests.moe_checkpoints import write_moe

ARGUMENTS = ("-p", "40", "-n", "6", "-r", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    write_checkpoint(folder, "llama", "none")
    return folder


def case(reads: bool, tokens: int, batch: int = 1, depth: int = 0, threads: int = 1) -> Case:
    return Case(reads=reads, tokens=tokens, batch=batch, threads=threads, depth=depth)


@pytest.mark.parametrize(
    "measured, tokens_a_step",
    [
        (case(True, 40), 40),
        (case(True, 40, batch=3), 120),
        (case(True, 40, depth=32), 40),
        (case(False, 6), 1),
        (case(False, 6, batch=3), 3),
        (case(False, 6, batch=2, depth=40), 2),
    ],
    ids=lambda value: f"{value.name} x {value.batch}" if isinstance(value, Case) else "",
)
def test_what_is_timed_are_the_steps_of_the_case_and_no_others(floats, measured, tokens_a_step, monkeypatch):
    """With a clock that counts the engine's steps, seconds are steps."""
    llm = LLM(floats, device="cpu", progress=False)
    steps = 0
    real = llm.engine.step

    def step():
        nonlocal steps
        steps += 1
        return real()

    monkeypatch.setattr(llm.engine, "step", step)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: steps))
    found = bench.measure(llm, [measured], 2)
    assert found.rows[0].speeds == [tokens_a_step] * 2
    assert llm.engine.idle


def test_a_model_that_cannot_share_pages_is_refused_at_depth_and_not_measured_wrongly(floats):
    llm = LLM(floats, device="cpu", progress=False, prefix_reuse=False)
    with pytest.raises(Exception, match="anew"):
        bench.measure(llm, [case(True, 16, depth=96)], 1)


@pytest.mark.parametrize("first", [0, 3, 9])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_tokens_that_queries_see_are_counted(first, window):
    expected = sum(min(first + i + 1, window or 10**9) for i in range(7))
    assert _seen(7, first, window) == expected


def test_a_step_reads_every_tensor_once_but_of_the_embedding_a_row(floats):
    tensors = load_file(floats / "model.safetensors")
    size = {name: tensor.nbytes for name, tensor in tensors.items()}
    table = tensors["model.embed_tokens.weight"]
    planned = plan(floats, device="cpu")
    cost = cost_of(planned, SimpleNamespace(), {})
    expected = sum(size.values()) - table.nbytes + table[0].nbytes
    assert cost.read_bytes(1, 1, 0) == expected
    each = planned.totals["kv_cache_bytes_per_token"]
    assert cost.read_bytes(3, 3, 100) == expected + 3 * 100 * each
    products = sum(
        tensor.numel() for name, tensor in tensors.items() if tensor.ndim == 2 and ".layers." in name
    )
    counted = cost.count_operations(10, 0, 0)
    width = sum(h * d for h, _, d in (x.shape for x in planned.layers if x.kind == "attention"))
    assert counted == {"float32": 2 * products * 10 + 4 * width * 55, "int8": 0}


def test_of_experts_those_are_counted_that_tokens_are_routed_to(tmp_path):
    write_moe(tmp_path, "mixtral")  # two of five
    planned = plan(tmp_path, device="cpu")
    config = SimpleNamespace(num_local_experts=5, num_experts_per_tok=2)
    cost = cost_of(planned, config, {})
    experts = sum(layer.bytes for layer in planned.layers if layer.kind == "experts")
    others_read = cost.read_bytes(1, 1, 0) - experts * 2 / 5
    assert 0 < others_read < planned.totals["weight_bytes"] - experts
    assert cost.read_bytes(2, 2, 0) == pytest.approx(others_read + experts * (1 - (3 / 5) ** 2))


def test_work_is_bound_by_what_takes_longer():
    assert bound_of(100, {"float32": 30, "int8": 0}, 10, {"float32": 10, "int8": 0}) == Bound(10, "memory")
    assert bound_of(100, {"float32": 300, "int8": 80}, 10, {"float32": 10, "int8": 40}) == Bound(
        32, "arithmetic"
    )
    # A CPU without an instruction for it: nobody knows how long the products take.
    assert bound_of(100, {"float32": 0, "int8": 80}, 10, {"float32": 10, "int8": 0}) == Bound(10, "memory")


def test_the_work_of_other_processes_is_what_is_not_our_own(monkeypatch, tmp_path):
    statistics = tmp_path / "stat"
    monkeypatch.setattr(others, "STATISTICS", statistics)
    monkeypatch.setattr(others.os, "sysconf", lambda name: 100)
    clock, own = iter([0.0, 10.0]), iter([1.0, 6.0])
    monkeypatch.setattr(others.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(others, "own_seconds", lambda: next(own))
    statistics.write_text("cpu  100 0 50 9999 77 10 10 30 5 5\ncpu0 1 1\n")
    watch = others.OtherProcesses()
    # 20 seconds more of work: user 10, nice 2, system 5, irq 1, softirq 1, steal 1.
    statistics.write_text("cpu  1100 200 550 99999 7777 110 110 130 5 5\n")
    assert watch.cpus() == pytest.approx((20 - 5) / 10)
    statistics.unlink()
    assert watch.cpus() is None


def test_cases_are_combined_and_named_as_llama_bench_names_them():
    made = make_cases([512, 0], [128], [1, 8], [1, 2], [0, 1024])
    assert len(made) == 2 * 2 * 2 * 2
    assert {one.name for one in made} == {"pp512", "tg128", "pp512 @ d1024", "tg128 @ d1024"}
    assert [one.threads for one in made] == sorted(one.threads for one in made)


@pytest.mark.parametrize(
    "wanted, code",
    [
        (case(True, 600), "bench-length"),
        (case(False, 500, depth=20), "bench-length"),
        (case(True, 400, batch=4), "bench-cache"),
        (case(True, 1, batch=65), "bench-batch"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(wanted, code):
    with pytest.raises(ConfigError) as caught:
        check_cases([case(True, 500), wanted], 512, 1600, 64, "model")
    assert caught.value.code == code and "--" in str(caught.value)


def test_the_table_is_narrow_and_names_what_ran(floats, capsys):
    assert main(["bench", str(floats), *ARGUMENTS, "-b", "1,2", "--depth", "0,32", "-t", "1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    rows = [line.split("  ")[0].strip() for line in lines if line.startswith(("pp40", "tg6"))]
    assert rows == ["pp40", "tg6"] * 2 + ["pp40 @ d32", "tg6 @ d32"] * 2
    assert any(line.split()[1:3] == ["attention", "native"] for line in lines)
    assert "slow:" not in printed.out


def test_a_narrow_terminal_gets_whole_words(floats, capsys, monkeypatch):
    monkeypatch.setattr("pymllm.cli.bench.WIDTH", 60)
    assert main(["bench", str(floats), *ARGUMENTS, "--depth", "32", "-t", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 60] == []
    assert "pp40 @ d32" in map(str.strip, lines) and "between layers" in " ".join(" ".join(lines).split())


def test_a_reference_kernel_is_said(floats, capsys):
    assert main(["bench", str(floats), *ARGUMENTS, "--kernel", "linear=reference"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "reference kernel" in text and "--why" in text


def test_json_csv_and_markdown_have_the_same_rows(floats, capsys):
    assert main(["bench", str(floats), *ARGUMENTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in found["rows"]] == ["pp40", "tg6"]
    for row in found["rows"]:
        assert row["tokens_per_second"] == pytest.approx(sum(row["repetitions"])) and row["deviation"] == 0
        assert row["share_of_limit"] == pytest.approx(
            row["tokens_per_second"] / row["limit_tokens_per_second"]
        )
    assert sum(group["layers"] for group in found["kernels"]) == len(plan(floats, device="cpu").layers)
    assert main(["bench", str(floats), *ARGUMENTS, "--csv"]) == 0
    assert [row["test"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))] == ["pp40", "tg6"]
    assert main(["bench", str(floats), *ARGUMENTS, "--markdown"]) == 0
    assert sum(line.startswith("| ") for line in capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("batch, depth", [(1, 0), (8, 100), (64, 90)])
def test_sizes_that_were_not_asked_for_fit_the_model(batch, depth):
    for longest in (128, 1024):
        sizes = zip((True, False), default_sizes(longest, batch, depth), strict=True)
        check_cases([case(*size, batch=batch, depth=depth) for size in sizes], longest, 10**9, 64, "model")


def test_the_cache_gets_the_room_that_is_needed_unless_the_user_says_how_much(floats):
    planned = plan(floats, device="cpu")
    wanted = [case(True, 400, batch=60)]
    assert wanted[0].cache_tokens > planned.kv_cache["tokens"]
    sizes = _with_room({"max_model_len": None, "kv_memory": None}, planned, wanted)
    assert plan(floats, device="cpu", **sizes).kv_cache["tokens"] >= wanted[0].cache_tokens
    assert _with_room({"kv_memory": "1MB"}, planned, wanted) == {"kv_memory": "1MB"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["aot"], "pymllm kernels aot"),
        (["tune", "--shape", "1x1"], "pymllm kernels tune"),
        (["table", "gpu_linear"], "pymllm kernels table"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-t", "2", "--tensor-parallel-size", "2"], "one rank"),
        (["-b", "0"], "at least 1"),
        (["-p", "5,x"], "commas"),
        (["--json", "--csv"], "not allowed"),
    ],
)
def test_wrong_usage_is_told(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err
