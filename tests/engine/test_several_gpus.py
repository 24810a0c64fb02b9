"""A model on one of several GPUs: what is launched, captured and awaited for it is so on that GPU, in any thread."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pymllm import LLM
from pymllm.api import llm as api
from pymllm.api import warming
from pymllm.engine.engine import Engine
from pymllm.engine.graphs import capture_cuda_graph
from pymllm.engine.runner import Runner
from pymllm.kernels import limits
from pymllm.kernels.triton import timing
from pymllm.kernels.triton.launch import Kernel
from pymllm.quantization.binding import weight_device

from ..fake_gpus import FakeGPUs


def runner_on(device, seen, gpus):
    """A runner that notes which GPU is current in place of each forward."""
    runner = Runner.__new__(Runner)
    runner.device, runner.leader, runner.strategy = torch.device(device), None, SimpleNamespace()
    # The forward is below both.
    runner._read = lambda requests, cache: seen.append((device, gpus.current))
    return runner


def test_two_models_on_two_gpus_step_in_turn_in_threads_that_have_another_one_current(monkeypatch):
    gpus, seen = FakeGPUs(monkeypatch, 3), []
    runners = [runner_on(f"cuda:{index}", seen, gpus) for index in (1, 2)]

    def step():
        for runner in runners:
            runner.step([SimpleNamespace(rows=[])], None)
        assert gpus.current == 0

    step()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert seen == [("cuda:1", 1), ("cuda:2", 2)] * 2


@pytest.mark.parametrize("method", ("step", "run", "logits", "hidden_states"))
def test_whatever_runs_a_model_makes_its_gpu_the_current_one(monkeypatch, method):
    gpus, seen = FakeGPUs(monkeypatch, 2), []
    runner = runner_on("cuda:1", seen, gpus)

    class Stop(Exception):
        pass

    class Asked:
        """Stands for what the method is given, and ends it at the first use."""

        def __getattribute__(self, name):
            seen.append(gpus.current)
            raise Stop

        def __len__(self):
            seen.append(gpus.current)
            raise Stop

        __iter__ = __len__

    with pytest.raises(Stop):
        getattr(runner, method)(*(Asked() for _ in range(2 if method in ("step", "run") else 1)))
    assert seen == [1] and gpus.current == 0


def test_a_step_that_chooses_nothing_waits_for_its_own_gpu(monkeypatch):
    gpus = FakeGPUs(monkeypatch, 2)
    engine = Engine.__new__(Engine)
    engine.__dict__ |= {
        "scheduler": SimpleNamespace(
            running=[], waiting=[], schedule=lambda: [SimpleNamespace(running_sequence=[], is_reading=False)]
        ),
        "device": torch.device("cuda", 1),
        "clock": lambda: 0.0,
        "_run": lambda batch: ([], None),
    }
    engine.__dict__["pace"] = SimpleNamespace(note=None)
    monkeypatch.setattr(Engine, "_fail_without_adapter", lambda self, requests: [])
    with pytest.raises(AttributeError):  # the request is none
        engine.step()
    assert gpus.asked == [("synchronize", 1)]
    limits.settle(torch.device("cuda", 1))
    limits.settle(torch.device("cpu"))
    assert gpus.asked == [("synchronize", 1)] * 2


class Streams:
    """torch.cuda's streams, events and graphs: each is of the GPU that is current when it is made."""

    def __init__(self, monkeypatch, gpus):
        self.captured = []

        class Stream:
            def __init__(self):
                self.gpu = gpus.current

            def wait_stream(self, other):
                assert self.gpu == other.gpu

        @contextmanager
        def on(stream):
            with gpus.device(stream.gpu):
                yield

        @contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode=None):
            # As torch does: its own stream is made once, on the GPU that captures first.
            if stream is None:
                stream = self.own = getattr(self, "own", None) or Stream()
            with on(stream):
                self.captured.append((graph.gpu, stream.gpu))
                yield

        class Event:
            def __init__(self, enable_timing):
                self.gpu = gpus.current

            record = synchronize = elapsed_time = lambda self, *others: 1.0

        def graphs():
            return SimpleNamespace(gpu=gpus.current, replay=lambda: None)

        for name, value in {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": on,
            "graph": graph,
            "CUDAGraph": graphs,
            "Event": Event,
            "graph_pool_handle": lambda: (0, 1),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("capture", (capture_cuda_graph, lambda run: timing.seconds_each([run])))
def test_each_gpus_graphs_are_captured_on_a_stream_of_its_own(monkeypatch, capture):
    gpus = FakeGPUs(monkeypatch, 2)
    streams, ran = Streams(monkeypatch, gpus), []
    for index in (0, 1, 0):
        with gpus.device(index):
            capture(lambda: ran.append(gpus.current))
    assert streams.captured == [(0, 0), (1, 1), (0, 0)]
    assert ran == [0] * 3 + [1] * 3 + [0] * 3


def test_a_kernel_is_launched_on_the_gpu_of_its_tensors(monkeypatch):
    gpus, launched = FakeGPUs(monkeypatch, 2), []
    kernel = Kernel(lambda x, n: None)
    kernel.__dict__["compiled"] = {(4,): lambda *arguments, **constants: launched.append(gpus.current)}
    for device in (1, 0, None):
        x = torch.ones(4)
        x.fake_device = device
        kernel.launch((4,), x, 3)
    assert launched == [1, 0, 0] and gpus.current == 0


def test_kernels_are_compiled_for_the_gpu_of_the_model_before_the_first_request(monkeypatch):
    llm = LLM(device="cpu", progress=False)
    gpus, compiled = FakeGPUs(monkeypatch, 2), []
    again = SimpleNamespace(execution=SimpleNamespace(device="cuda:1"), units=(), model=None)
    monkeypatch.setattr(warming, "launches_of_steps", lambda *sizes: [])
    monkeypatch.setattr(
        warming, "compile_launches", lambda launches, advance: compiled.append(gpus.current) or 0
    )
    warming.compile_kernels(lambda: again, llm.plan)
    assert compiled == [1] and gpus.current == 0


def test_a_weight_says_which_gpu_it_is_on():
    weight = SimpleNamespace(tensors=lambda: {"words": SimpleNamespace(device=torch.device("cuda", 1))})
    assert weight_device(weight) == "cuda:1"


def test_the_engine_has_the_cache_that_was_measured_after_the_load(monkeypatch):
    seen = []

    def measure_cache(plan, prepared, max_model_len, kv_memory):
        seen.append((max_model_len, kv_memory, prepared.model.load_report.loaded != set()))
        return replace(plan, kv_cache={**plan.kv_cache, "tokens": 160, "max_model_len": 150})

    monkeypatch.setattr(api, "measure_cache", measure_cache)
    llm = LLM(progress=False, kv_memory="2MB", max_model_len=64)
    assert seen == [(64, "2MB", True)]
    assert (llm.engine.cache.num_pages, llm.engine.longest, llm.plan.kv_cache["tokens"]) == (10, 150, 160)
