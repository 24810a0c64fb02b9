"""What a call asks of the engine: each answer to each prompt is a request of its own."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pymllm.engine.outputs import GenerationOutputs
from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import RequestError, counted
from pymllm.text.prompts import Prompt


@dataclass(frozen=True)
class Asked:
    """One answer that is asked for.

    place: which of the call's prompts it is to.  index: which of the prompt's `n` answers it is.
    first_scored: None; or the first of the prompt's tokens whose log-probability is wanted, in place of an answer.
    """

    ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    place: int = 0
    index: int = 0
    first_scored: int | None = None


def ask(
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    adapter: str | Sequence[str | None] | None,
    encode: Callable[[Prompt], list[int]],
) -> list[Asked]:
    """Spread a call over its answers, those of one prompt side by side.

    params, adapter: one for all prompts, or one each.  RequestError if these are neither one nor as many as prompts, or
    params are something else.
    """
    each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
    names: list[str | None]
    if isinstance(adapter, Sequence) and not isinstance(adapter, str):
        names = list(adapter)
    else:
        names = [adapter] * len(prompts)
    for what, given in (("params", each), ("adapter", names)):
        if len(given) != len(prompts):
            raise RequestError(
                f"there must be one {what}, or one for each prompt",
                code="parameter",
                tensor=what,
                expected=str(len(prompts)),
                found=str(len(given)),
            )
    wrong = [one for one in each if not isinstance(one, SamplingParams)]
    if wrong:
        raise RequestError(
            "params are no SamplingParams",
            code="parameter",
            tensor="params",
            expected="SamplingParams(...)",
            found=reprlib.repr(wrong[0]),
        )
    encoded = [encode(prompt) for prompt in prompts]
    return [
        Asked(ids, p.of_answer(index), name, place, index)
        for place, (ids, p, name) in enumerate(zip(encoded, each, names, strict=True))
        for index in range(p.n)
    ]


def check_length(tokens: int, longest: int, answers: bool = True) -> None:
    """Refuse, with a RequestError, a prompt that leaves no room for an answer.

    longest: the most tokens of a request.  answers: False: the prompt alone needs room.
    """
    if tokens + answers <= longest:
        return
    # Clients tell by these words that a prompt is too long.
    limit = f"this model's maximum context length is {counted(longest, 'token')}"
    problem = "does not leave room for an answer" if answers else "is too long"
    raise RequestError(
        f"the prompt {problem}: {limit}",
        code="prompt-too-long",
        tensor="prompt",
        expected=f"fewer than {counted(longest + (not answers), 'token')}",
        found=str(tokens),
        fix="Shorten the prompt.",
    )


def check_record(outputs: GenerationOutputs | None, asked: Sequence[Asked]) -> None:
    """Refuse, with a RequestError, a record of steps that has too few trajectories; None is no record."""
    if outputs is not None and outputs.num_prompts < len(asked):
        raise RequestError(
            "the record of the steps must have a trajectory for each answer",
            code="parameter",
            tensor="outputs",
            expected=f"GenerationOutputs({len(asked)})",
            found=f"GenerationOutputs({outputs.num_prompts})",
        )


def gather(answers: Mapping[tuple[int, int], RequestOutput]) -> list[RequestOutput]:
    """Put the answers to each prompt together, as the `outputs` of the first.  answers: by place and index."""
    groups: dict[int, list[RequestOutput]] = {}
    for place, index in sorted(answers):
        groups.setdefault(place, []).append(answers[place, index])
    return [_joined(group) for group in groups.values()]


def _joined(group: Sequence[RequestOutput]) -> RequestOutput:
    first, *others = group
    return replace(first, others=tuple(others)) if others else first


def number_of_prompts(asked: Iterable[Asked]) -> int:
    """Count the prompts of a call."""
    return len({one.place for one in asked})
