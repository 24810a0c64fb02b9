"""Measure how long a plan takes for big models whose type has no page: config and headers, in files full of holes.

    python benchmarks/generic_plan.py [--types exaone4 seed_oss glm4_moe]

For each type the script writes the header of a checkpoint with transformers' own names and shapes (70 billion weights;
glm4_moe: 353 billion, 43,913 tensors) and plans it three times. It prints the fastest plan, and the CPU seconds of the
imports that come before the first one.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DENSE = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128000,
}
TYPES = {
    "exaone4": DENSE | {"head_dim": 128, "sliding_window": 4096, "sliding_window_pattern": 4},
    "seed_oss": DENSE | {"head_dim": 128},
    "glm4_moe": DENSE
    | {
        "num_hidden_layers": 92,
        "hidden_size": 5120,
        "num_attention_heads": 96,
        "head_dim": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "first_k_dense_replace": 3,
    },
}
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
IMPORTS = """
import time, pymllm.api
import transformers.modeling_utils, transformers.conversion_mapping
from transformers.models.auto import modeling_auto
print(time.process_time())
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", choices=sorted(TYPES), default=sorted(TYPES))
    imports = float(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, check=True).stdout)
    print(f"imports: {imports:.1f} CPU seconds")
    for model_type in parser.parse_args().types:
        with tempfile.TemporaryDirectory() as folder:
            tensors = write_headers(Path(folder), model_type)
            measure(model_type, folder, tensors)


def write_headers(folder: Path, model_type: str) -> int:
    """Write a checkpoint without data.  Returns the number of its tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(model_type, **TYPES[model_type], dtype="bfloat16")
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        experts, _, last = name.rpartition(".")
        if not experts.endswith(".experts") or last not in PARTS:
            shapes[name] = tuple(tensor.shape)
            continue
        rows = tensor.shape[1] // len(PARTS[last])
        for expert in range(tensor.shape[0]):
            for part in PARTS[last]:
                shapes[f"{experts}.{expert}.{part}.weight"] = (rows, tensor.shape[2])
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return len(shapes)


def measure(model_type: str, folder: str, tensors: int) -> None:
    """Plan three times, and print the fastest."""
    from pymllm.planning.make_plan import plan

    best = (float("inf"), float("inf"))
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        plan(folder, device="cpu")
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    print(f"{model_type}: {tensors} tensors, plan {best[0]:.2f} s, {best[1]:.2f} CPU seconds")


if __name__ == "__main__":
    main()
