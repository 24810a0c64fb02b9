"""Devices by name: what a plan for another machine may ask."""

from types import SimpleNamespace

import pytest

from pymllm.api import load_model, shipped_model
from pymllm.errors import ConfigError
from pymllm.kernels.hardware import ARCHITECTURES, _cache_bytes, probe_device
from pymllm.planning.make_plan import plan


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_named_is_a_device_that_is_not_here(name):
    spec = ARCHITECTURES[name].spec
    device = probe_device(spec)
    assert device.type == "cuda" and not device.present and device.spec == spec
    assert device.architecture == ARCHITECTURES[name] and device.processors > 0
    assert probe_device(device.spec) == device


def test_the_last_cache_is_what_torch_says_of_nvidia_and_what_the_architecture_has_of_amd():
    present = SimpleNamespace(L2_cache_size=30 << 20)
    h100, mi300 = ARCHITECTURES["sm90"], ARCHITECTURES["gfx942"]
    assert _cache_bytes(present, h100) == 30 << 20
    assert _cache_bytes(present, mi300) == mi300.cache_bytes == 256 << 20
    assert _cache_bytes(SimpleNamespace(), h100) == h100.cache_bytes == 50 << 20
    assert _cache_bytes(SimpleNamespace(), None) == 0
    assert all(
        probe_device(known.spec).cache_bytes == known.cache_bytes > 0 for known in ARCHITECTURES.values()
    )


@pytest.mark.parametrize("name", ("cuda:sm91", "hip:sm90", "cuda:gfx942", "cuda:sm_90"))
def test_an_unknown_architecture_is_refused_with_those_there_are(name):
    with pytest.raises(ConfigError, match="cuda:sm90"):
        probe_device(name)


def test_a_model_is_planned_for_a_gpu_that_is_not_here_but_not_loaded_on_it():
    planned = plan(shipped_model(), device="cuda:sm90")
    assert planned.device == "cuda:sm90"
    kernels = {layer.kernel for layer in planned.layers if layer.method == "awq" and layer.kind == "linear"}
    assert kernels == {"triton_int"}
    with pytest.raises(ConfigError, match="names no device of this machine"):
        load_model(shipped_model(), device="cuda:sm90")
