"""What a plan for a GPU that is not here selects is what was compiled for it."""

import functools
import json
from pathlib import Path

import pytest

from pymllm.api import shipped_model
from pymllm.kernels.hardware import ARCHITECTURES
from pymllm.kernels.registry import KERNELS, kernels_for
from pymllm.kernels.triton.ahead_of_time import gather_tasks
from pymllm.planning.make_plan import plan
from tests.checkpoints import write_checkpoint
from tests.moe_checkpoints import write_moe

TABLE = Path(__file__).parents[3] / "benchmarks" / "results" / "triton_aot.json"
RULES = (None, {"**": "fp8"}, {"**.mlp.**": "mxfp4"}, {"**": "int8"})


@functools.cache
def compiled(architecture):
    """The functions of each kernel that are compiled."""
    return {(task.kernel, task.launch.kernel.name) for task in gather_tasks([architecture])}


def compiled_kernels(architecture):
    return {kernel for kernel, _ in compiled(architecture)}


@pytest.mark.parametrize("architecture", ("sm80", "sm90", "gfx942"))
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_every_triton_kernel_that_a_plan_selects_is_compiled_for_its_architecture(architecture, rules):
    planned = plan(shipped_model(), rules, device=ARCHITECTURES[architecture].spec, dtype="bfloat16")
    ours = {layer.kernel for layer in planned.layers if layer.kernel.startswith("triton")}
    ours |= {planned.elementwise["kernel"]}
    assert "triton_grouped" in ours and "triton" in ours
    assert ours <= compiled_kernels(architecture)


@pytest.mark.parametrize("architecture", ("sm80", "sm90", "gfx942"))
def test_every_kernel_that_a_plan_selects_for_routed_experts_is_compiled(architecture, tmp_path):
    write_moe(tmp_path / "m", "qwen3_moe")
    planned = plan(tmp_path / "m", device=ARCHITECTURES[architecture].spec, dtype="bfloat16")
    ours = {layer.kernel for layer in planned.layers if layer.kernel.startswith("triton")}
    ours |= {routing["kernel"] for routing in planned.routing}
    assert {"triton_experts", "triton_routing", "triton_grouped"} <= ours <= compiled_kernels(architecture)


def test_a_model_in_bfloat16_gets_our_attention_and_torch_s_matmuls(tmp_path):
    write_checkpoint(tmp_path)
    planned = plan(tmp_path, device="cuda:sm90", dtype="bfloat16")
    assert {layer.kernel for layer in planned.layers if layer.kind == "linear"} == {"torch"}
    assert {layer.kernel for layer in planned.layers if layer.kind == "attention"} == {"triton_grouped"}


def test_the_committed_table_has_every_function_of_every_kernel_for_every_architecture_and_nothing_amiss():
    rows = json.loads(TABLE.read_text())["launches"]
    for architecture in ARCHITECTURES:
        found = {(row["kernel"], row["function"]) for row in rows if row["architecture"] == architecture}
        assert found == compiled(architecture), architecture
    assert [row for row in rows if row["verdict"] != "ok"] == []


def test_every_registered_triton_kernel_says_what_to_compile():
    for operation, paths in KERNELS.items():
        for path, kernel in zip(paths, kernels_for(operation), strict=True):
            assert ".triton." not in path or hasattr(kernel, "cases"), path
