"""What a captured decoding step may do, on an emulated GPU; and steps whose capture fails."""

from __future__ import annotations

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.engine.graphs import capture_cuda_graph, why_not_captured

from ..block_checkpoints import write_blocks
from ..checkpoints import write_checkpoint
from ..moe_checkpoints import write_moe
from .emulated_gpu import LooksAtTheHost, captured, emulated_gpu, guarded, settle  # noqa: F401


def answers(llm, prompts, count):
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [output.token_ids for output in llm.generate(prompts, params)]


KINDS = {
    "dense": lambda folder: LLM(write_checkpoint(folder).folder, dtype="bfloat16"),
    "awq": lambda folder: LLM(write_checkpoint(folder, fmt="awq-g32").folder, dtype="bfloat16"),
    "fp8, int8 and fp4": lambda folder: LLM(
        write_checkpoint(folder).folder,
        {"**.self_attn.**": "fp8", "**.gate_proj": "int8", "**.up_proj": "int8", "**.down_proj": "mxfp4"},
        dtype="bfloat16",
        kv_cache="fp8",
    ),
    "experts in two methods": lambda folder: LLM(
        write_moe(folder, "qwen3_moe").folder, {"**.experts.0.**": "int8"}, dtype="bfloat16"
    ),
    "experts and latents": lambda folder: LLM(write_moe(folder, "deepseek_v3").folder, dtype="bfloat16"),
    "experts and sinks": lambda folder: LLM(write_moe(folder, "gpt_oss").folder, dtype="bfloat16"),
    "states": lambda folder: LLM(write_checkpoint(folder, "qwen3_5_text").folder, dtype="bfloat16"),
    "blocks": lambda folder: LLM(
        write_blocks(folder, "sdar").folder, dtype="bfloat16", strategy="block_diffusion:block_length=4"
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_of_a_captured_step_touches_the_host(kind, tmp_path, emulated_gpu):  # noqa: F811
    llm = settle(KINDS[kind](tmp_path))
    assert why_not_captured(llm.model) is None
    runner = llm.engine.runner
    runner.capture = captured
    answers(llm, [[5], [9, 8]], 2)
    replays = [batch.replay for batch in runner._decoding.values()]
    assert runner.why_eager is None and replays and None not in replays


@pytest.mark.parametrize(
    "look",
    [
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.full((3,), 1).to(x.device),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: x.numpy(),
    ],
)
def test_the_guard_sees_whatever_a_capture_refuses(look):
    x = torch.ones(3)
    with pytest.raises(LooksAtTheHost), guarded():
        look(x)
    with guarded():
        assert x[torch.arange(2, device=x.device)].shape == (2,)


# Captures that fail


def fails(*errors):
    """A capture that raises these, one after the other, after a run of the step, and notes that it was asked."""
    asked = []

    def capture(run):
        asked.append(len(run()))
        raise errors[len(asked) - 1]

    return capture, asked


def test_a_step_whose_capture_fails_runs_eagerly_and_says_why_once(caplog):
    prompts = [[5, 6, 7], [9] * 30, [11, 3, 200]]
    expected = answers(LLM(dtype="float32"), prompts, 24)
    llm = LLM(dtype="float32")
    runner = llm.engine.runner
    runner.capture, asked = fails(RuntimeError("operation not permitted when stream is capturing"))
    assert answers(llm, prompts, 24) == expected and answers(llm, prompts, 24) == expected
    reason = "its capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert asked == [4] and runner.why_eager == reason
    assert [record.message for record in caplog.records] == [
        f"decoding is slower, without a captured graph: {reason}"
    ]


def test_another_bucket_is_tried_for_itself_and_says_nothing_new(caplog):
    llm = LLM(dtype="float32")
    error = RuntimeError("no such thing")
    llm.engine.runner.capture, asked = fails(error, error)
    for prompts in ([[5]], [[5], [6]], [[5]], [[5], [6]]):
        answers(llm, prompts, 3)
    assert asked == [1, 2] and len(caplog.records) == 1


def test_a_model_that_fails_eagerly_too_fails_its_requests():
    llm = LLM(dtype="float32")
    answers(llm, [[5, 6]], 2)
    capture, _ = fails(*[RuntimeError("captured")] * 9)
    llm.engine.runner.capture = capture
    llm.engine.runner.model.compute_logits = lambda *_, **__: 1 / 0
    with pytest.raises(Exception, match="division by zero"):
        answers(llm, [[5, 6]], 4)


def test_what_a_failed_capture_changes_of_the_model_does_not_have_it_tried_again():
    llm = LLM(dtype="float32")
    asked = []

    def capture(run):
        asked.append(1)
        llm.model.model.layers[0].mlp.table = {len(asked): torch.ones(1)}
        raise RuntimeError("no such thing")

    llm.engine.runner.capture = capture
    assert answers(llm, [[5, 6, 7]], 12) == answers(LLM(dtype="float32"), [[5, 6, 7]], 12)
    assert len(asked) == 1


def test_a_failed_capture_leaves_keys_and_states_as_they_were(tmp_path):
    """The run before the failure stands for a warm-up, which a GPU does in earnest."""
    folder = write_checkpoint(tmp_path, "qwen3_5_text").folder
    prompts = [[5, 6, 7], [9] * 30, [11, 3, 20]]
    expected = answers(LLM(folder, dtype="float32"), prompts, 8)
    llm = LLM(folder, dtype="float32")
    runner, cache = llm.engine.runner, llm.engine.cache

    def held():
        runs = [layer.cache for layer in cache.layers]
        states = [state for layer in runner.states.layers for state in layer.states]
        # The last state is nobody's.
        return [*(part.clone() for one in runs for part in (one.k, one.v)), *(s[:-1].clone() for s in states)]

    seen = []

    def capture(run):
        before = held()
        run()
        seen.append(all(map(torch.equal, before, held())))
        raise RuntimeError("no such thing")

    assert llm.engine.scheduler is not None
    runner.capture = capture
    assert answers(llm, prompts, 8) == expected
    assert seen == [True]


class Streams:
    """Stands for torch's streams and captures, which begin, fail and end as CUDA's do; `log` has what is done."""

    device_index = 0

    def __init__(self, monkeypatch, broken):
        self.log, self.current, self.broken = [], "main", broken
        self.capturing = False
        cuda = torch.cuda
        streams = self

        class Stream:
            device_index = 0

            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                streams.log.append(f"{self.name} waits for {other.name}")

        class Within:
            """torch.cuda.stream"""

            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                self.before, streams.current = streams.current, self.stream.name

            def __exit__(self, *_):
                streams.current = self.before

        class Capture:
            """torch.cuda.graph, whose end raises, before its stream is left, where the capture is broken."""

            def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
                # In the global mode a thread that allocates for another model would break the capture, and fail.
                assert stream.name == "side" and capture_error_mode == "thread_local"
                self.within = Within(Stream("capture"))

            def __enter__(self):
                self.within.__enter__()
                streams.capturing = True

            def __exit__(self, *_):
                streams.capturing = False
                if streams.broken:
                    raise RuntimeError("the capture was invalidated")
                self.within.__exit__()

        monkeypatch.setattr(cuda, "Stream", Stream)
        monkeypatch.setattr(cuda, "current_stream", lambda: Stream(self.current))
        monkeypatch.setattr(cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))
        monkeypatch.setattr(cuda, "stream", Within)
        monkeypatch.setattr(cuda, "graph", Capture)
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda _: None})())
        ended = lambda *pool: self.log.append(f"pool {pool} closed")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_failure_at_any_run_leaves_the_capture_and_is_told_as_it_was(when, broken, monkeypatch):
    """when: two runs warm up, the third is captured.  broken: the end of the capture fails, too."""
    streams = Streams(monkeypatch, broken)
    runs = []

    def run():
        runs.append(streams.capturing)
        if len(runs) == when + 1:
            raise ValueError("the step's own")
        return torch.ones(1)

    with pytest.raises(ValueError, match="the step's own"):
        capture_cuda_graph(run)
    assert runs == [False, False, True][: when + 1]
    assert streams.current == "main" and not streams.capturing
    assert ("pool (0, (0, 1)) closed" in streams.log) == (when == 2)
    assert streams.log[:2] == ["side waits for main", "main waits for side"]


def test_a_capture_returns_what_replays_it(monkeypatch):
    streams = Streams(monkeypatch, broken=False)
    replay = capture_cuda_graph(lambda: torch.tensor([float(streams.capturing)]))
    assert replay().tolist() == [1.0] and streams.current == "main"
