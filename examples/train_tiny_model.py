"""Train the shipped model from scratch on the Python standard library.

    python examples/train_tiny_model.py --minutes 55 --out tiny-model

The text is the running Python's own library (its .py files), so no data is downloaded.  Three streams are
mixed: the library, its test folders at a lower weight, and a few chats made from documented functions.
The modules in HELD_OUT_MODULES, and the tests named after them, are never trained on.

Shapes: B sequences, T tokens of context, V vocabulary.
"""

import argparse
import ast
import json
import math
import random
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# fmt: off
HELD_OUT_MODULES = (
    "bisect.py", "calendar.py", "cmd.py", "code.py", "colorsys.py", "configparser.py", "csv.py",
    "fileinput.py", "fnmatch.py", "fractions.py", "getopt.py", "graphlib.py", "gzip.py", "netrc.py",
    "plistlib.py", "queue.py", "sched.py", "shlex.py", "statistics.py", "textwrap.py", "zipapp.py",
    "concurrent/futures/thread.py", "email/header.py", "http/cookies.py", "json/encoder.py",
    "logging/config.py", "unittest/suite.py", "xml/dom/pulldom.py",
)
# fmt: on

# Tables and generated files: they are large, and no reader would call them code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "encoded_modules", "data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "bad_coding", "badsyntax", "badcert", "python-config")

STREAM_WEIGHTS = {"library": 0.55, "tests": 0.35, "chats": 0.10}

END_OF_TEXT, CHAT_START, CHAT_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 4096
MAX_POSITIONS = 1024
WARM_UP_STEPS = 100
LINES_BETWEEN_CUTS = 12
SHORT_CONTEXT, LONG_CONTEXT = 512, MAX_POSITIONS

# The share of the time budget after which windows are long; they cost a third more time a token.
LONG_CONTEXT_FROM = 0.8


def library_root() -> Path:
    """Return the folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_library(root: Path) -> dict[str, dict[str, str]]:
    """Read the .py files under root as {"library" | "tests" | "held_out": {relative path: text}}."""
    held_out_tests = {f"test_{Path(module).stem}" for module in HELD_OUT_MODULES}
    texts: dict[str, dict[str, str]] = {"library": {}, "tests": {}, "held_out": {}}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith(SKIPPED_PREFIXES):
            continue
        is_test = bool({"test", "tests", "idle_test"} & set(relative.parts))
        if is_test and held_out_tests & {relative.stem, *relative.parts}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # some test inputs are in other encodings on purpose
            continue
        held_out = relative.as_posix() in HELD_OUT_MODULES
        texts["held_out" if held_out else "tests" if is_test else "library"][relative.as_posix()] = text
    return texts


def format_chat(messages: list[dict[str, str]]) -> str:
    """Write a conversation as CHAT_TEMPLATE does."""
    return "".join(f"{CHAT_START}{m['role']}\n{m['content']}{CHAT_END}\n" for m in messages)


def chats_from_functions(text: str, rng: random.Random) -> Iterator[str]:
    """Make one chat of each documented function in text: a user asks for its name or purpose, its source answers."""
    for node in ast.walk(ast.parse(text)):
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not docstring or node.name.startswith("__"):
            continue
        # ast columns count UTF-8 bytes, but only indentation precedes a def.
        lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
        source = "\n".join(
            line[node.col_offset :] if line[: node.col_offset].isspace() else line for line in lines
        )
        purpose = docstring.strip().splitlines()[0]
        question = rng.choice(
            (
                f"Write a function `{node.name}`.",
                f"Write a function `{node.name}`: {purpose}",
                f"Write a function: {purpose}",
                source.splitlines()[0],
            )
        )
        yield format_chat([{"role": "user", "content": question}, {"role": "assistant", "content": source}])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with GPT-2's split pattern and the chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, CHAT_START, CHAT_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=CHAT_END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def cut_after_newlines(text: str, rng: random.Random) -> list[str]:
    """Cut text after one line in LINES_BETWEEN_CUTS, at random; the pieces join to text.

    Inside a text a newline and the spaces after it are one token, but at the end of a prompt the newline is alone.
    Pieces encoded one by one teach the model to go on from there.
    """
    pieces = [""]
    for line in text.splitlines(keepends=True):
        pieces[-1] += line
        if rng.randrange(LINES_BETWEEN_CUTS) == 0:
            pieces.append("")
    return pieces


def encode_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Encode texts one after another.  Returns [tokens] int64."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.tensor([token for item in encoded for token in item.ids])


def endless_windows(stream: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield windows [length] of stream for ever, in a new order and at a new offset each epoch."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(offset, len(stream) - length + 1, length)
        for start in starts[torch.randperm(len(starts), generator=generator)].tolist():
            yield stream[start : start + length]


def mixed_batches(
    streams: dict[str, Tensor], tokens_a_step: int, context: int, seed: int
) -> Iterator[Tensor]:
    """Yield batches [B, T + 1], B x T = tokens_a_step; each row's stream is drawn by STREAM_WEIGHTS."""
    batch = max(1, tokens_a_step // context)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    windows = {name: endless_windows(stream, context + 1, generator) for name, stream in streams.items()}
    names, weights = zip(*STREAM_WEIGHTS.items(), strict=True)
    while True:
        yield torch.stack([next(windows[name]) for name in rng.choices(names, weights, k=batch)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama of 7 M parameters; every size is a multiple of 128, so that int4 groups fit."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for layer in model.model.layers:  # each block starts as the identity
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        repetition_penalty=1.1,
    )
    return model


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the mean cross-entropy, in nats, of each token of tokens [B, T + 1] given those before it."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T, V]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_report(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str], context: int
) -> dict[str, float]:
    """Measure the loss on texts cut into windows of context tokens: nats a token, bits a byte, perplexity."""
    stream = encode_stream(tokenizer, [END_OF_TEXT + text for text in texts.values()])
    windows = stream[: len(stream) // (context + 1) * (context + 1)].view(-1, context + 1)
    batches = windows.split(8)
    nats = sum(float(next_token_loss(model, batch)) * len(batch) for batch in batches) / len(windows)
    num_bytes = sum(len(text.encode()) for text in texts.values())
    return {
        "held_out_tokens": windows.shape[0] * context,
        "nats_per_token": round(nats, 4),
        "bits_per_byte": round(nats / math.log(2) * len(stream) / num_bytes, 4),
        "perplexity": round(math.exp(nats), 3),
    }


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Build the optimizers: Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    in_muon = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in in_muon]
    return [
        torch.optim.Muon(matrices, lr=0.025, weight_decay=0.1),
        torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Return the factor: a linear warm-up in steps, then a cosine to zero over progress (0..1 of the time budget)."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(model: LlamaForCausalLM, streams: dict[str, Tensor], args: argparse.Namespace) -> dict[str, int]:
    """Train until args.minutes have passed, saving to args.out on the way.  Returns steps and tokens seen."""
    compiled = torch.compile(model, dynamic=False) if args.compile else model
    short_batches, long_batches = (
        mixed_batches(streams, args.tokens_a_step, context, args.seed)
        for context in (SHORT_CONTEXT, LONG_CONTEXT)
    )
    optimizers = build_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    budget = args.minutes * 60
    started = saved = time.monotonic()
    step = tokens_seen = 0
    recent_loss = 0.0
    while (elapsed := time.monotonic() - started) < budget:
        progress = elapsed / budget
        factor = learning_rate_factor(step, progress)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        tokens = next(short_batches if progress < LONG_CONTEXT_FROM else long_batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = next_token_loss(compiled, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        tokens_seen += tokens.shape[0] * (tokens.shape[1] - 1)
        recent_loss = loss.item() if step == 1 else 0.95 * recent_loss + 0.05 * loss.item()
        if step % 20 == 0:
            speed = tokens_seen / (time.monotonic() - started)
            print(
                f"step {step} loss {recent_loss:.3f} {elapsed / 60:.1f} min {speed:.0f} tokens/s", flush=True
            )
        if time.monotonic() - saved > args.save_minutes * 60:
            model.save_pretrained(args.out)
            saved = time.monotonic()
    return {"steps": step, "tokens_seen": tokens_seen}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("tiny-model"), help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=52.0, help="wall-clock budget of the training loop")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="time between saved checkpoints")
    parser.add_argument("--tokens-a-step", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = read_library(library_root())
    library, tests = list(texts["library"].values()), list(texts["tests"].values())
    rng = random.Random(args.seed)
    chats = [chat for text in library for chat in chats_from_functions(text, rng)]
    rng.shuffle(chats)

    tokenizer = train_tokenizer(library + tests)
    streams = {
        name: encode_stream(
            tokenizer, [piece for text in members for piece in cut_after_newlines(END_OF_TEXT + text, rng)]
        )
        for name, members in (("library", library), ("tests", tests), ("chats", chats))
    }
    for name, stream in streams.items():
        print(f"{name}: {len(stream)} tokens", flush=True)
    model = build_model(tokenizer)
    print(f"{model.num_parameters()} parameters", flush=True)
    tokenizer.save_pretrained(args.out)

    counts = train(model, streams, args)
    model.save_pretrained(args.out)
    report = counts | held_out_report(model, tokenizer, texts["held_out"], SHORT_CONTEXT)
    (args.out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
