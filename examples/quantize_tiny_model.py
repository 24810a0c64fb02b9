"""Quantise a float Llama checkpoint to AWQ int4 (the layout of AutoAWQ's GEMM version) and measure the loss.

    python examples/quantize_tiny_model.py --model tiny-model --out pymllm/shipped_model

Two searches minimise output errors on calibration text.  The first finds a scale for each input channel,
folded into the operation before; the second finds how far each group's range may be clipped.  Then every
linear layer of the blocks is rounded to nearest.  Embedding and norms stay float16.

AWQ: Lin et al. 2023, "Activation-aware Weight Quantization", https://arxiv.org/abs/2306.00978.
Shapes: N calibration tokens, I in_features, O out_features, G group_size.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass
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

GROUP_SIZE = 128
MAX_CODE = 15
# Nibble i of a word, from the low end, holds this column of the word's eight.
NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
QUANTIZATION_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}
SCALE_EXPONENTS = [step / 10 for step in range(11)]
RANGE_FACTORS = [1.0 - step / 16 for step in range(6)]


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as int4: its value is (codes - zeros) * scales."""

    codes: Tensor  # [O, I/G, G] float, whole numbers 0..15
    zeros: Tensor  # [O, I/G, 1] float, whole numbers 0..15
    scales: Tensor  # [O, I/G, 1] float, exact in float16

    def dequantize(self) -> Tensor:
        """The weight [O, I]."""
        return ((self.codes - self.zeros) * self.scales).flatten(1)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The checkpoint's three tensors of layer `name`."""
        return {
            f"{name}.qweight": pack_nibbles(self.codes.flatten(1).T),  # [I, O/8] int32
            f"{name}.qzeros": pack_nibbles(self.zeros.squeeze(2).T),  # [I/G, O/8] int32
            f"{name}.scales": self.scales.squeeze(2).T.half().contiguous(),  # [I/G, O]
        }


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes [rows, O], whole numbers 0..15, into int32 words [rows, O/8] in NIBBLE_COLUMNS order."""
    nibbles = codes.long().unflatten(1, (-1, 8))[..., list(NIBBLE_COLUMNS)]
    return (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def unpack_nibbles(words: Tensor) -> Tensor:
    """The inverse of pack_nibbles: words [rows, O/8] int32 to codes [rows, O]."""
    nibbles = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & MAX_CODE
    codes = torch.empty_like(nibbles)
    codes[..., list(NIBBLE_COLUMNS)] = nibbles
    return codes.flatten(1)


def round_to_nearest(
    weight: Tensor, low_factor: Tensor | float = 1.0, high_factor: Tensor | float = 1.0
) -> QuantizedWeight:
    """Quantise weight [O, I] by groups; the factors, numbers or [O, I/G, 1], shrink each group's range."""
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low = groups.amin(-1, keepdim=True).clamp(max=0) * low_factor
    high = groups.amax(-1, keepdim=True).clamp(min=0) * high_factor
    # 1e-5 keeps the scale of a group of zeros above float16's smallest step.
    scales = ((high - low) / MAX_CODE).clamp(min=1e-5).half().float()
    zeros = (-low / scales).round().clamp(0, MAX_CODE)
    codes = ((groups / scales).round() + zeros).clamp(0, MAX_CODE)
    return QuantizedWeight(codes, zeros, scales)


def record_calls(
    model: LlamaForCausalLM, modules: list[nn.Module], tokens: Tensor
) -> list[tuple[tuple, dict]]:
    """Run tokens [windows, context] through model; return each module's (args, kwargs)."""
    calls: dict[nn.Module, tuple[tuple, dict]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[module] = (args, kwargs)

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    model.model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return [calls[module] for module in modules]


def output_of(module: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """The first output of module; attention blocks return a tuple."""
    output = module(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def candidate_scales(inputs: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Scales [I] to try for inputs [N, I] and weights [O, I]: a^x and a^x / w^(1 - x), x in SCALE_EXPONENTS.

    a is a channel's mean magnitude; w its mean share of the largest weight of its group.  a^0 is no scaling.
    """
    activity = inputs.abs().mean(0).clamp(min=1e-4)
    groups = torch.cat(weights).abs().unflatten(1, (-1, GROUP_SIZE))
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(1).mean(0).clamp(min=1e-4)
    candidates = [activity**x for x in SCALE_EXPONENTS] + [
        activity**x / share ** (1 - x) for x in SCALE_EXPONENTS
    ]
    return [scales / (scales.max() * scales.min()).sqrt() for scales in candidates]


def fold_best_scales(
    model: LlamaForCausalLM, previous: nn.Module, linears: list[nn.Linear], block: nn.Module, tokens: Tensor
) -> None:
    """Fold into previous the scales of the linears' shared input that disturb block's output least."""
    (args, kwargs), ((inputs,), _) = record_calls(model, [block, linears[0]], tokens)
    originals = [linear.weight.clone() for linear in linears]
    reference = output_of(block, args, kwargs)

    def error_with(scales: Tensor) -> float:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.copy_(round_to_nearest(original * scales).dequantize() / scales)
        return float((output_of(block, args, kwargs) - reference).square().mean())

    best = min(candidate_scales(inputs.flatten(0, 1), originals), key=error_with)
    for linear, original in zip(linears, originals, strict=True):
        linear.weight.copy_(original * best)
    previous.weight.div_(best.view(-1, *[1] * (previous.weight.ndim - 1)))


def round_with_best_clipping(weight: Tensor, inputs: Tensor) -> QuantizedWeight:
    """Quantise weight [O, I]; each group's range is shrunk to where its error on inputs [N, I] is least."""
    groups = inputs.unflatten(1, (-1, GROUP_SIZE)).transpose(0, 1)  # [I/G, N, G]
    gram = groups.transpose(1, 2) @ groups  # [I/G, G, G]
    least_error = torch.full((weight.shape[0], gram.shape[0], 1), torch.inf)
    best_low, best_high = torch.ones_like(least_error), torch.ones_like(least_error)
    for low_factor, high_factor in itertools.product(RANGE_FACTORS, repeat=2):
        quantized = round_to_nearest(weight, low_factor, high_factor)
        change = (
            (quantized.dequantize() - weight).unflatten(1, (-1, GROUP_SIZE)).transpose(0, 1)
        )  # [I/G, O, G]
        error = ((change @ gram) * change).sum(-1).T.unsqueeze(-1)
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        best_low[better], best_high[better] = low_factor, high_factor
    return round_to_nearest(weight, best_low, best_high)


@torch.no_grad()
def quantize_awq(model: LlamaForCausalLM, tokens: Tensor) -> dict[str, QuantizedWeight]:
    """Quantise the blocks of model in place, first to last, so that each is fitted to errors before it."""
    quantized = {}
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        # o_proj has no such fold: under grouped-query attention v_proj has fewer outputs than o_proj inputs.
        queries_keys_values = [attention.q_proj, attention.k_proj, attention.v_proj]
        fold_best_scales(model, layer.input_layernorm, queries_keys_values, attention, tokens)
        fold_best_scales(model, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], mlp, tokens)
        fold_best_scales(model, mlp.up_proj, [mlp.down_proj], mlp.down_proj, tokens)
        for name, linear in named_linears(layer):
            [((inputs,), _)] = record_calls(model, [linear], tokens)
            weight = round_with_best_clipping(linear.weight, inputs.flatten(0, 1))
            linear.weight.copy_(weight.dequantize())
            quantized[f"model.layers.{index}.{name}"] = weight
        print(f"layer {index} done", flush=True)
    return quantized


@torch.no_grad()
def quantize_plainly(model: LlamaForCausalLM) -> dict[str, QuantizedWeight]:
    """Round each linear of the blocks to nearest, without any search."""
    return {name: round_to_nearest(linear.weight) for name, linear in named_linears(model.model, "model")}


def named_linears(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Linear]]:
    return [
        (name, child) for name, child in module.named_modules(prefix=prefix) if isinstance(child, nn.Linear)
    ]


def save_checkpoint(folder: Path, model: LlamaForCausalLM, quantized: dict[str, QuantizedWeight]) -> None:
    """Write weights and configs; all but the linears in `quantized` are stored as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" and name.removesuffix(".weight") not in quantized
    }
    for name, weight in quantized.items():
        tensors |= weight.tensors(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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


def load_dequantized(folder: Path) -> LlamaForCausalLM:
    """Load a checkpoint written by save_checkpoint as a float32 model."""
    config = LlamaConfig.from_pretrained(folder)
    del config.quantization_config
    config.dtype = torch.float32
    tensors = load_file(folder / "model.safetensors")
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        codes = unpack_nibbles(tensors.pop(f"{name}.qweight"))  # [I, O]
        zeros = unpack_nibbles(tensors.pop(f"{name}.qzeros")).repeat_interleave(GROUP_SIZE, 0)
        scales = tensors.pop(f"{name}.scales").float().repeat_interleave(GROUP_SIZE, 0)
        tensors[f"{name}.weight"] = ((codes - zeros) * scales).T
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
    save_checkpoint(args.out, model, quantize_awq(model, calibration))
    save_tokenizer(args.out, tokenizer)
    report["int4 AWQ"] = held_out_report(
        load_dequantized(args.out), tokenizer, texts["held_out"], SHORT_CONTEXT
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
