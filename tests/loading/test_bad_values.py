"""Values that cannot be right are looked for while loading, in every format; every skip is proven harmless."""

# O out_features, I in_features

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import pymllm
from pymllm.errors import CheckpointError, PymllmError
from pymllm.writing.quantize_checkpoint import quantize_checkpoint

from ..checkpoints import AWQ, FP8, CompressedFP8, edit_config, save_tensors, write_checkpoint
from ..forward import assert_answers_as_meant
from ..gguf_files import write_gguf
from ..moe_checkpoints import write_moe
from ..quantization import test_torchao as torchao
from ..quantization.test_bitsandbytes import FourBit
from ..quantization.test_modelopt import NVFP4
from ..quantization.test_quark import Quark
from ..quantized import GPTQ, LAYER, WRITERS, CompressedInt

SMALL = {"num_hidden_layers": 1, "intermediate_size": 128}
NAN, INF = math.nan, math.inf
# The scales of each format, by suffix; and whether one may be zero, as that of a block of zeros.
SCALES = [
    ("awq", AWQ(64), "scales", False),
    ("gptq", GPTQ(), "scales", False),
    ("auto-round", WRITERS["auto-round"], "weight_scale", False),
    ("bitsandbytes", FourBit(), "weight.absmax", True),
    ("bitsandbytes", FourBit(64, double=True), "weight.nested_absmax", True),
    ("bitsandbytes", WRITERS["bitsandbytes-8"], "SCB", True),
    ("compressed-tensors", CompressedFP8("channel"), "weight_scale", False),
    ("compressed-tensors", CompressedFP8("tensor", static=True), "input_scale", False),
    ("compressed-tensors", CompressedInt(8, True, False), "weight_scale", False),
    ("fbgemm", WRITERS["fbgemm-fp8"], "weight_scale", False),
    ("fp8", WRITERS["fp8-block"], "weight_scale_inv", False),
    ("hqq", WRITERS["hqq"], "scale", False),
    ("modelopt", WRITERS["modelopt-fp8"], "weight_scale", False),
    ("modelopt", NVFP4(), "weight_scale", True),
    ("modelopt", NVFP4(), "weight_scale_2", False),
    ("modelopt", NVFP4(), "input_scale", False),
    ("quark", Quark("per_channel", static=False), "weight_scale", False),
]


def with_value(checkpoint, name, value):
    """Write the checkpoint with one element of a tensor replaced."""
    changed = checkpoint.tensors[name].clone()
    flat = changed.view(-1)
    flat[-1] = torch.tensor(value, dtype=torch.float32).to(changed.dtype)
    save_tensors(checkpoint.folder, checkpoint.tensors | {name: changed})
    return changed


def refused(folder, error=CheckpointError):
    with pytest.raises(error) as caught:
        pymllm.load_model(folder, device="cpu")
    return caught.value


@pytest.mark.parametrize(
    ("fmt", "writer", "suffix", "zero"), SCALES, ids=[f"{fmt}-{suffix}" for fmt, _, suffix, _ in SCALES]
)
def test_a_scale_is_a_finite_number_above_zero_in_every_format(fmt, writer, suffix, zero, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", writer, **SMALL)
    name = f"{LAYER}.{suffix}"
    infinities = () if checkpoint.tensors[name].dtype is torch.float8_e4m3fn else (INF, -INF)
    for value in (NAN, *infinities, -0.01, *(() if zero else (0.0,))):
        stored = with_value(checkpoint, name, value)
        error = refused(tmp_path)
        assert (error.code, error.tensor) == ("bad-scale", name), value
        assert f"1 of {stored.numel()}" in str(error)
    if zero:
        with_value(checkpoint, name, 0.0)
        pymllm.load_model(tmp_path, device="cpu")


def test_an_exponent_of_mxfp4_is_no_nan(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", WRITERS["mxfp4"], **SMALL)
    with_value(checkpoint, f"{LAYER}.weight_scale", 255)
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-content", f"{LAYER}.weight_scale")


@pytest.mark.parametrize("marks", ({"autoround_version": "0.16.1"}, {"provider": "auto-round"}), ids=str)
def test_negative_scales_of_autorounds_symmetric_integers_are_right(marks, tmp_path):
    writer = GPTQ(negative=True, marks=tuple(marks.items()))
    checkpoint = write_checkpoint(tmp_path, "llama", writer, **SMALL)
    logits = pymllm.LLM(tmp_path, device="cpu", dtype="float32", compute="exact").logits(
        checkpoint.ids.tolist()
    )
    expected = checkpoint.logits()
    assert (logits - expected).norm() / expected.norm() < 1e-5
    for spelling in ("awq", "compressed-tensors"):
        out = tmp_path / spelling
        quantize_checkpoint(
            tmp_path, out, {"**.up_proj": "awq:group_size=32"}, format=spelling, progress=False
        )
        logits = pymllm.LLM(out, device="cpu", dtype="float32", compute="exact").logits(
            checkpoint.ids.tolist()
        )
        assert (logits - expected).norm() / expected.norm() < 0.2, (
            spelling
        )  # but for up_proj, the very weights
    edit_config(tmp_path, quantization_config=dict.fromkeys(marks, "another"))
    if "provider" in marks:  # else the version says it
        assert refused(tmp_path).code == "bad-scale"


@pytest.mark.parametrize(
    "changed", (slice(1), slice(None), slice(1, None)), ids=("one", "all", "all but one")
)
def test_signs_that_no_writer_gives_to_the_scales_of_symmetric_integers_are_found(changed, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", WRITERS["compressed-int8"], **SMALL)
    name = f"{LAYER}.weight_scale"
    scales = checkpoint.tensors[name].clone()
    scales.view(-1)[changed] *= -1
    save_tensors(checkpoint.folder, checkpoint.tensors | {name: scales})
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-scale", name)
    assert f"found {int((scales < 0).sum())} of {scales.numel()}" in str(error)


def test_blocks_of_gguf_may_have_negative_scales_but_no_nan(tmp_path):
    def load(factor):
        def edit(tensors):
            raw, kind = tensors["blk.0.ffn_down.weight"]
            raw.reshape(raw.shape[0], -1, 34)[:, :, :2].view("<f2")[:, ::2] *= factor
            tensors["blk.0.ffn_down.weight"] = raw, kind

        write_gguf(tmp_path / "m.gguf", "llama", "Q8_0", edit_tensors=edit, num_hidden_layers=1)
        model = pymllm.load_model(tmp_path / "m.gguf", device="cpu")
        return model.model.layers[0].mlp.down_proj.bound.canonical().dequantize(torch.float64)

    kept, negated = load(1), load(-1)
    assert torch.equal(negated.abs(), kept.abs()) and not torch.equal(negated, kept)
    with pytest.raises(CheckpointError, match="NaN"):
        load(math.nan)


# --- any float


FLOATS = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.o_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("value", (NAN, INF, -INF), ids=str)
@pytest.mark.parametrize("name", FLOATS)
def test_floats_that_are_not_finite_are_named_and_counted(name, value, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "qwen2", "none-bf16", **SMALL)
    stored = with_value(checkpoint, name, value)
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-value", name) and f"1 of {stored.numel()}" in str(error)
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(tmp_path, tmp_path / "out", {"**.mlp.**": "int8"}, progress=False)
    assert (caught.value.code, caught.value.tensor) == ("bad-value", name)


@pytest.mark.parametrize(
    ("writer", "suffix", "value"),
    [
        (WRITERS["hqq"], "zero", NAN),
        (FourBit(), "weight.quant_map", INF),
        (FourBit(64, double=True), "weight.nested_quant_map", NAN),
    ],
    ids=("hqq", "quant_map", "nested_quant_map"),
)
def test_tables_and_zero_points_in_floats_are_finite(writer, suffix, value, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", writer, **SMALL)
    with_value(checkpoint, f"{LAYER}.{suffix}", value)
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-value", f"{LAYER}.{suffix}")


def test_a_number_that_a_narrower_dtype_does_not_hold_is_no_infinity_unseen(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", "none-bf16", **SMALL)
    with_value(checkpoint, "model.norm.weight", 1e6)
    pymllm.load_model(tmp_path, device="cpu", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="float16") as caught:
        pymllm.load_model(tmp_path, device="cpu", dtype="float16")
    assert caught.value.tensor == "model.norm.weight"


def test_experts_are_checked_as_they_load_and_as_they_are_read_again(tmp_path):
    checkpoint = write_moe(tmp_path, "mixtral", "fp8-block", num_hidden_layers=1)
    model = pymllm.load_model(tmp_path, device="cpu")
    name = next(n for n in checkpoint.tensors if n.endswith("experts.3.w2.weight_scale_inv"))
    raw = bytearray((tmp_path / "model.safetensors").read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    with (tmp_path / "model.safetensors").open("r+b") as file:  # the same file, so that it is read again
        file.seek(start)
        file.write(b"\xff" * 4)
    for act in (lambda: pymllm.verify(model), lambda: pymllm.load_model(tmp_path, device="cpu")):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert (caught.value.code, caught.value.tensor) == ("bad-scale", name)


# --- codes that the config's bits do not hold, and settings that the tensors repeat


def test_bytes_with_more_bits_than_the_config_says_are_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", CompressedInt(8), **SMALL)
    config = CompressedInt(8).config(())
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    edit_config(tmp_path, quantization_config=config)
    error = refused(tmp_path)
    assert error.code == "bad-content" and error.tensor.endswith("proj.weight") and "4 bits" in str(error)
    assert checkpoint.tensors[error.tensor].dtype is torch.int8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nbits", torch.tensor(8)),
        ("axis", torch.tensor(0)),
        ("shape", torch.tensor([128, 64])),
        ("group_size", torch.tensor(32)),
        ("view_as_float", torch.tensor(True)),
        ("quant_zero", torch.tensor(True)),
        ("packing", torch.tensor(list(b"8bit_u8"), dtype=torch.uint8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_of_hqq_that_a_tensor_repeats_otherwise_is_refused(name, value, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", WRITERS["hqq"], **SMALL)
    right = {"group_size": torch.tensor(64), "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8)}
    right |= {"view_as_float": torch.tensor(False), "quant_zero": torch.tensor(False)}
    save_tensors(tmp_path, checkpoint.tensors | {f"{LAYER}.{key}": setting for key, setting in right.items()})
    pymllm.load_model(tmp_path, device="cpu")
    save_tensors(tmp_path, checkpoint.tensors | {f"{LAYER}.{name}": value})
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-content", f"{LAYER}.{name}")


def test_a_quant_state_of_a_transposed_weight_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", FourBit(), num_hidden_layers=1)
    name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    state = bytes(checkpoint.tensors[name].tolist()).replace(b"[128, 256]", b"[256, 128]")
    save_tensors(tmp_path, checkpoint.tensors | {name: torch.tensor(list(state), dtype=torch.uint8)})
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-content", name)


@pytest.mark.parametrize("scaled", (False, True))
def test_rotary_frequencies_are_skipped_where_they_are_those_of_the_config(scaled, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0} if scaled else None
    options = {"rope_parameters": rope} if scaled else {}
    checkpoint = write_checkpoint(tmp_path, "llama", **SMALL, **options)
    plain = 10000.0 ** (-torch.arange(0, 32, 2).double() / 32).float()
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        for right in (plain, plain.bfloat16(), plain / 2 if scaled else plain.half()):
            save_tensors(tmp_path, checkpoint.tensors | {name: right})
            pymllm.load_model(tmp_path, device="cpu")
        for wrong in (plain * 1.1, 500000.0 ** (-torch.arange(0, 32, 2) / 32), plain[:8], plain * NAN):
            save_tensors(tmp_path, checkpoint.tensors | {name: wrong.float()})
            error = refused(tmp_path)
            assert (error.code, error.tensor) == ("bad-content", name)
    for name in (
        "x.rotary_emb.inv_freq",
        "model.layers.7.self_attn.rotary_emb.inv_freq",
        "rope_freqs.weight",
    ):
        save_tensors(tmp_path, checkpoint.tensors | {name: plain})
        assert refused(tmp_path).code == "unexpected"


@pytest.mark.parametrize(("value", "fits"), ((1200.0, True), (900.0, False)))
def test_the_bound_of_fbgemm_is_skipped_where_it_is_the_configs(value, fits, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", WRITERS["fbgemm-fp8"], **SMALL)
    save_tensors(tmp_path, checkpoint.tensors | {f"{LAYER}.input_scale_ub": torch.tensor([value])})
    if fits:
        pymllm.load_model(tmp_path, device="cpu")
    else:
        assert refused(tmp_path).tensor == f"{LAYER}.input_scale_ub"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("self_attn.q_proj.bias", "bad-content"),
        ("mlp.up_proj.bias", "bad-content"),
        ("self_attn.k_proj.bias", "unexpected"),  # it has 64 outputs
        ("input_layernorm.bias", "unexpected"),
    ],
)
def test_a_bias_that_the_config_does_not_have_is_refused(name, code, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", **SMALL)
    save_tensors(tmp_path, checkpoint.tensors | {f"model.layers.0.{name}": torch.ones(128)})
    assert refused(tmp_path).code == code


@pytest.mark.parametrize("fmt", ("gptq", "fp8-tensor"))
def test_biases_of_zeros_are_left_out_as_autogptq_writes_them(fmt, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", WRITERS[fmt], **SMALL)
    layer = "model.layers.0."
    sides = {"self_attn.q_proj": 128, "self_attn.k_proj": 64, "mlp.down_proj": 128}
    zeros = {f"{layer}{name}.bias": torch.zeros(side).half() for name, side in sides.items()}
    save_tensors(tmp_path, checkpoint.tensors | zeros)
    assert any("a bias of zeros" in note for note in pymllm.plan(tmp_path, device="cpu").notes)
    assert_answers_as_meant(checkpoint, compute="exact")


def test_a_bias_of_zeros_of_an_expert_is_left_out(tmp_path):
    checkpoint = write_moe(tmp_path, "mixtral", "awq-g64", num_hidden_layers=1)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.bias"
    save_tensors(tmp_path, checkpoint.tensors | {name: torch.zeros(128)})
    pymllm.load_model(tmp_path, device="cpu")
    save_tensors(tmp_path, checkpoint.tensors | {name: torch.eye(128)[5]})
    assert refused(tmp_path).tensor == name


def test_floats_that_are_codes_are_not_read_without_their_scale(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", FP8(None), **SMALL)
    name, meant = f"{LAYER}.weight", checkpoint.model.state_dict()[f"{LAYER}.weight"]
    save_tensors(tmp_path, checkpoint.tensors | {name: checkpoint.tensors[name].bfloat16()})
    error = refused(tmp_path)
    assert (error.code, error.tensor) == ("bad-content", f"{LAYER}.weight_scale")
    # What was never set beside a weight that is one.
    save_tensors(tmp_path, checkpoint.tensors | {name: meant, f"{LAYER}.weight_scale": torch.tensor(0.3)})
    assert_answers_as_meant(checkpoint, compute="exact")


@pytest.mark.parametrize(
    ("fmt", "suffix", "dtype"),
    [
        ("hqq", "scale", torch.int16),
        ("bitsandbytes-4", "weight", torch.bool),
        ("bitsandbytes-4", "weight.quant_state.bitsandbytes__nf4", torch.float8_e4m3fn),
    ],
)
def test_a_tensor_that_is_declared_to_be_of_another_dtype_is_refused(fmt, suffix, dtype, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", WRITERS[fmt], **SMALL)
    name = f"{LAYER}.{suffix}"
    save_tensors(tmp_path, checkpoint.tensors | {name: checkpoint.tensors[name].view(dtype).clone()})
    error = refused(tmp_path)
    assert error.code in ("dtype", "quant-state") and LAYER in error.tensor


# --- torchao: what its metadata declares


def declared(encode, change, **settings):
    """An encoder whose stored tensors are changed, and whose metadata declares more."""

    def encoded(weight):
        kind, stored, meant, data = encode(weight)
        return kind, change({**stored}), meant, data | settings

    return encoded


def relabelled(stored):
    return stored | {"scale": stored["scale"].float().contiguous().view(torch.int32)}


def turned(stored):
    return stored | {"scale": stored["scale"].t().contiguous()}


def wide(stored):
    return stored | {"qdata": stored["qdata"] * 3}


ROW = {"block_size": [1, 128]}  # all layers here have 128 inputs
CASES = [
    ("int8", torchao.int8, relabelled, ROW, "scale"),
    ("float8", torchao.float8, relabelled, ROW, "scale"),
    ("int4", torchao.int4, relabelled, {}, "scale"),
    ("intx", torchao.intx, relabelled, {"block_size": [1, 32]}, "scale"),
    ("int8-turned", torchao.int8, turned, ROW, "scale"),
    ("float8-turned", torchao.float8, turned, ROW, "scale"),
    ("float8-turned-undeclared", torchao.float8, turned, {}, "scale"),
    ("int4-turned", torchao.int4, turned, {"block_size": [1, 64]}, "scale"),
    ("intx-other-group", torchao.intx, dict, {"block_size": [1, 64]}, "scale"),
    ("intx-wide", torchao.intx, wide, {"block_size": [1, 32]}, "qdata"),
    ("float8-nan", torchao.float8, lambda stored: stored | {"scale": stored["scale"] * NAN}, ROW, "scale"),
    ("int4-zero-nan", torchao.int4, lambda s: s | {"zero_point": s["zero_point"] * NAN}, {}, "zero_point"),
]


@pytest.mark.parametrize(
    ("encode", "change", "more", "tensor"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_torchaos_tensors_are_what_their_subclass_declares(encode, change, more, tensor, tmp_path):
    write_torchao(tmp_path / "good", declared(encode, dict, **({} if change is dict else more)))
    pymllm.load_model(tmp_path / "good", device="cpu")
    write_torchao(tmp_path / "bad", declared(encode, change, **more))
    error = refused(tmp_path / "bad", PymllmError)
    assert tensor in str(error.tensor)


def write_torchao(folder, encode):
    """As `torchao.write`, of one layer whose matrices all have 128 inputs and outputs."""
    checkpoint = write_checkpoint(folder, "llama", num_key_value_heads=4, **SMALL)
    tensors, metadata = {}, {"format": "pt"}
    for name, tensor in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if layer not in checkpoint.linears:
            tensors[name] = tensor
            continue
        kind, stored, _, settings = encode(tensor)
        tensors |= {f"{layer}._weight_{key}": value.contiguous() for key, value in stored.items()}
        metadata[name] = json.dumps({"_type": kind, "_data": settings, "_tensor_data_names": list(stored)})
    save_file(tensors, folder / "model.safetensors", metadata)
    edit_config(
        folder, quantization_config={"quant_method": "torchao", "quant_type": {"default": {"_type": "Any"}}}
    )
