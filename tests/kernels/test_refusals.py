"""What refusals come down to, held against plans that are made with other settings."""

from __future__ import annotations

import itertools

import pytest

from pymllm.api import shipped_model
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import KERNELS, kernels_for
from pymllm.planning.make_plan import plan
from pymllm.planning.plan import Plan
from tests.moe_checkpoints import write_moe

RULES = {"**.mlp.**": "fp8", "**.self_attn.q_proj": "int8"}
DTYPES = ("float32", "float16", "bfloat16")
FOR_ONE_DEVICE = {"needs a GPU", "needs a CUDA device", "runs on the CPU only"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each with its rules: AWQ and fp8 and int8, and experts in AWQ."""
    experts = write_moe(tmp_path_factory.mktemp("experts"), "qwen3_moe", "awq-g32").folder
    return {"dense": (shipped_model(), RULES), "experts": (experts, None)}


def plans_of(model, device: str) -> dict[tuple[str, str], Plan]:
    """By dtype and compute: all that can be asked for."""
    path, rules = model
    return {
        (dtype, compute): plan(path, rules, device=device, dtype=dtype, compute=compute)
        for dtype, compute in itertools.product(DTYPES, ("auto", "exact"))
    }


@pytest.mark.parametrize("device", ("cpu", "cuda:sm80", "cuda:sm90"))
@pytest.mark.parametrize("name", ("dense", "experts"))
def test_a_setting_that_is_named_works_and_where_none_is_none_would(models, name, device):
    plans = plans_of(models[name], device)
    taken = {(layer.prefix, layer.kernel) for planned in plans.values() for layer in planned.layers}
    named = 0
    for (dtype, compute), planned in plans.items():
        for layer in planned.layers:
            for refusal in layer.refused:
                kernel, fix = refusal["kernel"], refusal["fix"]
                assert bool(fix) == (refusal["cause"] == "setting")
                if fix:
                    named += 1
                    changes = dict(change.split("=") for change in fix.split(","))
                    settings = {"dtype": dtype, "compute": compute, **changes}
                    again = plans[settings["dtype"], settings["compute"]].layer(layer.prefix)
                    assert kernel not in {other["kernel"] for other in again.refused}, (layer, fix)
                elif refusal["cause"] == "layer":
                    assert (layer.prefix, kernel) not in taken, (layer, refusal)
    assert named or (name, device) == ("dense", "cpu"), (
        "every kernel for plain weights runs under every setting there"
    )


@pytest.mark.parametrize("name", ("dense", "experts"))
def test_kernels_for_other_devices_are_told_from_those_that_do_not_run_the_layer(models, name):
    path, rules = models[name]
    found = set()
    for device in ("cpu", "cuda:sm90"):
        for layer in plan(path, rules, device=device).layers:
            for refusal in layer.refused:
                if refusal["why"] in FOR_ONE_DEVICE:
                    assert refusal["cause"] == "device", refusal
                if refusal["cause"] == "device":
                    found.add((device, refusal["kernel"].partition("_")[0]))
    assert found >= {("cpu", "triton")}


def test_a_gpu_that_lacks_what_another_has_is_another_device(models):
    path, _ = models["dense"]
    rules = {"**": "fp8"}
    refused = {
        r["kernel"]: r for layer in plan(path, rules, device="cuda:sm80").layers for r in layer.refused
    }
    assert refused["triton_fp8_w8a8"]["cause"] == "device"
    kernels = {layer.kernel for layer in plan(path, rules, device="cuda:sm90").layers}
    assert "triton_fp8_w8a8" in kernels


@pytest.mark.parametrize("operation", KERNELS)
def test_a_kernel_for_one_kind_of_device_says_so(operation):
    """Or a plan would take what a GPU alone can do for something that no machine does."""
    for path, kernel in zip(KERNELS[operation], kernels_for(operation), strict=True):
        expected = {"triton": "cuda", "flashinfer": "cuda", "native_": "cpu"}
        where = next((device for part, device in expected.items() if f"kernels.{part}" in path), None)
        if where is not None:
            assert getattr(kernel, "device_type", None) == where, path
        declared = getattr(kernel, "device_type", "cpu")
        assert declared in (probe_device("cpu").type, probe_device("cuda:sm90").type), path
