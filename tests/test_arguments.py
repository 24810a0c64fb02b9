"""Calls from Python with wrong arguments: each is one error that says which argument, and the nearest name."""

from __future__ import annotations

import pytest

import pymllm
from pymllm.arguments import checked
from pymllm.errors import ArgumentError, PymllmError

WRONG = [
    (lambda: pymllm.LLM(modle="x"), "LLM has no argument 'modle'. Nearest: model."),
    (lambda: pymllm.AsyncLLM(modle="x"), "'modle'. Nearest: model."),
    (
        lambda: pymllm.LLM(model=3),
        "model of LLM is of the wrong kind; expected text or a path or None, found 3.",
    ),
    (lambda: pymllm.LLM(b"x"), "neither a path nor a hub id"),
    (lambda: pymllm.LLM(quant=3), "expected PATTERN=METHOD"),
    (lambda: pymllm.LLM(kv_cache=3), "expected PATTERN=METHOD"),
    (lambda: pymllm.LLM(kernels="linear"), "kernels of LLM is of the wrong kind; expected a dict or None"),
    (lambda: pymllm.LLM(adapters=["x"]), "adapters of LLM"),
    (lambda: pymllm.LLM(prefix_reuse="on"), "expected True or False, found 'on'."),
    (lambda: pymllm.LLM(tensor_parallel_size="2"), "expected a whole number, found '2'."),
    (lambda: pymllm.LLM(device="gpu"), "A GPU is called cuda here."),
    (lambda: pymllm.LLM(dtype="BFLOAT16"), "Nearest: bfloat16"),
    (lambda: pymllm.LLM(dtype="bf61"), "Nearest: bf16"),
    (lambda: pymllm.plan(quantt="x"), "plan has no argument 'quantt'. Nearest: quant."),
    (lambda: pymllm.plan(device=3), "device of plan is of the wrong kind; expected text, found 3."),
    (lambda: pymllm.verify(end_to_ned=True), "Nearest: end_to_end."),
    (lambda: pymllm.load_model(chek_memory=True), "Nearest: check_memory."),
    (lambda: pymllm.compare(), "there are no sets of rules to compare"),
    (lambda: pymllm.compare(None, "**=fp8"), "expected a list of them"),
    (lambda: pymllm.search_rules("x", 4, bit=3), "search_rules has no argument 'bit'. Nearest: bits"),
    (lambda: pymllm.SamplingParams(max_token=3), "Nearest: max_tokens"),
    (lambda: pymllm.LLM.generate(None, "x", temperature=1), "params=SamplingParams(temperature=...)."),
    (lambda: pymllm.LLM.chat(None, [], max_tokens=1), "params=SamplingParams(max_tokens=...)."),
]


@pytest.mark.parametrize(("call", "said"), WRONG)
def test_a_wrong_argument_is_one_clear_error(call, said):
    with pytest.raises(PymllmError) as caught:
        call()
    assert said in str(caught.value)


def test_a_wrong_name_is_a_type_error_too_and_further_names_pass():
    @checked()
    def takes(name: str | None = None, *, count: int = 1, **more: object) -> object:
        return name, count, more

    assert takes("x", count=2, colour="red") == ("x", 2, {"colour": "red"})
    for wrong in ({"name": 3}, {"count": True}, {"count": "3"}):
        with pytest.raises(TypeError) as caught:
            takes(**wrong)
        assert isinstance(caught.value, ArgumentError) and caught.value.code == "argument-type"
    with pytest.raises(TypeError, match="positional"):
        takes(1, 2)


def test_a_name_that_the_package_does_not_have_gets_the_nearest():
    with pytest.raises(AttributeError, match=r"Nearest: quantize_model"):
        _ = pymllm.quantise_model


def test_without_a_model_it_is_the_one_that_comes_along():
    planned = pymllm.plan(dtype="bf16")
    assert planned.dtype == pymllm.plan(dtype="bfloat16").dtype == "bfloat16"
    assert planned.model == pymllm.plan(pymllm.api.shipped_model()).model
    assert pymllm.verify().model == planned.model
    assert pymllm.load_model().prepared.checkpoint.path == pymllm.api.shipped_model()
