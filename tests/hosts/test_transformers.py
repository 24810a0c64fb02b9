"""transformers' `from_pretrained` with our methods: `quantization_config=PymllmConfig()`."""

# T tokens, V vocabulary

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pymllm
from pymllm.errors import CheckpointError, ConfigError, RuleError
from pymllm.layers.weighted import WeightedLayer
from pymllm.models.generic.experts import RoutedExperts

from ..checkpoints import TinyCheckpoint, edit_config, load_tensors, relative_error, write_checkpoint
from ..mlx_checkpoints import MLX, write_mlx
from ..moe_checkpoints import write_moe
from ..quantized import WRITERS

transformers = pytest.importorskip("transformers")

from pymllm.hosts.transformers import PymllmConfig  # noqa: E402

EXACT = 1e-5  # float32 through two layers, next to another order of the same sums


def load(folder: Path, config: PymllmConfig | None = None, **options: Any) -> Any:
    options = {"dtype": torch.float32} | options
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config or PymllmConfig(), **options
    )


def logits(model: Any, ids: Tensor) -> Tensor:
    """[T, V]"""
    with torch.no_grad():
        return model(ids[None]).logits[0]


def linears(model: nn.Module) -> list[WeightedLayer]:
    return [module for module in model.modules() if isinstance(module, WeightedLayer)]


@pytest.mark.parametrize("fmt", sorted(WRITERS))
def test_a_checkpoint_in_any_format_gives_the_logits_that_its_tensors_mean(fmt: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS[fmt])
    model = load(checkpoint.folder, PymllmConfig(compute="exact"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(isinstance(module, (nn.Linear, nn.Embedding)) for module in model.modules())
    found = logits(model, checkpoint.ids)
    assert relative_error(found, checkpoint.logits()) < EXACT
    ours = pymllm.LLM(checkpoint.folder, dtype="float32", progress=False).logits(checkpoint.ids)
    assert relative_error(found, ours) < EXACT


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "granite"])
def test_families_keep_their_own_forward(family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "model", family, WRITERS["awq"], tie_word_embeddings=family == "qwen2", shards=2
    )
    model = load(checkpoint.folder)
    assert relative_error(logits(model, checkpoint.ids), checkpoint.logits()) < EXACT
    prompt = checkpoint.ids[None, :5]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = checkpoint.model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options), expected)


def test_rules_quantise_a_plain_checkpoint_as_they_do_in_pymllm(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "qwen3", "none")
    rules = {"**.down_proj": "none", "**.mlp.**": "int4:group_size=32", "lm_head": "fp8"}
    model = load(checkpoint.folder, PymllmConfig(rules))
    ours = pymllm.LLM(checkpoint.folder, quant=rules, dtype="float32", progress=False)
    found = logits(model, checkpoint.ids)
    assert relative_error(found, ours.logits(checkpoint.ids)) < EXACT
    assert relative_error(found, checkpoint.logits()) > 1e-3, "the weights were rounded"
    said = model.config.quantization_config
    assert said.quant_method == "pymllm" and said.checkpoint is None
    assert said.quant == ["**.down_proj=none", "**.mlp.**=int4:group_size=32", "lm_head=fp8"]
    assert sum(said.methods.values()) == len(linears(model)) == 16
    assert sorted(method.split()[0] for method in said.methods) == ["fp8", "int4", "none"]
    assert {record.status for record in model.load_report.tensors} == {"loaded"}


def test_experts_and_settings_without_a_name_are_read_too(tmp_path: Path) -> None:
    moe = write_moe(tmp_path / "moe", "qwen3_moe", WRITERS["fp8-tensor"])
    for dtype, limit in ((torch.float32, EXACT), (torch.bfloat16, 5e-2)):
        model = load(moe.folder, PymllmConfig(compute="exact"), dtype=dtype)
        assert sum(isinstance(module, RoutedExperts) for module in model.modules()) == 1
        assert relative_error(logits(model, moe.ids).float(), moe.logits()) < limit
    settings = MLX(4, 32).settings()
    mlx = write_mlx(
        tmp_path / "mlx",
        "llama",
        lambda _: MLX(4, 32),
        settings,
        # as mlx-lm writes them, twice
        edit=lambda raw: raw.update(quantization=settings, quantization_config=settings),
    )
    assert relative_error(logits(load(mlx.folder), mlx.ids), mlx.logits()) < EXACT


def test_the_model_runs_in_the_dtype_that_transformers_was_asked_for(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"])
    model = load(
        checkpoint.folder, dtype=torch.bfloat16, device_map="auto" if not torch.cuda.is_available() else "cpu"
    )
    found = logits(model, checkpoint.ids)
    assert model.dtype is found.dtype is torch.bfloat16
    assert relative_error(found.float(), checkpoint.logits()) < 3e-2  # 8 bits of mantissa, two layers
    assert not any(param.requires_grad for param in model.parameters())
    assert model.to("cpu") is model
    with pytest.raises(ConfigError, match="packed weights stay"):
        model.to("meta")
    with pytest.raises(ConfigError, match="not saved from transformers"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_nothing_is_left_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"])
    with caplog.at_level(logging.WARNING):
        load(checkpoint.folder)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    tensors = load_tensors(checkpoint.folder)
    missing = "model.layers.1.mlp.up_proj.qzeros"
    del tensors[missing]
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2, 2)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, checkpoint.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint.folder)
    for name in (missing, "mlp.extra.weight: unexpected", "model.norm.weight"):
        assert name in str(caught.value)


@pytest.mark.parametrize("own", [False, True])
def test_a_head_that_is_tied_and_stored_is_what_the_files_say(own: bool, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "qwen3", WRITERS["awq"], tie_word_embeddings=True)
    tensors = load_tensors(checkpoint.folder)
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.flip(0).contiguous() if own else table.clone()
    save_file(tensors, checkpoint.folder / "model.safetensors", {"format": "pt"})
    model = load(checkpoint.folder, dtype=torch.bfloat16)  # built under another default dtype
    expected = checkpoint.logits().flip(1) if own else checkpoint.logits()
    assert relative_error(logits(model, checkpoint.ids).float(), expected) < 3e-2
    assert (model.lm_head.bound.packed is model.model.embed_tokens.bound.packed) is not own


def test_what_cannot_be_hosted_is_one_error(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"])
    with pytest.raises(ConfigError, match="no setting 'rules'"):
        PymllmConfig(rules={})
    with pytest.raises(RuleError, match="matches no layer"):
        load(checkpoint.folder, PymllmConfig({"**.mpl.**": "int4"}))
    with pytest.raises(ConfigError, match="has one device"):
        load(checkpoint.folder, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ConfigError, match="only decoders of text"):
        transformers.AutoModel.from_pretrained(checkpoint.folder, quantization_config=PymllmConfig())
    with pytest.raises(ConfigError, match="from its files"):
        transformers.modeling_utils.get_hf_quantizer(
            checkpoint.model.config, PymllmConfig(), None, True, {}, gguf_file="model.gguf"
        )
    edit_config(checkpoint.folder, quantization_config={"bits": 3})
    with pytest.raises(ConfigError, match="bits"):
        load(checkpoint.folder)
    torch.save(load_tensors(checkpoint.folder), checkpoint.folder / "pytorch_model.bin")
    (checkpoint.folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="from its files"):
        load(checkpoint.folder)


def test_the_settings_may_be_a_plain_mapping(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["awq"])
    settings: Any = {"quant_method": "pymllm", "compute": "exact", "quant": {"**.down_proj": "fp8"}}
    model = load(checkpoint.folder, settings)
    said = model.config.quantization_config
    assert said.compute == "exact" and said.checkpoint["quant_method"] == "awq"
    assert sorted(method.split()[0] for method in said.methods) == ["awq", "fp8", "none"]


def test_other_loads_stay_as_they_are(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "model", "llama", "none")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain.folder, attn_implementation="eager")
    assert isinstance(model.lm_head, nn.Linear)
    assert torch.equal(logits(model, plain.ids), logits(plain.model, plain.ids))


def test_only_the_import_of_the_host_registers_it() -> None:
    code = (
        "import pymllm, sys\n"
        "assert 'pymllm.hosts' not in sys.modules\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "assert 'pymllm' not in known\n"
        "import pymllm.hosts.transformers as host\n"
        "host.register()\n"
        "assert known['pymllm'] is host.PymllmQuantizer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scales_of_a_kv_cache_are_skipped_with_a_reason(tmp_path: Path) -> None:
    checkpoint: TinyCheckpoint = write_checkpoint(tmp_path / "model", "llama", WRITERS["fp8-tensor"])
    tensors = load_tensors(checkpoint.folder)
    scales = [f"model.layers.{i}.self_attn.{one}_proj.{one}_scale" for i in (0, 1) for one in "kv"]
    save_file(
        tensors | {name: torch.ones(()) for name in scales},
        checkpoint.folder / "model.safetensors",
        {"format": "pt"},
    )
    model = load(checkpoint.folder, PymllmConfig(compute="exact"))
    assert relative_error(logits(model, checkpoint.ids), checkpoint.logits()) < EXACT
    skipped = {
        record.name: record.reason for record in model.load_report.tensors if record.status == "skipped"
    }
    assert sorted(skipped) == sorted(scales)
    assert all("kept in floats" in reason for reason in skipped.values())
