"""MLX: every mode as the library's page has it, config.json's keys, layers with settings of their own, experts, ranks.

Legend: I in_features, O out_features, G group_size.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import pymllm
from pymllm.config import Execution
from pymllm.errors import CheckpointError, ConfigError
from pymllm.kernels.canonical import IntWeight
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.binding import bind
from pymllm.quantization.formats.mlx import MLXLinearMethod
from pymllm.quantization.rules import Rule
from pymllm.weights.opening import open_checkpoint

from ..checkpoints import load_tensors, save_tensors, write_checkpoint
from ..conformance.vectors import ROOT, Vector
from ..forward import assert_answers_as_meant, logits_of
from ..mlx_checkpoints import MLX, write_mlx

VECTORS = [Vector(path) for path in sorted((ROOT / "mlx" / "golden").glob("*.safetensors"))]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SETTINGS = (
    MLX(1, 32, dtype=F32),
    MLX(2, 64),
    MLX(3, 32, dtype=F16),
    MLX(4, 16),
    MLX(5, 32),
    MLX(6, 128),
    MLX(8, 128),
    MLX(4, 32, "mxfp4"),
    MLX(8, 32, "mxfp8"),
    MLX(4, 16, "nvfp4"),
)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.path.stem)
def test_rounding_gives_the_codes_scales_and_biases_of_the_library(vector):
    if "global_scale" in vector.stored:
        pytest.skip("the second scale is read, and not made")
    weight = vector._content[1]["weight_float"]
    stored = vector.method.to_stored(vector.method.quantize(weight, vector.shape), vector.shape)
    assert stored.keys() == vector.stored.keys()
    for name, tensor in vector.stored.items():
        assert stored[name].dtype is tensor.dtype and torch.equal(stored[name], tensor), name


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_a_model_answers_as_the_weights_it_means_on_one_rank_and_on_two(setting, tmp_path):
    written = write_mlx(tmp_path, "llama", lambda _: setting, setting.settings())
    assert_answers_as_meant(written)


@pytest.mark.parametrize("family", ("qwen2", "gemma"))
def test_a_tied_head_multiplies_by_the_quantised_embedding(family, tmp_path):
    setting = MLX(6, 64)
    written = write_mlx(tmp_path, family, lambda _: setting, setting.settings(), tie_word_embeddings=True)
    assert "model.embed_tokens.biases" in written.tensors and "lm_head.weight" not in written.tensors
    assert_answers_as_meant(written)
    (head,) = (layer for layer in pymllm.plan(tmp_path, device="cpu").layers if layer.kind == "lm_head")
    assert (head.tied_to, head.bytes) == ("model.embed_tokens", 0), "the table is held once"


OWN = {
    "q_proj": MLX(3, 32),
    "down_proj": MLX(4, 32, "mxfp4"),
    "embed_tokens": MLX(8, 128),
    "lm_head": MLX(6, 64),
}


def choose_own(layer):
    name = layer.rpartition(".")[2]
    return None if name == "up_proj" else OWN.get(name, MLX())


def test_layers_have_settings_of_their_own_or_none(tmp_path):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    names += [f"model.layers.{i}.mlp.down_proj" for i in range(2)] + ["model.embed_tokens", "lm_head"]
    quantization = MLX().settings() | {name: OWN[name.rpartition(".")[2]].settings() for name in names}
    quantization |= {"model.layers.0.mlp.up_proj": False, "model.layers.0.mlp.gate_proj": True}
    assert_answers_as_meant(write_mlx(tmp_path, "llama", choose_own, quantization))


def test_what_is_stored_decides_where_the_config_says_something_else(tmp_path):
    written = write_mlx(tmp_path, "llama", choose_own, MLX(5, 32).settings() | {"lm_head": False})
    assert_answers_as_meant(written)


@pytest.mark.parametrize(
    ("family", "setting"),
    (
        ("qwen3_moe", MLX(4, 64)),
        ("qwen2_moe", MLX(4, 16, "nvfp4")),
        ("mixtral", MLX(3, 32)),
        ("deepseek_v2", MLX(6, 32)),
        ("gpt_oss", MLX(5, 32)),
        ("gpt_oss", MLX(4, 32, "mxfp4")),
    ),
    ids=str,
)
def test_stacked_experts_answer_as_the_weights_they_mean(family, setting, tmp_path):
    def choose(layer):
        return MLX(8, 64) if layer.endswith((".gate", ".router")) else setting

    assert_answers_as_meant(write_mlx(tmp_path, family, choose, setting.settings()))


@pytest.mark.parametrize("family", ("qwen3_moe", "gpt_oss"))
def test_experts_whose_products_differ_answer_as_the_weights_they_mean(family, tmp_path):
    chosen = {"gate_proj": MLX(3, 64), "up_proj": MLX(4, 64), "down_proj": MLX(6, 32)}
    quantization = MLX().settings()
    written = write_mlx(
        tmp_path, family, lambda layer: chosen.get(layer.rpartition(".")[2], MLX()), quantization
    )
    assert_answers_as_meant(written)


@pytest.mark.parametrize("keys", (None, MLX(4, 16)), ids=str)
def test_latent_attention_is_read_as_mlx_lm_divides_it(keys, tmp_path):
    def choose(layer):
        if layer.endswith(".gate"):
            return None
        return keys if layer.endswith(".embed_q") else MLX(6, 32)

    written = write_mlx(tmp_path, "deepseek_v3", choose, MLX(6, 32).settings())
    assert not any("kv_b_proj" in name for name in written.tensors)
    assert_answers_as_meant(written)
    tensors = load_tensors(tmp_path)
    tensors["model.layers.1.self_attn.unembed_out.scales"] = tensors[
        "model.layers.1.self_attn.unembed_out.scales"
    ][:3]
    save_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"unembed_out\.scales"):
        read(tmp_path)


def test_experts_in_floats_are_stacked_apart_too(tmp_path):
    def choose(layer):
        return None if "switch_mlp" in layer else MLX()

    assert_answers_as_meant(write_mlx(tmp_path, "olmoe", choose, MLX().settings()))


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 8))
def test_a_native_kernel_multiplies_every_width_group_and_dtype_as_float64_does(bits):
    draw = torch.Generator().manual_seed(bits)
    for group in (16, 32, 64, 128):
        for dtype in (F16, BF16, F32):
            codes = torch.randint(0, 2**bits, (37, 3 * group), generator=draw).to(torch.uint8)
            scales, biases = (torch.randn(37, 3, generator=draw).to(dtype) for _ in range(2))
            weight = IntWeight(codes, scales, None, bits, group, offsets=biases)
            bound = bind(weight, Execution(dtype=F32, compute="exact"), "linear")
            assert bound.selection.kernel.name == ("native_int4" if bits <= 4 else "native_int8")
            exact = codes.double().unflatten(1, (3, -1)) * scales.double()[..., None]
            exact = (exact + biases.double()[..., None]).flatten(1)
            for tokens in (1, 5, 33):
                x = torch.randn(tokens, 3 * group, generator=draw)
                expected = x.double() @ exact.t()
                error = (bound.run(x, None).double() - expected).norm() / expected.norm()
                assert error < 2e-6, (group, dtype, tokens, error)


def test_a_plan_says_what_runs_and_counts_the_packed_bytes(tmp_path):
    setting = MLX(3, 64)
    write_mlx(tmp_path, "llama", lambda _: setting, setting.settings())
    plan = pymllm.plan(tmp_path, device="cpu")
    layers = [layer for layer in plan.layers if layer.kind != "attention"]
    assert {(layer.method_detail, layer.kernel) for layer in layers} == {("mlx int3 g64", "native_int4")}
    model = pymllm.load_model(tmp_path, device="cpu")
    head = model.lm_head.bound
    assert head.selection.kernel.name == "native_int4"
    # 112 rows in blocks of 16; for each row and group a bf16 scale, a float32 bias and 64 codes in 4 bits.
    (planned,) = (layer.bytes for layer in layers if layer.kind == "lm_head")
    assert planned == head.nbytes == 112 * 2 * (2 + 4 + 32)


def test_a_swap_gives_what_loading_with_the_rule_gives(tmp_path):
    written = write_checkpoint(tmp_path, "llama", "awq-g64")
    llm = pymllm.LLM(tmp_path, device="cpu", dtype="float32")
    pymllm.swap(llm, "**.mlp.**", "mlx:bits=6,group_size=32")
    ruled = pymllm.LLM(
        tmp_path, device="cpu", dtype="float32", quant={"**.mlp.**": "mlx:bits=6,group_size=32"}
    )
    ids = written.ids.tolist()
    assert torch.equal(llm.logits(ids), ruled.logits(ids))
    error = (llm.logits(ids) - written.logits()).norm() / written.logits().norm()
    assert 1e-3 < error < 0.1, "six bits on top of four"


# config.json


def read(folder):
    return pymllm.plan(folder, device="cpu")


def test_either_key_alone_is_enough_and_two_that_differ_are_named(tmp_path):
    setting = MLX(4, 64)
    for key in ("quantization", "quantization_config"):
        written = write_mlx(
            tmp_path, "llama", lambda _: setting, setting.settings(), edit=lambda raw, key=key: raw.pop(key)
        )
        model = pymllm.load_model(tmp_path, device="cpu", dtype="float32")
        expected = written.logits()
        assert (logits_of(model, written.ids) - expected).norm() / expected.norm() < 1e-5

    def equal(raw):
        raw["quantization_config"] = {"group_size": 64, "bits": 4}  # affine, unless it says otherwise

    write_mlx(tmp_path, "llama", lambda _: setting, setting.settings(), edit=equal)
    read(tmp_path)
    for other in ({"group_size": 64, "bits": 8}, {"quant_method": "awq", "bits": 4, "group_size": 64}):
        write_mlx(
            tmp_path,
            "llama",
            lambda _: setting,
            setting.settings(),
            edit=lambda raw, other=other: raw.update(quantization_config=other),
        )
        with pytest.raises(ConfigError, match="quantization and quantization_config say different things"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"mode": "mxfp6"}, "quantization.mode"),
        ({"bits": 7}, "quantization.bits"),
        ({"bits": "4"}, "quantization.bits"),
        ({"group_size": 0}, "quantization.group_size"),
        ({"mode": "mxfp4", "group_size": 64}, "quantization.group_size"),
        ({"mode": "nvfp4", "bits": 8, "group_size": 16}, "quantization.bits"),
        ({"symmetric": 1}, "quantization.symmetric"),
        ({"lm_head": {"bits": 9}}, "quantization.lm_head.bits"),
        ({"lm_head": {"bits": 8, "rotation": "hadamard"}}, "quantization.lm_head.rotation"),
        ({"lm_head": {"quantize_input": True}}, "quantization.lm_head.quantize_input"),
    ),
)
def test_a_setting_that_cannot_be_read_is_named(changes, said, tmp_path):
    write_mlx(tmp_path, "llama", lambda _: MLX(), MLX().settings() | changes)
    with pytest.raises(ConfigError, match=said):
        read(tmp_path)


def test_settings_of_others_are_not_taken_for_these(tmp_path):
    """Only uint32 weights beside scales are MLX's, whatever the key is called."""

    def beside(raw):
        raw["quantization"] = {"bits": 8, "group_size": 32}

    written = write_checkpoint(tmp_path, "llama", "awq-g64", edit_config=beside)
    assert {layer.method for layer in read(tmp_path).layers if layer.kind == "linear"} == {"awq"}
    raw = json.loads((written.folder / "config.json").read_text())
    del raw["quantization_config"]
    (written.folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="no known format"):
        read(tmp_path)
    config = get_quantization_config("mlx")
    with open_checkpoint(tmp_path) as checkpoint:
        assert not config.claims({"bits": 4, "group_size": 64}, checkpoint.tensors)


@pytest.mark.parametrize(
    ("settings", "named"),
    (
        ({"zz": 1}, "quantization.zz"),
        ({"zz": {"bits": 4}}, "quantization.zz"),
        ({"zz": True}, "quantization.zz"),
        ({"lm_head": {"bits": 4, "zz": False}}, "quantization.lm_head.zz"),
        ({"lm_head": {"bits": 4, "quantize_input": True}}, "quantization.lm_head.quantize_input"),
        ({"lm_head": 4}, "quantization.lm_head"),
    ),
)
def test_a_setting_that_is_neither_known_nor_a_stored_layers_is_refused(settings, named, tmp_path):
    write_mlx(tmp_path, "llama", lambda _: MLX(), {**MLX().settings(), **settings})
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ("scales", "biases"))
def test_scales_and_biases_that_are_no_numbers_are_refused(name, tmp_path):
    write_mlx(tmp_path, "llama", lambda _: MLX(), MLX().settings())
    tensors = load_tensors(tmp_path)
    tensors[f"lm_head.{name}"][3, 1] = torch.nan
    save_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"lm_head\.{name}"):
        pymllm.load_model(tmp_path, device="cpu")


def test_a_layer_without_its_scales_or_biases_is_reported(tmp_path):
    write_mlx(tmp_path, "llama", lambda _: MLX(), MLX().settings())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.scales"], tensors["model.embed_tokens.biases"]
    save_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"(?s)embed_tokens\.biases: missing.*lm_head\.scales: missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("rule", "method"),
    (
        ("x=mlx", MLXLinearMethod(4, 64)),
        ("x=mlx:bits=3,group_size=32,scales=float16", MLXLinearMethod(3, 32, "affine", F16)),
        ("x=mlx:mode=mxfp8", MLXLinearMethod(8, 32, "mxfp8")),
        ("x=mlx:mode=nvfp4", MLXLinearMethod(4, 16, "nvfp4")),
    ),
)
def test_rules_name_bits_group_size_mode_and_scales(rule, method):
    assert Rule.parse(rule).build() == method


@pytest.mark.parametrize(
    "options",
    ("bits=7", "group_size=0", "mode=mxfp6", "mode=mxfp4,bits=8", "mode=nvfp4,scales=float16", "size=4"),
)
def test_rules_that_the_library_could_not_follow_are_refused(options):
    with pytest.raises(ConfigError):
        Rule.parse(f"x=mlx:{options}").build()
