"""Models of gated delta nets and attention: the same however a prompt is cut, in any company, and on any rank."""

# T tokens, V vocabulary

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import save_file

import pymllm
from pymllm import LLM, SamplingParams
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.errors import CheckpointError, ConfigError
from pymllm.parallel import simulate

from ..checkpoints import load_tensors, relative_error, write_checkpoint
from ..engine.answers import answers, greedy
from ..forward import TOLERANCE, logits_of
from ..moe_checkpoints import write_moe

FAMILIES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
ODDS = random.Random(8)
PROMPTS = [[ODDS.randrange(97) for _ in range(length)] for length in (70, 1, 33, 5, 18)]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


def write(folder, family, **settings):
    make = write_checkpoint if family == "qwen3_5_text" else write_moe
    return make(folder, family, max_position_embeddings=256, **settings)


def logprobs(checkpoint, prompt):
    """The log-probability of each of a prompt's tokens but the first, from transformers."""
    scores = checkpoint.logits(torch.tensor(prompt)).log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def read(llm, prompts):
    """The same from the engine, which reads these prompts together."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate(prompts, params)
    return [torch.tensor([p.logprob for p in output.prompt_logprobs[1:]]) for output in outputs]


@pytest.mark.parametrize("step_tokens", (1, 7, 30, 1024))
def test_prompts_side_by_side_in_any_pieces_are_read_as_transformers_reads_each(checkpoint, step_tokens):
    llm = LLM(checkpoint.folder, dtype="float32")
    llm.engine.scheduler.step_tokens = step_tokens
    for prompt, found in zip(PROMPTS, read(llm, PROMPTS), strict=True):
        if len(prompt) > 1:
            assert (found - logprobs(checkpoint, prompt)).abs().max() < 3e-5


def test_ranks_divide_the_heads(checkpoint):
    def run(parallel):
        return logits_of(pymllm.load_model(checkpoint.folder, dtype="float32"), checkpoint.ids)

    for logits in simulate(2, run):
        assert relative_error(logits, checkpoint.logits()) <= TOLERANCE


def test_a_size_that_splits_a_key_head_is_refused_with_the_sizes_that_work(tmp_path):
    write(tmp_path, "qwen3_5_text", linear_num_key_heads=2)
    ranks = pymllm.plan(tmp_path).tensor_parallel
    assert ranks["legal_sizes"] == [1, 2] and "heads" in ranks["refused_sizes"]["4"]


@pytest.mark.parametrize("pages", (8, 80))
def test_64_requests_at_any_time_answer_as_each_alone(tmp_path_factory, pages):
    folder = write(tmp_path_factory.mktemp("m"), "qwen3_5_text").folder
    odds, params = random.Random(2), []
    prompts = [[odds.randrange(97) for _ in range(odds.randint(1, 60))] for _ in range(64)]
    params = [greedy(odds.randint(1, 24)) for _ in prompts]
    arrivals = sorted(odds.randint(0, 40) for _ in prompts)
    alone = LLM(folder, dtype="float32", prefix_reuse=False)
    expected = [answers(alone, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    llm = LLM(folder, dtype="float32")
    llm.engine.cache = PagedKVCache(llm.model, pages, torch.device("cpu"))
    llm.engine.scheduler.step_tokens = 61
    requests, step = [], 0
    with llm.session() as session:
        while len(requests) < 64 or session.unfinished:
            while len(requests) < 64 and arrivals[len(requests)] <= step:
                requests.append(session.add(prompts[len(requests)], params[len(requests)]))
            session.step()
            step += 1
    assert [tuple(request.answer) for request in requests] == expected
    assert (sum(request.preemptions for request in requests) > 0) == (pages == 8)
    assert sorted(llm.engine.cache.free) == list(range(pages))
    assert llm.engine.states.available == llm.engine.states.count


def test_the_next_turn_goes_on_from_the_state_of_the_one_before(checkpoint):
    llm, plain = (LLM(checkpoint.folder, dtype="float32", prefix_reuse=reuse) for reuse in (True, False))
    first = PROMPTS[0]
    (one,) = llm.generate([first], greedy(30))
    turn = [*first, *one.token_ids, 5, 4, 3]
    (two,) = llm.generate([turn], greedy(20))
    assert two.cached_tokens == 96
    assert [two.token_ids] == answers(plain, [turn], greedy(20))


def test_the_plan_counts_the_states(tmp_path):
    settings = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 16, "linear_value_head_dim": 24}
    write(tmp_path, "qwen3_5_text", **settings, **sizes)
    plan = pymllm.plan(tmp_path, dtype="float32")
    rule, conv = 4 * 16 * 24 * 4, (2 * 2 * 16 + 4 * 24) * 3 * 4
    assert plan.totals["state_bytes_per_request"] == rule + conv
    assert f"state: {rule + conv} bytes a request" in str(plan)
    layer = plan.layer("model.layers.0.linear_attn")
    assert (layer.kind, layer.state_bytes, layer.shape) == ("recurrence", rule, [4, 16, 24])
    assert plan.layer("model.layers.0.linear_attn.conv1d").state_bytes == conv
    cache = plan.kv_cache
    assert cache["state_bytes"] == (cache["requests"] + 1 + cache["remembered_states"]) * (rule + conv)
    llm = LLM(tmp_path, dtype="float32")
    assert llm.engine.states.count == cache["requests"] and llm.engine.states.bytes_each == rule + conv


def test_rules_quantise_the_projections_as_any_linear_layer(tmp_path):
    checkpoint = write(tmp_path, "qwen3_5_text")
    rules = {"**.in_proj_qkv": "int8", "**.out_proj": "fp8", "**.in_proj_b": "int8"}
    llm = LLM(tmp_path, rules, dtype="float32")
    named = {layer.prefix.rpartition(".")[2]: layer.method for layer in llm.plan.layers}
    assert (named["in_proj_qkv"], named["out_proj"], named["in_proj_b"]) == ("int8", "fp8", "int8")
    assert (named["in_proj_z"], named["in_proj_a"]) == ("none", "none")
    assert pymllm.verify(tmp_path, rules, dtype="float32").ok
    assert relative_error(llm.logits(checkpoint.ids), checkpoint.logits()) < 0.05
    assert answers(llm, PROMPTS[:2]) == [answers(llm, [prompt])[0] for prompt in PROMPTS[:2]]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"linear_num_value_heads": 30}, "linear_num_value_heads.*a multiple of linear_num_key_heads, 4.*30"),
        ({"hidden_act": "relu"}, "hidden_act.*silu"),
        ({"layer_types": ["linear_attention", "chunked_attention"]}, "layer_types.*linear_attention"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim.*at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, change, error):
    write(tmp_path, "qwen3_5_text", edit_config=lambda raw: raw.update(change))
    with pytest.raises(ConfigError, match=error):
        pymllm.plan(tmp_path)


def test_a_llama_with_linear_attention_is_refused(tmp_path):
    kinds = ["linear_attention", "full_attention"]
    write_checkpoint(tmp_path, edit_config=lambda raw: raw.update(layer_types=kinds))
    with pytest.raises(ConfigError, match=r"layer_types.*full_attention or sliding_attention"):
        pymllm.plan(tmp_path)


# Wrappers


@pytest.fixture(scope="module", params=("qwen3_5", "qwen3_5_moe"))
def wrapped(request, tmp_path_factory):
    """A published model: the language model's config inside, a vision tower, and layers that guess ahead."""
    import transformers

    text = write(tmp_path_factory.mktemp("text"), f"{request.param}_text")
    name = "Qwen3_5Moe" if "moe" in request.param else "Qwen3_5"
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 128}
    config = getattr(transformers, f"{name}Config")(
        text_config=text.model.config.to_dict(), vision_config=vision
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()
    model.model.language_model.load_state_dict(text.model.model.state_dict())
    model.lm_head.load_state_dict(text.model.lm_head.state_dict())
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tensors = load_tensors(folder) | {"mtp.fc.weight": torch.ones(4, 4)}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, text


def test_a_wrapper_answers_as_its_language_model_and_says_what_is_not_run(wrapped):
    folder, text = wrapped
    llm = LLM(folder, dtype="float32")
    assert relative_error(llm.logits(text.ids), text.logits()) <= TOLERANCE
    why = {
        record.name.split(".")[0:2][-1]: record.reason for record in llm.load_report.tensors if record.reason
    }
    assert why["visual"] == "the vision tower is not run"
    assert why["fc"] == "a layer that predicts further tokens, which is not run"
    assert any("the vision tower is not run" in note for note in llm.plan.notes)
    llm.plan.layer("model.layers.1.self_attn.q_proj")


def test_rules_name_a_wrapper_s_layers_as_its_files_do(wrapped):
    plan = pymllm.plan(wrapped[0], {"model.language_model.layers.1.self_attn.*": "int8"})
    changed = [layer.prefix.rpartition(".")[2] for layer in plan.layers if layer.method == "int8"]
    assert changed == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_a_language_model_s_names_inside_a_wrapper_s_config_are_read_too(wrapped, tmp_path):
    folder, text = wrapped
    tensors = {
        name.replace("model.language_model.", "model."): value
        for name, value in load_tensors(folder).items()
        if "visual" not in name
    }
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert relative_error(LLM(tmp_path, dtype="float32").logits(text.ids), text.logits()) <= TOLERANCE


def test_a_wrapper_without_a_language_model_is_refused(wrapped, tmp_path):
    raw = json.loads((wrapped[0] / "config.json").read_text())
    del raw["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises((CheckpointError, ConfigError)):
        pymllm.plan(tmp_path)


def test_a_missing_projection_is_named(tmp_path):
    write(tmp_path, "qwen3_5_text")
    tensors = load_tensors(tmp_path)
    del tensors["model.layers.0.linear_attn.A_log"]
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.linear_attn\.A_log"):
        pymllm.plan(tmp_path)
