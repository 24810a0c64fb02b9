"""`quantize_model` on modules that we have no definition for, through their own forward and generate."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pymllm
from pymllm.errors import ConfigError, RuleError
from pymllm.kernels import registry
from pymllm.modules.layers import QuantizedEmbedding, QuantizedLayer, QuantizedLinear, quantized_layers
from pymllm.quantization import binding

from ..checkpoints import random_model, relative_error

SIZES = {"vocab_size": 104, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(0, 104, (2, 17), generator=torch.Generator().manual_seed(7))
INT4, FP8 = "awq:group_size=64", "fp8"
LEAST = {INT4: 0.99, FP8: 0.999, "int4:group_size=64": 0.99, "int8": 0.999}


def neox() -> nn.Module:
    return random_model(
        transformers.GPTNeoXConfig(**SIZES, intermediate_size=256, max_position_embeddings=128)
    )


def opt() -> nn.Module:
    """Tied: the head's weight is the embedding's."""
    return random_model(
        transformers.OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=128, max_position_embeddings=128)
    )


def gpt2() -> nn.Module:
    """Its layers are Conv1D, whose weights lie [I, O]; tied."""
    sizes = {"vocab_size": 104, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return random_model(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, intermediate_size=256, max_position_embeddings=128)
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


FAMILIES = {"neox": neox, "opt": opt, "gpt2": gpt2, "bert": bert}
LAYERS = {
    "neox": "gpt_neox.layers.**",
    "opt": "model.decoder.layers.**",
    "gpt2": "transformer.h.**",
    "bert": "encoder.layer.**",
}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    answer = model(IDS)
    return answer.logits if "logits" in answer else answer.last_hidden_state


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", LEAST)
@pytest.mark.parametrize("everything", [False, True], ids=["layers", "everything"])
def test_outputs_stay_near_the_floats_through_the_models_own_forward(family, method, everything):
    model = FAMILIES[family]()
    expected = outputs(model)
    count = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in model.modules())
    rules = {"**" if everything else LAYERS[family]: method}
    if (family, method, everything) == ("bert", INT4, True):
        rules = {"**.token_type_embeddings": "none", **rules}  # two rows, which AWQ cannot pack
    assert pymllm.quantize_model(model, rules) is model
    found = outputs(model)
    assert LEAST[method] <= cosine(found, expected) < 1 - 1e-7
    replaced = [row for row in model.quantization if row.kind == "linear"]
    assert len(replaced) == len([m for m in model.modules() if isinstance(m, QuantizedLinear)])
    assert len(replaced) == count - (0 if everything else 1)  # the head, or BERT's pooler
    left = [row.prefix for row in model.quantization.unreached]
    assert left == (["model.decoder.embed_positions"] if (family, everything) == ("opt", True) else [])
    assert all(
        row.bytes_after < row.bytes_before or row.tied_to for row in model.quantization if row.replaced
    )


@pytest.mark.parametrize("family", ["neox", "opt", "gpt2"])
def test_generate_runs_the_replaced_layers(family):
    model = FAMILIES[family]()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    pymllm.quantize_model(model, {LAYERS[family]: "int8"})
    with_cache = model.generate(IDS, **options)
    assert with_cache.shape == (2, 25)
    assert torch.equal(model.generate(IDS, use_cache=False, **options), with_cache)
    assert torch.equal(with_cache[:, :19], expected[:, :19])  # the first tokens, before errors add up


def test_a_layer_computes_what_its_format_says_for_every_input():
    torch.manual_seed(1)
    linear = nn.Linear(64, 48)
    holder = pymllm.quantize_model(nn.Sequential(copy.deepcopy(linear)), {"0": "int8"}, compute="exact")
    layer = holder[0]
    weight = layer.bound.canonical().dequantize(torch.float64)
    # Written out: codes of 8 bits, a scale for each row.
    step = linear.weight.detach().double().abs().amax(1, keepdim=True) / 127.5
    off = ((weight - linear.weight.detach().double()).abs() / step).max()
    assert (
        float(off) <= 0.5 + 127.5 * 2**-11
    )  # half a step, and the largest code times a float16 scale's rounding
    for shape in ((64,), (1, 64), (0, 64), (2, 3, 64), (2, 3, 5, 64)):
        x = torch.randn(shape)
        expected = x.double() @ weight.t() + linear.bias.double()
        assert layer(x).shape == expected.shape
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(6, 128)[:, ::2]
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert layer(x.to(dtype)).dtype is dtype
    assert torch.equal(layer.weight, weight.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_module_keeps_its_dtype(dtype):
    model = neox()
    expected = outputs(model)
    model.to(dtype)
    pymllm.quantize_model(model, {LAYERS["neox"]: FP8})
    found = outputs(model)
    assert found.dtype is dtype
    assert cosine(found, expected) > 0.999


def test_casting_a_quantised_module_casts_activations_and_no_codes():
    model = pymllm.quantize_model(neox(), {"**": FP8})
    before = {layer.prefix: layer.weight for layer in quantized_layers(model)}
    expected = outputs(model)
    model.to(torch.bfloat16)
    assert outputs(model).dtype is torch.bfloat16
    assert cosine(outputs(model), expected) > 0.9995
    model.float()
    for layer in quantized_layers(model):
        assert torch.equal(layer.weight, before[layer.prefix])
    clone = copy.deepcopy(model)
    assert torch.equal(outputs(clone), outputs(model))


@pytest.mark.parametrize("method", [INT4, FP8])
def test_tied_weights_are_shared_where_both_are_quantised_alike(method):
    model = opt()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    pymllm.quantize_model(model, {"lm_head": method, "**.embed_tokens": method})
    embedding, head = model.model.decoder.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert torch.equal(embedding.weight, head.weight)
    second = model.quantization[1]
    if second.tied_to:
        assert second.tied_to == model.quantization[0].prefix
        pointers = [{t.data_ptr() for t in layer.bound.packed.values()} for layer in (embedding, head)]
        assert pointers[0] == pointers[1]


def test_tied_weights_of_which_one_is_quantised_leave_the_other_its_floats():
    model = opt()
    floats = model.lm_head.weight.detach().clone()
    pymllm.quantize_model(model, {"lm_head": FP8})
    assert torch.equal(model.model.decoder.embed_tokens.weight, floats)
    assert 0 < relative_error(model.lm_head.weight, floats) < 0.07

    model = opt()
    pymllm.quantize_model(model, {"**.embed_tokens": FP8})
    assert torch.equal(model.lm_head.weight, floats)
    assert isinstance(model.lm_head, nn.Linear)


class Twice(nn.Module):
    """One linear layer at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = nn.Sequential(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


def test_a_module_at_two_paths_is_replaced_at_both():
    model = pymllm.quantize_model(Twice(), {"again.*": FP8})
    assert isinstance(model.first, QuantizedLinear) and model.again[0] is model.first
    with pytest.raises(RuleError, match="first and again"):
        pymllm.quantize_model(Twice(), {"again.*": FP8, "first": "int8"})


@pytest.mark.parametrize(("family", "method"), [("opt", INT4), ("opt", FP8), ("gpt2", INT4), ("bert", FP8)])
def test_a_state_dict_restores_another_module_quantised_by_the_same_rules(family, method, tmp_path):
    model, other = FAMILIES[family](), FAMILIES[family]()
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(-0.5)
    for each in (model, other):
        pymllm.quantize_model(each, {"**": method})
    expected = outputs(model)
    assert not torch.equal(outputs(other), expected)
    state = model.state_dict()
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in state.items()}, tmp_path / "s.safetensors"
    )
    other.load_state_dict(load_file(tmp_path / "s.safetensors"), strict=True)
    assert torch.equal(outputs(other), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_a_state_dict_packed_for_one_kernel_is_read_by_another(monkeypatch):
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return pymllm.quantize_model(nn.Sequential(nn.Linear(128, 64)), {"0": INT4})

    fast = made(0)
    if fast[0].bound.selection.kernel.name == "reference":
        pytest.skip("no other int4 kernel runs here")
    with monkeypatch.context() as patch:
        patch.setattr(binding, "select", lambda op, problem, _: registry.select(op, problem, "reference"))
        slow = made(1)
        assert slow[0].bound.selection.kernel.name == "reference"
        assert not torch.equal(slow[0].weight, fast[0].weight)
        slow.load_state_dict(fast.state_dict(), strict=True)
    assert slow[0].bound.selection.kernel.name == "reference"
    assert torch.equal(slow[0].weight, fast[0].weight)
    fast.load_state_dict(slow.state_dict(), strict=True)
    assert torch.equal(slow[0].weight, fast[0].weight)


def test_a_state_dict_of_another_format_is_refused():
    fp8 = pymllm.quantize_model(nn.Sequential(nn.Linear(64, 64)), {"0": FP8})
    int8 = pymllm.quantize_model(nn.Sequential(nn.Linear(64, 64)), {"0": "int8"})
    with pytest.raises(RuntimeError, match="the saved weight is not this layer's"):
        fp8.load_state_dict(int8.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        fp8.load_state_dict(nn.Sequential(nn.Linear(64, 64)).state_dict())


def test_rules_are_ordered_and_none_leaves_a_module_alone():
    model = pymllm.quantize_model(neox(), ["**.dense=none", "**.layers.0.**=int8", f"**.layers.**={FP8}"])
    methods = {row.prefix: row.method.split()[0] for row in model.quantization}
    assert methods["gpt_neox.layers.0.mlp.dense_h_to_4h"] == "int8"
    assert methods["gpt_neox.layers.1.mlp.dense_h_to_4h"] == "fp8"
    assert type(model.gpt_neox.layers[0].attention.dense) is nn.Linear
    assert {row.rule for row in model.quantization} == {"**.layers.0.**=int8", f"**.layers.**={FP8}"}


def test_unmatched_and_shadowed_rules_are_errors_with_the_nearest_names():
    with pytest.raises(RuleError, match=r"gpt_neox\.layers\.0\.attention\.dense"):
        pymllm.quantize_model(neox(), {"gpt_neox.layers.0.attention.dens": FP8})
    with pytest.raises(RuleError, match="never applies"):
        pymllm.quantize_model(neox(), {"**": FP8, "**.dense": "int8"})
    with pytest.raises(RuleError, match="matches no layer"):
        pymllm.quantize_model(nn.ReLU(), {"**": FP8})
    with pytest.raises(RuleError, match="forward of its own"):
        pymllm.quantize_model(opt(), {"**.embed_positions": FP8})  # adds an offset to the ids


def test_what_cannot_be_replaced_is_refused_before_anything_changes():
    model = neox()
    with pytest.raises(ConfigError, match="groups of 96"):
        pymllm.quantize_model(model, {"**": "int4:group_size=96"})
    hooked = model.gpt_neox.layers[1].mlp.dense_4h_to_h
    hooked.register_forward_hook(lambda *args: None)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.dense_4h_to_h .*hooks"):
        pymllm.quantize_model(model, {"**.dense_4h_to_h": FP8})
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    with pytest.raises(ConfigError, match=r"in place: wrap it in another, in nn\.Sequential"):
        pymllm.quantize_model(nn.Linear(64, 64), {"**": FP8})
    pymllm.quantize_model(model, {"**": FP8})
    assert model.gpt_neox.layers[1].mlp.dense_4h_to_h is hooked
    (row,) = model.quantization.unreached
    assert row.prefix == "gpt_neox.layers.1.mlp.dense_4h_to_h" and "hooks" in str(row.reason)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), None))
def test_weights_without_numbers_to_round_are_refused_before_anything_changes(value):
    """No integer stands for an infinity, and a weight without elements has no largest one."""
    wrong = nn.Linear(64, 64) if value else nn.Linear(64, 0)
    with torch.no_grad():
        wrong.weight[1:2, 2] = value or 0.0
    model = nn.Sequential(nn.Linear(64, 64), wrong)
    with pytest.raises(ConfigError, match="NaN or infinite" if value else "empty"):
        pymllm.quantize_model(model, ["0=int8", "1=int8"])
    assert type(model[0]) is nn.Linear
    pymllm.quantize_model(model, ["**=int8"])
    assert [row.prefix for row in model.quantization.unreached] == ["1"] and model[1] is wrong


def test_arguments_of_other_types_are_one_error():
    with pytest.raises(ConfigError, match="torch module"):
        pymllm.quantize_model({"a": 1}, ["**=int8"])
    with pytest.raises(ConfigError, match="rules"):
        pymllm.quantize_model(nn.Sequential(nn.Linear(64, 64)), 3)


# With calibration inputs


def relative_change(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 104, (2, 17), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("algorithm", "act_order"), [("gptq", False), ("gptq", True), ("clip", False)])
def test_calibration_brings_outputs_nearer_to_the_floats(family, algorithm, act_order):
    rules = {LAYERS[family]: "int4:group_size=64"}
    plain, calibrated = FAMILIES[family](), FAMILIES[family]()
    expected = outputs(plain)
    pymllm.quantize_model(plain, rules)
    pymllm.quantize_model(calibrated, rules, [*batches(), IDS], algorithm=algorithm, act_order=act_order)
    assert all(row.calibration_rows == 7 * 34 for row in calibrated.quantization)
    limit = 0.8 if algorithm == "gptq" else 0.99
    assert relative_change(outputs(calibrated), expected) < limit * relative_change(outputs(plain), expected)
    assert cosine(outputs(calibrated), expected) >= 0.99


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
def test_inputs_may_be_tensors_arguments_or_keywords(kind):
    shaped = {"tensor": IDS, "tuple": (IDS,), "mapping": {"input_ids": IDS, "use_cache": False}}
    model = neox().train()
    pymllm.quantize_model(model, {"**.dense": "int8:activations=static"}, [shaped[kind]])
    assert model.training and model.gpt_neox.layers[0].training
    peaks = {}
    other = neox()
    for name, module in other.named_modules():
        if name.endswith(".dense"):
            module.register_forward_pre_hook(
                lambda m, args, name=name: peaks.__setitem__(name, float(args[0].abs().max()))
            )
    outputs(other)
    for layer in quantized_layers(model):
        scales = layer.bound.canonical().input_scales
        assert scales.tolist() == pytest.approx([peaks[layer.prefix] / 127.5], rel=1e-5)


def test_static_activations_round_as_their_scales_say():
    model, expected = neox(), outputs(neox())
    pymllm.quantize_model(model, {LAYERS["neox"]: "fp8:activations=static"}, batches(), compute="checkpoint")
    assert 0.998 < cosine(outputs(model), expected) < 1 - 1e-7
    again = neox()
    with pytest.raises(ConfigError, match="example inputs"):
        pymllm.quantize_model(again, {LAYERS["neox"]: "fp8:activations=static"})
    assert not any(isinstance(module, QuantizedLayer) for module in again.modules())


def test_layers_go_in_portions_where_their_statistics_would_not_fit(monkeypatch):
    from pymllm.modules import calibration as module_calibration

    rules = {LAYERS["bert"]: "int4:group_size=64"}
    whole, portioned = bert(), bert()
    pymllm.quantize_model(whole, rules, batches())
    monkeypatch.setattr(module_calibration, "MOST_BYTES", 5 * 4 * 128 * 128)
    pymllm.quantize_model(portioned, rules, batches())
    assert [row.prefix for row in portioned.quantization] == [row.prefix for row in whole.quantization]
    # Later portions see what the earlier ones have become, so the weights differ; the quality does not.
    expected = outputs(bert())
    assert relative_change(outputs(portioned), expected) < 1.1 * relative_change(outputs(whole), expected)


@pytest.mark.parametrize(
    ("calibration", "options", "needle"),
    [
        ([], {}, "no calibration inputs"),
        (IDS, {}, "an iterable of inputs"),
        ([IDS], {"algorithm": "awq"}, "gptq or clip"),
        ([IDS], {"algorithm": "clip", "act_order": True}, "act_order"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(calibration, options, needle):
    with pytest.raises(ConfigError, match=needle):
        pymllm.quantize_model(neox(), {LAYERS["neox"]: "int4:group_size=64"}, calibration, **options)
