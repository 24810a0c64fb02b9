"""`quantize_checkpoint`: what it writes is what other readers, and plain decoders of the layouts' pages, find in it.

Legend: O out_features, I in_features, G group_size.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from torch import Tensor

import pymllm
from pymllm.api import shipped_model
from pymllm.errors import CheckpointError, ConfigError, RuleError
from pymllm.weights.opening import open_checkpoint
from pymllm.writing import output

from ..checkpoints import load_tensors, relative_error, save_tensors, write_checkpoint
from ..forward import logits_of
from ..quantization.test_mxfp8 import MXFP8
from .layouts import decode_awq, decode_compressed
from .stopping import Stop, stop_at

BLOCKS = "model.layers.**"


def float_weights(checkpoint) -> dict[str, Tensor]:
    return {
        name: w for name, w in checkpoint.model.state_dict().items() if ".layers." in name and w.ndim == 2
    }


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """A tiny llama in bfloat16."""
    return write_checkpoint(tmp_path_factory.mktemp("bf16"), "llama", "none-bf16")


METHODS = {
    "int4:group_size=64": 4,
    "int4:group_size=32,symmetric=true,scale=mse": 4,
    "int4:group_size=32,scale=hqq": 4,
    "int8": 8,
    "int8:activations=token": 8,
    "fp8": 8,
    "fp8:granularity=tensor,activations=float": 8,
    "fp8:granularity=block": 8,
}


@pytest.mark.parametrize("method", METHODS)
def test_compressed_tensors_hold_weights_within_the_steps_of_the_method(bf16, method, tmp_path):
    written = pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", {BLOCKS: method})
    assert written.spelling == "compressed-tensors"
    tensors = load_tensors(tmp_path / "out")
    errors = {layer.prefix: layer.error for layer in written.layers}
    for name, weight in float_weights(bf16).items():
        layer = name.removesuffix(".weight")
        found = decode_compressed(tensors, layer, METHODS[method])
        error = float((found - weight.double()).norm() / weight.double().norm())
        assert error == pytest.approx(errors[layer], rel=1e-3)
        assert error < {4: 0.12, 8: 0.03}[METHODS[method]]
    # Everything else is what it was, in its own dtype.
    for name, tensor in bf16.tensors.items():
        if ".layers." not in name or tensor.ndim == 1:
            assert tensors[name].dtype is tensor.dtype and torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("zero_point", ["true", "false"])
def test_awq_tensors_hold_what_rounding_to_nearest_says(bf16, group_size, zero_point, tmp_path):
    method = f"awq:group_size={group_size},zero_point={zero_point}"
    written = pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", {BLOCKS: method})
    assert written.spelling == "awq"
    tensors = load_tensors(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": zero_point == "true",
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    for name, weight in float_weights(bf16).items():
        layer = name.removesuffix(".weight")
        found = decode_awq(tensors, layer)
        scales = tensors[f"{layer}.scales"].double().t()
        steps = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
        # Half a step; zero points are whole numbers, so the ends of a range may lie another half step off.
        assert bool(((found - weight.double()).abs() <= 1.01 * steps).all())
        assert ((found - weight.double()).abs() <= 0.501 * steps).float().mean() > 0.97


MIXED = [
    "**.mlp.gate_proj=int4:group_size=64,symmetric=true",
    "**.mlp.**=int8:activations=token",
    "**.o_proj=fp8:granularity=block",
    "**.self_attn.**=fp8",
    "lm_head=int8",
]


def test_mixed_rules_are_config_groups_that_this_package_reads_back_exactly(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out", MIXED, shard_size="100KB")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "mixed-precision" and len(settings["config_groups"]) == 5
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    model = pymllm.load_model(tmp_path / "out", dtype="float32")
    methods = {layer.prefix: layer.method for layer in written.layers}
    assert {decision.method.describe() for decision in model.prepared.quant.decisions.values()} == set(
        methods.values()
    )
    assert pymllm.verify(model).ok
    # The same rules while loading give the same weights; a model in float32 has scales that are exact in both.
    direct = pymllm.load_model(there.folder, MIXED, dtype="float32")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 1e-6


def test_transformers_and_compressed_tensors_read_the_same_weights(bf16, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", MIXED)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_tensors(tmp_path / "out")
    bits = {"gate_proj": 4}
    compared = 0
    for name, module in theirs.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight = compressor.decompress(dict(module.state_dict()), scheme)["weight"]
        expected = decode_compressed(tensors, name, bits.get(name.rpartition(".")[2], 8))
        assert torch.equal(weight, expected.to(weight.dtype)), name
        compared += 1
    assert compared == 2 * 7 + 1
    with torch.no_grad():
        logits = theirs(bf16.ids.unsqueeze(0), use_cache=False).logits[0].float()
    # int4 and 8-bit weights and activations of random layers: as far as their own rounding explains.
    assert relative_error(logits, bf16.logits()) < 0.3


def test_asymmetric_groups_are_read_by_transformers(bf16, tmp_path):
    pytest.importorskip("compressed_tensors")
    pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", {BLOCKS: "int4:group_size=64"})
    # transformers 5.23 cannot hold packed zero points, whoever wrote them; it dequantises such checkpoints instead.
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=settings
    ).state_dict()
    tensors = load_tensors(tmp_path / "out")
    for name in float_weights(bf16):
        expected = decode_compressed(tensors, name.removesuffix(".weight"))
        assert torch.equal(theirs[name], expected.bfloat16()), name


SOURCES = ["awq-g64", "awq-g64-sym", "fp8-block", "fp8-tensor-static", "ct-channel", "ct-tensor"]


@pytest.mark.parametrize("source", SOURCES)
def test_layers_without_a_rule_keep_their_weights_whatever_the_source_format(source, tmp_path):
    there = write_checkpoint(tmp_path / "in", "qwen2", source)
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {"**.down_proj": "int8"})
    tensors = load_tensors(tmp_path / "out")
    for name, weight in float_weights(there).items():
        layer = name.removesuffix(".weight")
        found = decode_compressed(tensors, layer, 8 if "down_proj" in name else 4)
        if "down_proj" in name:
            assert 0 < float((found - weight.double()).norm() / weight.norm()) < 0.02
        else:
            assert torch.equal(found.float(), weight), name
    before, after = (pymllm.load_model(f, dtype="float32") for f in (there.folder, tmp_path / "out"))
    assert 0 < relative_error(logits_of(after, there.ids), logits_of(before, there.ids)) < 0.1


def test_mxfp8_whose_inputs_are_rounded_too_is_written_as_such(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", MXFP8("mxfp8"))
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {"**.down_proj": "none"})
    tensors = load_tensors(tmp_path / "out")
    for name, weight in float_weights(there).items():
        if "down_proj" not in name:
            scales = tensors[name.replace(".weight", ".weight_scale")]  # [O, I/32]
            assert scales.dtype is torch.uint8
            powers = 2.0 ** (scales.double() - 127)
            assert torch.equal(tensors[name].double() * powers.repeat_interleave(32, 1), weight.double())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    for codes in (group["weights"], group["input_activations"]):
        said = {name: codes[name] for name in ("type", "num_bits", "strategy", "group_size")}
        assert said == {"type": "float", "num_bits": 8, "strategy": "group", "group_size": 32}
    before, after = (pymllm.plan(folder, device="cpu") for folder in (there.folder, tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj"
    assert config["format"] == "mxfp8-quantized"
    assert after.layer(name).kernel == before.layer(name).kernel
    assert "group mx" in after.layer(name).method_detail


def test_a_quantised_source_becomes_floats_where_a_rule_says_none(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "awq-g64")
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {BLOCKS: "none"})
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_tensors(tmp_path / "out")
    for name, weight in float_weights(there).items():
        assert torch.equal(tensors[name], weight)


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    pymllm.quantize_checkpoint(shipped_model(), tmp_path / "out", {"lm_head": "int8"})
    out, source = tmp_path / "out", shipped_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith((source / "README.md").read_text().rstrip())
    assert "lm_head=int8" in card and "lm_head was tied" in card
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert not (out / output.STAGING).exists()
    llm = pymllm.LLM(out)
    assert llm.generate("def f(x):", pymllm.SamplingParams(max_tokens=4))[0].text


def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tmp_path):
    from ..gguf_files import write_gguf

    write_gguf(tmp_path / "m.gguf", "qwen2", "Q8_0", hidden_size=128)
    rules = ["model.embed_tokens=none", "**.mlp.**=int4:group_size=64"]
    with pytest.raises(ConfigError, match=r"model\.embed_tokens=none"):
        pymllm.quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "out", rules[1:])
    pymllm.quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "out", rules)
    before = pymllm.LLM(tmp_path / "m.gguf", rules, dtype="float32")
    after = pymllm.LLM(tmp_path / "out", dtype="float32")
    ids = torch.arange(20)
    # Scales of int4 are rounded to the dtype that the config says, and codes chosen for that.
    assert relative_error(after.logits(ids), before.logits(ids)) < 0.05
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("hello", "it's<|end|>x"):
        assert theirs.encode(text) == after.encode(text) == before.encode(text)


# What cannot be written


@pytest.mark.parametrize(
    ("rules", "format", "needle"),
    [
        ({"**": "int4:group_size=32"}, "auto", r"model\.embed_tokens=none"),
        ({BLOCKS: "fp8"}, "awq", "compressed-tensors"),
        (
            {BLOCKS: "int4:symmetric=false,group_size=32", "lm_head": "int4:group_size=32"},
            "awq",
            "lm_head=none",
        ),
        (["**.mlp.**=awq:group_size=64", f"{BLOCKS}=awq:group_size=32"], "awq", "one group size"),
        ({BLOCKS: "mxfp4"}, "awq", "int4 with integer zero points"),
        ({BLOCKS: "int8:activations=static"}, "auto", "example inputs"),
        ({BLOCKS: "int4"}, "gguff", "auto or awq"),
    ],
)
def test_what_a_spelling_cannot_express_is_refused_before_anything_is_written(
    bf16, rules, format, needle, tmp_path
):
    with pytest.raises(ConfigError, match=needle):
        pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", rules, format=format)
    assert not (tmp_path / "out").exists()


def test_a_rule_that_matches_nothing_names_the_nearest_layers(bf16, tmp_path):
    with pytest.raises(RuleError, match=r"mlp\.down_proj"):
        pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", {"**.mlp.down_prj": "int4"})


def test_values_that_are_not_finite_are_found_and_named(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    tensors = there.tensors
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_tensors(there.folder, tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj.*1 of 32768") as caught:
        pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {BLOCKS: "int8"})
    assert caught.value.code == "bad-value"


def test_a_folder_with_other_things_in_it_is_left_alone(bf16, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "below", bf16.folder):
        with pytest.raises(ConfigError) as caught:
            pymllm.quantize_checkpoint(bf16.folder, out, {BLOCKS: "int8"})
        assert caught.value.code == "out-exists"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_too_little_room_is_said_with_numbers(bf16, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="GB") as caught:
        pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", {BLOCKS: "int8"})
    assert caught.value.code == "disk-full"


# Stopping and going on


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


RULES = {BLOCKS: "int4:group_size=64"}
POINTS = ["write_tensors", "_digest", "join_tensors", "write_whole", "os.replace"]


@pytest.mark.parametrize("point", POINTS)
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(bf16, point, tmp_path, monkeypatch):
    """Stopped at every call of a step of the work in turn, as often as it takes to get through."""
    pymllm.quantize_checkpoint(bf16.folder, tmp_path / "whole", RULES, shard_size="100KB")
    owner, name = (os, "replace") if point == "os.replace" else (output, point)
    reached = 0
    for allowed in range(100):
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, 2 + allowed // 3)
            try:
                written = pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", RULES, shard_size="100KB")
                break
            except Stop:
                reached += 1
                assert not (tmp_path / "out" / "config.json").exists() or point == "os.replace"
    assert reached > 0
    assert written.resumed > 0 or point in ("_digest", "join_tensors", "write_whole", "os.replace")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


@pytest.fixture
def stopped(bf16, tmp_path, monkeypatch):
    """A folder whose run was stopped in its fourth step of five."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, output, "write_tensors", 4)
        pymllm.quantize_checkpoint(bf16.folder, tmp_path / "out", RULES)
    return tmp_path / "out"


def test_a_damaged_piece_is_made_again(bf16, stopped, tmp_path):
    entries = [json.loads(line) for line in (stopped / output.STAGING / "journal.jsonl").open()]
    piece = stopped / output.STAGING / entries[1]["file"]
    raw = bytearray(piece.read_bytes())
    raw[-1] ^= 1
    piece.write_bytes(raw)
    assert pymllm.quantize_checkpoint(bf16.folder, stopped, RULES).resumed == 2
    pymllm.quantize_checkpoint(bf16.folder, tmp_path / "whole", RULES)
    assert files(stopped) == files(tmp_path / "whole")


def test_another_request_is_refused_unless_it_starts_anew(bf16, stopped):
    with pytest.raises(ConfigError, match="rules changed") as caught:
        pymllm.quantize_checkpoint(bf16.folder, stopped, {BLOCKS: "int8"})
    assert caught.value.code == "resume-changed" and "--restart" in str(caught.value)
    written = pymllm.quantize_checkpoint(bf16.folder, stopped, {BLOCKS: "int8"}, restart=True)
    assert written.resumed == 0 and open_checkpoint(stopped)


def test_two_processes_cannot_write_one_folder(bf16, stopped):
    import fcntl

    with open(stopped / output.STAGING / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError) as caught:
            pymllm.quantize_checkpoint(bf16.folder, stopped, RULES)
    assert caught.value.code == "out-busy"


# Spelling targets


def test_targets_mean_just_their_layers():
    from pymllm.writing.targets import patterns_for

    names = [f"model.layers.{i}.mlp.{part}" for i in range(12) for part in ("up_proj", "down_proj")]
    up = [name for name in names if "up" in name]
    assert patterns_for(up, names) == [r"re:model\.layers\.\d+\.mlp\.up_proj$"]
    assert patterns_for([*up[:3], names[1]], names) == [*up[:3], names[1]]
    assert patterns_for(["lm_head"], [*names, "lm_head"]) == ["lm_head"]
