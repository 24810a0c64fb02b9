"""Greedy answers through the paged cache equal those of transformers' generate, past sliding windows too."""

from __future__ import annotations

import pytest
import torch

import pymllm
from pymllm.attention import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
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
    "olmo2": {},
    "qwen3_5_text": {},
}
PROMPTS = [list(range(3, 23)), [5], [40, 41, 42, 43, 44, 45, 46]]  # longer than the windows, shorter, as long


def transformers_answer(model, prompt):
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    return ids[0, len(prompt) :].tolist()


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 40 for i in range(16)],
    "long_factor": [1.0 + i / 3 for i in range(16)],
}


def test_answers_that_grow_past_the_trained_length(tmp_path):
    """One prompt begins past it, one passes it on its way, one stays below it; together as alone."""
    settings = {"rope_parameters": LONG, "original_max_position_embeddings": 18}
    checkpoint = write_checkpoint(tmp_path / "m", "phi3", **settings)
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    lengths = [NEW, 10, NEW]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    expected = [transformers_answer(checkpoint.model, p)[:n] for p, n in zip(PROMPTS, lengths, strict=True)]
    assert [list(output.token_ids) for output in llm.generate(PROMPTS, params)] == expected


def test_requests_with_dynamic_rotary_scaling_do_not_change_each_other(tmp_path):
    settings = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    checkpoint = write_checkpoint(tmp_path / "m", "llama", max_position_embeddings=64, **settings)
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    long, short = list(range(60)) + list(range(30)), [5, 6, 7]
    alone = llm.engine.runner.logits(short)
    step = AttnMetaDataBase(
        cu_seqlens_q=torch.tensor([0, 90, 93], dtype=torch.int32),
        context_lens=torch.tensor([90, 3], dtype=torch.int32),
        max_seqlen_q=90,
    )
    ids, positions = torch.tensor(long + short), torch.tensor([*range(90), *range(3)])
    set_fetch_fn_for_attn_metadata(lambda: step)
    with torch.no_grad():
        hidden = llm.model(ids, positions)
    assert torch.allclose(llm.model.compute_logits(hidden[90:]), alone, atol=1e-4)


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
