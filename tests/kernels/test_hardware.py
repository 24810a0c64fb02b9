"""Devices by name: what a plan for another machine may ask."""

import pytest

from pymllm.api import load_model, shipped_model
from pymllm.errors import ConfigError
from pymllm.kernels.hardware import ARCHITECTURES, probe_device
from pymllm.planning.make_plan import plan


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_named_is_a_device_that_is_not_here(name):
    spec = ARCHITECTURES[name].spec
    device = probe_device(spec)
    assert device.type == "cuda" and not device.present and device.spec == spec
    assert device.architecture == ARCHITECTURES[name] and device.processors > 0
    assert probe_device(device.spec) == device


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
