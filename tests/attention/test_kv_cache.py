"""Quantised KV caches, as checkpoints spell them and as users ask for them, against transformers with rounded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

import pymllm
from pymllm.api import load_model
from pymllm.attention import AttnMetaDataBase
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import CheckpointError, ConfigError, RuleError
from pymllm.kernels.registry import kernels_for
from pymllm.parallel import simulate
from pymllm.quantization.kv_cache import read_kv_scheme

from ..checkpoints import load_tensors, relative_error, save_tensors, write_checkpoint
from ..forward import logits_of
from .steps import empty_pages, make_problem

# Both sides round the same values but for the last bits of float32: a code that lies on a boundary may fall to the
# other side, which moves one value of a head by its rounding error. What rounding does as a whole is ten times more.
TOLERANCE = 2e-3
KV8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
SCALES = {0: (0.02, 0.004), 1: (0.03, 0.005)}  # of keys and values, by layer


class RoundingCache(DynamicCache):
    """transformers' cache, with keys and values rounded on their way in.  round_k, round_v: (x, layer) -> x."""

    def __init__(self, round_k, round_v):
        super().__init__()
        self.round_k, self.round_v = round_k, round_v

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = self.round_k(key_states, layer_idx), self.round_v(value_states, layer_idx)
        return super().update(keys, values, layer_idx, *args, **kwargs)


def round_fp8(x, scale):
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_int8_static(x, scale):
    return (x / scale).round().clamp(-128, 127) * scale


def round_by_token(x, largest, cast):
    scale = x.abs().amax(-1, keepdim=True) / largest  # [B, Hkv, T, 1]
    return cast(x / scale) * scale


def with_scales(rounding, scales=SCALES):
    return RoundingCache(
        lambda x, layer: rounding(x, torch.as_tensor(scales[layer][0])),
        lambda x, layer: rounding(x, torch.as_tensor(scales[layer][1])),
    )


def expected_logits(checkpoint, cache):
    with torch.no_grad():
        return checkpoint.model(checkpoint.ids.unsqueeze(0), past_key_values=cache).logits[0]


def store_scales(checkpoint, names, scales=SCALES):
    """Add scale tensors; names: of keys' and values', after the attention module's."""
    tensors = load_tensors(checkpoint.folder)
    for layer, pair in scales.items():
        for name, scale in zip(names, pair, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.as_tensor(scale)
    save_tensors(checkpoint.folder, tensors)


CT_NAMES, PROJ_NAMES = ("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")
OUTPUT_NAMES = ("k_proj.output_scale", "v_proj.output_scale")


def compressed(raw):
    raw["quantization_config"]["kv_cache_scheme"] = KV8


def compressed_cache_alone(raw):
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": KV8,
    }


def fp8_static(raw):
    raw["quantization_config"]["kv_cache_scheme"] = "static"


def modelopt(raw):
    raw["quantization_config"] = {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    }


def modelopt_scheme(raw):
    raw["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    }


def quark(raw):
    tensor = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    plain = {"weight": tensor, "input_tensors": tensor, "output_tensors": None}
    raw["quantization_config"] = {
        "quant_method": "quark",
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"], "weight_format": "real_quantized"},
        "global_quant_config": plain,
        "layer_quant_config": {name: plain | {"output_tensors": tensor} for name in ("*k_proj", "*v_proj")},
        "exclude": ["lm_head"],
    }


SPELLINGS = {
    "compressed-tensors": ("ct-channel", compressed, CT_NAMES),
    "compressed-tensors, the cache alone": ("none", compressed_cache_alone, CT_NAMES),
    "fp8": ("fp8-block", fp8_static, CT_NAMES),
    "fp8, one scale for both": ("fp8-block", fp8_static, ("kv_scale",)),
    "modelopt": ("fp8-tensor-static", modelopt, PROJ_NAMES),
    "modelopt, by scheme": ("fp8-tensor-static", modelopt_scheme, PROJ_NAMES),
    "quark": ("fp8-tensor-static", quark, OUTPUT_NAMES),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scales_are_loaded_however_the_checkpoint_spells_them(tmp_path, spelling):
    fmt, edit, names = SPELLINGS[spelling]
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt, edit_config=edit)
    scales = SCALES if len(names) == 2 else {layer: pair[:1] * 2 for layer, pair in SCALES.items()}
    store_scales(checkpoint, names, {layer: pair[: len(names)] for layer, pair in scales.items()})
    # compute "auto" honours the checkpoint's KV cache; activations of its linear layers stay in floats here.
    llm = pymllm.LLM(checkpoint.folder, device="cpu", kernels={"linear": "reference"})
    expected = expected_logits(checkpoint, with_scales(round_fp8, scales))
    assert relative_error(llm.logits(checkpoint.ids.tolist()), expected) <= TOLERANCE
    assert relative_error(checkpoint.logits(), expected) > 5 * TOLERANCE, "rounding must matter"
    states = {record.name: record.status for record in llm.load_report.tensors}
    for layer in SCALES:
        assert states[f"model.layers.{layer}.self_attn.{names[0]}"] in ("loaded", "tied")
    row = llm.plan.layer("model.layers.1.self_attn.attn")
    assert (row.method, row.source) == ("fp8", "quantization_config")
    assert row.method_detail == "KV cache in fp8 e4m3, a scale from the checkpoint"


@pytest.mark.parametrize("kind", ("float", "int"))
def test_a_scale_for_every_head_is_sharded_with_the_heads(tmp_path, kind):
    def scheme(raw):
        raw["quantization_config"]["kv_cache_scheme"] = KV8 | {"strategy": "attn_head", "type": kind}

    checkpoint = write_checkpoint(
        tmp_path / "m", "llama", "ct-channel", edit_config=scheme, num_key_value_heads=4
    )
    by_head = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1)
    scales = {layer: tuple(by_head * scale for scale in pair) for layer, pair in SCALES.items()}
    store_scales(checkpoint, CT_NAMES, scales)
    rounding = round_fp8 if kind == "float" else round_int8_static
    expected = expected_logits(checkpoint, with_scales(rounding, scales))
    for size in (1, 2, 4):
        for logits in simulate(
            size,
            lambda _: logits_of(
                load_model(checkpoint.folder, device="cpu", kernels={"linear": "reference"}), checkpoint.ids
            ),
        ):
            assert relative_error(logits, expected) <= TOLERANCE


USER = {
    "int8": lambda x: round_by_token(x, 127, torch.round),
    "fp8:scale=token": lambda x: round_by_token(x, 448, lambda y: y.to(torch.float8_e4m3fn).float()),
    "fp8": lambda x: round_fp8(x, 1.0),
    "bfloat16": lambda x: x.bfloat16().float(),
    "none": lambda x: x,
}


@pytest.mark.parametrize("method", USER)
@pytest.mark.parametrize("size", (1, 2, 4))
def test_a_user_chooses_a_method_for_any_checkpoint(tmp_path, method, size):
    """Also in exact arithmetic, as float32 is: what is asked for by name is done."""
    checkpoint = write_checkpoint(tmp_path / "m", "qwen3", "awq-g32")
    expected = expected_logits(
        checkpoint, RoundingCache(lambda x, _: USER[method](x), lambda x, _: USER[method](x))
    )
    load = {"device": "cpu", "dtype": "float32", "kv_cache": method}
    for logits in simulate(size, lambda _: logits_of(load_model(checkpoint.folder, **load), checkpoint.ids)):
        assert relative_error(logits, expected) <= (1e-5 if method == "none" else TOLERANCE)


@pytest.mark.parametrize("method", ("int8", "fp8", "bfloat16"))
def test_answers_do_not_depend_on_what_was_cached_when(tmp_path, method):
    """A prompt's own keys and values count as stored: decoding and one pass over all tokens agree."""
    checkpoint = write_checkpoint(tmp_path / "m", "llama")
    llm = pymllm.LLM(checkpoint.folder, device="cpu", kv_cache=method)
    prompt = checkpoint.ids.tolist()
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    answer = list(llm.generate([prompt], params)[0].token_ids)
    logits = llm.logits(prompt + answer)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_layers_may_differ_and_the_plan_says_so(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama")
    rules = {"model.layers.0.**": "int8", "**": "fp8"}
    planned = pymllm.plan(checkpoint.folder, device="cpu", kv_cache=rules)
    first, second = (planned.layer(f"model.layers.{i}.self_attn.attn") for i in (0, 1))
    assert (first.method, first.rule) == ("int8", "model.layers.0.**=int8")
    assert (second.method, second.rule) == ("fp8", "**=fp8")
    heads, size = first.shape_local[1:]
    assert first.kv_bytes_per_token == heads * (2 * size + 2 * 4)
    assert second.kv_bytes_per_token == heads * 2 * size
    assert planned.totals["kv_cache_bytes_per_token"] == first.kv_bytes_per_token + second.kv_bytes_per_token
    assert any("scale 1" in note for note in planned.notes)
    llm = pymllm.LLM(checkpoint.folder, device="cpu", kv_cache=rules)
    assert llm.plan.to_dict() == planned.to_dict()
    cache = llm.engine.cache
    per_page = sum(layer.cache.nbytes for layer in cache.layers) / cache.num_pages
    # Scales that are not stored by token come on top, once a layer.
    assert 0 <= per_page - cache.page_size * planned.totals["kv_cache_bytes_per_token"] < 1


def test_exact_arithmetic_leaves_the_checkpoints_kv_cache_in_floats_and_says_so(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "ct-channel", edit_config=compressed)
    store_scales(checkpoint, CT_NAMES)
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    assert relative_error(llm.logits(checkpoint.ids.tolist()), checkpoint.logits()) <= 1e-5
    assert llm.plan.layer("model.layers.0.self_attn.attn").source == "compute=exact"
    assert any("compute=exact forbids" in note for note in llm.plan.notes)
    reasons = {record.name: record.reason for record in llm.load_report.tensors}
    assert "kept in floats" in reasons["model.layers.0.self_attn.k_scale"]


def test_a_user_may_turn_a_checkpoints_scheme_off_or_leave_it(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "ct-channel", edit_config=compressed)
    store_scales(checkpoint, CT_NAMES)
    name = "model.layers.0.self_attn.attn"
    methods = {
        kv: pymllm.plan(checkpoint.folder, device="cpu", kv_cache=kv).layer(name).method
        for kv in (None, "auto", "none", "int8")
    }
    assert methods == {None: "fp8", "auto": "fp8", "none": "none", "int8": "int8"}


@pytest.mark.parametrize(
    "change, found",
    (
        ({"num_bits": 4}, "'num_bits': 4"),
        ({"symmetric": False}, "False"),
        ({"dynamic": True}, "True"),
        ({"strategy": "channel"}, "'channel'"),
    ),
)
def test_a_scheme_without_a_method_is_refused_unless_the_user_chooses(tmp_path, change, found):
    def scheme(raw):
        raw["quantization_config"]["kv_cache_scheme"] = KV8 | change

    checkpoint = write_checkpoint(tmp_path / "m", "llama", "ct-channel", edit_config=scheme)
    with pytest.raises(ConfigError, match="kv_cache_scheme") as error:
        pymllm.plan(checkpoint.folder, device="cpu")
    assert found in error.value.found and "--kv-cache none" in str(error.value)
    for options in ({"kv_cache": "none"}, {"dtype": "float32"}):
        row = pymllm.plan(checkpoint.folder, device="cpu", **options).layer("model.layers.0.self_attn.attn")
        assert row.method == "none"


@pytest.mark.parametrize(
    "kv_cache, error, message",
    (
        ("fp4", ConfigError, "no KV cache method 'fp4'"),
        ("int8:group=4", ConfigError, "no option 'group'"),
        ("fp8:scale=none", ConfigError, "cannot be 'none'"),
        ({"**.mlp.**": "fp8"}, RuleError, "matches no layer"),
        (["fp8", "int8"], RuleError, "never applies"),
    ),
)
def test_what_cannot_be_done_is_refused(tmp_path, kv_cache, error, message):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    with pytest.raises(error, match=message):
        pymllm.plan(checkpoint.folder, device="cpu", kv_cache=kv_cache)


def test_a_missing_scale_is_an_error_and_so_is_a_zero_one(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "ct-channel", edit_config=compressed)
    store_scales(checkpoint, CT_NAMES)
    tensors = load_tensors(checkpoint.folder)
    zero = tensors | {"model.layers.1.self_attn.k_scale": torch.tensor(0.0)}
    save_tensors(checkpoint.folder, zero)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_scale"):
        load_model(checkpoint.folder, device="cpu")
    del tensors["model.layers.0.self_attn.v_scale"]
    save_tensors(checkpoint.folder, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_scale.*missing"):
        pymllm.plan(checkpoint.folder, device="cpu")


def test_the_command_line_takes_methods_and_patterns(tmp_path, capsys):
    from pymllm.cli import main

    checkpoint = write_checkpoint(tmp_path / "m", "llama")
    options = ["--kv-cache", "model.layers.1.**=none", "--kv-cache", "int8:scale=token"]
    assert main(["plan", str(checkpoint.folder), "--device", "cpu", "--json", *options]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["layers"] if row["kind"] == "attention"]
    assert [row["method"] for row in rows] == ["int8", "none"]


# --- against the writer's own rounding

VECTORS = sorted((Path(__file__).parents[2] / "quantization" / "kv_cache" / "vectors").glob("*.safetensors"))


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.parametrize("kernel", kernels_for("kv_store"), ids=lambda kernel: kernel.name)
def test_pages_return_what_compressed_tensors_rounds_to_bit_for_bit(path, kernel):
    with safe_open(path, "pt") as file:
        method = read_kv_scheme(json.loads(file.metadata()["kv_cache_scheme"]))
        x, scale, rounded = (file.get_tensor(name) for name in ("x", "scale", "rounded"))
    _, heads, tokens, size = x.shape
    problem = make_problem(num_kv_heads=heads, num_heads=heads, head_dim=size, kv=method.kv_type(x.dtype))
    if kernel.why_not(problem) is not None:
        pytest.skip(kernel.why_not(problem))
    cache = empty_pages(problem, 1)
    cache.k_scale = cache.v_scale = scale.flatten().expand(heads).contiguous()
    slots = torch.arange(tokens)
    x, rounded = (t[0].transpose(0, 1).contiguous() for t in (x, rounded))  # [T, Hkv, D]
    kernel.run(problem, x, x, cache, AttnMetaDataBase(slot_mapping=slots))
    for returned in cache.read(slots, torch.float32):
        assert torch.equal(returned, rounded)


def test_there_are_vectors():
    assert len(VECTORS) == 4
