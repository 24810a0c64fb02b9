"""Greedy answers through the paged cache equal those of transformers' generate, past sliding windows too."""

from __future__ import annotations

import pytest
import torch

import pymllm
from pymllm.engine.sampling import SamplingParams

from ..checkpoints import write_checkpoint

NEW = 24
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 3},
    "phi3": {"sliding_window": 7},
}
PROMPTS = [list(range(3, 23)), [5], [40, 41, 42, 43, 44, 45, 46]]  # longer than the windows, shorter, as long


def transformers_answer(model, prompt):
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ("none", "awq-g32"))
def test_greedy_answers_equal_transformers(tmp_path, family, fmt):
    checkpoint = write_checkpoint(tmp_path / "m", family, fmt, **FAMILIES[family])
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    expected = [transformers_answer(checkpoint.model, prompt) for prompt in PROMPTS]
    together = [list(output.token_ids) for output in llm.generate(PROMPTS, params)]
    alone = [list(llm.generate([prompt], params)[0].token_ids) for prompt in PROMPTS]
    assert together == expected
    assert alone == expected
