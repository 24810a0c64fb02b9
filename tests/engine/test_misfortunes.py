"""Hundreds of requests through aborts, faults, refusals and cancelled streams; `benchmarks/crowd.py` runs thousands."""

from __future__ import annotations

import pytest

from pymllm import LLM

from ..adapters.handwritten import adapter_for_shipped
from .misfortunes import misfortunes

pytest.importorskip("llguidance")


def test_who_is_not_concerned_never_notices_and_nothing_stays_behind(tmp_path):
    llm = LLM(dtype="float32", compute="exact", progress=False)
    adapter_for_shipped(tmp_path, llm)
    llm.load_adapter("odd", tmp_path)
    book, faults = misfortunes(llm, 300, adapters=(None, "odd"), each=1, rate=0.02, session=100)
    assert set(faults.came) == {
        *("layer", "store", "sampling", "log-probabilities", "choice", "grammar", "place in a grammar"),
        "step",
    }
    assert min(book.fates[fate] for fate in ("answered", "aborted", "failed")) > 20
