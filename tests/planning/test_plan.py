"""The plan: its schema, that headers are all it reads, and that what loads is what was planned."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

import pymllm
from pymllm.api import load_model, shipped_model
from pymllm.errors import RuleError
from pymllm.kernels.refusals import explain
from pymllm.layers.weighted import WeightedLayer
from pymllm.parallel import Parallel
from pymllm.planning.make_plan import plan
from pymllm.quantization.binding import bound_weight
from pymllm.weights.tensor_file import TensorInfo

from ..operators import Operators

RULES = {"**.mlp.**": "fp8", "**.self_attn.k_proj": "none", "lm_head": "none"}


@pytest.fixture
def no_tensor_is_read(monkeypatch):
    def refuse(self, *args, **options):
        raise AssertionError(f"a plan read the data of {self.name}")

    monkeypatch.setattr(TensorInfo, "read", refuse)


def test_a_plan_reads_headers_only(no_tensor_is_read):
    assert plan(shipped_model(), RULES).layers


def test_rows_name_rule_method_kernel_and_reasons(no_tensor_is_read):
    rows = {row["prefix"]: row for row in plan(shipped_model(), RULES).to_dict()["layers"]}
    gate = rows["model.layers.0.mlp.gate_proj"]
    assert gate["rule"] == "**.mlp.**=fp8" and gate["source"] == "rule"
    assert (gate["method"], gate["source_method"]) == ("fp8", "awq")
    assert gate["shape"] == [1024, 256] and gate["shape_local"] == [1024, 256]
    assert all(refusal["kernel"] and refusal["why"] for refusal in gate["refused"]) and gate["refused"]
    assert rows["model.layers.0.self_attn.q_proj"]["method"] == "awq"
    assert rows["model.layers.0.self_attn.q_proj"]["rule"] is None
    assert rows["model.layers.0.self_attn.k_proj"]["method"] == "none"
    assert rows["lm_head"]["method"] == "none" and rows["lm_head"]["rule"] == "lm_head=none"
    assert rows["model.embed_tokens"]["kind"] == "embedding"


def test_the_plan_is_json_with_a_version():
    as_json = json.loads(json.dumps(plan(shipped_model()).to_dict()))
    assert as_json["schema_version"] == 1
    assert set(as_json) >= {"model", "layers", "totals", "tensor_parallel", "notes", "dtype", "device"}
    assert 2 in as_json["tensor_parallel"]["legal_sizes"]


@pytest.mark.parametrize("rules", [None, RULES, {"model.embed_tokens": "fp8"}, {"lm_head": "fp8"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_loads_is_what_was_planned(rules, dtype):
    planned = plan(shipped_model(), rules, dtype=dtype)
    model = load_model(shipped_model(), rules, dtype=dtype)
    rows = {row.prefix: row for row in planned.layers}
    for layer in model.modules():
        if isinstance(layer, WeightedLayer):
            for weight in layer.held():
                bound = bound_weight(weight.packed_in)
                names = [layer.prefix] if layer.kind == "lm_head" else weight.shape.parts
                for name in names:
                    row = rows[name]
                    assert (row.method, row.kernel) == (weight.method.name, bound.selection.kernel.name)
                    assert row.refused == explain(bound.selection)
    storages = {}
    for layer in model.modules():
        for weight in layer.held() if isinstance(layer, WeightedLayer) else ():
            for tensor in bound_weight(weight.packed_in).packed.values():
                storages[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        for param in layer._parameters.values():
            if param is not None:
                storages[param.data_ptr()] = param.nbytes
    assert planned.totals["weight_bytes"] == sum(storages.values())


def test_rows_of_a_fused_layer_add_up_to_its_bytes():
    planned = plan(shipped_model())
    rows = sum(row.bytes for row in planned.layers)
    norms = sum(p.nbytes for n, p in load_model(shipped_model()).named_parameters() if "norm" in n)
    assert planned.totals["weight_bytes"] == rows + norms


def test_each_rank_plans_its_own_share():
    with Parallel(1, 2):
        row = plan(shipped_model()).layer("model.layers.0.mlp.down_proj")
    assert row.shape == [256, 1024] and row.shape_local == [256, 512]
    assert row.bytes * 2 == plan(shipped_model()).layer("model.layers.0.mlp.down_proj").bytes


def test_a_plan_has_no_layer_of_a_name_that_is_not_there():
    with pytest.raises(KeyError, match="no_proj"):
        plan(shipped_model()).layer("model.layers.0.mlp.no_proj")


def test_a_misspelt_rule_is_reported_with_the_nearest_name():
    with pytest.raises(RuleError, match=r"gate_prj.*matches no layer.*gate_proj"):
        plan(shipped_model(), {"**.mlp.gate_prj": "fp8"})


def test_a_split_fused_layer_is_noted():
    notes = plan(shipped_model(), {"**.mlp.up_proj": "none"}).notes
    assert any("fused" in note and "gate_up_proj" in note for note in notes)


def test_forcing_a_kernel_is_planned_and_a_wrong_one_gives_its_reason():
    forced = plan(shipped_model(), {"**": "fp8"}, kernels={"linear": "reference"})
    assert {row.kernel for row in forced.layers if row.kind == "linear"} == {"reference"}
    with pytest.raises(pymllm.PymllmError, match="torch_scaled_mm: needs a CUDA device"):
        plan(shipped_model(), {"**": "fp8"}, kernels={"linear": "torch_scaled_mm"})


def test_a_checkpoint_of_70b_scale_is_planned_from_headers_alone(tmp_path, no_tensor_is_read):
    """Nothing grows with the weights: nothing is read, and no tensor but of shapes alone is larger than a page."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    write_headers_of_an_awq_llama(tmp_path, config)
    with Operators() as ran:
        planned = plan(tmp_path, device="cpu")
    assert 35e9 < planned.totals["weight_bytes"] < 60e9
    assert ran.largest <= 4096


def write_headers_of_an_awq_llama(folder, config: LlamaConfig) -> None:
    """A checkpoint of real size whose data are holes: a sparse file that takes no disk."""
    quantised = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": quantised}))
    hidden, middle, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_key_value_heads * config.head_dim,
    )
    entries = {"lm_head.weight": ("BF16", [config.vocab_size, hidden])}
    entries["model.embed_tokens.weight"] = entries["lm_head.weight"]
    entries["model.norm.weight"] = ("BF16", [hidden])
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    linears |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (middle, hidden)}
    linears |= {"mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            entries[f"{prefix}.{norm}.weight"] = ("BF16", [hidden])
        for name, (outputs, inputs) in linears.items():
            entries[f"{prefix}.{name}.qweight"] = ("I32", [inputs, outputs // 8])
            entries[f"{prefix}.{name}.qzeros"] = ("I32", [inputs // 128, outputs // 8])
            entries[f"{prefix}.{name}.scales"] = ("F16", [inputs // 128, outputs])
    header, offset = {}, 0
    for name, (dtype, shape) in entries.items():
        size = torch.Size(shape).numel() * {"BF16": 2, "F16": 2, "I32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
