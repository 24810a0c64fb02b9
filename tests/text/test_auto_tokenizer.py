"""Loading a tokenizer through transformers, with the one known fault worked around."""

from __future__ import annotations

import json
import sys

import pytest
import transformers  # noqa: F401  loaded, as it may replace itself in sys.modules

from pymllm.api import shipped_model
from pymllm.text.tokenizer import Tokenizer, auto_tokenizer_from_pretrained


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": ["<a>", "<|b|>"]}))
    return tmp_path


class Loader:
    """Stands in for AutoTokenizer of a version that takes objects only."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def from_pretrained(self, path, **options):
        self.calls.append(options)
        if self.error is not None:
            raise self.error
        if not isinstance(options.get("extra_special_tokens"), dict):
            raise AttributeError("'list' object has no attribute 'keys'")
        return options["extra_special_tokens"]


def with_loader(monkeypatch, error=None):
    loader = Loader(error)
    monkeypatch.setattr(sys.modules["transformers"], "AutoTokenizer", loader)
    return loader


def test_a_list_of_extra_tokens_is_given_names_and_tried_again(monkeypatch, folder):
    loader = with_loader(monkeypatch)
    tokens = auto_tokenizer_from_pretrained(str(folder), use_fast=True)
    assert tokens == {"extra_special_token_0": "<a>", "extra_special_token_1": "<|b|>"}
    assert [call["use_fast"] for call in loader.calls] == [True, True]


@pytest.mark.parametrize(
    "error",
    (OSError("no such file"), AttributeError("'NoneType' object"), ValueError("extra_special_tokens")),
)
def test_any_other_failure_is_raised_as_it_is(monkeypatch, folder, error):
    loader = with_loader(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        auto_tokenizer_from_pretrained(folder)
    assert caught.value is error and len(loader.calls) == 1


def test_the_same_message_without_a_list_in_the_file_is_raised(monkeypatch, tmp_path):
    loader = with_loader(monkeypatch)
    with pytest.raises(AttributeError, match="'list' object"):
        auto_tokenizer_from_pretrained(tmp_path)
    assert len(loader.calls) == 1


def test_tokens_that_the_caller_gives_are_the_callers(monkeypatch, folder):
    with_loader(monkeypatch)
    with pytest.raises(AttributeError, match="'list' object"):
        auto_tokenizer_from_pretrained(folder, extra_special_tokens=["<a>"])


def test_a_real_tokenizer_loads():
    tokenizer = auto_tokenizer_from_pretrained(shipped_model())
    ours = Tokenizer(shipped_model())
    assert tokenizer.encode("def f(x):") == ours.encode("def f(x):")
