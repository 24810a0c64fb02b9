"""Read what llm-compressor writes of types without a page, hybrids and wrappers, and compare logits with transformers'.

    python benchmarks/written_by_llm_compressor.py write FOLDER      where llm-compressor is installed
    python benchmarks/written_by_llm_compressor.py compare FOLDER    where pymllm is

The models are tiny and random. The other side is transformers in float64, over weights that this script decodes by the
published layouts, loaded by transformers' own loader; pymllm runs in float32 with compute="exact".
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT: dict[str, Any] = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
}
VISION: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_heads": 2, "depth": 1, "image_size": 28, "patch_size": 14, "out_hidden_size": 128},
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA: dict[str, Any] = {
    **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1},
    **{"mamba_d_state": 16, "mamba_expand": 2, "shared_intermediate_size": 256},
}
DELTA: dict[str, Any] = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32},
    **{"linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"]},
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, dict[str, Any]] = {
    "smollm3": TEXT,
    "exaone4": {**TEXT, **SLIDING},
    "cohere2": {**TEXT, **SLIDING},
    "seed_oss": TEXT,
    "glm4_moe": {
        **{**TEXT, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1},
    },
    "ernie4_5_moe": {
        **{
            **TEXT,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 128,
            "moe_num_shared_experts": 1,
        },
        **{"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    },
    "granitemoehybrid": {**TEXT, **MAMBA, "num_local_experts": 0, "num_experts_per_tok": 0},
    "falcon_h1": {
        **{**TEXT, "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
        "mamba_n_groups": 1,
    },
    "lfm2": {**TEXT, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {**TEXT, **DELTA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 128},
    "gemma3": {
        "text_config": {**TEXT, **SLIDING, "model_type": "gemma3_text", "tie_word_embeddings": True},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "head_dim": 32, "model_type": "pixtral"},
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
        },
        "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {"text_config": {**TEXT, **DELTA, "model_type": "qwen3_5_text"}, "vision_config": VISION},
}
SCHEMES = ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16")
IGNORED = ["lm_head", "re:.*vision_tower.*", "re:.*projector.*", "re:.*visual.*", "re:.*mlp.gate$"]
PROMPTS = [[1, 5, 9, 17, 3, 22, 8, 40, 77, 12, 200, 31, 7, 7, 99, 100, 44, 3, 9, 8], [2, 33, 4]]


def model_class(config: Any) -> Any:
    wraps = (config if isinstance(config, dict) else config.to_dict()).get("text_config")
    return transformers.AutoModelForImageTextToText if wraps else transformers.AutoModelForCausalLM


def write(folder: Path) -> None:
    """Write every model in every scheme."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models

    words = models.WordLevel({f"t{i}": i for i in range(TEXT["vocab_size"])}, unk_token="t0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    for name, settings in MODELS.items():
        source = folder / "source" / name
        config = transformers.CONFIG_MAPPING[name](**settings)
        torch.manual_seed(1)
        model = model_class(config).from_config(config).to(torch.bfloat16).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.numel() > 1:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        for scheme in SCHEMES:
            loaded = model_class(config).from_pretrained(source, dtype=torch.bfloat16)
            recipe = QuantizationModifier(targets="Linear", ignore=IGNORED, scheme=scheme)
            oneshot(model=loaded, processor=tokenizer, recipe=recipe)
            loaded.save_pretrained(folder / f"{name}-{scheme}", save_compressed=True)
            print(f"{name}-{scheme}: written", flush=True)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
BLOCK = 128


def decode(layer: dict[str, Tensor], bits: int) -> Tensor:
    """Decode a layer's tensors, by the last words of their names, to float64."""
    scale = layer["weight_scale"].double()
    packed = layer.get("weight_packed")
    if packed is not None and packed.dtype is torch.uint8:  # NVFP4
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
        values = torch.cat((E2M1, -E2M1))[codes]
        scale = scale / layer["weight_global_scale"].double()
        return (values.view(*scale.shape, -1) * scale[..., None]).view(values.shape)
    if packed is not None:
        rows, columns = layer["weight_shape"].tolist()
        fields = [(packed >> (bits * i)) & (2**bits - 1) for i in range(32 // bits)]
        codes = torch.stack(fields, -1).flatten(-2)[:, :columns].double() - 2 ** (bits - 1)
        return (codes.view(*scale.shape, -1) * scale[..., None]).view(rows, columns)
    weight = layer["weight"].double()
    if scale.ndim == 2 and scale.shape[0] != weight.shape[0]:
        scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight * scale


def reference(folder: Path) -> Any:
    """Load a checkpoint's decoded weights with transformers, in float64."""
    raw = json.loads((folder / "config.json").read_text())
    (group,) = raw.pop("quantization_config")["config_groups"].values()
    layers: dict[str, dict[str, Tensor]] = {}
    for file in glob.glob(str(folder / "*.safetensors")):
        for name, tensor in load_file(file).items():
            module, _, last = name.rpartition(".")
            layers.setdefault(module, {})[last] = tensor
    floats: dict[str, Tensor] = {}
    for module, tensors in layers.items():
        if "weight_scale" in tensors:
            floats[f"{module}.weight"] = decode(tensors, group["weights"]["num_bits"])
            tensors = {"bias": tensors["bias"]} if "bias" in tensors else {}
        floats |= {f"{module}.{last}".strip("."): tensor for last, tensor in tensors.items()}
    with tempfile.TemporaryDirectory() as plain:
        save_file(
            {k: v.contiguous() for k, v in floats.items()}, f"{plain}/model.safetensors", {"format": "pt"}
        )
        Path(plain, "config.json").write_text(json.dumps(raw))
        options = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model, info = model_class(raw).from_pretrained(
            plain, dtype=torch.float64, output_loading_info=True, **options
        )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.double().eval()


def compare(folder: Path) -> None:
    """Print how far pymllm's logits are from transformers', relative to their length."""
    from pymllm.api import LLM

    worst = 0.0
    for path in sorted(p for p in folder.iterdir() if re.search("-(" + "|".join(SCHEMES) + ")$", p.name)):
        model = reference(path)
        llm = LLM(path, dtype="float32", compute="exact", progress=False)
        errors = []
        for ids in PROMPTS:
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids])).logits[0]
            errors.append(float((llm.logits(ids).double() - expected).norm() / expected.norm()))
        worst = max(worst, *errors)
        print(f"{path.name:32s} {max(errors):.1e}  {llm.model.definition}", flush=True)
    print(f"worst: {worst:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("write", "compare"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"write": write, "compare": compare}[arguments.step](arguments.folder)
