"""What loading costs: no more than the packed weights and about a layer; and `import pymllm` costs nothing."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest

from pymllm.kernels.native import extension
from pymllm.weights import memory

from ..checkpoints import AWQ, SIZES
from ..processes import python

# The claim is about 1 GB: PYMLLM_TEST_CHECKPOINT_MB=1000 measures just that.
MEGABYTES = int(os.environ.get("PYMLLM_TEST_CHECKPOINT_MB", "300"))
# Beside the weights: the modules of the model, report and plan, what torch's operators allocate on first use, and what
# the C library keeps of what was freed: 45 MB here, at 300 MB and at 1 GB alike.
CONSTANT = 48 << 20 if MEGABYTES < 1000 else 0


def write_large_awq(folder, megabytes, hidden=2048, intermediate=5632, vocab=4096, group=128):
    """A Llama whose codes are holes in a sparse file (zeros), and whose scales are one."""
    half = b"\x00\x3c"  # 1.0 as float16
    layer = {}
    for name, inputs, outputs in (
        *((f"self_attn.{part}_proj", hidden, hidden) for part in "qkvo"),
        ("mlp.gate_proj", hidden, intermediate),
        ("mlp.up_proj", hidden, intermediate),
        ("mlp.down_proj", intermediate, hidden),
    ):
        layer[f"{name}.qweight"] = ("I32", [inputs, outputs // 8], None)
        layer[f"{name}.qzeros"] = ("I32", [inputs // group, outputs // 8], None)
        layer[f"{name}.scales"] = ("F16", [inputs // group, outputs], half)
    layer["input_layernorm.weight"] = layer["post_attention_layernorm.weight"] = ("F16", [hidden], half)

    def nbytes(dtype, shape):
        count = {"I32": 4, "F16": 2}[dtype]
        for side in shape:
            count *= side
        return count

    layers = round(megabytes * 1e6 / sum(nbytes(dtype, shape) for dtype, shape, _ in layer.values()))
    tensors = {"model.embed_tokens.weight": ("F16", [vocab, hidden], half)}
    for index in range(layers):
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    tensors |= {
        "model.norm.weight": ("F16", [hidden], half),
        "lm_head.weight": ("F16", [vocab, hidden], half),
    }
    header, position = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        end = position + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for name, (_, _, fill) in tensors.items():
            first, end = header[name]["data_offsets"]
            if fill is not None:
                file.seek(start + first)
                file.write(fill * ((end - first) // len(fill)))
        file.truncate(start + position)
    config = SIZES | {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "head_dim": 128,
        "vocab_size": vocab,
        "dtype": "float16",
        "quantization_config": AWQ(group).config(()),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return position


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_while_loading_is_the_packed_model_and_a_little(tmp_path):
    stored = write_large_awq(tmp_path / "m", MEGABYTES)
    script = Path(__file__).with_name("load_measured.py")
    done = python(script, tmp_path / "m", check=True, OMP_NUM_THREADS="1")
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["read"] == stored
    # Packed weights have their own layout; embedding and head stay float16 where a native kernel widens them.
    assert stored <= sizes["final"] <= (1.1 if extension.native_available() else 1.35) * stored
    assert sizes["peak"] <= 1.15 * sizes["final"] + CONSTANT
    assert sizes["resident"] <= sizes["final"] + (64 << 20), "what loading used is given back"


@pytest.mark.skipif(memory._malloc_trim() is None, reason="glibc alone maps large blocks one by one")
def test_what_one_step_of_loading_frees_serves_the_next():
    code = """
import resource, torch
from pymllm.weights.memory import keep_freed_memory, return_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(1 << 20, dtype=torch.uint8).fill_(1) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
print(*[faults() for _ in range(4)])
return_freed_memory()
print(faults())
"""
    done = python("-c", code, check=True, OMP_NUM_THREADS="1")
    first, *again, returned = map(int, done.stdout.split())
    assert sum(again) < first, "the same pages serve"
    assert returned > first / 2, "which are the system's once they are returned"


HEAVY = ("torch", "transformers", "numpy", "safetensors", "triton", "fastapi")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pymllm; assert pymllm.__version__; print(*sys.modules)"
    done = python("-c", code, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


def test_every_name_of_the_front_door_is_there():
    code = "import pymllm; print([name for name in pymllm.__all__ if getattr(pymllm, name, None) is None])"
    assert python("-c", code, check=True).stdout.strip() == "[]"


def test_loading_needs_no_transformers(tmp_path):
    """Models are ours; transformers is for tokenizers and tests."""
    write_large_awq(tmp_path / "m", 2, hidden=256, intermediate=512, vocab=64)
    code = (
        f"import sys, pymllm; pymllm.load_model({str(tmp_path / 'm')!r}, device='cpu'); print(*sys.modules)"
    )
    done = python("-c", code, check=True)
    assert "transformers" not in done.stdout.split()
