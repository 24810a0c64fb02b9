"""Small LoRA adapters, made and run by PEFT: what `golden/` holds, and how to make it again.

    python tests/adapters/make_golden.py       # needs peft

golden/base is a tiny Llama with random weights. Each other folder is an adapter as `PeftModel.save_pretrained` writes
it, with `logits.safetensors` beside: `ids` [T], and the `logits` [T, V] of transformers' model under PEFT, in float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("golden")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 41,
    "max_position_embeddings": 64,
}
CASES = {
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "stabilised": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.k_proj": 8},
        "alpha_pattern": {r"model\.layers\.0\.mlp\..*": 3},
    },
    "vocabulary": {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "expression": {
        "r": 2,
        "lora_alpha": 7,
        "target_modules": r"model\.layers\.\d+\.(mlp\.(gate|down)|self_attn\.k)_proj",
    },
    "chosen-layer": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["k_proj", "up_proj", "gate_proj"],
        "layers_to_transform": [1],
        "exclude_modules": ["gate_proj"],
    },
}


def randomise(module: torch.nn.Module, seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in sorted(module.named_parameters()):
            if param.requires_grad:
                noise = torch.randn(param.shape, generator=draw)
                param.copy_(1 + 0.1 * noise if "norm" in name else noise * scale * param.shape[-1] ** -0.5)


def base_model() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).float().eval()
    randomise(model, 1, 1.0)
    return model


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    base_model().save_pretrained(GOLDEN / "base")
    ids = torch.randint(0, SIZES["vocab_size"], (12,), generator=torch.Generator().manual_seed(2))
    for seed, (name, settings) in enumerate(CASES.items()):
        config = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="tiny", **settings)
        model = peft.get_peft_model(base_model(), config)
        randomise(model, 10 + seed, 1.0)  # the adapter's matrices alone require gradients
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
            with model.disable_adapter():
                assert (model(ids[None]).logits[0] - logits).abs().max() > 0.1
        folder = GOLDEN / name
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink()
        save_file({"ids": ids, "logits": logits.contiguous()}, folder / "logits.safetensors")
        settings_file = folder / "adapter_config.json"
        written = json.loads(settings_file.read_text())
        written["base_model_name_or_path"] = "tiny"
        settings_file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
