"""Names in errors: what a registry has bound."""

from __future__ import annotations

import functools

import pytest

from pymllm.errors import fetch_factory_name
from pymllm.quantization.base import QuantizationConfig, list_quantization_methods, register_quantization


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
