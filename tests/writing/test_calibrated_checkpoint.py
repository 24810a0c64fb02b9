"""`quantize_checkpoint` with calibration text: what it finds, and that folding scales changes nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import pymllm
from pymllm.api import shipped_model
from pymllm.errors import ConfigError
from pymllm.writing import output

from .. import moe_checkpoints
from ..checkpoints import (
    SIZES,
    TinyCheckpoint,
    load_tensors,
    random_model,
    relative_error,
    save_tensors,
    write_checkpoint,
)
from ..forward import logits_of
from .layouts import decode_compressed
from .stopping import Stop, stop_at


def lines(numbers: range) -> str:
    return "".join(f"def f{n}(x, y={n % 7}):\n    return [x * {n}, y - {n * n}]\n\n" for n in numbers)


TEXT = lines(range(120))
OPTIONS = {"calibration_tokens": 1024, "window": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny llama with the shipped model's tokenizer; some channels of its norms are strong, as in real models."""
    folder = tmp_path_factory.mktemp("model")
    there = write_checkpoint(folder, "qwen2", "none", vocab_size=4096)
    tensors = there.tensors
    state = there.model.state_dict()
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][::13] *= 8
            state[name].copy_(tensors[name])
    save_tensors(folder, tensors)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, folder)
    (folder / "text.txt").write_text(TEXT)
    return there


def divergence(folder: Path, there) -> float:
    """Mean KL divergence of next tokens from the float model's, on text of the kind that was calibrated on."""
    ids = torch.tensor(pymllm.text.tokenizer.Tokenizer(there.folder).encode(lines(range(130, 140)))[:120])
    found = logits_of(pymllm.load_model(folder, dtype="float32"), ids).log_softmax(-1)
    expected = there.logits(ids).log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def distance(folder: Path, there) -> float:
    """Relative error of the logits to the float model's, on text of the kind that was calibrated on."""
    ids = torch.tensor(pymllm.text.tokenizer.Tokenizer(there.folder).encode(lines(range(130, 140)))[:120])
    return relative_error(logits_of(pymllm.load_model(folder, dtype="float32"), ids), there.logits(ids))


@pytest.fixture(scope="module")
def by_nearest(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    pymllm.quantize_checkpoint(model.folder, out, {"**.layers.**": "int4:group_size=64"})
    return divergence(out, model)


@pytest.mark.parametrize(
    ("algorithm", "method", "act_order"),
    [
        ("gptq", "int4:group_size=64", False),
        ("gptq", "int4:group_size=64", True),
        ("awq", "int4:group_size=64", False),
        ("awq", "awq:group_size=64", False),
    ],
)
def test_calibration_brings_the_answers_nearer(model, by_nearest, algorithm, method, act_order, tmp_path):
    written = pymllm.quantize_checkpoint(
        model.folder,
        tmp_path / "out",
        {"**.layers.**": method},
        calibrate=model.folder / "text.txt",
        algorithm=algorithm,
        act_order=act_order,
        **OPTIONS,
    )
    assert not written.notes
    assert divergence(tmp_path / "out", model) < 0.8 * by_nearest
    assert algorithm in (tmp_path / "out" / "README.md").read_text()


def test_scales_are_folded_so_that_eight_bits_still_compute_the_same(model, tmp_path):
    """int8 rounds so little that a scale divided out in one place and not the other would stand out."""
    rules = {"**.layers.**": "int8:group_size=64"}
    calibration = {"calibrate": model.folder / "text.txt", "algorithm": "awq", **OPTIONS}
    pymllm.quantize_checkpoint(model.folder, tmp_path / "out", rules, **calibration)
    before, after = model.tensors, load_tensors(tmp_path / "out")
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(before[norm], after[norm])  # something was folded
    assert divergence(tmp_path / "out", model) < 2e-3


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_scales_are_folded_into_every_kind_of_norm(family, tmp_path):
    """Norms that multiply by 1 + w and stand elsewhere; q, k and v in one tensor."""
    there = write_checkpoint(tmp_path / "in", family, "none", vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, there.folder)
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = {"calibrate": tmp_path / "text.txt", "algorithm": "awq", **OPTIONS}
    pymllm.quantize_checkpoint(
        there.folder, tmp_path / "out", {"**.layers.**": "int8:group_size=32"}, **calibration
    )
    after = load_tensors(tmp_path / "out")
    norms = [name for name in there.tensors if "layernorm" in name and ".layers.0." in name]
    assert sum(not torch.equal(after[name], there.tensors[name]) for name in norms) == 2
    assert divergence(tmp_path / "out", there) < 2e-3


@pytest.mark.parametrize("pattern", ["**.layers.**", "**.mlp.**", "**.self_attn.**"])
def test_a_family_whose_norms_come_after_is_calibrated_as_well_as_one_whose_norms_come_before(
    pattern, tmp_path
):
    """No norm feeds its attention or MLP: to fold scales into the norm before them by its name would ruin them."""
    errors = {}
    (tmp_path / "text.txt").write_text(TEXT)
    for family in ("llama", "olmo2"):
        there = write_checkpoint(tmp_path / family, family, "none", vocab_size=4096)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(shipped_model() / file, there.folder)
        for name, options in (
            ("plain", {}),
            ("awq", {"calibrate": tmp_path / "text.txt", "algorithm": "awq", **OPTIONS}),
        ):
            out = tmp_path / f"{family}-{name}"
            pymllm.quantize_checkpoint(there.folder, out, {pattern: "int4:group_size=64"}, **options)
            errors[family, name] = distance(out, there)
        norms = [name for name in there.tensors if "norm" in name]
        if family == "olmo2":
            after = load_tensors(out)
            assert all(torch.equal(after[name], there.tensors[name]) for name in norms)
    assert errors["olmo2", "awq"] < errors["olmo2", "plain"]
    if (
        pattern == "**.layers.**"
    ):  # in one part alone, rounding weighs as the family has it, calibrated or not
        assert errors["olmo2", "awq"] < 2 * errors["llama", "awq"]


def test_experts_are_calibrated_on_what_is_routed_to_them(tmp_path):
    there = write_moe(tmp_path / "in")
    (tmp_path / "text.txt").write_text(TEXT)
    rules = {"**.experts.*.*": "int4:group_size=32", "**.self_attn.**": "int8:group_size=32"}
    errors = []
    for name, options in (
        ("plain", {}),
        ("gptq", {"calibrate": tmp_path / "text.txt", **OPTIONS}),
    ):
        written = pymllm.quantize_checkpoint(there.folder, tmp_path / name, rules, **options)
        assert sum(".experts." in layer.prefix for layer in written.layers) == 2 * 4 * 3
        assert not written.notes
        errors.append(divergence(tmp_path / name, there))
    assert errors[1] < 0.8 * errors[0]
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert [f"model.layers.{i}.mlp.gate" for i in range(2)] == settings["ignore"][:2]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_rules_for_some_experts_alone_are_calibrated_too(family, tmp_path):
    """Experts that a rule splits into groups of methods, and those that a checkpoint calls w1, w2 and w3."""
    there = moe_checkpoints.write_moe(tmp_path / "in", family, vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, there.folder)
    (tmp_path / "text.txt").write_text(TEXT)
    rules = {"**.experts.0.*": "int4:group_size=32", "**.experts.1.*": "int4:group_size=64"}
    errors = []
    for name, options in (("plain", {}), ("gptq", {"calibrate": tmp_path / "text.txt", **OPTIONS})):
        written = pymllm.quantize_checkpoint(there.folder, tmp_path / name, rules, **options)
        made = [layer.prefix for layer in written.layers if layer.error]
        assert {prefix.rpartition(".experts.")[2][0] for prefix in made} == {"0", "1"}
        errors.append(divergence(tmp_path / name, there))
    assert errors[1] < 0.9 * errors[0]


def test_experts_that_lie_in_one_tensor_are_refused_by_name(tmp_path):
    there = moe_checkpoints.write_moe(tmp_path / "in", "qwen3_moe", stacked=True, vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, there.folder)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts: .* without --calibrate"):
        pymllm.quantize_checkpoint(
            there.folder,
            tmp_path / "out",
            {"**.self_attn.**": "int4:group_size=16"},
            calibrate=tmp_path / "text.txt",
            **OPTIONS,
        )


@pytest.mark.parametrize("method", ["int4:group_size=32,symmetric=true", "fp8"])
def test_transformers_reads_experts_with_the_same_weights(method, tmp_path):
    pytest.importorskip("compressed_tensors")
    there, out = write_moe(tmp_path / "in"), tmp_path / "out"
    pymllm.quantize_checkpoint(there.folder, out, {"**.experts.*.*": method, "**.self_attn.**": method})
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=settings
    ).state_dict()
    tensors = load_tensors(out)
    for layer in range(2):
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (
                decode_compressed(tensors, f"{prefix}.{p}_proj").float() for p in ("gate", "up", "down")
            )
            fused = theirs[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert]
            their_down = theirs[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
            # transformers 5.20 decodes fp8 to bfloat16, whatever dtype it is asked for
            assert torch.equal(fused, torch.cat([gate, up]).to(fused.dtype))
            assert torch.equal(their_down, down.to(their_down.dtype))


def write_moe(folder: Path) -> TinyCheckpoint:
    """A tiny Qwen3-MoE, each expert with tensors of its own, and the shipped model's tokenizer."""
    sizes = {
        **SIZES,
        "vocab_size": 4096,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    }
    config = transformers.Qwen3MoeConfig(**sizes, attn_implementation="eager")
    model = random_model(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix, stacked, _ = name.partition("experts.")
        if stacked and name.endswith("gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                tensors[f"{prefix}experts.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}experts.{expert}.up_proj.weight"] = up
        elif stacked and name.endswith("down_proj"):
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}experts.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    folder.mkdir()
    raw = json.loads(config.to_json_string()) | {"dtype": "float32", "architectures": ["Qwen3MoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(raw))
    save_tensors(folder, tensors)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, folder)
    return TinyCheckpoint(folder, model, ())


def test_scales_are_folded_only_where_all_that_changes_is_quantised(model, tmp_path):
    calibration = {"calibrate": model.folder / "text.txt", "algorithm": "awq", **OPTIONS}
    rules = {"**.q_proj": "int4:group_size=64", "**.down_proj": "int4:group_size=64"}
    pymllm.quantize_checkpoint(model.folder, tmp_path / "out", rules, **calibration)
    after = load_tensors(tmp_path / "out")
    for name, tensor in model.tensors.items():
        if name in after:
            assert torch.equal(after[name], tensor), name
    assert not any(name.endswith(("q_proj.weight", "down_proj.weight")) for name in after)


def test_static_scales_are_those_of_the_inputs_that_transformers_sees(model, tmp_path):
    out = tmp_path / "out"
    pymllm.quantize_checkpoint(
        model.folder,
        out,
        {"**.layers.0.self_attn.q_proj": "fp8:activations=static", "lm_head": "int8:activations=static"},
        calibrate=model.folder / "text.txt",
        **OPTIONS,
    )
    ids = pymllm.text.tokenizer.Tokenizer(model.folder).encode(TEXT)
    last = len(ids) - 128
    windows = torch.tensor([ids[last * i // 7 : last * i // 7 + 128] for i in range(8)])
    peaks = {}
    for name in ("model.layers.0.self_attn.q_proj", "lm_head"):
        model.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: peaks.__setitem__(name, float(args[0].abs().max()))
        )
    with torch.no_grad():
        model.model(windows, use_cache=False)
    tensors = load_tensors(out)
    name = "model.layers.0.self_attn.q_proj"
    assert float(tensors[f"{name}.input_scale"]) == pytest.approx(peaks[name] / 448, rel=1e-4)
    # The head sees what the quantised q_proj has changed: near, not equal.
    assert float(tensors["lm_head.input_scale"]) == pytest.approx(peaks["lm_head"] / 127.5, rel=0.1)
    assert pymllm.verify(out).ok


def test_a_stopped_calibration_goes_on_where_it_was(model, tmp_path, monkeypatch):
    arguments = [model.folder, tmp_path / "out", {"**.layers.**": "int4:group_size=64"}]
    options = {"calibrate": model.folder / "text.txt", **OPTIONS}
    pymllm.quantize_checkpoint(arguments[0], tmp_path / "whole", arguments[2], **options)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, output, "write_tensors", 6)
        pymllm.quantize_checkpoint(*arguments, **options)
    with pytest.raises(ConfigError, match="calibration changed"):
        pymllm.quantize_checkpoint(*arguments)
    written = pymllm.quantize_checkpoint(*arguments, **options)
    assert 0 < written.resumed < 5
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        ({"algorithm": "gptq"}, "--calibrate"),
        ({"act_order": True}, "--calibrate"),
        ({"calibrate": "no/such/file"}, "cannot be read"),
        ({"calibrate": "short.txt"}, "too little"),
        ({"calibrate": "text.txt", "algorithm": "magic"}, "awq or gptq"),
        ({"calibrate": "text.txt", "algorithm": "awq", "act_order": True}, "gptq"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model, options, needle, tmp_path):
    (model.folder / "short.txt").write_text("one two")
    if "calibrate" in options:
        options = {**options, "calibrate": model.folder / options["calibrate"]}
    with pytest.raises(ConfigError, match=needle):
        pymllm.quantize_checkpoint(
            model.folder, tmp_path / "out", {"**.mlp.**": "int4:group_size=64"}, **options
        )
    assert not (tmp_path / "out").exists()


def test_transformers_reads_the_config_of_a_calibrated_checkpoint(model, tmp_path):
    pymllm.quantize_checkpoint(
        model.folder,
        tmp_path / "out",
        {"**.mlp.**": "fp8:activations=static"},
        calibrate=model.folder / "text.txt",
        **OPTIONS,
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    scheme = config.quantization_config["config_groups"]["group_0"]
    assert scheme["input_activations"]["dynamic"] is False
