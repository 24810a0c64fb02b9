"""How fast a loaded model reads and answers, case by case, and what the machine would allow at most."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pymllm.api import LLM
from pymllm.engine.request import Request
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import RequestError
from pymllm.kernels.attention import PAGE_SIZE
from pymllm.kernels.limits import Limits, settle
from pymllm.measuring.cases import Case
from pymllm.measuring.cost import Bound, Cost, bound_of, cost_of
from pymllm.measuring.others import OtherProcesses

# Steps of decoding before the clock starts: a step is recorded at the third of its kind and tried at the fourth.
WARM_STEPS = 8
WARM_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case as measured.

    speeds: tokens a second of each repetition, of all requests together.  bound: the least time of a token's share that
    the machine allows; None: nobody knows.  other_cpus: how many CPUs other processes took meanwhile, on average.
    """

    case: Case
    speeds: list[float]
    bound: Bound | None
    other_cpus: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        """The standard deviation of the repetitions; 0 for a single one."""
        return statistics.stdev(self.speeds) if len(self.speeds) > 1 else 0.0

    @property
    def limit(self) -> float | None:
        """The tokens a second that the machine allows at most."""
        return 1 / self.bound.seconds if self.bound is not None else None

    @property
    def share(self) -> float | None:
        """The part of the limit that was reached."""
        return self.mean / self.limit if self.limit else None


@dataclass(kw_only=True)
class Measured:
    """All rows, and what they were measured on.

    read_rates: bytes a second by threads.  operation_rates: operations a second, likewise, as far as they are known.
    other_cpus: how many CPUs other processes took meanwhile, on average; None where the system does not say.
    eager_reason: why decoding steps are not replayed; None: they are, or nothing was decoded.
    """

    cost: Cost
    rows: list[Row] = field(default_factory=list)
    read_rates: dict[int, float] = field(default_factory=dict)
    operation_rates: dict[int, dict[str, float]] = field(default_factory=dict)
    other_cpus: float | None = None
    eager_reason: str | None = None


def measure(
    llm: LLM,
    cases: Sequence[Case],
    repetitions: int,
    told: Callable[[str], object] = lambda text: None,
) -> Measured:
    """Measure every case: a warm-up, then so many repetitions, with a probe of the machine before each.

    told: gets the name of each case before it is measured.  The number of torch's threads is put back at the end.
    """
    windows: dict[str, int | None] = {
        str(module.prefix): module.sliding_window  # type: ignore[misc]
        for module in llm.model.modules()
        if hasattr(module, "sliding_window") and hasattr(module, "prefix")
    }
    measured = Measured(cost=cost_of(llm.plan, llm.config, windows))
    device = llm.engine.device
    limits, draw = Limits(device), random.Random(0)
    threads, everyone = torch.get_num_threads(), OtherProcesses()
    found: list[tuple[Case, list[float], float | None]] = []
    try:
        for case in cases:
            told(f"{case.name}, batch {case.batch}, threads {case.threads}")
            torch.set_num_threads(case.threads)
            watch, speeds = OtherProcesses(), []
            with llm.session():
                _run(llm, _warm_up(case), draw)
                for _ in range(repetitions):
                    limits.probe()
                    seconds, tokens = _run(llm, case, draw)
                    speeds.append(tokens / seconds)
            found.append((case, speeds, watch.cpus()))
    finally:
        torch.set_num_threads(threads)
    for case, speeds, others in found:
        # The best of all probes of the run is the limit of every row.
        bound = _bound(llm, case, measured.cost, limits)
        measured.rows.append(Row(case=case, speeds=speeds, bound=bound, other_cpus=others))
        measured.read_rates[case.threads] = limits.read_rate(case.threads)
        if (rates := limits.operations(case.threads)) is not None:
            measured.operation_rates[case.threads] = rates
    measured.other_cpus = everyone.cpus()
    measured.eager_reason = llm.engine.runner.why_eager
    return measured


def _warm_up(case: Case) -> Case:
    """Return a shorter case of the same kind."""
    most = WARM_TOKENS if case.reads else WARM_STEPS
    return Case(
        reads=case.reads,
        tokens=min(case.tokens, most),
        batch=case.batch,
        threads=case.threads,
        depth=min(case.depth, WARM_TOKENS),
    )


def _run(llm: LLM, case: Case, draw: random.Random) -> tuple[float, int]:
    """Run a case once.  Returns the seconds that count, and the tokens that they took."""
    vocabulary = llm.config.size("vocab_size")

    def texts(length: int) -> list[list[int]]:
        return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(case.batch)]

    return (_prefill if case.reads else _decode)(llm, case, texts)


def _prefill(llm: LLM, case: Case, texts: Callable[[int], list[list[int]]]) -> tuple[float, int]:
    """Time the steps that read the case's tokens, the head after the last of each request included."""
    before = texts(case.depth) if case.depth else [[] for _ in range(case.batch)]
    if case.depth:
        _read(llm, [_request(llm, text, 1) for text in before])
    requests = [_request(llm, text + new, 1) for text, new in zip(before, texts(case.tokens), strict=True)]
    seconds = _read(llm, requests)
    taken = [request.cached_tokens for request in requests]
    # A page is shared once it is full, and a state is remembered where a page ends, some tokens before the last.
    if min(taken) < case.depth - 3 * PAGE_SIZE:
        raise RequestError(
            f"{case.name}: this model reads the tokens before a prompt anew with it",
            code="bench-depth",
            tensor="depth",
            expected="prefill at depth 0",
            found=f"{min(taken)} of {case.depth} tokens taken over",
            fix="Leave prefill out with --prompt-tokens 0, or take --depth 0.",
        )
    return seconds, sum(len(request.prompt) for request in requests) - sum(taken)


def _read(llm: LLM, requests: list[Request]) -> float:
    """Read prompts to their end.  Returns the seconds of the steps that did so."""
    engine, seconds = llm.engine, 0.0
    while not engine.idle:
        settle(engine.device)
        started = time.perf_counter()
        stepped = engine.step()
        settle(engine.device)
        took = time.perf_counter() - started
        _check(stepped)
        if not any(request.is_reading for request in stepped):
            break
        seconds += took
    _end(llm, requests)
    return seconds


def _decode(llm: LLM, case: Case, texts: Callable[[int], list[list[int]]]) -> tuple[float, int]:
    """Time the steps that decode the case's tokens, after prompts of its depth and one token more are read."""
    engine = llm.engine
    longest = case.request_tokens - case.depth - 1
    requests = [_request(llm, text, longest) for text in texts(case.depth + 1)]
    while not all(request.answer for request in requests):
        _check(engine.step())
    before = sum(len(request.answer) for request in requests)
    wanted = before + case.tokens * case.batch
    settle(engine.device)
    started = time.perf_counter()
    while sum(len(request.answer) for request in requests) < wanted and not engine.idle:
        _check(engine.step())
    settle(engine.device)
    seconds = time.perf_counter() - started
    tokens = sum(len(request.answer) for request in requests) - before
    _end(llm, requests)
    return seconds, tokens


def _end(llm: LLM, requests: list[Request]) -> None:
    for request in requests:
        if request.finish_reason is None:
            llm.engine.abort(request)


def _request(llm: LLM, prompt: list[int], answer: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    llm.engine.strategy.check(params)
    request = Request(prompt, params, len(prompt) + answer)
    llm.engine.add(request)
    return request


def _check(stepped: Sequence[Request]) -> None:
    """Raise the error of a request that failed."""
    for request in stepped:
        if request.error is not None:
            raise request.error


def _bound(llm: LLM, case: Case, cost: Cost, limits: Limits) -> Bound | None:
    """Compute the least time of one token.  None for models of several ranks, or that do not decode token by token."""
    if llm.parallel.size > 1 or llm.plan.strategy.get("name") != "autoregressive":
        return None
    rates = limits.operations(case.threads)
    if case.reads and (rates is None or cost.unknown is not None):
        return None
    total, steps = case.tokens * case.batch, 1 if case.reads else case.tokens
    tokens_of_step = total if case.reads else case.batch
    # Of what comes after them, prompts see nothing.
    context = case.depth + (0.0 if case.reads else 1 + case.tokens / 2)
    each = cost.count_operations(case.tokens, case.depth, 1 if case.reads else case.tokens)
    counted = None if each is None else {name: count * case.batch for name, count in each.items()}
    read = steps * cost.read_bytes(case.batch, tokens_of_step, context)
    whole = bound_of(read, counted, limits.read_rate(case.threads), rates)
    return None if whole is None else Bound(whole.seconds / total, whole.by)


def describe_kernels(llm: LLM) -> list[dict[str, Any]]:
    """List which kernels run: of each group of layers its kind, number, method and kernel."""
    return [
        {"kind": first.kind, "layers": len(names), "method": first.method_detail, "kernel": first.kernel}
        for first, names in llm.plan.groups()
    ]
