"""Convert the shipped model from every format that we can write to every method that rules know.

    python benchmarks/any_to_any.py [--write]

The shipped model's weights are decoded to floats, and noise of the size of their own rounding is added, so that they
lie on no format's grid. The script writes them once in each source format, then loads each copy with each target method
for all layers of the blocks, and verifies it. An error is the relative distance of all weights, together, from those
floats: of the source format alone, of the target alone, and of the target made from the source. The last must not be
more than the sum of the first two (times 1.05, as a target's error on rounded weights is not quite its error on the
originals). The script prints a table; --write also puts it into results/any_to_any.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pymllm
from pymllm.api import shipped_model
from pymllm.layers.weighted import weighted_layers
from pymllm.quantization.binding import bound_weight

BLOCKS = "model.layers.**"
# Name: the rule, and the format to write where the rule does not imply it.
SOURCES: dict[str, str | tuple[str, str] | None] = {
    "float16": None,
    "awq g128": "awq",
    "awq g64": "awq:group_size=64",
    "ct int4 g32 asym": "int4:group_size=32",
    "ct int4 g128 sym mse": "int4:symmetric=true,scale=mse",
    "ct int8 channel": "int8",
    "ct int8 w8a8": "int8:activations=token",
    "ct fp8 channel": "fp8",
    "ct fp8 tensor": "fp8:granularity=tensor",
    "ct fp8 block": "fp8:granularity=block",
    "ct mxfp4": "mxfp4",
    "ct nvfp4": "nvfp4",
    "modelopt nvfp4": ("nvfp4", "modelopt"),
    "modelopt fp8 channel": ("fp8", "modelopt"),
    "gptq g128": "gptq",
    "gptq 3 bits": "gptq:bits=3,group_size=32",
    "gptq_v2 g64 asym": ("gptq:group_size=64,sym=false", "gptq_v2"),
    "gguf Q4_0": ("gguf:type=Q4_0", "gguf"),
    "gguf Q4_K": ("gguf:type=Q4_K", "gguf"),
    "gguf Q6_K": ("gguf:type=Q6_K", "gguf"),
}
TARGETS = (
    "none",
    "awq",
    "awq:group_size=32,zero_point=false",
    "int4:group_size=64,scale=mse",
    "int4:scale=hqq",
    "int4:group_size=-1,symmetric=true",
    "int8",
    "int8:group_size=32,symmetric=false",
    "fp8",
    "fp8:granularity=tensor",
    "fp8:granularity=block",
    "mxfp4",
    "nvfp4",
    "gptq",
    "gptq:bits=3,group_size=32",
    "gguf:type=Q4_K",
    "gguf:type=Q5_0",
    "gguf:type=Q6_K",
)


def weights_of(folder: Path, rules: list[str]) -> tuple[dict[str, Tensor], bool]:
    """Return every weight of the blocks that runs, by name, and whether all kernels verify."""
    model = pymllm.load_model(folder, rules, progress=False)
    found = {}
    for layer in weighted_layers(model):
        for weight in layer.held():
            if ".layers." in weight.shape.name:
                found[weight.shape.name] = (
                    bound_weight(weight.packed_in).canonical().dequantize(torch.float32)
                )
    return found, pymllm.verify(model).ok


def add_noise(file: Path) -> None:
    """Add noise of a twentieth of each row's standard deviation, which is about what int4 rounds."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for name in sorted(tensors):
        if "_proj." in name:
            weight = tensors[name].float()
            noise = torch.randn(weight.shape, generator=generator) * weight.std(1, keepdim=True) / 20
            tensors[name] = (weight + noise).half()
    save_file(tensors, file, {"format": "pt"})


def joined(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def distance(weights: dict[str, Tensor], original: Tensor) -> float:
    return float((joined(weights) - original).norm() / original.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        floats = Path(scratch) / "floats"
        pymllm.quantize_checkpoint(shipped_model(), floats, [f"{BLOCKS}=none"])
        add_noise(floats / "model.safetensors")
        original = joined(weights_of(floats, [])[0])
        alone = {t: distance(weights_of(floats, [f"{BLOCKS}={t}"])[0], original) for t in TARGETS}
        lines = [
            "| source \\ target | its own error | " + " | ".join(TARGETS) + " |",
            "| --- | --- | " + " | ".join("---" for _ in TARGETS) + " |",
            "| (the target's own error) | | " + " | ".join(f"{alone[t]:.4f}" for t in TARGETS) + " |",
        ]
        for name, rule in SOURCES.items():
            folder = floats
            if rule is not None:
                method, format = (rule, "auto") if isinstance(rule, str) else rule
                folder = Path(scratch) / (name.replace(" ", "-") + (".gguf" if format == "gguf" else ""))
                pymllm.quantize_checkpoint(floats, folder, [f"{BLOCKS}={method}"], format=format)
            source = distance(weights_of(folder, [])[0], original)
            cells = []
            for target in TARGETS:
                weights, ok = weights_of(folder, [f"{BLOCKS}={target}"])
                error = distance(weights, original)
                within = ok and error <= 1.05 * (source + alone[target]) + 1e-6
                cells.append(f"{error:.4f}" + ("" if within else " **!**"))
                if not within:
                    bad.append(f"{name} -> {target}: {error:.4f}, kernels {'ok' if ok else 'FAIL'}")
            lines.append(f"| {name} | {source:.4f} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    pairs = len(SOURCES) * len(TARGETS)
    verdict = f"{pairs - len(bad)} of {pairs} pairs load, verify, and err no more than both formats do."
    print("\n".join([*lines[:3], verdict, *bad]))
    if args.write:
        intro = (__doc__ or "").split("\n\n")[0]
        page = Path(__file__).parent / "results" / "any_to_any.md"
        page.write_text(
            f"# Any format to any method\n\n{intro}\n`python benchmarks/any_to_any.py --write`\n\n"
        )
        with page.open("a") as file:
            file.write("\n".join([*lines, "", verdict, *bad]) + "\n")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
