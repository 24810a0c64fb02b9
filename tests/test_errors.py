"""What errors say, all of it or for a terminal, and the names in them."""

from __future__ import annotations

import functools

import pytest

from pymllm.errors import CheckpointError, KernelError, fetch_factory_name, first_few, nearest, unknown_name
from pymllm.quantization.base import QuantizationConfig, list_quantization_methods, register_quantization
from pymllm.weights.report import Problem, raise_problems


class Factory:
    def method(self):
        return self

    @classmethod
    def made(cls):
        return cls()

    def __call__(self):
        return self


def plain():
    return None


@functools.wraps(plain)
def decorated():
    return plain()


HERE = __name__


@pytest.mark.parametrize(
    "factory, name",
    (
        (Factory, "Factory"),
        (plain, "plain"),
        (decorated, "plain"),
        (functools.partial(plain), "plain"),
        (functools.partial(functools.partial(decorated, 1), 2), "plain"),
        (functools.lru_cache(plain), "plain"),
        (Factory().method, "Factory.method"),
        (Factory.made, "Factory.made"),
        (Factory(), "Factory"),
        (functools.partial(Factory, 1), "Factory"),
    ),
)
def test_a_factory_goes_by_what_is_behind_its_wrappers(factory, name):
    assert fetch_factory_name(factory) == f"{HERE}.{name}"


def test_a_name_that_is_taken_is_an_error_that_says_by_whom():
    taken = list_quantization_methods()[0]
    with pytest.raises(ValueError, match=r"registered already, by pymllm\.quantization\.formats\."):
        register_quantization(taken)(QuantizationConfig)


# What an error says


WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("message", "named_in_front"),
    [
        ("there is no place for it", True),
        (f"{WEIGHT} has no place", False),
        (f"{WEIGHT}: no place. ", False),
        (f"it has no place, unlike {WEIGHT}_scale_inv", True),  # another tensor, whose name begins alike
        (f"it has no place, unlike x.{WEIGHT}", True),
        (
            f"nothing reads it. {nearest(WEIGHT, [WEIGHT])}",
            True,
        ),  # a hint does not say which tensor it is about
        (f"nothing reads it. {nearest('up_proj', ['up_proj.weight', 'up_proj'])}", True),
    ],
)
def test_an_error_names_its_tensor_once_and_never_leaves_it_to_the_hint(message, named_in_front):
    text = str(CheckpointError(message, code="unexpected", tensor=WEIGHT))
    assert text.startswith(f"{WEIGHT}: {message[:10]}") == named_in_front
    assert WEIGHT in text


def test_the_parts_of_an_error_make_one_paragraph():
    error = CheckpointError(
        "the shape is wrong", code="shape", file="a", tensor="b", expected="[1]", found="[2]", fix="Do this."
    )
    assert str(error) == "a, b: the shape is wrong; expected [1], found [2]. Do this."
    assert error.shortened() == str(error) and error.brief is None


def test_only_the_terminals_version_of_a_list_is_cut():
    names = [f"layer.{index}" for index in range(1490)]
    error = CheckpointError(
        f"missing: {', '.join(names)}", code="missing", brief=f"missing: {first_few(names)}", fix="Get them."
    )
    assert all(name in str(error) for name in names)
    assert error.shortened() == f"missing: {', '.join(names[:8])}, and 1482 more. Get them."
    whole = CheckpointError(
        f"missing: {', '.join(names[:8])}", code="x", brief=f"missing: {first_few(names[:8])}"
    )
    assert whole.brief is None  # nothing is left out


def test_problems_of_every_kind_are_shown_however_many_there_are_of_one():
    problems = [Problem("missing", f"a.{index}", "it is not there") for index in range(1490)]
    problems.append(Problem("dtype", "b", "it is int3"))
    with pytest.raises(CheckpointError) as caught:
        raise_problems("folder", problems)
    assert caught.value.code == "checkpoint-mismatch"
    assert all(f"  {problem.tensor}: {problem.text}" in str(caught.value) for problem in problems)
    shown = caught.value.shortened().splitlines()
    assert shown[0] == "folder: 1491 problems, nothing was loaded:"
    assert shown[8:] == ["  a.7: it is not there", "  and 1482 more", "  b: it is int3."]


def test_an_unknown_name_is_told_with_all_there_are_and_the_nearest():
    error = unknown_name("router", "navie", ("naive", "group_limited"), code="router", error=KernelError)
    assert isinstance(error, KernelError) and error.code == "router"
    assert str(error) == (
        "there is no router 'navie'; expected naive or group_limited, found navie. Nearest: naive."
    )
