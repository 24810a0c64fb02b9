"""`pymllm run`: print an answer to stdout as it comes, and with --stats the plan and the speeds to stderr."""

from __future__ import annotations

import argparse
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
)
from pymllm.cli.output import (
    console,
    is_quiet,
    print_json,
    rank,
    readable_size,
    readable_text,
    say,
    show_text,
)
from pymllm.cli.questions import (
    DEMO_PROMPT,
    Asker,
    Question,
    Ready,
    add_prompt_options,
    check_options,
    check_text,
    load,
    names_lines,
    read_prompt,
    read_words,
)
from pymllm.cli.sampling_options import add_sampling_options

if TYPE_CHECKING:
    from pymllm.api import LLM
    from pymllm.engine.outputs import GenerationOutputs
    from pymllm.engine.request import RequestOutput
    from pymllm.engine.sampling import SamplingParams
    from pymllm.loading.prepare import Prepared
    from pymllm.planning.plan import Plan
    from pymllm.text.tokenizer import Tokenizer

EPILOG = """A single word is MODEL if it is an existing path, starts like one (/, ./, ../, ~) or is a hub id org/name;
otherwise it is a prompt for the small model that comes with pymllm. With --prompt it is always MODEL.

The prompt is a user's message where the model has a chat template (--raw: the text is continued instead); the small
model that comes along completes code, so its prompts are raw without --chat. What is piped into stdin, and
--prompt-file, come before PROMPT, with an empty line between. Sampling options that are not given are as the
checkpoint's generation_config.json recommends.

A line of a batch is {"prompt": ...} or {"messages": [...]}, with an "id" and sampling settings of its own where they
are wanted, or a text in quotes. Answers come in the order of the lines; with --output the file appears when all are
there, and the same command goes on after an interruption.

examples:
  pymllm run --demo
  pymllm run org/name "What is a monad?" --system "Answer in one sentence."
  cat notes.txt | pymllm run ./model "Summarise this."
  pymllm run ./model --batch questions.jsonl --output answers.jsonl
  pymllm run ./model --raw "Once upon a time" --max-tokens 64 --stats"""
DEMO_SEED, DEMO_TOKENS = 2, 52


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pymllm run [MODEL] [PROMPT] [options]"
    parser.epilog = EPILOG
    parser.add_argument("words", nargs="*", metavar="[MODEL] [PROMPT]", help=f"default MODEL: {SHIPPED}")
    add_prompt_options(parser)
    parser.add_argument(
        "--demo", action="store_true", help="run the shipped model on a fixed prompt and seed, with --stats"
    )
    parser.add_argument(
        "--adapter",
        type=adapter,
        metavar="NAME=DIR",
        help="answer with this LoRA adapter, as PEFT writes them",
    )
    add_sampling_options(parser, "1024 for an answer in a chat, 128 for a raw text")
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
    check_options(args)
    model, prompt = read_words(args)
    if args.demo:
        args.raw = not args.chat
        prompt = DEMO_PROMPT if prompt is None else prompt
        args.stats, args.seed = True, DEMO_SEED if args.seed is None else args.seed
        args.max_tokens = DEMO_TOKENS if args.max_tokens is None else args.max_tokens
    if names_lines(args):
        from pymllm.cli.run_lines import run_lines

        return run_lines(args, model, prompt)
    text = read_prompt(args, model, prompt)
    check_text(args, text)
    askers: list[Asker] = []
    ready: Ready | None = None

    def check(prepared: Prepared, plan: Plan, tokenizer: Tokenizer) -> None:
        nonlocal ready
        askers.append(Asker(args, model, prepared, plan, tokenizer))
        # torchrun gives stdin to one rank only.
        if rank() == 0:
            ready = askers[0].ask(Question(text))

    started = time.perf_counter()
    llm = load(args, model, check)
    startup_seconds = time.perf_counter() - started
    ids, chats = llm.parallel.broadcast(None if ready is None else (ready.ids, ready.chats))
    params = askers[0].params({}, chats)
    name = args.adapter[0] if args.adapter else None
    if args.stats and not args.json:
        print_plan_summary(llm.plan)
        for loaded in llm.adapters.values():
            say(str(loaded))
    show = not args.json
    continued = show and not chats and isinstance(text, str) and not is_quiet()
    if continued and (args.stats or sys.stdout.isatty()):
        # The answer continues this line.
        print(readable_text(str(text)), end="", file=sys.stderr, flush=True)
    output, outputs, first_token_seconds = answer(llm, ids, params, name, show)
    speeds = measure(llm, outputs, startup_seconds, first_token_seconds)
    if args.json:
        print_json(
            {
                "schema_version": 1,
                "model": str(llm.path),
                "adapter": name,
                "chat": chats,
                "prompt_tokens": len(output.prompt_token_ids),
                "text": output.text,
                "token_ids": list(output.token_ids),
                "finish_reason": output.finish_reason,
                "sampling": asdict(params),
                "plan": summarise(llm.plan),
                "speeds": speeds,
            }
        )
    else:
        if args.stats:
            print_speeds(output, speeds)
        if output.finish_reason == "length":
            say(why_cut(output, params))
    return 0


def answer(
    llm: LLM, ids: list[int], params: SamplingParams, name: str | None, show: bool
) -> tuple[RequestOutput, GenerationOutputs, float]:
    """Answer one prompt, to stdout if `show`.  Returns the answer, its steps, and the seconds to the first token."""
    from pymllm.engine.outputs import GenerationOutputs

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
    return output, outputs, first_token_seconds


def why_cut(output: RequestOutput, params: SamplingParams) -> str:
    """Say why an answer ended by its length, and what gives a longer one."""
    made = len(output.token_ids)
    if params.max_tokens is not None and made >= params.max_tokens:
        return f"(ended after {made} tokens, the most that were asked for; --max-tokens N gives more)"
    room = len(output.prompt_token_ids) + made
    return (
        f"(ended after {made} tokens: the context of {room} tokens is full; a shorter prompt, or --max-model-len and "
        "--kv-memory where they were the limit, give more)"
    )


def summarise(plan: Plan) -> dict[str, Any]:
    """Summarise a plan: its totals, and how many layers each method and kernel has."""
    return {
        "device": plan.device,
        "device_name": plan.device_name,
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

    load: reading and packing weights, or taking those that were kept.
    startup: from the call of `LLM` until it is ready, imports left out.
    """
    report = llm.load_report
    return {
        "load_seconds": report.seconds,
        "load_bytes": report.bytes_read,
        "load_taken_from": report.taken_from,
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
    size, kept = readable_size(speeds["load_bytes"]), speeds["load_taken_from"]
    done = f"{size} read and packed" if not kept else f"packed weights taken from {kept}, nothing read"
    say(f"load     {speeds['load_seconds']:.2f} s, {done}")
    say(f"first    token after {speeds['time_to_first_token_seconds'] * 1000:.0f} ms")
    say(f"prefill  {speeds['prefill_tokens_per_second']:.0f} tokens/s ({prompt} tokens)")
    say(
        f"decode   {speeds['decode_tokens_per_second']:.1f} tokens/s ({answer} tokens, ended by {output.finish_reason})"
    )
