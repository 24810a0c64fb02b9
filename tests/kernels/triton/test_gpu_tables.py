"""The scripts of the GPU tables, run small in Triton's interpreter; what they do when something fails or hangs."""

# T tokens, O out_features, I in_features, E experts, K experts a token, H hidden size

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.first_contact.tables import SCRIPTS
from pymllm.kernels.canonical import Fp8Weight, IntWeight
from tests.attention.steps import make_case, make_problem

from ...processes import python
from .gpu import HERE, randn

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = pytest.mark.skipif(HERE.type == "cuda", reason="runs the scripts in Triton's interpreter")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import one another as they lie."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def table(budget=60.0):
    module = importlib.import_module("gpu_roofline")
    options = argparse.Namespace(dry_run=True, budget=budget)
    return module.Table("gpu_test", "A test", options)


def measure(made, kernel, make, **settings):
    made.measure("work", kernel, make, nbytes=1, operations=1, **settings)


@pytest.mark.parametrize(
    "name, rows",
    (("gpu_linear", 24), ("gpu_moe", 12), ("gpu_attention", 7), ("gpu_elementwise", 12), ("gpu_decode", 0)),
)
def test_every_row_of_ours_runs_and_peers_that_cannot_say_why(name, rows, capsys):
    assert importlib.import_module(name).main(["--dry-run", "--budget", "3600"]) == 0
    said = capsys.readouterr().out
    assert not rows or f"{rows} rows ran in the interpreter, 0 of ours failed" in said
    assert name != "gpu_linear" or ("gemlite A16W4" in said and "_scaled_mm" in said)
    assert name != "gpu_moe" or "torch _grouped_mm          ran" in said
    assert name != "gpu_attention" or "flashinfer" in said


def test_a_peer_that_fails_in_its_own_way_is_a_row_and_one_of_ours_fails_the_table():
    def fails():
        raise AssertionError("scales of a kind that I do not take")

    made = table()
    measure(made, "peer", fails)
    measure(made, "other peer", lambda: [fails])
    assert [row["failed"] for row in made.rows] == ["AssertionError: scales of a kind that I do not take"] * 2
    assert made.finish() == 0
    made = table()
    measure(made, "triton_int", lambda: [lambda: torch.ones(2)], expected=torch.zeros(2))
    assert "relative error" in made.rows[0]["failed"] and made.finish() == 1


def test_rows_beyond_the_budget_and_after_a_broken_device_are_left_out():
    made = table(budget=-1.0)
    measure(made, "peer", lambda: [lambda: torch.ones(1)])
    assert made.rows == [] and made.left_out == ["peer, work, as the time was up"]
    made.finish()
    made = table()
    made.broken = "peer broke the device"
    measure(made, "triton_int", lambda: [lambda: torch.ones(1)])
    assert made.rows == [] and made.left_out == ["triton_int, work, after peer broke the device"]
    made.finish()


def test_a_script_that_hangs_writes_what_it_has_and_ends(tmp_path):
    code = (
        f"import sys, threading; sys.path.insert(0, {str(BENCHMARKS)!r}); from gpu_roofline import stop_after; "
        f"stop_after(0.1, lambda: open({str(tmp_path / 'rows')!r}, 'w').write('one row')); threading.Event().wait()"
    )
    run = python("-c", code)
    assert run.returncode == 1 and "stopped after" in run.stdout
    assert (tmp_path / "rows").read_text() == "one row"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_that_make_gpu_runs_takes_its_budget_of_seconds(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(["--dry-run", "--budget", "x"])
    assert end.value.code == 2 and "--budget: invalid float value" in capsys.readouterr().err


def test_torch_s_fp8_product_is_given_the_same_weight():
    (peer,) = importlib.import_module("gpu_peers").peers_of(
        weight := Fp8Weight(randn(32, 64).to(torch.float8_e4m3fn), randn(32, 1).abs(), (1, 0), "token")
    )
    x = randn(5, 64, seed=1, dtype=torch.bfloat16)
    first, second = peer.calls([weight, weight], x)
    expected = x.double() @ weight.dequantize(torch.float64).t()
    for call in (first, second):
        assert float((call().double() - expected).norm() / expected.norm()) < peer.error
    assert first.args[0][0].data_ptr() != second.args[0][0].data_ptr(), "each has a place of its own"


def test_torch_s_grouped_experts_are_the_formula():
    grouped = importlib.import_module("gpu_peers").grouped_mm_experts
    gate_up, down = (
        randn(5, *shape, seed=i, dtype=torch.bfloat16) / 4 for i, shape in enumerate(((32, 16), (16, 16)))
    )
    x, ids = (
        randn(7, 16, seed=2, dtype=torch.bfloat16),
        torch.tensor([[0, 4], [4, 1], [4, 0], [1, 4], [0, 1]]),
    )
    x, weights = x[:5], randn(5, 2, seed=3).abs()
    expected = torch.zeros(5, 16, dtype=torch.float64)
    for token in range(5):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (down[expert].double() @ (gate * torch.sigmoid(gate) * up))
    found = grouped(gate_up, down, x, ids, weights).double()
    assert float((found - expected).norm() / expected.norm()) < 2e-2  # bfloat16 between the two products


def test_gemlite_and_int4pack_are_given_codes_scales_and_zeros_as_they_take_them(monkeypatch):
    """By stand-ins with the packages' own formulas: w = (code - zero) * scale, and (code - 8) * scale + zero."""
    peers = importlib.import_module("gpu_peers")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (32, 2), generator=generator, dtype=torch.uint8)
    weight = IntWeight(codes, torch.rand(32, 2, generator=generator) + 0.5, zeros, 4, 32)
    x = randn(3, 64, dtype=torch.bfloat16)
    expected = x.double() @ weight.dequantize(torch.float64).t()

    class A16Wn:
        def __init__(self, device="cuda:0", dtype=None, packing_bitwidth=None, post_scale=False):
            assert dtype is torch.bfloat16 and torch.device(device).type == "cpu"

        def from_weights(self, W_q, scales, zeros, W_nbits, group_size, bias=None, quant_type="INT"):
            assert (W_q.dtype, W_nbits, group_size, quant_type) == (torch.uint8, 4, 32, "INT")
            wide = [t.float().repeat_interleave(group_size, 1) for t in (zeros, scales)]
            layer = torch.nn.Linear(W_q.shape[1], W_q.shape[0], bias=False).requires_grad_(False)
            layer.weight.data = ((W_q - wide[0]) * wide[1]).bfloat16()
            return layer

    helper = ModuleType("gemlite.helper")
    helper.A16Wn = A16Wn
    monkeypatch.setitem(sys.modules, "gemlite", ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)

    def multiply(x, packed, group_size, both):
        unpacked = torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).float() - 8
        scales, zeros = both.float().repeat_interleave(group_size, 0).unbind(-1)
        return (x.float() @ (unpacked.t() * scales + zeros)).bfloat16()

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda packed, inner_k_tiles: packed)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    for peer in peers.peers_of(weight):
        (call,) = peer.calls([weight], x)
        assert float((call().double() - expected).norm() / expected.norm()) < 2e-2, peer.name


def test_flashinfer_is_planned_with_the_pages_of_the_step(monkeypatch):
    seen = {}

    class BatchDecodeWithPagedKVCacheWrapper:
        def __init__(
            self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False
        ):
            assert float_workspace_buffer.dtype is torch.uint8 and kv_layout == "NHD" and use_tensor_cores

        def plan(
            self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **settings
        ):
            seen.update(
                settings, indptr=indptr.tolist(), indices=indices.tolist(), last=last_page_len.tolist()
            )
            seen["sizes"] = (num_qo_heads, num_kv_heads, head_dim, page_size)

        def run(self, q, paged_kv_cache):
            assert len(paged_kv_cache) == 2
            return q

    package = ModuleType("flashinfer")
    package.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    peers = importlib.import_module("gpu_peers")
    monkeypatch.setattr(peers, "WORKSPACE_BYTES", 64)
    case = make_case(make_problem(head_dim=64, dtype=torch.bfloat16), [(15, 1), (20, 1)])
    call = peers.flashinfer_decode(case.problem, case.q, case.step, case.cache)
    assert call() is case.q
    tables = case.step.page_tables
    assert seen["indptr"] == [0, 1, 3] and seen["last"] == [16, 5] and seen["sizes"] == (4, 2, 64, 16)
    assert seen["indices"] == [int(tables[0, 0]), *tables[1].tolist()] and seen["sm_scale"] == 0.2
    assert seen["q_data_type"] == seen["kv_data_type"] == torch.bfloat16
