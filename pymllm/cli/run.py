"""`pymllm run`: print an answer to stdout as it comes, and with --stats the plan and the speeds to stderr."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pymllm.cli.options import (
    SHIPPED,
    adapter,
    add_engine_options,
    add_model_options,
    add_template_option,
    engine_arguments,
    model_arguments,
)
from pymllm.cli.output import console, print_json, readable_size, say, show_text
from pymllm.cli.sampling_options import add_sampling_options, sampling_arguments

if TYPE_CHECKING:
    from pymllm.api import LLM
    from pymllm.engine.outputs import GenerationOutputs
    from pymllm.engine.request import RequestOutput
    from pymllm.planning.plan import Plan

EPILOG = """A single word is MODEL if it is an existing path, starts like one (/, ./, ../, ~) or is a hub id org/name;
otherwise it is a prompt for the small model that comes with pymllm. With --prompt it is always MODEL. Without a prompt,
pymllm reads the prompt from stdin, unless that is a terminal. Sampling options that are not given are as the
checkpoint's generation_config.json recommends.

examples:
  pymllm run --demo
  pymllm run "def fibonacci(n):" --max-tokens 64
  pymllm run org/name --chat "What is a monad?" --stats
  pymllm run ./model --quant '**.mlp.**=fp8' < prompt.txt"""
DEMO_PROMPT = 'class Queue:\n    """A first-in, first-out queue."""\n\n    def __init__(self):\n'
DEMO_SEED, DEMO_TOKENS = 2, 52
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pymllm run [MODEL] [PROMPT] [options]"
    parser.epilog = EPILOG
    parser.add_argument("words", nargs="*", metavar="[MODEL] [PROMPT]", help=f"default MODEL: {SHIPPED}")
    parser.add_argument("-p", "--prompt", help="the prompt, whatever it looks like")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message for the chat template"
    )
    parser.add_argument(
        "--demo", action="store_true", help="run the shipped model on a fixed prompt and seed, with --stats"
    )
    parser.add_argument(
        "--adapter",
        type=adapter,
        metavar="NAME=DIR",
        help="answer with this LoRA adapter, as PEFT writes them",
    )
    add_sampling_options(parser, "128")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--stats", action="store_true", help="also print the plan before and the speeds after, to stderr"
    )
    group.add_argument(
        "--json", action="store_true", help="print one JSON object at the end in place of the text"
    )
    add_template_option(parser)
    add_engine_options(parser)
    add_model_options(parser, positional=False)


def execute(args: argparse.Namespace) -> int:
    model, prompt = read_words(args)
    if args.demo:
        prompt = DEMO_PROMPT if prompt is None else prompt
        args.stats, args.seed = True, DEMO_SEED if args.seed is None else args.seed
        args.max_tokens = DEMO_TOKENS if args.max_tokens is None else args.max_tokens
    if prompt is None:
        prompt = read_stdin(args, model)
    check_text(args, prompt)
    from pymllm.api import LLM
    from pymllm.engine.outputs import GenerationOutputs

    chosen = sampling_arguments(args)
    started = time.perf_counter()
    adapters = dict([args.adapter] if args.adapter else [])
    name = next(iter(adapters), None)
    llm = LLM(
        model,
        tensor_parallel_size=args.tensor_parallel_size,
        expert_parallel=args.expert_parallel,
        adapters=adapters,
        **model_arguments(args),
        **engine_arguments(args),
        check_memory=args.check_memory,
        chat_template=args.chat_template,
    )
    llm.model.check_generates()
    startup_seconds = time.perf_counter() - started
    params = llm.default_params(**chosen)
    # torchrun gives stdin to one rank only.
    prompt = llm.parallel.broadcast(prompt)
    ids = (
        llm.encode_to_answer(prompt)
        if not args.chat
        else llm.tokenizer.apply_chat_template([message(prompt)])
    )
    if args.stats and not args.json:
        print_plan_summary(llm.plan)
        for loaded in llm.adapters.values():
            say(str(loaded))
    show = not args.json
    if show and not args.chat and (args.stats or sys.stdout.isatty()):
        # The answer continues this line.
        print(prompt, end="", file=sys.stderr, flush=True)
    outputs = GenerationOutputs(1)
    started, first_token_seconds, output = time.perf_counter(), 0.0, None
    for piece in llm.stream(ids, params, adapter=name, outputs=outputs):
        first_token_seconds = first_token_seconds or time.perf_counter() - started
        output = piece.output
        if show:
            show_text(piece.text)
    assert output is not None
    if show:
        print(flush=True)
    speeds = measure(llm, outputs, startup_seconds, first_token_seconds)
    if args.json:
        print_json(
            {
                "schema_version": 1,
                "model": str(llm.path),
                "adapter": name,
                "prompt_tokens": len(output.prompt_token_ids),
                "text": output.text,
                "token_ids": list(output.token_ids),
                "finish_reason": output.finish_reason,
                "sampling": asdict(params),
                "plan": summarise(llm.plan),
                "speeds": speeds,
            }
        )
    elif args.stats:
        print_speeds(output, speeds)
    return 0


def message(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def read_words(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Read (model, prompt) from the positional words and --prompt; None: not given."""
    words, prompt = args.words, args.prompt
    if len(words) > (2 if prompt is None else 1):
        args.parser.error(
            "expected at most MODEL and one PROMPT; put quotes around a prompt of several words"
        )
    if len(words) == 2:
        return words[0], words[1]
    if len(words) == 1:
        return (words[0], prompt) if prompt is not None or names_a_model(words[0]) else (None, words[0])
    return None, prompt


def names_a_model(word: str) -> bool:
    """Decide whether a lone word is MODEL rather than PROMPT; `--help` states the rule."""
    path_like = word.startswith(("/", "./", "../", "~")) and not any(
        character.isspace() for character in word
    )
    return path_like or os.path.exists(word) or HUB_ID.fullmatch(word) is not None


def read_stdin(args: argparse.Namespace, model: str | None) -> str:
    """Read the prompt from a pipe.  If there is none, the shipped model gets its demo prompt; others are an error."""
    text = ""
    if sys.stdin is not None and not sys.stdin.isatty():
        data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            args.parser.error(f"the prompt on stdin is not UTF-8: {error}")
    if not text and model is None:
        say("(no prompt given: this is the built-in one)")
        return DEMO_PROMPT
    if not text and not int(os.environ.get("RANK", "0")):
        args.parser.error("no prompt: give one after MODEL, with --prompt, or on stdin")
    return text


def check_text(args: argparse.Namespace, prompt: str) -> None:
    for text in (prompt, *(args.stop or ())):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            args.parser.error("the prompt and --stop must be UTF-8")


def summarise(plan: Plan) -> dict[str, Any]:
    """Summarise a plan: its totals, and how many layers each method and kernel has."""
    return {
        "device": plan.device,
        "dtype": plan.dtype,
        "compute": plan.compute,
        **plan.totals,
        "methods": dict(
            Counter(
                layer.method_detail for layer in plan.layers if layer.kind not in ("attention", "recurrence")
            )
        ),
        "kernels": dict(Counter(f"{layer.kind}: {layer.kernel}" for layer in plan.layers)),
    }


def measure(
    llm: LLM, outputs: GenerationOutputs, startup_seconds: float, first_token_seconds: float
) -> dict[str, Any]:
    """Collect seconds, and tokens per second.

    load: reading and packing weights.  startup: from the call of `LLM` until it is ready, imports left out.
    """
    report = llm.load_report
    return {
        "load_seconds": report.seconds,
        "load_bytes": report.bytes_read,
        "startup_seconds": startup_seconds,
        "time_to_first_token_seconds": first_token_seconds,
        "time_per_output_token_seconds": outputs.tpot,
        "prefill_tokens_per_second": outputs.prefill_throughput,
        "decode_tokens_per_second": outputs.decode_throughput,
    }


def print_plan_summary(plan: Plan) -> None:
    from pymllm.cli.plan import print_plan

    print_plan(plan, console(stderr=True), reasons=False)
    say()


def print_speeds(output: RequestOutput, speeds: dict[str, Any]) -> None:
    prompt, answer = len(output.prompt_token_ids), len(output.token_ids)
    say()
    say(f"load     {speeds['load_seconds']:.2f} s, {readable_size(speeds['load_bytes'])} read and packed")
    say(f"first    token after {speeds['time_to_first_token_seconds'] * 1000:.0f} ms")
    say(f"prefill  {speeds['prefill_tokens_per_second']:.0f} tokens/s ({prompt} tokens)")
    say(
        f"decode   {speeds['decode_tokens_per_second']:.1f} tokens/s ({answer} tokens, ended by {output.finish_reason})"
    )
