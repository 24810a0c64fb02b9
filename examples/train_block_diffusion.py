"""Train a block-diffusion model from the shipped one: it fills in a block of tokens in fewer forwards than tokens.

    python examples/train_block_diffusion.py --minutes 40 --out tiny-block-model

The result is a checkpoint of model_type `Fast_dLLM_Qwen` (Fast-dLLM v2): Qwen2's names, with q, k and v biases of zero,
are exactly the Llama it starts from. Text and tokenizer are those of train_tiny_model.py; the tokenizer's unused token
`<|pad|>` becomes the mask token.

Training (Arriola et al. 2025, "Block Diffusion", https://arxiv.org/abs/2503.09573; Wu et al. 2025, "Fast-dLLM v2",
https://arxiv.org/abs/2509.26328): a clean copy of a sequence and two noised ones stand side by side. In the first
noised copy each block has masks at a random share of its tokens, in the second at the others. A block sees itself and
the earlier CLEAN blocks. The logits at a position say what stands at the next one, as the shipped model's do; the first
token of a block is never a mask, since decoding takes it from the block before (plain_block_diffusion.py).

The linears are then rounded to AWQ int4 (quantize_tiny_model.py), calibrated on such copies.  With --minutes 0 and
--model the folder of an earlier run, that model is only rounded and measured.

Shapes: R sequences, T tokens of each, B block length, C copies, V vocabulary.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from plain_block_diffusion import (
    autoregressive_loss,
    decoding_report,
    left_to_right_loss,
    predict,
    shifted_left,
    side_by_side,
)
from quantize_tiny_model import (
    QUANTIZATION_CONFIG,
    dequantized_tensors,
    quantize_awq,
    save_tensors,
    save_tokenizer,
)
from torch import Tensor, nn
from train_tiny_model import (
    CHAT_END,
    CHAT_START,
    END_OF_TEXT,
    PAD,
    build_optimizers,
    chats_from_functions,
    cut_after_newlines,
    encode_stream,
    library_root,
    mixed_batches,
    read_library,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHIPPED = Path(__file__).resolve().parent.parent / "pymllm" / "shipped_model"
MODEL_TYPE, ARCHITECTURE = "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM"
MASK = "<|mask|>"
ASSISTANT = f"{CHAT_START}assistant\n"
SHORT_CONTEXT, LONG_CONTEXT = 128, 256  # attention over three copies costs nine times one's
LONG_CONTEXT_FROM = 0.75
WARM_UP_STEPS = 20
MEASURED_CONTEXT = 256  # the left-to-right loss runs a copy for each place of a block
IN_ORDER_SHARE = 0.5
PEAK_RATES = (0.005, 1e-3)  # of Muon and AdamW: a fifth and less of those that trained the shipped model


def draw_noise(fixed: Tensor, block_length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw which tokens are masked in the two noised copies.

    fixed: [R, T] bool, the tokens that are never masked (a prompt's); nor is the first token of a block.
    The number of masks in a block of n tokens that may be masked is uniform in 0..n in the first copy and the rest
    in the second, so the two hold n masks together.  Half of the blocks are noised at random: the copies complement
    each other.  The other half have their masks at the end, as decoding meets them: the copies overlap.
    Returns two tensors [R, T] bool.
    """
    blocks = fixed.view(len(fixed), -1, block_length)
    open_tokens = ~blocks
    open_tokens[..., 0] = False
    count = open_tokens.sum(-1, keepdim=True)
    masks = (torch.rand(count.shape, generator=generator) * (count + 1)).long()
    in_order = torch.rand(count.shape, generator=generator) < IN_ORDER_SHARE
    order = torch.where(
        in_order,
        -torch.arange(block_length, dtype=torch.float32).expand(open_tokens.shape),
        torch.rand(open_tokens.shape, generator=generator),
    )
    rank = order.masked_fill(~open_tokens, math.inf).argsort(-1).argsort(-1)
    first = (rank < masks) & open_tokens
    second = torch.where(in_order, rank < count - masks, rank >= masks) & open_tokens
    return first.flatten(1), second.flatten(1)


def block_diffusion_loss(
    model: LlamaForCausalLM, tokens: Tensor, fixed: Tensor, block_length: int, generator: torch.Generator
) -> Tensor:
    """Compute the mean cross-entropy, in nats, of the masked tokens of tokens [R, T] and of the blocks' first tokens.

    fixed: [R, T] bool, the tokens that are neither masked nor predicted.  The first token of a block is predicted by
    the last of the clean block before it, as decoding does when it commits a block.
    """
    first, second = draw_noise(fixed, block_length, generator)
    begins = torch.zeros_like(fixed)
    begins[:, block_length::block_length] = True
    begins &= ~fixed
    masked = model.config.mask_token_id
    copies = [tokens, tokens.masked_fill(first, masked), tokens.masked_fill(second, masked)]
    wanted = torch.cat([shifted_left(mask) for mask in (begins, first, second)], 1)
    targets = torch.cat([tokens[mask] for mask in (begins, first, second)])
    # `wanted` picks row by row, the targets come copy by copy.
    row = torch.cat([mask.nonzero()[:, 0] for mask in (begins, first, second)])
    logits = predict(model, copies, block_length, wanted)
    return nn.functional.cross_entropy(logits, targets[row.argsort(stable=True)])


def load_llama(folder: Path) -> LlamaForCausalLM:
    """Load a Llama, or a block-diffusion model made from one, as float32; AWQ int4 weights are expanded."""
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("quantization_config", None)
    mask = settings.pop("mask_token_id", None)
    block_length = settings.pop("bd_size", None)
    if "rope_parameters" not in settings:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    config = LlamaConfig.from_dict(settings | {"model_type": "llama"})
    config.mask_token_id, config.bd_size = mask, block_length
    tensors = dequantized_tensors(folder)
    for name in [name for name in tensors if name.endswith("_proj.bias")]:
        if tensors.pop(name).any():
            raise ValueError(f"{folder}: {name} is not zero, so this is not a Llama in Qwen2's names")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(tensors)
    model.generation_config.update(**json.loads((folder / "generation_config.json").read_text()))
    return model


def name_mask(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose unused token PAD is the mask token; it pads with the end of text instead."""
    content = tokenizer.backend_tokenizer.to_str().replace(json.dumps(PAD), json.dumps(MASK))
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(content),
        bos_token=END_OF_TEXT,
        eos_token=CHAT_END,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )


def begin_block_model(
    base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, block_length: int
) -> LlamaForCausalLM:
    """Copy base as a model to be trained for block diffusion; the mask token starts as the mean of all tokens."""
    config = LlamaConfig.from_dict(base.config.to_dict() | {"pad_token_id": tokenizer.pad_token_id})
    config.mask_token_id, config.bd_size = tokenizer.mask_token_id, block_length
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[config.mask_token_id] = embedding.mean(0)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, key, getattr(base.generation_config, key))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def save_block_model(folder: Path, model: LlamaForCausalLM, quantized: dict | None = None) -> None:
    """Write model as a Fast_dLLM_Qwen checkpoint in float16; quantized: the linears to store as AWQ int4."""
    biases = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(layer.self_attn, name).out_features
            biases[f"model.layers.{index}.self_attn.{name}.bias"] = torch.zeros(rows, dtype=torch.float16)
    save_tensors(folder, model, quantized or {}, biases)
    llama = model.config.to_dict()
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "bd_size",
    )  # fmt: skip
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        **{key: llama[key] for key in kept},
        "rope_theta": llama["rope_parameters"]["rope_theta"],
        "use_sliding_window": False,
        "torch_dtype": "float16",
    }
    if quantized:
        config["quantization_config"] = QUANTIZATION_CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "pad_token_id")}
    generation |= {"eos_token_id": model.generation_config.eos_token_id, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def encode_with_prompts(tokenizer: PreTrainedTokenizerFast, pieces: list[str], prompts: list[bool]) -> Tensor:
    """Encode pieces one after another.  Returns [tokens, 2] int64: the ids, and 1 where the piece is a prompt."""
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces)
    rows = [(i, int(prompt)) for item, prompt in zip(encoded, prompts, strict=True) for i in item.ids]
    return torch.tensor(rows)


def build_streams(
    tokenizer: PreTrainedTokenizerFast, texts: dict[str, dict[str, str]], seed: int
) -> dict[str, Tensor]:
    """Encode the three streams of train_tiny_model.py, each [tokens, 2]; what a chat's user says is a prompt."""
    rng = random.Random(seed)
    chats = [chat for text in texts["library"].values() for chat in chats_from_functions(text, rng)]
    rng.shuffle(chats)
    streams = {}
    for name in ("library", "tests"):
        pieces = [p for text in texts[name].values() for p in cut_after_newlines(END_OF_TEXT + text, rng)]
        streams[name] = encode_with_prompts(tokenizer, pieces, [False] * len(pieces))
    turns = [part for chat in chats for part in split_chat(chat)]
    streams["chats"] = encode_with_prompts(tokenizer, turns, [True, False] * len(chats))
    return streams


def split_chat(chat: str) -> tuple[str, str]:
    """Split a chat of one question into what the model is given, up to `assistant\\n`, and its answer."""
    question, header, answer = chat.partition(ASSISTANT)
    return question + header, answer


def train(model: LlamaForCausalLM, streams: dict[str, Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Train for args.steps, or args.minutes, saving to args.out on the way.  Returns steps, tokens and the loss."""
    generator = torch.Generator().manual_seed(args.seed)
    short_batches, long_batches = (
        mixed_batches(streams, args.tokens_a_step, context - 1, args.seed)
        for context in (SHORT_CONTEXT, LONG_CONTEXT)
    )
    optimizers = build_optimizers(model)
    budget = args.minutes * 60
    started = saved = time.monotonic()
    step = tokens_seen = 0
    recent_loss = 0.0
    model.train()
    while True:
        elapsed = time.monotonic() - started
        progress = step / args.steps if args.steps else elapsed / budget if budget else 1.0
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, rate in zip(optimizers, PEAK_RATES, strict=True):
            optimizer.param_groups[0]["lr"] = rate * args.rate * factor
        tokens, prompt = next(short_batches if progress < LONG_CONTEXT_FROM else long_batches).unbind(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = block_diffusion_loss(model, tokens, prompt.bool(), model.config.bd_size, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        tokens_seen += tokens.numel()
        recent_loss = loss.item() if step == 1 else 0.95 * recent_loss + 0.05 * loss.item()
        if step % 20 == 0:
            speed = tokens_seen / (time.monotonic() - started)
            line = f"step {step} loss {recent_loss:.3f} {elapsed / 60:.1f} min {speed:.0f} tokens/s"
            print(line, flush=True)
        if time.monotonic() - saved > args.save_minutes * 60:
            save_block_model(args.out, model)
            saved = time.monotonic()
    model.eval()
    return {"steps": step, "tokens_seen": tokens_seen, "training_loss": round(recent_loss, 4)}


def calibration_batch(
    stream: Tensor, windows: int, mask: int, block_length: int, seed: int
) -> dict[str, Tensor]:
    """Draw windows of stream, [tokens, 2], and noise them; return what the model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - LONG_CONTEXT, (windows,), generator=generator)
    tokens = torch.stack([stream[start : start + LONG_CONTEXT, 0] for start in starts.tolist()])
    noise = draw_noise(torch.zeros_like(tokens, dtype=torch.bool), block_length, generator)
    return side_by_side([tokens, *(tokens.masked_fill(masked, mask) for masked in noise)], block_length)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the model to start from")
    parser.add_argument(
        "--out", type=Path, default=Path("tiny-block-model"), help="folder for the checkpoint"
    )
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock budget of the training loop")
    parser.add_argument("--rate", type=float, default=1.0, help="a factor of the learning rates")
    parser.add_argument(
        "--steps", type=int, help="train so many steps instead, so that a rerun ends at the same weights"
    )
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between saved checkpoints")
    parser.add_argument("--block-length", type=int, default=8, help="tokens of a block; divides 128")
    parser.add_argument(
        "--tokens-a-step", type=int, default=1024, help="clean tokens; three times as many are run"
    )
    parser.add_argument(
        "--int4", action=argparse.BooleanOptionalAction, default=True, help="round to AWQ int4 at the end"
    )
    parser.add_argument(
        "--calibration-windows", type=int, default=16, help=f"windows of {LONG_CONTEXT} tokens"
    )
    parser.add_argument(
        "--windows", type=int, default=40, help=f"held-out windows of {MEASURED_CONTEXT} tokens to measure"
    )
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts to decode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast"
    )
    args = parser.parse_args()
    if args.block_length < 2 or SHORT_CONTEXT % args.block_length:
        parser.error(f"--block-length {args.block_length}: expected a divisor of {SHORT_CONTEXT}, at least 2")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = load_llama(args.model)
    if model.config.mask_token_id is None:
        tokenizer = name_mask(tokenizer)
        model = begin_block_model(model, tokenizer, args.block_length)
    block_length = model.config.bd_size
    texts = read_library(library_root())
    streams = build_streams(tokenizer, texts, args.seed)
    for name, stream in streams.items():
        print(f"{name}: {len(stream)} tokens", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(args.out, tokenizer)

    report: dict[str, object] = train(model, streams, args)
    save_block_model(args.out, model)
    base = load_llama(SHIPPED)
    held_out = encode_stream(tokenizer, [END_OF_TEXT + text for text in texts["held_out"].values()])
    windows = held_out[: len(held_out) // MEASURED_CONTEXT * MEASURED_CONTEXT].view(-1, MEASURED_CONTEXT)
    windows = windows[:: max(1, len(windows) // args.windows)][: args.windows]
    report["held_out_nats"] = {
        "autoregressive": round(autoregressive_loss(base, windows), 4),
        "left_to_right": round(left_to_right_loss(model, windows, block_length), 4),
    }
    if args.int4:
        mask = tokenizer.mask_token_id
        batch = calibration_batch(streams["library"], args.calibration_windows, mask, block_length, args.seed)
        save_block_model(args.out, model, quantize_awq(model, batch))
        model = load_llama(args.out)
        report["held_out_nats"]["left_to_right, int4"] = round(
            left_to_right_loss(model, windows, block_length), 4
        )
    print(json.dumps(report, indent=2), flush=True)
    report["decoding"] = decoding_report(model, base, held_out, args.prompts, block_length)
    (args.out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
