"""Devices by name: one of several GPUs, and what a plan for another machine may ask."""

import threading
from types import SimpleNamespace

import pytest
import torch

from pymllm.api import load_model, shipped_model
from pymllm.cli import doctor
from pymllm.errors import ConfigError
from pymllm.kernels.hardware import ARCHITECTURES, _cache_bytes, current, on_own_device, probe_device
from pymllm.planning.make_plan import plan

from ..fake_gpus import FakeGPUs


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


@pytest.mark.parametrize("index", (0, 1))
def test_a_gpu_named_by_its_number_is_that_one_with_its_own_properties(monkeypatch, index):
    gpus = FakeGPUs(monkeypatch, 2)
    device = probe_device(f"cuda:{index}")
    assert (device.index, device.spec) == (index, f"cuda:{index}")
    assert device.torch_device == torch.device("cuda", index)
    assert device.name == f"Fake {'HA'[index]}100 number {index}" and device.memory == 80 << 30
    assert device.capability == ((9, 0), (8, 0))[index] and device.processors == (132, 108)[index]
    assert device.architecture is ARCHITECTURES[("sm90", "sm80")[index]]
    assert device.describe() == f"{device.name} (cuda:{index})"
    assert gpus.asked == [("get_device_properties", index)]
    assert probe_device(device.spec) == device and gpus.current == 0


def test_cuda_alone_is_the_threads_current_gpu_whenever_it_is_asked(monkeypatch):
    gpus = FakeGPUs(monkeypatch, 3)
    assert [probe_device(name).index for name in ("cuda", "auto")] == [0, 0]
    torch.cuda.set_device(2)
    assert [probe_device(name).index for name in ("cuda", "auto")] == [2, 2]
    found = []
    thread = threading.Thread(target=lambda: found.append(probe_device("cuda").index))
    thread.start()
    thread.join()
    assert found == [0] and gpus.current == 2
    with current(torch.device("cuda", 1)):
        assert probe_device("auto").index == 1
    assert probe_device("cpu").torch_device == torch.device("cpu")


def test_under_torchrun_cuda_alone_is_the_gpu_of_the_local_rank(monkeypatch):
    FakeGPUs(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [probe_device(name).spec for name in ("cuda", "auto", "cuda:0")] == ["cuda:1", "cuda:1", "cuda:0"]


@pytest.mark.parametrize(
    ("rank", "gpus", "words"),
    [
        ("2", 2, "at least 3 GPUs.*2 GPUs, cuda:0 to cuda:1"),
        ("1", 1, r"at least 2 GPUs.*1 GPU, cuda:0 \(CUDA_VISIBLE_DEVICES=5\).*--virtual-local-rank"),
        ("-1", 2, "LOCAL_RANK does not say"),
        ("one", 2, "LOCAL_RANK does not say"),
        ("\u0663", 2, "LOCAL_RANK does not say"),
    ],
)
def test_a_local_rank_without_a_gpu_is_one_error(monkeypatch, rank, gpus, words):
    FakeGPUs(monkeypatch, gpus)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if gpus == 1:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(ConfigError, match=words):
        probe_device("auto")
    assert probe_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:7", "cuda:7; 2 GPUs, cuda:0 to cuda:1"),
        ("cuda:2", "2 GPUs, cuda:0 to cuda:1"),
        ("cuda:99999999999999999999", "2 GPUs, cuda:0 to cuda:1"),
        ("cuda:-1", "cuda:N with a GPU's number"),
        ("cuda:", "cuda:N with a GPU's number"),
        ("cuda:01", "Write the number as torch does: cuda:1"),
        ("cuda:00", "Write the number as torch does: cuda:0"),
        ("cuda: 1", "Write the number as torch does: cuda:1"),
        ("cuda:\u0661", "cuda:N with a GPU's number"),
        ("cuda:1:0", "cuda:N with a GPU's number"),
        ("cuda:x1", "no GPU or architecture 'cuda:x1'.*cuda:1 or cuda:0"),
        ("hip:1", "torch calls AMD's GPUs cuda, too"),
        ("gpu", "A GPU is called cuda here"),
        ("gpu:1", "A GPU is called cuda here"),
        ("CUDA:1", "Nearest: cuda"),
        ("cpu:1", "auto, cpu"),
        ("auto:1", "Nearest: auto"),
        ("", "auto, cpu"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_error_that_says_how_many_are(monkeypatch, name, words):
    FakeGPUs(monkeypatch, 2)
    with pytest.raises(ConfigError, match=words) as error:
        probe_device(name)
    assert error.value.code == "device"


def test_visible_devices_are_counted_as_torch_counts_them(monkeypatch):
    FakeGPUs(monkeypatch, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert probe_device("cuda").spec == "cuda:0"
    with pytest.raises(ConfigError, match=r"1 GPU, cuda:0 \(CUDA_VISIBLE_DEVICES=3\)"):
        probe_device("cuda:3")


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), "sm_80 sm_90", True),
        ((9, 0), "sm_80 sm_90a", True),
        ((8, 9), "sm_80 sm_86", True),
        ((10, 3), "sm_90 sm_100", True),
        ((12, 1), "sm_90 compute_90", True),
        ((12, 1), "sm_90", False),
        ((7, 0), "sm_75 sm_80 sm_120 compute_120", False),
        ((8, 0), "sm_86 sm_90", False),
        ((6, 1), "", True),  # nobody knows
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_not_chosen_and_is_refused_where_it_is_named(
    monkeypatch, capability, built, runs
):
    gpus = FakeGPUs(monkeypatch, 1)
    gpus.capabilities = [capability]
    monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
    problems = []
    assert len(doctor._examine_gpus(problems)) == 1
    assert probe_device("auto").type == ("cuda" if runs else "cpu")
    if runs:
        assert probe_device("cuda:0").capability == capability and not problems
        return
    said = f"no code for capability {capability[0]}.{capability[1]}, only for sm_"
    assert "cuda:0 (Fake H100 number 0) cannot be used" in problems[0] and said in problems[0]
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"{said}.*--device cpu") as error:
            probe_device(name)
        assert error.value.code == "device"


@pytest.mark.parametrize("variable", ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"))
def test_what_leaves_out_gpus_of_amd_is_named_too(monkeypatch, variable):
    FakeGPUs(monkeypatch, 1)
    monkeypatch.setenv(variable, "3")
    with pytest.raises(ConfigError, match=rf"1 GPU, cuda:0 \({variable}=3\)"):
        probe_device("cuda:3")


@pytest.mark.parametrize("name", ("cuda", "cuda:0"))
def test_without_a_gpu_none_can_be_named(monkeypatch, name):
    FakeGPUs(monkeypatch, 0)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        probe_device(name)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert probe_device("auto").type == "cpu"


def test_a_method_runs_on_its_own_device_in_any_thread_and_leaves_the_threads_own(monkeypatch):
    gpus, seen = FakeGPUs(monkeypatch, 2), []

    class Owner:
        def __init__(self, device):
            self.device = torch.device(device)

        @on_own_device
        def run(self, *others, fails=False):
            seen.append(gpus.current)
            for other in others:
                other.run()
            seen.append(gpus.current)
            if fails:
                raise ValueError("as it was asked")

    first, second, plain = (Owner(name) for name in ("cuda:0", "cuda:1", "cpu"))
    second.run(first, plain)
    with pytest.raises(ValueError, match="as it was asked"):
        second.run(fails=True)
    assert seen == [1, 0, 0, 1, 1, 1, 1, 1] and gpus.current == 0
    thread = threading.Thread(target=second.run)
    thread.start()
    thread.join()
    assert seen[-2:] == [1, 1] and gpus.current == 0
