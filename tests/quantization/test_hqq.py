"""HQQ: the layout by its formula, layers by their tags, ranks, config errors."""

from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import write_checkpoint
from ..forward import assert_answers_as_meant, logits_of

PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def params(bits, group):
    return {"weight_quant_params": {"nbits": bits, "group_size": group, "axis": 1, "channel_wise": True}}


@dataclass(frozen=True)
class HQQ:
    bits: int = 4
    group: int | None = 64

    def config(self, ignored):
        skipped = ["lm_head", *(f"mlp.{name}" for name in ignored)]
        return {"quant_method": "hqq", "quant_config": params(self.bits, self.group), "skip_modules": skipped}

    def encode(self, weight):
        top, per_word = 2**self.bits - 1, PER_WORD[self.bits]
        groups = weight.reshape(-1, self.group or weight.shape[1])
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).half()
        codes = (groups / scale.float() + zero.float()).round().clamp(0, top)
        meant = ((codes - zero.float()) * scale.float()).view_as(weight)
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per_word))
        words = torch.zeros(len(padded) // per_word, codes.shape[1], dtype=torch.int64)
        for piece in padded.long().chunk(per_word):
            words = words * 2**self.bits + piece
        stored = words.to(torch.int32 if self.bits == 3 else torch.uint8)
        repeated = {
            "nbits": torch.tensor(self.bits),
            "axis": torch.tensor(1),
            "shape": torch.tensor(weight.shape),
        }
        return {"W_q": stored, "scale": scale, "zero": zero} | repeated, meant


@pytest.mark.parametrize(
    "writer", (HQQ(), HQQ(8, 32), HQQ(3), HQQ(2, 32), HQQ(1, 32), HQQ(4, None)), ids=repr
)
def test_a_checkpoint_answers_as_the_weights_it_means_on_one_rank_and_on_two(writer, tmp_path):
    written = write_checkpoint(tmp_path, "llama", writer, ignored=("down_proj",))
    assert_answers_as_meant(written)


def test_layers_have_the_settings_of_their_tag_and_others_are_left_alone(tmp_path):
    def by_tag(raw):
        tags = {f"self_attn.{part}_proj": params(4, 64) for part in "qkvo"} | {"mlp.down_proj": params(8, 32)}
        raw["quantization_config"]["quant_config"] = tags

    written = write_checkpoint(
        tmp_path,
        "llama",
        HQQ(),
        parts={"down_proj": HQQ(8, 32)},
        ignored=("gate_proj", "up_proj"),
        edit_config=by_tag,
    )
    model = pymllm.load_model(tmp_path, device="cpu", dtype="float32")
    expected = written.logits()
    assert (logits_of(model, written.ids) - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"nbits": 5}, "nbits"),
        ({"axis": 0}, "axis"),
        ({"group_size": -1}, "group_size"),
        ({"view_as_float": True}, "view_as_float"),
    ),
)
def test_a_config_that_cannot_be_read_names_field_and_value(changes, said):
    settings = {"weight_quant_params": params(4, 64)["weight_quant_params"] | changes}
    with pytest.raises(ConfigError, match=said):
        get_quantization_config("hqq").from_config({"quant_method": "hqq", "quant_config": settings})


def test_quantised_scales_and_an_empty_config_are_refused():
    read = get_quantization_config("hqq").from_config
    with pytest.raises(ConfigError, match="scale_quant_params"):
        read({"quant_config": params(4, 64) | {"scale_quant_params": {"nbits": 8}}})
    with pytest.raises(ConfigError, match="quant_config"):
        read({"quant_method": "hqq"})
