"""Quantise a float Llama checkpoint to AWQ int4 (the layout of AutoAWQ's GEMM version) and measure the loss.

    python examples/quantize_tiny_model.py --model tiny-model --out pymllm/shipped_model

Two searches of pymllm.quantization.rounding.awq minimise output errors on calibration text.  The first finds a scale
for each input channel, folded into the operation before; the second finds how far each group's range may be clipped.
Then every linear layer of the blocks is rounded to nearest.  Embedding and norms stay float16.

AWQ: Lin et al. 2023, "Activation-aware Weight Quantization", https://arxiv.org/abs/2306.00978.
Shapes: N calibration tokens, I in_features, O out_features, G group_size.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_tiny_model import (
    END_OF_TEXT,
    SHORT_CONTEXT,
    encode_stream,
    held_out_report,
    library_root,
    read_library,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pymllm.kernels.canonical import IntWeight
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.rounding.awq import grams_of, round_with_clipping, search_scales
from pymllm.weights.spec import LinearShape, Span

GROUP_SIZE = 128
QUANTIZATION_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}


def round_to_nearest(weight: Tensor) -> IntWeight:
    """Quantise weight [O, I] by groups."""
    return IntWeight.from_float(weight, bits=4, group_size=GROUP_SIZE, symmetric=False)


def stored(name: str, weight: IntWeight) -> dict[str, Tensor]:
    """Return the three tensors that a checkpoint has of layer `name`."""
    out_features, in_features = weight.shape
    shape = LinearShape(Span.full(in_features), (Span.full(out_features),), (name,), torch.float16)
    tensors = AWQLinearMethod(GROUP_SIZE).to_stored(weight, shape)
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def record_calls(
    model: LlamaForCausalLM, modules: list[nn.Module], batch: dict[str, Tensor]
) -> list[tuple[tuple, dict]]:
    """Run batch, what the model's forward takes, through model; return each module's (args, kwargs)."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[module] = (args, kwargs)

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    model.model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [calls[module] for module in modules]


def output_of(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """Return the first output of module; attention blocks return a tuple."""
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def fold_best_scales(
    model: LlamaForCausalLM,
    previous: nn.Module,
    linears: list[nn.Linear],
    block: nn.Module,
    batch: dict[str, Tensor],
) -> None:
    """Fold into previous the scales of the linears' shared input that disturb block's output least."""
    (args, kwargs), ((inputs,), _) = record_calls(model, [block, linears[0]], batch)
    best = search_scales(
        [linear.weight for linear in linears],
        inputs.flatten(0, 1),
        lambda: output_of(block, args, kwargs),
        [lambda weight: round_to_nearest(weight).dequantize(torch.float32)] * len(linears),
        GROUP_SIZE,
    )
    for linear in linears:
        linear.weight.mul_(best)
    previous.weight.div_(best.view(-1, *[1] * (previous.weight.ndim - 1)))


def round_with_best_clipping(weight: Tensor, inputs: Tensor) -> IntWeight:
    """Quantise weight [O, I], with each group's range shrunk to where its error on inputs [N, I] is least."""
    grams = grams_of(inputs, GROUP_SIZE)
    return round_with_clipping(weight, grams, bits=4, group_size=GROUP_SIZE, symmetric=False)


@torch.no_grad()
def quantize_awq(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[str, IntWeight]:
    """Quantise the blocks of model in place, first to last, so that each is fitted to errors before it.

    batch: the calibration text, as the model's forward takes it: `input_ids` [windows, context], and masks if any.
    """
    quantized = {}
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        # o_proj has no such fold: under grouped-query attention v_proj has fewer outputs than o_proj inputs.
        queries_keys_values = [attention.q_proj, attention.k_proj, attention.v_proj]
        fold_best_scales(model, layer.input_layernorm, queries_keys_values, attention, batch)
        fold_best_scales(model, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], mlp, batch)
        fold_best_scales(model, mlp.up_proj, [mlp.down_proj], mlp.down_proj, batch)
        for name, linear in named_linears(layer):
            [((inputs,), _)] = record_calls(model, [linear], batch)
            weight = round_with_best_clipping(linear.weight, inputs.flatten(0, 1))
            linear.weight.copy_(weight.dequantize(torch.float32))
            quantized[f"model.layers.{index}.{name}"] = weight
        print(f"layer {index} done", flush=True)
    return quantized


@torch.no_grad()
def quantize_plainly(model: LlamaForCausalLM) -> dict[str, IntWeight]:
    """Round each linear of the blocks to nearest, without any search."""
    return {name: round_to_nearest(linear.weight) for name, linear in named_linears(model.model, "model")}


def named_linears(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Linear]]:
    return [
        (name, child) for name, child in module.named_modules(prefix=prefix) if isinstance(child, nn.Linear)
    ]


def save_tensors(
    folder: Path, model: LlamaForCausalLM, quantized: dict[str, IntWeight], others: dict[str, Tensor]
) -> None:
    """Write the weights, and others as they are; all but the linears in `quantized` are stored as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = others | {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" and name.removesuffix(".weight") not in quantized
    }
    for name, weight in quantized.items():
        tensors |= stored(name, weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_checkpoint(folder: Path, model: LlamaForCausalLM, quantized: dict[str, IntWeight]) -> None:
    """Write weights and configs."""
    save_tensors(folder, model, quantized, {})
    config = model.config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "torch_dtype": "float16",  # the spelling before transformers 4.56
        "quantization_config": QUANTIZATION_CONFIG,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.generation_config.save_pretrained(folder)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokenizer so that transformers 4 reads it too, by its class name and template in its config."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for how_it_was_loaded in ("is_local", "local_files_only"):
        settings.pop(how_it_was_loaded, None)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template)


def dequantized_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint written by save_tensors, AWQ's expanded to float32 weights."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        words = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in ("qweight", "qzeros", "scales")}
        weight = AWQLinearMethod(GROUP_SIZE).to_canonical(words, None)
        tensors[f"{name}.weight"] = weight.dequantize(torch.float32)
    return tensors


def load_dequantized(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint written by save_checkpoint as a float32 model."""
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    config.dtype = torch.float32
    tensors = dequantized_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(tensors)
    return model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=Path("tiny-model"), help="folder of the float checkpoint"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-model-awq"), help="folder for the int4 checkpoint"
    )
    parser.add_argument(
        "--calibration-windows", type=int, default=16, help=f"windows of {SHORT_CONTEXT} tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = read_library(library_root())

    stream = encode_stream(tokenizer, [END_OF_TEXT + text for text in texts["library"].values()])
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(len(stream) - SHORT_CONTEXT, (args.calibration_windows,), generator=generator)
    calibration = torch.stack([stream[start : start + SHORT_CONTEXT] for start in starts.tolist()])

    report = {"float32": held_out_report(model, tokenizer, texts["held_out"], SHORT_CONTEXT)}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), model, quantize_plainly(model))
        plain = load_dequantized(Path(folder))
    report["int4 round to nearest"] = held_out_report(plain, tokenizer, texts["held_out"], SHORT_CONTEXT)
    save_checkpoint(args.out, model, quantize_awq(model, {"input_ids": calibration}))
    save_tokenizer(args.out, tokenizer)
    report["int4 AWQ"] = held_out_report(
        load_dequantized(args.out), tokenizer, texts["held_out"], SHORT_CONTEXT
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
