"""The record of a batch of prompts, step by step: trajectories, their text, and the metrics that follow from them.

A step is one run of the model; `GenerationOutputs.record_step` takes each step's requests and its time. All times are
seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The environment variable that turns block traces off, by "0".
TRACE_SWITCH = "PYMLLM_SAVE_TRACE"


def decode_token_ids_robust(
    tokenizer: Any, token_ids: Sequence[int] | None, *, skip_special_tokens: bool = False
) -> str:
    """Decode ids to text; "" for no ids.

    If the tokenizer's `decode` does not take these arguments (a TypeError), its tokens are converted one by one
    instead; any other error is raised as it is.
    """
    if not token_ids:
        return ""
    try:
        return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
    except TypeError:
        tokens = tokenizer.convert_ids_to_tokens(list(token_ids))
        return tokenizer.convert_tokens_to_string([token for token in tokens if token is not None])


@dataclass(frozen=True)
class ReqStep:
    """One step of one request.

    step_id: the number of the step, counted from 0 for the request.  step_time: the time of the whole step, which other
    requests may have shared.  is_prefill: whether it read text.  num_generated_tokens: how many positions got a token.
    running_token_ids: the tokens that the step ran, masks included.  buffer_bids: ids of the blocks in the buffer.
    block_trace: `trace_block` of each of these, after the step.
    """

    step_id: int
    step_time: float
    is_prefill: bool
    num_generated_tokens: int
    running_token_ids: list[int]
    block_size: int = 1
    buffer_bids: list[int] = field(default_factory=list)
    block_trace: list[dict[str, Any]] = field(default_factory=list)


FLAGS = (
    "is_truncated",
    "max_new_tokens_reached",
    "max_model_len_reached",
    "max_nfe_reached",
    "max_repetition_run_reached",
    "eos_token_generated",
    "completion_reason",
)


@dataclass
class ReqTrajectory:
    """One prompt's answer and the steps that made it.

    token_ids: the tokens before the end token; full_token_ids: all that were generated; is_truncated: whether these
    differ.  The *_reached flags say which limit ended the answer.  text, full_text: set by `convert_to_text`.
    """

    req_id: int
    token_ids: list[int] = field(default_factory=list)
    trajectory: list[ReqStep] = field(default_factory=list)
    is_truncated: bool = False
    max_new_tokens_reached: bool = False
    max_model_len_reached: bool = False
    max_nfe_reached: bool = False
    max_repetition_run_reached: bool = False
    eos_token_generated: bool = False
    completion_reason: str | None = None
    text: str | None = None
    full_token_ids: list[int] = field(default_factory=list)
    full_text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the trajectory as JSON values."""
        return asdict(self)

    @property
    def generated_tokens(self) -> int:
        return sum(step.num_generated_tokens for step in self.trajectory)

    @property
    def total_time(self) -> float:
        """The time of the steps that the request took part in."""
        return sum(step.step_time for step in self.trajectory)

    @property
    def time_to_first_token(self) -> float | None:
        """The time of its steps up to the one that gave its first token; None: there is no token yet."""
        elapsed = 0.0
        for step in self.trajectory:
            elapsed += step.step_time
            if step.num_generated_tokens > 0:
                return elapsed
        return None


class GenerationOutputs:
    """The trajectories of `num_prompts` prompts, and metrics over them.

    Totals of the batch: batch_step_count, total_time, prefill_time, decode_time; generated_tokens, prefill_tokens
    (tokens run), decode_tokens (tokens generated), cached_tokens (tokens of prompts that were not run, as the KV cache
    had them). A step in which some requests prefill and others decode counts for both times.
    """

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts
        self.trajectories = [ReqTrajectory(index) for index in range(num_prompts)]
        self.traces_blocks = os.environ.get(TRACE_SWITCH, "1") != "0"
        self.batch_step_count = 0
        self.total_time = self.prefill_time = self.decode_time = 0.0
        self.generated_tokens = self.prefill_tokens = self.decode_tokens = 0
        self._cached: dict[int, int] = {}

    def record_step(
        self,
        reqs: Sequence[Any],
        step_time: float,
        req_id_to_prompt_id: Mapping[int, int] | None = None,
    ) -> None:
        """Add a step of these requests.

        req_id_to_prompt_id: which prompt each request answers; None: its req_id is the prompt's index.

        Requests of any decoding strategy can be recorded. These attributes are read: req_id; is_prefilling, new_tokens
        (how many this step gave), running_sequence (the tokens that it ran), block_size, blocks (the strategy's buffer:
        each with block_id, block_size, is_active, num_mask_tokens); full_response (every token so far) and
        truncated_response (those before the end token); the flags of `ReqTrajectory`. And if they are there: is_reading
        (reading an answer again is prefill, too), cached_tokens, and a block's status and is_dummy.
        """
        if not reqs:
            return
        prefilling = [req for req in reqs if _reads(req)]
        decoding = [req for req in reqs if not _reads(req)]
        self.batch_step_count += 1
        self.total_time += step_time
        self.generated_tokens += sum(req.new_tokens for req in reqs)
        self.prefill_tokens += sum(len(req.running_sequence) for req in prefilling)
        self.decode_tokens += sum(req.new_tokens for req in decoding)
        self.prefill_time += step_time if prefilling else 0.0
        self.decode_time += step_time if decoding else 0.0
        for req in reqs:
            index = req.req_id if req_id_to_prompt_id is None else req_id_to_prompt_id[req.req_id]
            self._cached[index] = getattr(req, "cached_tokens", 0)
            self._record(self.trajectories[index], req, step_time)

    def _record(self, trajectory: ReqTrajectory, req: Any, step_time: float) -> None:
        blocks = list(req.blocks)
        trajectory.trajectory.append(
            ReqStep(
                len(trajectory.trajectory),
                step_time,
                _reads(req),
                req.new_tokens,
                list(req.running_sequence),
                req.block_size,
                [block.block_id for block in blocks],
                [trace_block(block) for block in blocks] if self.traces_blocks else [],
            )
        )
        trajectory.token_ids = list(req.truncated_response)
        trajectory.full_token_ids = list(req.full_response)
        for flag in FLAGS:
            setattr(trajectory, flag, getattr(req, flag))

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached.values())

    @property
    def tpf(self) -> float:
        """Tokens per forward: what a request got in decoding steps over their number; the mean over requests."""
        decoding = ([s for s in t.trajectory if not s.is_prefill] for t in self.trajectories)
        return _mean(sum(s.num_generated_tokens for s in steps) / len(steps) for steps in decoding if steps)

    @property
    def ttft(self) -> float:
        """Time to the first token; the mean over requests that have one."""
        times = [trajectory.time_to_first_token for trajectory in self.trajectories]
        return _mean(time for time in times if time is not None)

    @property
    def tpot(self) -> float:
        """Time per output token after the first; the mean over requests that have at least two."""
        return _mean(
            (t.total_time - (t.time_to_first_token or 0.0)) / (t.generated_tokens - 1)
            for t in self.trajectories
            if t.generated_tokens > 1
        )

    @property
    def throughput(self) -> float:
        """Generated tokens a second of the batch."""
        return _rate(self.generated_tokens, self.total_time)

    @property
    def prefill_throughput(self) -> float:
        """Prompt tokens a second, over the steps in which any request prefilled."""
        return _rate(self.prefill_tokens, self.prefill_time)

    @property
    def decode_throughput(self) -> float:
        """Tokens a second that decoding requests got, over the steps in which any decoded."""
        return _rate(self.decode_tokens, self.decode_time)

    @property
    def e2e_time(self) -> float:
        """The sum over requests of the time of their steps."""
        return sum(trajectory.total_time for trajectory in self.trajectories)

    @property
    def e2e_tokens(self) -> int:
        """Tokens of the answers, up to their end tokens."""
        return sum(len(trajectory.token_ids) for trajectory in self.trajectories)

    @property
    def e2e_throughput(self) -> float:
        """Tokens of the answers, up to their end tokens, a second of the batch."""
        return _rate(self.e2e_tokens, self.total_time)

    def metrics(self) -> dict[str, float]:
        """Return every metric, time and count, by name."""
        return {name: getattr(self, name) for name in METRICS}

    def convert_to_text(self, tokenizer: Any) -> None:
        """Fill in `text`, which ends before the first end token, and `full_text` of every trajectory."""
        end = getattr(tokenizer, "eos_token", None)
        for trajectory in self.trajectories:
            whole = trajectory.full_token_ids or trajectory.token_ids
            trajectory.full_text = decode_token_ids_robust(tokenizer, whole)
            text = decode_token_ids_robust(tokenizer, trajectory.token_ids)
            trajectory.text = text.partition(end)[0] if end else text

    def to_benchmark_format(self) -> list[dict[str, Any]]:
        """Return for each prompt text, full_text, token_ids, and nfe, the number of its steps."""
        return [
            {
                "text": trajectory.text or "",
                "full_text": trajectory.full_text
                if trajectory.full_text is not None
                else trajectory.text or "",
                "token_ids": list(trajectory.token_ids),
                "nfe": len(trajectory.trajectory),
            }
            for trajectory in self.trajectories
        ]


METRICS = (
    *("tpf", "ttft", "tpot", "throughput", "prefill_throughput", "decode_throughput", "e2e_throughput"),
    *("total_time", "prefill_time", "decode_time", "e2e_time"),
    *("batch_step_count", "generated_tokens", "prefill_tokens", "decode_tokens", "e2e_tokens"),
)


def trace_block(block: Any) -> dict[str, Any]:
    """Describe a block's state, for a trace."""
    masked = block.num_mask_tokens / max(block.block_size, 1)
    return {
        "block_id": block.block_id,
        "is_active": block.is_active,
        "is_dummy": getattr(block, "is_dummy", False),
        "num_mask_tokens": block.num_mask_tokens,
        "mask_ratio": masked,
        "progress": 1 - masked,
        "block_status": str(getattr(block, "status", "?")),
    }


def _reads(req: Any) -> bool:
    return bool(req.is_prefilling or getattr(req, "is_reading", False))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
