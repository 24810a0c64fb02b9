"""Read what `pymllm quantize` writes with other programs' own libraries, and compare every weight, or the answers.

    python benchmarks/written_elsewhere.py write FOLDER         with pymllm: the shipped model in many spellings
    python benchmarks/written_elsewhere.py gptqmodel FOLDER     where GPTQModel is installed
    python benchmarks/written_elsewhere.py auto_round FOLDER    where AutoRound is installed
    python benchmarks/written_elsewhere.py modelopt FOLDER      where ModelOpt is installed
    python benchmarks/written_elsewhere.py llama_cpp FOLDER     where xllamacpp (llama.cpp) is installed

Each spelling lies in FOLDER/NAME, beside FOLDER/NAME.pt: the weights that pymllm decodes, and greedy answers to a few
prompts. The readers need no pymllm, so that each can have an environment of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

BLOCKS = "**.layers.**"
# Name: rules and format.
GPTQ = {
    "gptq": ([f"{BLOCKS}=gptq"], "gptq"),
    "gptq-row-8": ([f"{BLOCKS}=gptq:bits=8,group_size=-1"], "gptq"),
    "gptq-asym": ([f"{BLOCKS}=gptq:group_size=64,sym=false"], "gptq"),
    "gptq-v2-asym": ([f"{BLOCKS}=gptq:group_size=64,sym=false"], "gptq_v2"),
    "gptq-mixed": (
        [
            "model.layers.0.mlp.**=none",
            "**.mlp.down_proj=gptq:bits=8,group_size=32",
            "**.self_attn.**=gptq:bits=3,group_size=-1",
            "**.mlp.**=gptq:bits=2,group_size=32,sym=false",
            "lm_head=gptq:group_size=64",
        ],
        "gptq_v2",
    ),
}
MODELOPT = {
    "modelopt-nvfp4": ([f"{BLOCKS}=nvfp4"], "modelopt"),
}
GGUF = {
    "f16.gguf": (["**=none"], "gguf"),
    "q8_0.gguf": (["**=gguf:type=Q8_0"], "gguf"),
    "q4_k.gguf": (
        ["lm_head=gguf:type=Q6_K", "model.embed_tokens=gguf:type=Q6_K", "**=gguf:type=Q4_K"],
        "gguf",
    ),
    "mixed.gguf": (["**.mlp.**=gguf:type=Q5_K", f"{BLOCKS}=gguf:type=Q4_0", "**=gguf:type=Q3_K"], "gguf"),
}
PROMPTS = (
    "def add(a, b):\n    return a + b\n\n\ndef mul(a, b):",
    "import os\n\n\nclass A:",
    "for i in range(10):\n",
)
TOKENS = 24


def write(folder: Path) -> None:
    """Write the shipped model in every spelling, and what pymllm makes of each."""
    import pymllm
    from pymllm.api import shipped_model
    from pymllm.layers.weighted import weighted_layers
    from pymllm.quantization.binding import bound_weight

    for name, (rules, format) in {**GPTQ, **MODELOPT, **GGUF}.items():
        pymllm.quantize_checkpoint(shipped_model(), folder / name, rules, format=format)
        # The numbers that the file means, and the answers of exact arithmetic.
        llm = pymllm.LLM(folder / name, dtype="float32", compute="exact", progress=False)
        weights = {}
        for layer in weighted_layers(llm.model):
            for held in layer.held():
                bound = bound_weight(held.packed_in)
                spans = [span.size for span in held.shape.outputs]
                for part, rows in zip(
                    held.shape.parts, bound.canonical().dequantize(torch.float32).split(spans), strict=True
                ):
                    weights[part] = rows
        sampling = pymllm.SamplingParams(max_tokens=TOKENS, temperature=0.0)
        answers = [answer.text for answer in llm.generate(list(PROMPTS), sampling)]
        torch.save({"weights": weights, "answers": answers}, folder / f"{name}.pt")
        print(f"{name}: written")


def gptqmodel(folder: Path) -> None:
    """Load with GPTQModel and compare what its layers dequantise to."""
    from gptqmodel import BACKEND, GPTQModel

    for name in GPTQ:
        try:
            model = GPTQModel.load(
                str(folder / name), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
            )
        except Exception as error:
            print(f"{name}: not loaded: {error}")
            continue
        found = {
            layer: module.dequantize_weight().t()
            for layer, module in model.model.named_modules()
            if hasattr(module, "qweight")
        }
        compare(name, found, folder, 2e-3)


def auto_round(folder: Path) -> None:
    """Load with transformers, which hands the layers to AutoRound, and compare by products with unit vectors."""
    import transformers
    from transformers import AutoRoundConfig

    # It converts gptq, not gptq_v2, and has no kernel for zero points on a CPU.
    for name in ("gptq", "gptq-row-8"):
        config = AutoRoundConfig(backend="torch")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float16, quantization_config=config
        )
        found = {}
        for layer, module in model.named_modules():
            if hasattr(module, "qweight"):
                inputs = torch.eye(module.infeatures, dtype=torch.float16)
                with torch.no_grad():
                    found[layer] = module(inputs).t()
        compare(name, found, folder, 2e-3)


def modelopt(folder: Path) -> None:
    """Dequantise with ModelOpt's own NVFP4 tensor and compare."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import load_file

    for name in MODELOPT:
        tensors = load_file(folder / name / "model.safetensors")
        found = {}
        for key, weight in tensors.items():
            if weight.dtype is torch.uint8:
                layer = key.removesuffix(".weight")
                shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
                found[layer] = NVFP4QTensor(shape, torch.float32, weight).dequantize(
                    dtype=torch.float32,
                    scale=tensors[f"{layer}.weight_scale"],
                    double_scale=tensors[f"{layer}.weight_scale_2"],
                    block_sizes={-1: 16},
                )
        compare(name, found, folder, 1e-6)


def compare(name: str, found: dict[str, torch.Tensor], folder: Path, tolerance: float) -> None:
    """Compare weights with pymllm's, and print the worst.  tolerance: relative to a layer's largest weight."""
    expected = torch.load(folder / f"{name}.pt")["weights"]
    worst = 0.0
    for layer, weight in found.items():
        ours = expected[layer]
        worst = max(worst, float((weight.float() - ours).abs().max() / ours.abs().max()))
    print(f"{name}: {len(found)} layers, the largest difference {worst:.2e} of a layer's largest weight")
    if not found or worst > tolerance:
        raise SystemExit(f"{name}: other weights")


def llama_cpp(folder: Path) -> None:
    """Run llama.cpp's server over the GGUF files, and compare its greedy answers with pymllm's."""
    import xllamacpp

    for name in GGUF:
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / name)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.verbosity = 512, 1, 2, 0
        server = xllamacpp.Server(params)
        expected, same = torch.load(folder / f"{name}.pt")["answers"], 0
        for prompt, ours in zip(PROMPTS, expected, strict=True):
            request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "top_k": 1}
            answer: Any = server.handle_completions(request)
            answer = answer if isinstance(answer, dict) else json.loads(answer)
            text = answer["choices"][0]["text"]
            same += text == ours
            if text != ours:
                print(f"{name}: {text!r}\n   pymllm: {ours!r}")
        print(f"{name}: {same} of {len(PROMPTS)} greedy answers of {TOKENS} tokens are the same")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = {step.__name__: step for step in (write, gptqmodel, auto_round, modelopt, llama_cpp)}
    parser.add_argument("step", choices=list(steps))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    steps[args.step](args.folder)


if __name__ == "__main__":
    main()
