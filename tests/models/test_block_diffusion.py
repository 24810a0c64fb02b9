"""Families that are decoded by blocks: logits by the plain formula, names, settings, formats, ranks."""

# B block length

from __future__ import annotations

import json

import pytest
import torch

import pymllm
from pymllm.errors import CheckpointError, ConfigError
from pymllm.loading.prepare import prepare
from pymllm.models import find_definition, read_model_config
from pymllm.models.strategy import BlockDiffusion
from pymllm.parallel import simulate

from ..block_checkpoints import FAMILIES, block_logits, write_blocks
from ..checkpoints import edit_config, relative_error, save_tensors, write_checkpoint
from ..forward import TOLERANCE
from ..moe_checkpoints import write_moe
from ..quantized import WRITERS

ODD = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "vocab_size": 61,
}
# A share of the head that is no power of two; a head size of its own; groups of two; no dense layer, or no sparse one.
LLADA2 = {
    "odd": {**ODD, "partial_rotary_factor": 0.6, "rotary_dim": 6, "moe_intermediate_size": 24},
    "one-key-head": {"num_key_value_heads": 1, "head_dim": 16, "rotary_dim": 8},
    "groups-of-two": {"n_group": 6, "topk_group": 5, "num_experts_per_tok": 7},
    "one-group": {"n_group": 1, "topk_group": 1},
    "one-expert-a-token": {"num_experts_per_tok": 1},
    "no-shared": {"num_shared_experts": 0, "first_k_dense_replace": 0},
    "two-shared": {"num_shared_experts": 2, "num_hidden_layers": 3},
    "all-dense": {"first_k_dense_replace": 2},
    "biases": {"use_qkv_bias": True, "use_bias": True},
    "no-expert-bias": {"moe_router_enable_expert_bias": False},
    "whole-heads": {"partial_rotary_factor": 1.0, "rotary_dim": 32},
    "tied": {"tie_word_embeddings": True},
}
CASES = [("llada2_moe", name, settings) for name, settings in LLADA2.items()]
CASES += [("llada2_moe_veomni", "merged", {}), ("llada2_moe_veomni", "merged-odd", LLADA2["odd"])]
CASES += [(family, "plain", {}) for family in ("sdar", "sdar_moe", "fast_dllm_qwen")]
CASES += [(family, "odd", ODD) for family in ("sdar", "fast_dllm_qwen")]
CASES += [("sdar_moe", "odd", {**ODD, "moe_intermediate_size": 24, "num_experts_per_tok": 3})]


def causal_logits(checkpoint, **options):
    """Compute the logits of the checkpoint's ids, a token at a time."""
    model = pymllm.load_model(checkpoint.folder, device="cpu", dtype="float32", **options)
    return block_logits(model, checkpoint.ids, 1)


def load_by_blocks(folder, block_length):
    """Load a model that is built for blocks of this length."""
    strategy = f"block_diffusion:block_length={block_length}"
    model = pymllm.load_model(folder, device="cpu", dtype="float32", strategy=strategy)
    attention = [m for m in model.modules() if isinstance(m, pymllm.attention.attention.Attention)]
    assert all(layer.problem.block_causal for layer in attention)
    return model


@pytest.mark.parametrize("family, name, settings", CASES, ids=[f"{f}-{n}" for f, n, _ in CASES])
def test_logits_are_those_of_the_formula_at_any_block_length(tmp_path, family, name, settings):
    checkpoint = write_blocks(tmp_path / "m", family, seed=len(name), **settings)
    model, causal = load_by_blocks(tmp_path / "m", 4), checkpoint.logits()
    assert relative_error(block_logits(model, checkpoint.ids, 1), causal) <= TOLERANCE
    for block_length in (3, 4, 32):
        expected = checkpoint.logits(block_length=block_length)
        assert relative_error(expected, causal) > 0.01, "the block must matter"
        assert relative_error(block_logits(model, checkpoint.ids, block_length), expected) <= TOLERANCE


# --- SDAR and Fast-dLLM are Qwen's models


@pytest.mark.parametrize("fmt", ("none", "awq-g64", "fp8-block"))
@pytest.mark.parametrize(
    "family, base", (("sdar", "qwen3"), ("sdar_moe", "qwen3_moe"), ("fast_dllm_qwen", "qwen2"))
)
def test_causal_logits_equal_transformers_of_the_model_they_were_trained_from(tmp_path, family, base, fmt):
    model_type, architecture, _ = FAMILIES[family]

    def trained_on(raw):
        raw |= {"model_type": model_type, "architectures": [architecture], "mask_token_id": 3}

    write = write_moe if base == "qwen3_moe" else write_checkpoint
    checkpoint = write(tmp_path / "m", base, fmt, edit_config=trained_on)
    assert relative_error(causal_logits(checkpoint), checkpoint.logits()) <= TOLERANCE
    assert pymllm.plan(checkpoint.folder, device="cpu").definition == f"pymllm.models.{family}"


# --- what a page says


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("named", ("model_type", "architectures"))
def test_a_page_is_found_by_type_and_by_class(family, named):
    model_type, architecture, _ = FAMILIES[family]
    by_type = {"model_type": model_type}
    by_class = {
        "model_type": "of-its-own",
        "architectures": [architecture],
        "auto_map": {"AutoModelForCausalLM": f"modeling.{architecture}"},
    }
    found = find_definition(by_type if named == "model_type" else by_class)
    assert found == (family if named == "model_type" else family.removesuffix("_veomni"))


@pytest.mark.parametrize(
    "family, expected",
    (
        ("sdar", BlockDiffusion(4, 151669, 0.9)),
        ("sdar_moe", BlockDiffusion(4, 151669, 0.9)),
        ("fast_dllm_qwen", BlockDiffusion(32, 151665, 0.9, shifted=True)),
        ("llada2_moe", BlockDiffusion(32, 156895, 0.95)),
        ("llada2_moe_veomni", BlockDiffusion(32, 156895, 0.95)),
    ),
)
def test_a_model_says_how_it_is_decoded(tmp_path, family, expected):
    folder = write_blocks(tmp_path, family).folder
    assert prepare(folder, device="cpu").model.block_diffusion == expected


def test_a_model_of_another_family_is_decoded_a_token_at_a_time(tmp_path):
    assert prepare(write_checkpoint(tmp_path, "qwen3").folder, device="cpu").model.block_diffusion is None


def test_the_settings_that_a_config_may_leave_out():
    """The defaults of the authors' config classes."""
    config = read_model_config({"model_type": "llada2_moe", "hidden_size": 64, "num_attention_heads": 4})
    assert (config.head_dim, config.rms_norm_eps, config.num_key_value_heads) == (16, 1e-5, 4)
    rope = config.rope_parameters
    assert (rope.theta, rope.partial_rotary_factor) == (10000.0, 0.5)
    found = {
        name: config.get(name)
        for name in ("use_bias", "use_qkv_bias", "n_group", "topk_group", "num_experts")
    }
    assert found == {
        "use_bias": True,
        "use_qkv_bias": False,
        "n_group": 8,
        "topk_group": 4,
        "num_experts": 16,
    }
    fast = read_model_config({"model_type": "Fast_dLLM_Qwen", "hidden_size": 64, "num_attention_heads": 4})
    assert (fast.head_dim, fast.num_key_value_heads, fast.rms_norm_eps) == (16, 32, 1e-6)
    sdar = read_model_config({"model_type": "sdar", "hidden_size": 64, "num_attention_heads": 4})
    assert (sdar.head_dim, sdar.attention_bias) == (128, False)


@pytest.mark.parametrize(
    "setting, value",
    (
        ("score_function", "softmax"),
        ("norm_topk_prob", False),
        ("norm_head", True),
        ("rotary_dim", 12),
        ("use_sliding_window", True),
        ("num_key_value_heads", 0),
    ),
)
def test_a_setting_that_the_model_has_no_branch_for_is_refused(tmp_path, setting, value):
    checkpoint = write_blocks(tmp_path, "llada2_moe")
    edit_config(tmp_path, **{setting: value})
    with pytest.raises(ConfigError, match=setting) as raised:
        pymllm.plan(checkpoint.folder, device="cpu")
    assert raised.value.tensor == setting


def test_how_much_of_a_head_turns_in_either_spelling(tmp_path):
    checkpoint = write_blocks(tmp_path, "llada2_moe", partial_rotary_factor=0.25, rotary_dim=8)
    raw, expected = json.loads((tmp_path / "config.json").read_text()), checkpoint.logits()
    spellings = (
        {"rotary_dim": 8},
        {"partial_rotary_factor": 0.25},
        {
            "rope_parameters": {
                "rope_theta": 5000.0,
                "partial_rotary_factor": 0.25,
                "rope_type": "default",
            }
        },
    )
    for spelling in spellings:
        rest = {k: v for k, v in raw.items() if k not in ("rotary_dim", "partial_rotary_factor")}
        (tmp_path / "config.json").write_text(json.dumps(rest | spelling))
        assert relative_error(causal_logits(checkpoint), expected) <= TOLERANCE


# --- the tensors of LLaDA2


def test_the_bias_of_the_experts_in_either_spelling(tmp_path):
    checkpoint = write_blocks(tmp_path, "llada2_moe")
    tensors, name = checkpoint.tensors, "model.layers.1.mlp.gate.expert_bias"
    other = name.replace("expert_bias", "e_score_correction_bias")
    assert tensors[name].dtype is torch.float32
    save_tensors(tmp_path, {other if key == name else key: value for key, value in tensors.items()})
    edit_config(tmp_path, moe_router_enable_expert_bias=False)  # the authors' code does not read it
    assert relative_error(causal_logits(checkpoint), checkpoint.logits()) <= TOLERANCE
    save_tensors(tmp_path, {**tensors, other: tensors[name].clone()})
    with pytest.raises(CheckpointError, match=r"unexpected, .*e_score_correction_bias fills its place"):
        pymllm.plan(tmp_path, device="cpu")
    edit_config(tmp_path, moe_router_enable_expert_bias=True)
    save_tensors(tmp_path, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=r"mlp\.gate.*bias"):
        pymllm.plan(tmp_path, device="cpu")


def test_a_body_that_was_saved_without_its_head_is_read(tmp_path):
    checkpoint = write_blocks(tmp_path, "llada2_moe")
    body = {
        key.removeprefix("model."): value for key, value in checkpoint.tensors.items() if "lm_head" not in key
    }
    save_tensors(tmp_path, body)
    edit_config(tmp_path, architectures=["LLaDA2MoeModel"])
    prepared = prepare(tmp_path, device="cpu")
    assert prepared.model.why_no_text is not None
    assert all(record.status == "skipped" for record in prepared.records) and not prepared.records


def test_a_misshapen_tensor_of_q_k_and_v_is_named(tmp_path):
    checkpoint = write_blocks(tmp_path, "llada2_moe")
    name = "model.layers.0.attention.query_key_value.weight"
    save_tensors(tmp_path, {**checkpoint.tensors, name: checkpoint.tensors[name][:-32]})
    with pytest.raises(CheckpointError, match=r"query_key_value.*\[256, 128\]"):
        pymllm.plan(tmp_path, device="cpu")


FUSED = (
    *("awq", "gptq", "bitsandbytes-4", "compressed-fp8", "compressed-int8", "fp8-block", "fp8-tensor"),
    *("hqq", "modelopt-nvfp4", "mxfp4"),
)


@pytest.mark.parametrize("fmt", FUSED)
def test_formats_of_the_fused_tensor_on_one_rank_and_two(tmp_path, fmt):
    """Heads of 128, so that a block of 128 outputs is q's, k's or v's alone."""
    sizes = {"head_dim": 128, "rotary_dim": 64, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    sizes |= {"num_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    checkpoint = write_blocks(tmp_path, "llada2_moe", WRITERS[fmt], **sizes)
    expected = checkpoint.logits()
    assert pymllm.verify(tmp_path, device="cpu").ok
    for logits in (causal_logits(checkpoint), *simulate(2, lambda _: causal_logits(checkpoint))):
        assert (logits - expected).norm() / expected.norm() < 1e-4


RANKS = [
    ("llada2_moe", "none"),
    ("llada2_moe", "awq-g32"),
    ("llada2_moe_veomni", "none"),
    ("sdar_moe", "none"),
]
RANKS = [(family, fmt, whole) for family, fmt in RANKS for whole in (False, True)]


@pytest.mark.parametrize("family, fmt, expert_parallel", [*RANKS, ("fast_dllm_qwen", "none", False)])
def test_ranks_give_the_logits_of_one(tmp_path, family, fmt, expert_parallel):
    checkpoint = write_blocks(tmp_path, family, fmt)
    expected = checkpoint.logits(block_length=4)

    def work(_):
        model = pymllm.load_model(
            tmp_path, device="cpu", dtype="float32", kernels={"attention": "torch_sdpa"}
        )
        return block_logits(model, checkpoint.ids, 4)

    for size in (2, 4):
        for logits in simulate(size, work, expert_parallel=expert_parallel):
            assert relative_error(logits, expected) <= TOLERANCE


# --- by the checkpoint's names

RULES = {
    "model.layers.1.attention.query_key_value": "int8",
    "**.attention.dense": "fp8",
    "**.mlp.experts.*.down_proj": "int4:group_size=32",
    "model.word_embeddings": "int8",
}


def test_layers_are_planned_verified_and_swapped_by_their_names(tmp_path):
    checkpoint = write_blocks(tmp_path, "llada2_moe", "none-bf16")
    plan = pymllm.plan(tmp_path, RULES, device="cpu")
    methods = {layer.prefix: layer.method for layer in plan.layers if layer.method != "none"}
    row = plan.layer("model.layers.1.attention.query_key_value")
    assert (row.shape, row.fused_with, row.method) == ([256, 128], [], "int8")
    assert methods["model.layers.0.attention.dense"] == "fp8"
    assert methods["model.word_embeddings"] == "int8"
    assert methods["model.layers.1.mlp.experts.11.down_proj"] == "int4"
    llm = pymllm.LLM(tmp_path, RULES, device="cpu", dtype="float32")
    assert pymllm.verify(llm).ok
    error = float(
        (block_logits(llm.model, checkpoint.ids, 1) - checkpoint.logits()).norm() / checkpoint.logits().norm()
    )
    assert 1e-4 < error < 0.15
    before = block_logits(llm.model, checkpoint.ids, 1)
    swap = pymllm.swap(llm, "**.attention.**", "int4:group_size=32")
    assert swap.changed == [
        f"model.layers.{i}.attention.{name}" for i in range(2) for name in ("query_key_value", "dense")
    ]
    assert not torch.equal(block_logits(llm.model, checkpoint.ids, 1), before)
    swap.undo()
    assert torch.equal(block_logits(llm.model, checkpoint.ids, 1), before)


@pytest.mark.parametrize("format", ("awq", "gptq", "compressed-tensors", "mlx"))
@pytest.mark.parametrize("family", ("llada2_moe", "llada2_moe_veomni", "fast_dllm_qwen"))
def test_a_quantised_checkpoint_keeps_its_names_and_answers(tmp_path, family, format):
    checkpoint = write_blocks(tmp_path / "m", family, "none-bf16")
    # Experts in one tensor stay as they are: no spelling has a quantised form of them.
    rules = {"**.at*.**" if "veomni" in family else "model.layers.**": "int4:group_size=32"}
    pymllm.quantize_checkpoint(tmp_path / "m", tmp_path / "out", rules, format=format)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == FAMILIES[family][0]
    llm, expected = pymllm.LLM(tmp_path / "out", device="cpu", dtype="float32"), checkpoint.logits()
    error = float((block_logits(llm.model, checkpoint.ids, 1) - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.3  # int4 rounds, and so some tokens have other experts
    assert pymllm.verify(llm).ok
    written = {record.name.rpartition(".")[0] for record in llm.load_report.tensors}
    expected = {name.rpartition(".")[0] for name in checkpoint.tensors}
    if format == "mlx":  # experts lie in one tensor there, under a name of mlx-lm's
        written, expected = (
            {n for n in names if "experts." not in n and "switch" not in n} for names in (written, expected)
        )
    assert written == expected


@pytest.mark.parametrize("family", ("sdar", "llada2_moe", "fast_dllm_qwen"))
def test_two_ranks_give_the_same_answers(tmp_path, family):
    prompts = [[3 + (5 * i * i + n) % 90 for i in range(n)] for n in (1, 6, 16, 23)]
    folder = write_blocks(tmp_path, family).folder
    params = [
        pymllm.SamplingParams(max_tokens=14, confidence_threshold=0.3, **each)
        for each in ({}, {"temperature": 0.8, "seed": 1})
    ]

    def work(_):
        llm = pymllm.LLM(folder, dtype="float32", tensor_parallel_size=2)
        return [[o.token_ids for o in llm.generate(prompts, each)] for each in params]

    first, second = simulate(2, work)
    llm = pymllm.LLM(folder, dtype="float32")
    assert first == second == [[o.token_ids for o in llm.generate(prompts, each)] for each in params]
