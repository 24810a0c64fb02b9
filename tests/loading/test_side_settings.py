"""Settings in a file beside config.json, which must not say something else of the same weights."""

from __future__ import annotations

import json

import pytest

import pymllm
from pymllm.errors import PymllmError

from ..checkpoints import AWQ, FP8, edit_config, write_checkpoint
from ..forward import TOLERANCE, llm_logits_of
from ..quantization.test_modelopt import NVFP4
from ..quantized import GPTQ

SMALL = {"num_hidden_layers": 1, "intermediate_size": 128}
GPTQ_FILE, AWQ_FILE, MODELOPT_FILE = "quantize_config.json", "quant_config.json", "hf_quant_config.json"
GPTQ_SETTINGS = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ_SETTINGS = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}


def modelopt(**settings):
    producer = {"name": "modelopt", "version": "0.47.0"}
    return {"producer": producer, "quantization": {"quant_algo": "W4A16_NVFP4", "group_size": 16, **settings}}


def write(folder, writer, file, settings):
    checkpoint = write_checkpoint(folder, "llama", writer, **SMALL)
    (folder / file).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return checkpoint


@pytest.mark.parametrize(
    ("writer", "file", "settings"),
    [
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS),
        # As AutoGPTQ writes it, with what matters to nobody who reads.
        (
            GPTQ(),
            GPTQ_FILE,
            GPTQ_SETTINGS
            | {"damp_percent": 0.01, "model_name_or_path": None, "model_file_base_name": "model"},
        ),
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"quant_method": "gptq", "checkpoint_format": "gptq"}),
        (AWQ(64), AWQ_FILE, AWQ_SETTINGS),
        (AWQ(64), AWQ_FILE, AWQ_SETTINGS | {"modules_to_not_convert": ["down_proj"]}),  # the tensors tell
        (
            NVFP4("W4A16_NVFP4"),
            MODELOPT_FILE,
            modelopt(exclude_modules=["lm_head"], kv_cache_quant_algo=None),
        ),
    ],
)
def test_two_files_that_mean_the_same_are_no_contradiction(writer, file, settings, tmp_path):
    checkpoint = write(tmp_path, writer, file, settings)
    found, expected = llm_logits_of(checkpoint, compute="exact"), checkpoint.logits()
    assert (found - expected).norm() / expected.norm() < TOLERANCE


@pytest.mark.parametrize(
    ("writer", "file", "settings", "key"),
    [
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"bits": 8}, "bits"),
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"group_size": 64}, "group_size"),
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"sym": False}, "sym"),
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"checkpoint_format": "gptq_v2"}, "checkpoint_format"),
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"dynamic": {".*down.*": {"bits": 8}}}, "dynamic"),
        (GPTQ(), GPTQ_FILE, GPTQ_SETTINGS | {"quant_method": "awq"}, "quant_method"),
        (AWQ(64), AWQ_FILE, AWQ_SETTINGS | {"q_group_size": 128}, "group_size"),
        (AWQ(64), AWQ_FILE, AWQ_SETTINGS | {"version": "GEMV"}, "version"),
        (NVFP4("W4A16_NVFP4"), MODELOPT_FILE, modelopt(quant_algo="FP8"), "quant_algo"),
        (FP8(), MODELOPT_FILE, modelopt(), "quant_method"),
    ],
)
def test_two_files_that_say_different_things_are_refused_by_name(writer, file, settings, key, tmp_path):
    write(tmp_path, writer, file, settings)
    with pytest.raises(PymllmError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    error = caught.value
    assert error.code == "quantization-config" and error.tensor == key
    assert "config.json" in str(error) and file in str(error) and error.file.endswith(file)


def test_the_two_spellings_of_a_cache_are_compared(tmp_path):
    scheme = {"type": "float", "num_bits": 8, "dynamic": False}
    write(tmp_path, NVFP4("W4A16_NVFP4"), MODELOPT_FILE, modelopt(kv_cache_quant_algo="FP8"))
    edit_config(tmp_path, quantization_config={"kv_cache_scheme": scheme})
    pymllm.plan(tmp_path, device="cpu")
    edit_config(tmp_path, quantization_config={"kv_cache_scheme": scheme | {"type": "int"}})
    with pytest.raises(PymllmError, match="kv_cache_quant_algo"):
        pymllm.plan(tmp_path, device="cpu")


@pytest.mark.parametrize("algorithm", ("FP8", "W4A16_NVFP4", None))
def test_a_layer_in_both_lists_of_mixed_precision_has_one_algorithm(algorithm, tmp_path):
    layers = {
        f"model.layers.0.mlp.{name}_proj": {"quant_algo": "W4A16_NVFP4"} for name in ("up", "gate", "down")
    }
    layers |= {f"model.layers.0.self_attn.{name}_proj": {"quant_algo": "W4A16_NVFP4"} for name in "qkvo"}
    mixed = {"quant_algo": "MIXED_PRECISION", "group_size": None, "quantized_layers": layers}
    theirs = {name: entry for name, entry in layers.items() if "down" not in name}
    if algorithm is not None:
        theirs["model.layers.0.mlp.down_proj"] = {"quant_algo": algorithm}
    settings = modelopt(quant_algo="MIXED_PRECISION", group_size=None, quantized_layers=theirs)
    write(tmp_path, NVFP4("W4A16_NVFP4"), MODELOPT_FILE, settings)
    edit_config(tmp_path, quantization_config=mixed)
    if algorithm != "FP8":
        pymllm.plan(tmp_path, device="cpu")
    else:
        with pytest.raises(PymllmError, match="quantized_layers"):
            pymllm.plan(tmp_path, device="cpu")


@pytest.mark.parametrize("alone", (True, False))
@pytest.mark.parametrize("text", ('{"bits": 4', "[1]", '{"bits": 4, "bits": 8}', "\x00"))
def test_a_file_that_is_no_json_object_is_refused(text, alone, tmp_path):
    write(tmp_path, GPTQ(), GPTQ_FILE, text)
    if alone:
        raw = json.loads((tmp_path / "config.json").read_text())
        del raw["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(PymllmError) as caught:
        pymllm.plan(tmp_path, device="cpu")
    assert caught.value.code.startswith("config-") and caught.value.file.endswith(GPTQ_FILE)
