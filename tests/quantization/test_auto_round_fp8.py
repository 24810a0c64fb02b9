"""AutoRound's float8 by its formula, and layers of several data types in one checkpoint."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config
from pymllm.weights.spec import LinearShape, Span

from ..checkpoints import AWQ, encode_e4m3, write_checkpoint
from ..forward import assert_answers_as_meant

AUTO = {"quant_method": "auto-round", "bits": 8, "data_type": "fp", "sym": True, "fmt": "e4m3"}


@dataclass(frozen=True)
class Fp8:
    """group_size: as AutoRound has it.  more: entries of `extra_config`."""

    group_size: int | tuple[int, int] = (128, 128)
    static: bool = False
    more: tuple = ()

    def config(self, ignored):
        activations = {
            "act_bits": 8,
            "act_data_type": "fp",
            "act_dynamic": not self.static,
            "act_group_size": 128,
        }
        kind = "fp8" if isinstance(self.group_size, tuple) else "fp8_static"
        size = list(self.group_size) if isinstance(self.group_size, tuple) else self.group_size
        floats = {f".*{name}.*": {"bits": 16} for name in ignored}
        return (
            AUTO
            | activations
            | {"group_size": size, "packing_format": f"auto_round:{kind}"}
            | {"extra_config": floats | dict(self.more)}
        )

    def encode(self, weight):
        outputs, inputs = weight.shape
        size = self.group_size
        block = (
            size if isinstance(size, tuple) else {0: (outputs, inputs), -1: (1, inputs)}.get(size, (1, size))
        )
        stored, scales, meant = encode_e4m3(weight, block, torch.bfloat16)
        named = (
            {"weight_scale_inv": scales} if isinstance(size, tuple) else {"weight_scale": scales.flatten()}
        )
        inputs_scale = {"input_scale": torch.tensor([0.02], dtype=torch.bfloat16)} if self.static else {}
        return {"weight": stored} | named | inputs_scale, meant


@pytest.mark.parametrize(
    "writer", (Fp8(), Fp8((64, 32)), Fp8(0), Fp8(0, static=True), Fp8(-1), Fp8(64)), ids=repr
)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    written = write_checkpoint(tmp_path, "llama", writer, ignored=("down_proj",))
    assert_answers_as_meant(written)


@dataclass(frozen=True)
class GPTQ4:
    """int4 in groups of 32 as auto_round:auto_gptq packs it: zero points minus one."""

    def encode(self, weight):
        groups = weight.unflatten(1, (-1, 32))
        scales = (groups.abs().amax(-1) / 7).half()
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
        meant = ((codes - 8) * scales.float()[..., None]).flatten(1)
        stored = codes.flatten(1).t().to(torch.int64).unflatten(0, (-1, 8))  # [I/8, 8, O]
        words = (stored << (4 * torch.arange(8))[None, :, None]).sum(1)
        words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        zeros = torch.full((scales.shape[1], scales.shape[0] // 8), 0x77777777, dtype=torch.int32)
        return {"qweight": words, "qzeros": zeros, "scales": scales.t()}, meant


INT4 = {"bits": 4, "data_type": "int", "group_size": 32, "act_bits": 16}


@pytest.mark.parametrize("packed", (GPTQ4(), AWQ(32, symmetric=True)), ids=repr)
def test_layers_of_integers_among_float8_are_packed_as_their_tensors_are(packed, tmp_path):
    writer = Fp8(more=((r".*mlp\.(gate|up)_proj.*", INT4),))
    parts = {"gate_proj": packed, "up_proj": packed}
    assert_answers_as_meant(write_checkpoint(tmp_path, "llama", writer, parts=parts, ignored=("o_proj",)))
    plan = pymllm.plan(tmp_path, device="cpu")
    said = {
        name: plan.layer(f"model.layers.0.{name}").method_detail for name in ("mlp.up_proj", "mlp.down_proj")
    }
    assert "int4" in said["mlp.up_proj"] and "fp8" in said["mlp.down_proj"]


def test_layers_of_float8_among_integers_are_read_as_such(tmp_path):
    @dataclass(frozen=True)
    class Mixed(GPTQ4):
        def config(self, ignored):
            extra = {"model.layers.0.mlp.down_proj": AUTO | {"group_size": -1}, "lm_head": {"bits": 16}}
            extra["model.layers.1.mlp.down_proj"] = AUTO | {"group_size": [128, 128], "act_bits": 8}
            return (
                {"quant_method": "auto-round", "sym": True, "packing_format": "auto_round:auto_gptq"}
                | INT4
                | {"extra_config": extra}
            )

    parts = {"layers.0.mlp.down_proj": Fp8(-1), "layers.1.mlp.down_proj": Fp8()}
    assert_answers_as_meant(write_checkpoint(tmp_path, "llama", Mixed(), parts=parts))


def test_a_group_that_does_not_divide_the_inputs_is_refused_by_name():
    read = get_quantization_config("auto-round").from_config(Fp8(64).config(()))
    method = read.get_quant_method(SimpleNamespace(kind="linear"), "model.layers.0.mlp.down_proj")
    shape = LinearShape(Span.full(160), (Span.full(128),), ("down_proj",), torch.float32)
    with pytest.raises(ConfigError, match="groups of 64 do not divide the 160 inputs"):
        method.check(shape)
