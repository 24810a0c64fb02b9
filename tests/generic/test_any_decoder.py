"""Types without a page answer as transformers does, one type of each kind of thing that a class may do."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._pytree import tree_leaves

import pymllm
from pymllm.errors import ConfigError

from . import zoo

# What each of these types shows.
SIDE_BY_SIDE = {
    "gpt2": "weights that are stored turned, a tied head",
    "bert": "a head with a bias of its own, and a part before it",
    "gemma3": "a text model within a model of images",
    "gemma4_text": "layers of other sizes than the config says for all, a part of the positions turned",
    "glm4_moe": "stacked experts, a bias that ranks them",
    "bamba": "a Mamba 2 scan",
    "qwen3_next": "a gated delta rule",
}
ALONE = {
    "gptj": "an attention of the class's own",
    "camembert": "positions made of the ids of tokens, a head that stands before its embedding",
    "blenderbot": "a config that counts an encoder's layers",
    "recurrent_gemma": "a state that is kept in the modules",
    "minimax": "a cache of the class's own",
    "xlstm": "a cache that does not fit its own model",
    "qwen4_exp_text": "a table stored in more than ten parts",
}


def answers(model_type: str, tied: bool, folder):
    """Return the loaded model and what transformers expects of it."""
    made = zoo.make(model_type, tied=tied) if model_type in SIDE_BY_SIDE else zoo.small(model_type)
    expected = zoo.write(made, folder)
    return pymllm.LLM(folder, device="cpu", dtype="float32", compute="exact", progress=False), expected


@pytest.mark.parametrize("model_type", (*SIDE_BY_SIDE, *ALONE))
def test_logits_and_batched_answers_equal_transformers(tmp_path, model_type):
    llm, expected = answers(model_type, model_type in ("gpt2", "bert", "camembert"), tmp_path / "m")
    for ids, logits in zip(expected["prompts"], expected["logits"], strict=True):
        assert float((llm.logits(ids) - logits).abs().max()) <= 1e-4 * min(1.0, float(logits.abs().max()))
    sampling = pymllm.SamplingParams(max_tokens=zoo.TOKENS, temperature=0.0, ignore_eos=True)
    found = [list(answer.token_ids) for answer in llm.generate(expected["prompts"], sampling)]
    assert found == expected["answers"]
    if model_type in ALONE:
        assert llm.model.why_alone is not None


@pytest.mark.parametrize("model_type", ("glm4_moe", "gpt2", "falcon_mamba"))
def test_a_rule_for_everything_reaches_all_layers(tmp_path, model_type):
    zoo.write(zoo.small(model_type), tmp_path / "m")
    plan = pymllm.plan(tmp_path / "m", ["**=int8"], device="cpu")
    methods = {layer.prefix: layer.method for layer in plan.weighted_layers if layer.kind != "router"}
    assert methods and set(methods.values()) == {"int8"}


@pytest.mark.parametrize("model_type", ("electra", "megatron-bert"))
def test_an_encoder_is_refused_before_anything_loads(tmp_path, model_type):
    zoo.write(zoo.small(model_type), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
    with pytest.raises(ConfigError, match="is no decoder"):
        pymllm.plan(tmp_path / "m", device="cpu")


@pytest.mark.parametrize("model_type", ("granite", "deepseek_v3"))
def test_a_setting_of_the_zoo_changes_what_transformers_answers(model_type):
    made = zoo.make(model_type)
    assert len(made.moved) >= 7
    ids = zoo.prompt(13)
    moved, plain = (zoo.logits_of(one.model(), ids) for one in (made, zoo.small(model_type)))
    assert not torch.allclose(moved, plain, atol=1e-2)


def test_a_wrapper_with_experts_is_planned_before_anything_has_looked_at_them(tmp_path):
    made = zoo.small("gemma4")
    made.settings["text_config"] |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    made.settings["text_config"] |= {"moe_intermediate_size": 48}
    made.model().save_pretrained(tmp_path / "m")
    plan = pymllm.plan(tmp_path / "m", ["**.experts.**=int8"], device="cpu")
    assert {layer.method for layer in plan.weighted_layers if ".experts" in layer.prefix} == {"int8"}


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE |= {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}


def test_answers_that_outgrow_the_trained_length_begin_anew_where_the_class_does(tmp_path):
    made = zoo.small("phimoe")
    made.settings |= {"max_position_embeddings": 128}
    made.settings["rope_parameters"] = LONG_ROPE | {"short_mscale": 1.1, "long_mscale": 1.3}
    model = made.model()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").unlink(missing_ok=True)
    llm = pymllm.LLM(tmp_path / "m", device="cpu", dtype="float32", compute="exact", progress=False)
    prompts = [zoo.prompt(tokens, tokens) for tokens in (28, 20, 40)]
    sampling = pymllm.SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    found = [list(answer.token_ids) for answer in llm.generate(prompts, sampling)]
    assert found == [zoo.greedy(model, ids, 20)[0] for ids in prompts]


def test_a_plan_counts_the_states_that_a_class_keeps_in_its_modules(tmp_path):
    zoo.write(zoo.small("recurrent_gemma"), tmp_path / "m")
    llm = pymllm.LLM(tmp_path / "m", device="cpu", dtype="float32", compute="exact", progress=False)
    caches, held = llm.model.request_caches, []
    run = caches._run_one

    def noted(*args):
        hidden, kept = run(*args)
        layers = [vars(layer) for layer in kept[0].layers]
        held.append(sum(x.nbytes for x in tree_leaves((layers, kept[1])) if isinstance(x, torch.Tensor)))
        return hidden, kept

    caches._run_one = noted
    llm.generate([zoo.prompt(40)], pymllm.SamplingParams(max_tokens=4, ignore_eos=True))
    assert 0.9 * caches.fixed_bytes <= max(held) <= caches.fixed_bytes


def test_a_request_whose_cache_fails_is_answered_and_leaves_others_theirs(tmp_path, monkeypatch):
    made = zoo.small("falcon_mamba")
    zoo.write(made, tmp_path / "m")
    llm = pymllm.LLM(tmp_path / "m", device="cpu", dtype="float32", compute="exact")
    prompts = [zoo.prompt(9, seed) for seed in range(3)]
    params = pymllm.SamplingParams(max_tokens=6, ignore_eos=True)
    expected = [answer.token_ids for answer in llm.generate(prompts, params)]
    caches = type(llm.model.request_caches)
    new_cache, calls = caches._new_cache, []

    def fail_once(self, base, name):
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("the cache does not fit")
        return new_cache(self, base, name)

    monkeypatch.setattr(caches, "_new_cache", fail_once)
    assert [answer.token_ids for answer in llm.generate(prompts, params)] == expected
    assert len(calls) == 3  # the third request has a cache again
