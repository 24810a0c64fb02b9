"""What is stored decides where the config says something else: over layers, heads, zero points and cache scales."""

# V vocabulary, H hidden size

from __future__ import annotations

import json

import pytest
import torch

import pymllm
from pymllm.errors import CheckpointError
from pymllm.writing.quantize_checkpoint import quantize_checkpoint

from ..checkpoints import AWQ, FORMATS, FP8, Plain, edit_config, load_tensors, save_tensors, write_checkpoint
from ..forward import TOLERANCE, llm_logits_of
from ..gguf_files import write_gguf
from ..moe_checkpoints import write_moe
from ..quantization.test_modelopt import FP8 as ModelOptFP8
from ..quantized import GPTQ, LAYER, WRITERS, CompressedInt, excluded_name

SMALL = {"num_hidden_layers": 1, "intermediate_size": 128}
HEAD = "lm_head.weight"


def sources(folder, **options):
    return {layer.prefix: layer for layer in pymllm.plan(folder, device="cpu", **options).layers}


def assert_answers(checkpoint, expected=None, **options):
    expected = checkpoint.logits() if expected is None else expected
    found = llm_logits_of(checkpoint, compute="exact", **options)
    assert (found - expected).norm() / expected.norm() < TOLERANCE
    assert pymllm.verify(checkpoint.folder, device="cpu").ok


# --- layers


@pytest.mark.parametrize("fmt", WRITERS)
def test_a_layer_that_is_left_out_by_name_and_stored_quantised_is_read_as_it_is_stored(fmt, tmp_path):
    writer = WRITERS[fmt]
    checkpoint = write_checkpoint(tmp_path, "llama", writer, **SMALL)
    edit_config(tmp_path, quantization_config=writer.config((excluded_name(fmt),)))
    plan = sources(tmp_path)
    assert plan[LAYER].source == "stored so, although the config excludes it"
    assert plan[LAYER].method == plan["model.layers.0.mlp.up_proj"].method != "none"
    assert plan["model.layers.0.mlp.up_proj"].source == "quantization_config"
    assert_answers(checkpoint)


@pytest.mark.parametrize("fmt", WRITERS)
def test_a_layer_that_is_to_be_quantised_and_stored_in_floats_is_read_as_it_is_stored(fmt, tmp_path):
    writer = WRITERS[fmt]
    checkpoint = write_checkpoint(tmp_path, "llama", writer, ignored=("down_proj",), **SMALL)
    edit_config(tmp_path, quantization_config=writer.config(()))
    layer = sources(tmp_path)[LAYER]
    assert (layer.method, layer.source) == ("none", "stored so, although the config quantises it")
    assert_answers(checkpoint)


@pytest.mark.parametrize(
    "fmt", ("awq", "gptq", "fp8-block", "modelopt-nvfp4", "compressed-int8", "quark", "mxfp4")
)
def test_a_head_that_is_left_out_and_stored_quantised_is_read_as_it_is_stored(fmt, tmp_path):
    writer = WRITERS[fmt]
    checkpoint = write_checkpoint(tmp_path, "llama", writer, vocab_size=128, **SMALL)
    weight = checkpoint.model.lm_head.weight
    stored, meant = writer.encode(weight.detach())
    with torch.no_grad():
        weight.copy_(meant)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != HEAD}
    save_tensors(tmp_path, tensors | {f"lm_head.{suffix}": tensor for suffix, tensor in stored.items()})
    edit_config(tmp_path, quantization_config=writer.config(("lm_head",)))
    head = sources(tmp_path)["lm_head"]
    assert head.method != "none" and head.source == "stored so, although the config excludes it"
    assert_answers(checkpoint)


@pytest.mark.parametrize(
    ("quantization", "parts"),
    [
        # The list of layers lacks one.
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4"},
                    "model.layers.0.mlp.gate_proj": {"quant_algo": "FP8"},
                },
            },
            {"up_proj": "modelopt-nvfp4", "gate_proj": "modelopt-fp8", "down_proj": "modelopt-fp8"},
        ),
        # Groups and rules by name, of which another one is stored.
        (
            {
                **CompressedInt().config(()),
                "config_groups": {
                    "a": CompressedInt(said=None).config(())["config_groups"]["group_0"]
                    | {"targets": ["re:.*(up|gate)_proj"]},
                    "b": {
                        **FORMATS["ct-channel"].config(())["config_groups"]["group_0"],
                        "targets": ["re:.*down_proj"],
                    },
                },
            },
            {"up_proj": "compressed-fp8", "gate_proj": "compressed-int8", "down_proj": "compressed-int8"},
        ),
        (
            {**GPTQ().config(()), "dynamic": {".*down_proj": {"group_size": 64}, ".*up_proj": {"bits": 8}}},
            {"up_proj": GPTQ(64), "gate_proj": "gptq", "down_proj": "gptq"},
        ),
    ],
    ids=("modelopt", "compressed-tensors", "gptq"),
)
def test_of_several_methods_of_a_config_the_one_that_reads_the_tensors_is_taken(
    quantization, parts, tmp_path
):
    writers = {name: WRITERS.get(fmt, fmt) if isinstance(fmt, str) else fmt for name, fmt in parts.items()}
    others = {f"{part}_proj": Plain() for part in "qkvo"}
    checkpoint = write_checkpoint(tmp_path, "llama", ModelOptFP8(), parts=writers | others, **SMALL)
    edit_config(tmp_path, quantization_config={"ignore": ["lm_head"], **quantization})
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization}))
    assert sources(tmp_path)[LAYER].source.startswith("stored so, although the config ")
    assert_answers(checkpoint)


def test_experts_that_are_left_out_and_stored_quantised_are_read_as_they_are_stored(tmp_path):
    checkpoint = write_moe(tmp_path, "mixtral", "fp8-block", num_hidden_layers=1)
    edit_config(tmp_path, quantization_config={"modules_to_not_convert": [r"model.layers.0.*experts.*"]})
    expert = next(layer for layer in sources(tmp_path).values() if layer.kind == "experts")
    assert expert.source == "stored so, although the config excludes it" and expert.method == "fp8"
    assert_answers(checkpoint)


def test_autorounds_16_bits_of_a_model_published_in_float8_are_read_as_they_are_stored(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", GPTQ(), parts={"down_proj": FP8()}, **SMALL)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **{"bits": 4, "group_size": 32, "sym": True, "data_type": "int"},
        "extra_config": {LAYER: {"bits": 16, "data_type": "float"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    layer = sources(tmp_path)[LAYER]
    assert (layer.method, layer.source) == ("auto-round", "stored so, although the config excludes it")
    assert "128x128" in layer.method_detail
    assert_answers(checkpoint)


# --- zero points


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("bits", (4, 8))
def test_zero_points_that_the_config_does_not_speak_of_are_used(bits, packed, tmp_path):
    if packed and bits == 8:
        pytest.skip("the writer here packs four bits")
    checkpoint = write_checkpoint(tmp_path, "llama", CompressedInt(bits, True, None, packed), **SMALL)
    assert_answers(checkpoint)


@pytest.mark.parametrize("packed", (False, True))
def test_zero_points_of_weights_that_are_said_to_have_none_are_refused_where_they_are_not_neutral(
    packed, tmp_path
):
    checkpoint = write_checkpoint(tmp_path, "llama", CompressedInt(4, True, True, packed), **SMALL)
    with pytest.raises(CheckpointError) as caught:
        pymllm.load_model(tmp_path, device="cpu")
    assert caught.value.code == "bad-content" and caught.value.tensor.endswith("weight_zero_point")
    neutral = {
        name: torch.full_like(tensor, -0x77777778 if packed else 0) if name.endswith("zero_point") else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    save_tensors(tmp_path, neutral)
    assert "symmetric" in str(pymllm.plan(tmp_path, device="cpu").notes)
    pymllm.load_model(tmp_path, device="cpu")


# --- heads that the config ties


def own_head(folder, writer, stored_by, scale=0.5, name="lm_head"):
    """A tied checkpoint with another head in `stored_by`, and the logits that it means."""
    checkpoint = write_checkpoint(folder, "qwen2", writer, tie_word_embeddings=True, vocab_size=128, **SMALL)
    noise = torch.randn(checkpoint.model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
    stored, meant = stored_by.encode(noise * scale)
    save_tensors(folder, checkpoint.tensors | {f"{name}.{suffix}": t for suffix, t in stored.items()})
    with torch.no_grad():
        hidden = checkpoint.model.model(checkpoint.ids[None], use_cache=False).last_hidden_state[0]
    vars(checkpoint).pop("tensors")
    return checkpoint, hidden @ meant.t()


@pytest.mark.parametrize(
    ("fmt", "head"),
    [
        ("none", "none"),
        ("none-bf16", "none-bf16"),
        ("awq-g64", "none"),
        ("awq-g64", "awq-g64"),
        ("fp8-block", "fp8-block"),
        ("ct-channel", "ct-channel-f32"),
    ],
)
def test_a_head_of_its_own_is_run_although_the_config_ties_it(fmt, head, tmp_path):
    writer = FORMATS[fmt]
    checkpoint, expected = own_head(tmp_path, writer, FORMATS[head])
    planned = sources(tmp_path)["lm_head"]
    assert "although the config ties it" in planned.source and planned.tied_to is None and planned.bytes > 0
    tolerance = 1e-2 if fmt == "none-bf16" else TOLERANCE
    found = llm_logits_of(checkpoint, compute="exact")
    assert (found - expected).norm() / expected.norm() < tolerance
    assert pymllm.verify(tmp_path, device="cpu").ok
    model = pymllm.load_model(tmp_path, device="cpu")
    loaded = {r.name for r in model.load_report.tensors if r.status == "loaded"}
    assert {name for name in checkpoint.tensors if name.startswith("lm_head.")} <= loaded


def test_a_head_of_its_own_is_swapped_and_written_as_one(tmp_path):
    checkpoint, expected = own_head(tmp_path / "m", FORMATS["none"], FORMATS["none"])
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    before = llm.logits(checkpoint.ids.tolist())
    pymllm.swap(llm, "lm_head", "fp8")
    after = llm.logits(checkpoint.ids.tolist())
    assert 1e-4 < float((after - before).norm() / before.norm()) < 0.1
    written = quantize_checkpoint(checkpoint.folder, tmp_path / "out", {"**.mlp.**": "int8"}, progress=False)
    assert any("lm_head" in note for note in written.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_tensors(tmp_path / "out")[HEAD], checkpoint.tensors[HEAD])
    again = pymllm.LLM(tmp_path / "out", device="cpu", dtype="float32", compute="exact").logits(
        checkpoint.ids.tolist()
    )
    assert (again - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("fmt", ("none", "none-bf16"))
def test_a_head_that_is_the_embedding_once_more_is_skipped_as_equal(fmt, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "qwen2", fmt, tie_word_embeddings=True, **SMALL)
    table = checkpoint.tensors["model.embed_tokens.weight"]
    save_tensors(tmp_path, checkpoint.tensors | {HEAD: table.clone()})
    model = pymllm.load_model(tmp_path, device="cpu")
    (record,) = (r for r in model.load_report.tensors if r.name == HEAD)
    assert record.status == "skipped" and "equal to model.embed_tokens.weight" in record.reason
    assert sources(tmp_path)["lm_head"].tied_to == "model.embed_tokens"
    changed = table.clone()
    changed[-1, -1] += 1  # the last element alone
    save_tensors(tmp_path, checkpoint.tensors | {HEAD: changed})
    assert sources(tmp_path)["lm_head"].tied_to is None


@pytest.mark.parametrize("name", ("lm_head.weightx", "lm_head.bias", "lm_head.weight.x"))
@pytest.mark.parametrize("head", (False, True))
def test_nothing_else_is_skipped_under_the_name_of_a_tied_head(name, head, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "qwen2", tie_word_embeddings=True, **SMALL)
    table = checkpoint.tensors["model.embed_tokens.weight"]
    more = {HEAD: table.clone()} if head else {}
    save_tensors(tmp_path, checkpoint.tensors | more | {name: torch.zeros(4)})
    with pytest.raises(CheckpointError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert caught.value.code == "unexpected" and caught.value.tensor == name


def test_a_head_that_is_neither_tied_nor_stored_is_missed_by_name(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", AWQ(64), **SMALL)
    save_tensors(tmp_path, {name: t for name, t in checkpoint.tensors.items() if name != HEAD})
    with pytest.raises(CheckpointError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert (caught.value.code, caught.value.tensor) == ("missing", HEAD)


# --- the KV cache's scales

SPELLINGS = {
    "llm-compressor": ("k_scale", "v_scale"),
    "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
    "quark": ("k_proj.output_scale", "v_proj.output_scale"),
    "fused": ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    "vllm": ("attn.k_scale", "attn.v_scale"),
    "autofp8": ("kv_scale", "kv_scale"),
    "vllm-common": ("attn.kv_scale", "attn.kv_scale"),
}
ATTENTION = "model.layers.0.self_attn"


def with_cache(folder, scales, **more):
    checkpoint = write_checkpoint(folder, "llama", "fp8-tensor", **SMALL)
    edit_config(folder, quantization_config={"kv_cache_scheme": "static"})
    named = {f"{ATTENTION}.{name}": value for name, value in (scales | more).items()}
    save_tensors(folder, checkpoint.tensors | named)
    return checkpoint


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scales_of_the_cache_are_read_under_every_name(spelling, tmp_path):
    key, value = SPELLINGS[spelling]
    scales = {key: torch.tensor([0.25])} | ({value: torch.tensor([0.5])} if value != key else {})
    with_cache(tmp_path, scales)
    model = pymllm.load_model(tmp_path, device="cpu")
    found = [scale.unique().tolist() for scale in model.model.layers[0].self_attn.attn.kv_scales]
    assert found == [[0.25], [0.25 if key == value else 0.5]]
    plan = pymllm.plan(tmp_path, device="cpu")
    assert not any("KV cache" in note or "scale 1" in note for note in plan.notes)
    (cache,) = (layer for layer in plan.layers if layer.kind == "attention")
    assert "a scale from the checkpoint" in cache.method_detail
    kept = pymllm.plan(tmp_path, device="cpu", kv_cache="none").notes
    assert any("a scale of the KV cache, which is kept in floats" in note for note in kept)


def test_one_scale_of_two_is_missed_by_name(tmp_path):
    with_cache(tmp_path, {"v_scale": torch.tensor([0.5])})
    with pytest.raises(CheckpointError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert (caught.value.code, caught.value.tensor) == ("missing", f"{ATTENTION}.k_scale")


@pytest.mark.parametrize(
    ("name", "harmless", "harmful"),
    [
        ("attn.k_scale", 0.25, 0.3),  # once more, under another name
        ("qkv_proj.v_scale", 0.5, 0.25),
        ("k_zero_point", 0.0, 1.0),
        ("attn.v_zero_point", 0.0, -3.0),
        ("k_proj.output_zero_point", 0.0, 2.0),
    ],
)
def test_what_is_left_out_beside_the_cache_must_be_harmless(name, harmless, harmful, tmp_path):
    scales = {"k_scale": torch.tensor([0.25]), "v_scale": torch.tensor([0.5])}
    with_cache(tmp_path, scales, **{name: torch.tensor([harmless])})
    pymllm.load_model(tmp_path, device="cpu")
    with_cache(tmp_path, scales, **{name: torch.tensor([harmful])})
    with pytest.raises(CheckpointError) as caught:
        pymllm.load_model(tmp_path, device="cpu")
    assert (caught.value.code, caught.value.tensor) == ("bad-content", f"{ATTENTION}.{name}")


@pytest.mark.parametrize(
    "name", ("q_scale", "q_proj.output_scale", "attn.q_scale", "attn.prob_scale", "prob_output_scale")
)
def test_scales_of_queries_and_probabilities_are_said_to_be_unused(name, tmp_path):
    scales = {"k_scale": torch.tensor([0.25]), "v_scale": torch.tensor([0.5])}
    with_cache(tmp_path, scales, **{name: torch.tensor([3.0])})
    assert any("stay in floats" in note for note in pymllm.plan(tmp_path, device="cpu").notes)


@pytest.mark.parametrize(
    "name", ("o_proj.k_scale", "mlp.k_scale", "x.k_scale", "k_scales", "up_proj.q_scale")
)
def test_a_name_that_is_like_a_scale_of_the_cache_is_no_reason_to_skip_a_tensor(name, tmp_path):
    with_cache(tmp_path, {name: torch.tensor([3.0])})
    with pytest.raises(CheckpointError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert (caught.value.code, caught.value.tensor) == ("unexpected", f"{ATTENTION}.{name}")


# --- model types


def test_the_architecture_decides_where_the_model_type_is_unknown(tmp_path):
    checkpoint = write_moe(tmp_path, "deepseek_v3", "none", num_hidden_layers=2)
    edit_config(tmp_path, model_type="kimi_k2")
    assert any(
        "kimi_k2" in note and "deepseek_v3" in note for note in pymllm.plan(tmp_path, device="cpu").notes
    )
    assert_answers(checkpoint)


@pytest.mark.parametrize(
    "architectures", (["Unknown"], [], None, ["LlamaForCausalLM", "Qwen3ForCausalLM"], [1])
)
def test_an_unknown_model_type_is_refused_without_one_known_architecture(architectures, tmp_path):
    write_checkpoint(tmp_path, "llama", **SMALL)
    edit_config(tmp_path, model_type="kimi_k2", architectures=architectures)
    with pytest.raises(pymllm.errors.ConfigError, match="kimi_k2"):
        pymllm.plan(tmp_path, device="cpu")


def test_a_layer_that_the_config_does_not_count_is_no_layer_for_further_tokens(tmp_path):
    checkpoint = write_moe(tmp_path, "deepseek_v3", "none", num_hidden_layers=2)
    edit_config(tmp_path, num_hidden_layers=1, num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert caught.value.code == "unexpected"
    further = "model.layers.1.eh_proj.weight"
    save_tensors(tmp_path, checkpoint.tensors | {further: torch.zeros(128, 256)})
    assert any("further tokens" in note for note in pymllm.plan(tmp_path, device="cpu").notes)


def test_nothing_else_is_skipped_under_the_name_of_a_tied_head_of_gguf(tmp_path):
    def add(tensors):
        tensors["output.weightx"] = tensors["output_norm.weight"]

    write_gguf(
        tmp_path / "m.gguf", "qwen3", "Q8_0", tie_word_embeddings=True, num_hidden_layers=1, edit_tensors=add
    )
    with pytest.raises(CheckpointError, match=r"weightx.*unexpected"):
        pymllm.plan(tmp_path / "m.gguf", device="cpu")
