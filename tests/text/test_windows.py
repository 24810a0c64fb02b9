"""Windows of a text: what cannot be run over is refused before the model is."""

from __future__ import annotations

import shutil

import pytest

import pymllm
from pymllm.api import shipped_model
from pymllm.errors import ConfigError

from ..checkpoints import write_checkpoint

TEXT = "def read_lines(path):\n    return open(path).read()\n" * 40


@pytest.fixture
def of_another_model(tmp_path):
    """A model of 97 tokens beside the shipped model's tokenizer of 4096."""
    folder = write_checkpoint(tmp_path / "m", "llama", "none").folder
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder, tmp_path / "text.txt"


def test_a_tokenizer_of_another_model_is_named_with_its_ids(of_another_model, tmp_path):
    folder, text = of_another_model
    with pytest.raises(ConfigError, match=r"no row for.*ids below vocab_size, 97"):
        pymllm.quantize_checkpoint(folder, tmp_path / "out", {"**": "int8"}, calibrate=text)
    with pytest.raises(ConfigError, match="no row for"):
        pymllm.verify(folder, text=text)


def test_a_text_that_is_too_short_says_how_long_it_is(tmp_path):
    (tmp_path / "short.txt").write_text("def f(x):")
    with pytest.raises(ConfigError, match=r"too little text.*tokens of text"):
        pymllm.verify(shipped_model(), text=tmp_path / "short.txt")
