"""bitsandbytes: layouts by their formula, blocks that straddle rows, ranks, config errors."""

# O out_features, I in_features, B block size

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import pymllm
from pymllm.errors import CheckpointError, ConfigError, ShardingError
from pymllm.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from pymllm.parallel import Parallel
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.binding import bound_weight

from ..checkpoints import save_tensors, write_checkpoint
from ..forward import assert_answers_as_meant

LINEAR = SimpleNamespace(kind="linear")
TABLE = torch.linspace(-1, 1, 16)  # any table is in the file; it need not be NF4's
NESTED = torch.linspace(-1, 1, 256)


@dataclass(frozen=True)
class FourBit:
    """The page's layout in plain torch.  storage: the dtype that the bytes are declared as."""

    block: int = 64
    double: bool = False
    storage: torch.dtype = torch.uint8

    def config(self, ignored):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double,
            "llm_int8_skip_modules": list(ignored) or None,
        }

    def encode(self, weight):
        flat = weight.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
        absmax = blocks.abs().amax(1)
        state = {
            "quant_type": "nf4",
            "blocksize": self.block,
            "dtype": "float32",
            "shape": list(weight.shape),
        }
        tensors = {"weight.quant_map": TABLE.clone()}
        stored = absmax
        if self.double:
            offset = float(absmax.mean())
            groups = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 4)).view(-1, 4)
            peaks = groups.abs().amax(1).clamp(min=1e-12)
            codes = (groups[..., None] / peaks[:, None, None] - NESTED).abs().argmin(-1)
            absmax = (NESTED[codes] * peaks[:, None] + offset).view(-1)[: absmax.numel()]
            stored = codes.view(-1)[: absmax.numel()].to(torch.uint8)
            state |= {"nested_blocksize": 4, "nested_offset": offset, "nested_dtype": "float32"}
            tensors |= {"weight.nested_absmax": peaks, "weight.nested_quant_map": NESTED.clone()}
        codes = (blocks[..., None] / absmax[:, None, None] - TABLE).abs().argmin(-1)
        meant = (TABLE[codes] * absmax[:, None]).view(-1)[: flat.numel()].view_as(weight)
        nibbles = codes.view(-1)[: flat.numel()].to(torch.uint8)
        packed = (nibbles[0::2] << 4) | nibbles[1::2]
        text = json.dumps(state).encode()
        tensors |= {
            "weight": packed.view(self.storage).view(-1, 1),
            "weight.absmax": stored,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
        }
        return tensors, meant


@dataclass(frozen=True)
class EightBit:
    def config(self, ignored):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_skip_modules": list(ignored) or None,
        }

    def encode(self, weight):
        peaks = weight.abs().amax(1)
        codes = (weight / peaks[:, None] * 127).round()
        tensors = {
            "weight": codes.to(torch.int8),
            "SCB": peaks,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return tensors, codes * peaks[:, None] / 127


WRITERS = {
    "b64": FourBit(),
    "b128-double": FourBit(128, double=True),
    "b64-double": FourBit(64, double=True),
    "bf16-storage": FourBit(storage=torch.bfloat16),
    "int8": EightBit(),
}


def load(folder, **options):
    return pymllm.load_model(folder, device="cpu", dtype="float32", **options)


@pytest.mark.parametrize("name", WRITERS)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(name, tmp_path):
    assert_answers_as_meant(write_checkpoint(tmp_path / "c", "llama", WRITERS[name], ignored=("down_proj",)))


def layer_of(writer, make, out_features=40, in_features=96, parallel=None):
    """A layer filled with one encoded weight, and what that means."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1))
    tensors, meant = writer.encode(weight)
    config = get_quantization_config("bitsandbytes").from_config(writer.config(()))
    config.see_checkpoint({f"m.{name}": tensor for name, tensor in tensors.items()})
    method = config.get_quant_method(LINEAR, "m")
    with parallel or Parallel():
        layer = make(in_features, out_features, False, quant_method=method, prefix="m")
    for spec in method.weight_specs(layer.shape):
        stored = next(tensors[name] for name in (spec.name, *spec.aliases) if name in tensors)
        layer.weight_loader(getattr(layer, spec.name), stored, 0)
    method.process_weights_after_loading(layer)
    return bound_weight(layer).canonical().dequantize(torch.float32), meant


@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize(("out_features", "in_features"), ((40, 96), (8, 24), (6, 33), (3, 32)))
def test_blocks_may_end_anywhere_in_a_row(double, out_features, in_features):
    found, meant = layer_of(FourBit(double=double), Linear, out_features, in_features)
    assert torch.allclose(found, meant, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("size", (2, 4))
def test_columns_are_cut_anywhere_and_rows_where_blocks_end(double, size):
    writer = FourBit(double=double)
    for make, axis in ((ColumnParallelLinear, 0), (RowParallelLinear, 1)):
        try:
            pieces = [layer_of(writer, make, parallel=Parallel(rank, size)) for rank in range(size)]
        except ShardingError as error:
            # Blocks of 64 end with every second row of 96, those of four scales with every eighth.
            assert axis == 0 and (40 // size) % (8 if double else 2) and "m." in str(error)
            continue
        assert torch.allclose(
            torch.cat([piece for piece, _ in pieces], axis), pieces[0][1], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    (
        ({}, "load_in_4bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exactly one"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "nf4 or fp4"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
    ),
)
def test_a_config_that_cannot_be_read_names_field_and_value(settings, said):
    with pytest.raises(ConfigError, match=said):
        get_quantization_config("bitsandbytes").from_config({"quant_method": "bitsandbytes"} | settings)


def test_a_damaged_or_missing_quant_state_is_an_error_that_names_it(tmp_path):
    written = write_checkpoint(tmp_path / "c", "llama", FourBit())
    name = next(name for name in written.tensors if "quant_state" in name)
    broken = written.tensors | {name: torch.tensor(list(b"{"), dtype=torch.uint8)}
    save_tensors(written.folder, broken)
    with pytest.raises(CheckpointError, match="quant_state cannot be read"):
        load(written.folder)
    save_tensors(written.folder, {key: value for key, value in broken.items() if key != name})
    with pytest.raises(CheckpointError, match="no quant_state"):
        load(written.folder)


def test_an_int8_weight_in_another_order_than_rows_is_refused(tmp_path):
    written = write_checkpoint(tmp_path / "c", "llama", EightBit())
    name = next(name for name in written.tensors if name.endswith("weight_format"))
    save_tensors(written.folder, written.tensors | {name: torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match="row"):
        load(written.folder)
