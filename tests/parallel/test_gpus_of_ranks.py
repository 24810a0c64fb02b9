"""The GPU of each rank: under torchrun, where rank 0 leads, and where a GPU is named or missing."""

from types import SimpleNamespace

import pytest
import torch

from pymllm import follower
from pymllm.api import load_model, shipped_model
from pymllm.cli import main
from pymllm.errors import ConfigError
from pymllm.parallel import Parallel, Ranks, choose_parallel, place, process_group
from pymllm.parallel.leader import Leader
from pymllm.planning.make_plan import plan

from ..fake_gpus import FakeGPUs


class Joined:
    """torch.distributed's default group as NCCL would make it: what it was asked for."""

    def __init__(self, monkeypatch, rank=0, size=2):
        self.asked, self.tensors = [], []

        def init_process_group(backend, device_id=None, **others):
            self.asked.append((backend, device_id))
            world = SimpleNamespace(bound_device_id=device_id)
            monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=world))

        answers = {
            "init_process_group": init_process_group,
            "is_initialized": lambda: bool(self.asked),
            "get_backend": lambda: self.asked[-1][0],
            "get_rank": lambda: rank,
            "get_world_size": lambda: size,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.distributed, name, answer)
        monkeypatch.setattr(
            process_group, "Heartbeat", lambda rank, size: SimpleNamespace(check=None, stop=int)
        )
        monkeypatch.setattr(process_group.atexit, "register", lambda function: None)
        monkeypatch.setattr(place, "_heartbeats", [])


def torchrun(monkeypatch, rank, size=2, here=2):
    for name, value in (
        ("RANK", rank),
        ("LOCAL_RANK", rank),
        ("WORLD_SIZE", size),
        ("LOCAL_WORLD_SIZE", here),
    ):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("device", ("auto", "cuda", "cuda:1"))
def test_a_rank_of_torchrun_has_the_gpu_of_its_local_rank_and_joins_with_it(monkeypatch, device):
    gpus = FakeGPUs(monkeypatch, 2)
    joined = Joined(monkeypatch, rank=1)
    torchrun(monkeypatch, 1)
    parallel = choose_parallel(2, device=device)
    assert joined.asked == [("nccl", torch.device("cuda", 1))]
    assert (parallel.rank, parallel.gpu, gpus.current) == (1, 1, 1)
    assert parallel.group.device == torch.device("cuda", 1)
    with parallel:
        assert plan(shipped_model(), device=device).device == "cuda:1"
    # Another thread's current GPU, and a second group of the process, change nothing.
    torch.cuda.set_device(0)
    again = Parallel.from_environment()
    assert (again.gpu, again.group.device) == (1, torch.device("cuda", 1)) and len(joined.asked) == 1
    with again, pytest.raises(ConfigError, match="rank 1 of 2 has cuda:1, and cannot load to cuda:0"):
        plan(shipped_model(), device="cuda:0")


def test_ranks_on_the_cpu_of_a_machine_with_gpus_join_by_gloo(monkeypatch):
    gpus = FakeGPUs(monkeypatch, 1)
    joined = Joined(monkeypatch, rank=1)
    torchrun(monkeypatch, 1)
    parallel = choose_parallel(2, device="cpu")
    assert joined.asked == [("gloo", None)] and parallel.gpu is None and gpus.current == 0
    assert parallel.group.device == torch.device("cpu")
    with parallel:
        assert plan(shipped_model(), device="cpu").device == "cpu"


def test_a_group_that_somebody_else_has_made_says_its_gpu_or_the_rank_does(monkeypatch):
    FakeGPUs(monkeypatch, 4)
    joined = Joined(monkeypatch, rank=1)
    torchrun(monkeypatch, 3, 4, 4)
    torch.distributed.init_process_group("nccl")
    assert Parallel.from_environment().group.device == torch.device("cuda", 3)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", 2))
    assert Parallel.from_environment().group.device == torch.device("cuda", 2) and len(joined.asked) == 2


@pytest.mark.parametrize(
    ("rank", "gpus", "device", "words"),
    [
        (2, 2, "auto", "rank 2 of this machine .LOCAL_RANK. has none.*at least 3 GPUs.*2 GPUs"),
        (1, 1, "cuda", "at least 2 GPUs.*1 GPU, cuda:0"),
        (1, 2, "cuda:0", "cuda:0 is one GPU, and this machine has 4 ranks"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused_before_it_joins(monkeypatch, rank, gpus, device, words):
    FakeGPUs(monkeypatch, gpus)
    joined = Joined(monkeypatch)
    torchrun(monkeypatch, rank, 4, 4)
    with pytest.raises(ConfigError, match=words) as error:
        choose_parallel(1, device=device)
    assert error.value.code == "rank-devices" and not joined.asked


class Led:
    """A leader that starts and joins nobody, and notes its own GPU."""

    def __init__(self, monkeypatch):
        self.started, self.gpus = [], []
        monkeypatch.setattr(Leader, "start", self.start)
        monkeypatch.setattr(place, "ProcessGroup", lambda size, check: SimpleNamespace())

    def start(self, size, ranks):
        self.started.append(size)
        started = size - 1 if ranks.started is None else ranks.started
        return SimpleNamespace(started=started, check=None, join=lambda settings, gpu: self.gpus.append(gpu))


def test_a_rank_0_that_leads_has_gpu_0_whichever_is_current(monkeypatch):
    FakeGPUs(monkeypatch, 4)
    led = Led(monkeypatch)
    torch.cuda.set_device(2)
    parallel = choose_parallel(4, settings={}, device="cuda")
    assert (led.gpus, parallel.gpu, parallel.led, led.started) == ([0], 0, True, [4])
    with parallel:
        assert plan(shipped_model(), device="auto").device == "cuda:0"
    # Alone on its machine it has the one that is named, or the current one.
    alone = Ranks("10.0.0.1", 29500, "key", started=0)
    assert choose_parallel(2, ranks=alone, settings={}, device="cuda:1").gpu == 1
    assert choose_parallel(2, ranks=alone, settings={}, device="cuda").gpu is None


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "fewer GPUs than ranks.*a GPU for each of the 3 ranks.*2 GPUs, cuda:0 to cuda:1"),
        ("cuda:1", "cuda:1 is one GPU, and this machine has 3 ranks.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_process_is_started_for_ranks_that_cannot_have_a_gpu_each(monkeypatch, device, words):
    FakeGPUs(monkeypatch, 2)
    led = Led(monkeypatch)
    with pytest.raises(ConfigError, match=words):
        choose_parallel(3, settings={}, device=device)
    assert not led.started and choose_parallel(3, settings={}, device="cpu").gpu is None


def test_serve_refuses_one_gpu_for_several_ranks_before_it_listens(monkeypatch, capsys):
    assert main(["serve", "--device", "cuda:0", "--tensor-parallel-size", "2"]) == 1
    assert "cuda:0 is one GPU, and this machine has 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("local_rank", "options", "gpu"),
    [
        (1, {"device": "auto"}, 1),
        (None, {"device": "cuda"}, 1),
        (0, {"device": "cuda:1"}, 1),
        (1, {"device": "cpu"}, None),
    ],
)
def test_a_rank_that_follows_loads_to_its_own_gpu(monkeypatch, local_rank, options, gpu):
    """local_rank None: rank 3 of machines with two GPUs each."""
    FakeGPUs(monkeypatch, 2)
    seen = []

    class Link:
        def __init__(self, *place):
            pass

        def next(self):
            return {"store": 1, "backend": "nccl", "settings": {"model": None, "options": options}}, ()

        def tell(self, message):
            seen.append(message)

        close = int

    class Loaded(Exception):
        pass

    def load(model, device):
        found = place.current_parallel()
        seen.append((found.rank, found.gpu, found.device_of(device)))
        raise Loaded

    monkeypatch.setattr(follower, "Led", Link)
    monkeypatch.setattr(follower, "join", lambda *given: seen.append(given[-1]))
    monkeypatch.setattr(follower, "LLM", load)
    with pytest.raises(Loaded):
        follower.follow(rank=3, size=4, host="10.0.0.1", port=29500, local_rank=local_rank)
    assert seen[:2] == [gpu, (3, gpu, "cpu" if gpu is None else f"cuda:{gpu}")]


def test_a_follower_whose_machine_has_no_gpu_for_it_is_refused(monkeypatch):
    FakeGPUs(monkeypatch, 2)
    with pytest.raises(ConfigError, match="at least 3 GPUs"):
        process_group.choose_gpu("cuda", 2)
    assert process_group.choose_gpu("cpu", 2) is None


def test_a_model_is_not_loaded_to_a_gpu_of_a_number_that_is_not_there(monkeypatch):
    FakeGPUs(monkeypatch, 2)
    with pytest.raises(ConfigError, match="cuda:7; 2 GPUs, cuda:0 to cuda:1"):
        load_model(shipped_model(), device="cuda:7")
