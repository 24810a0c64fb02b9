"""`pymllm chat`: a conversation in the terminal; with a pipe for stdin, each line is a message."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from pymllm.cli.options import (
    adapter,
    add_engine_options,
    add_model_options,
    add_template_option,
    engine_arguments,
    model_arguments,
    text_arguments,
)
from pymllm.cli.sampling_options import add_sampling_options, sampling_arguments

if TYPE_CHECKING:
    from pymllm.cli.chat.settings import Settings
    from pymllm.loading.prepare import Prepared
    from pymllm.planning.plan import Plan
    from pymllm.text.dialect import Dialect
    from pymllm.text.tokenizer import Tokenizer

EPILOG = """In the chat, /help lists the commands, Ctrl+C ends an answer, and Ctrl+D leaves. @PATH puts the text of a
file into a message. Where stdin is no terminal, each line is a message or a command, and answers alone go to stdout;
the exit code is 1 if any was refused. Sampling options that are not given are as the checkpoint's
generation_config.json recommends.

examples:
  pymllm chat ./model
  pymllm chat org/name --system "Answer in one sentence." --temperature 0.7
  printf 'What is a monad?\\nAnd in one word?\\n' | pymllm chat ./model --stats"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm chat [MODEL] [options]", EPILOG
    add_model_options(parser)
    group = parser.add_argument_group("the conversation")
    group.add_argument(
        "--system", metavar="TEXT", help="the system prompt; default: as the chat template has it"
    )
    group.add_argument(
        "--thinking",
        choices=("on", "off", "hide"),
        default="default",
        help="whether the model thinks before it answers, if its template has a switch for that; hide: it may, but its "
        "thoughts are not shown",
    )
    group.add_argument(
        "--stats",
        action="store_true",
        help="after each answer, a line on stderr with its tokens and their speed",
    )
    group.add_argument(
        "--adapter",
        type=adapter,
        metavar="NAME=DIR",
        help="answer with this LoRA adapter, as PEFT writes them",
    )
    add_template_option(parser)
    add_sampling_options(parser, "until the model ends its answer, or the context is full")
    add_engine_options(parser)


def execute(args: argparse.Namespace) -> int:
    from pymllm.api import LLM
    from pymllm.cli.chat.answering import Answerer, ends_on_signals
    from pymllm.cli.chat.conversation import Conversation
    from pymllm.cli.chat.reading import choose_reader
    from pymllm.cli.chat.screen import Screen
    from pymllm.cli.chat.settings import Settings
    from pymllm.cli.chat.talk import Talk
    from pymllm.engine.sampling import SamplingParams

    if sys.stdin is None or sys.stdin.closed:
        args.parser.error("stdin is closed: there is nobody to chat with")
    _refuse_torchrun()
    settings = Settings(sampling_arguments(args), args.thinking, args.stats)
    SamplingParams(**settings.sampling)
    screen = Screen()
    checked: list[tuple[Dialect, str | None]] = []

    def check(prepared: Prepared, plan: Plan, tokenizer: Tokenizer) -> None:
        checked.append(check_before_loading(args, settings, prepared, tokenizer))

    with ends_on_signals():
        adapters = dict([args.adapter] if args.adapter else [])
        llm = LLM(
            args.model,
            tensor_parallel_size=args.tensor_parallel_size,
            expert_parallel=args.expert_parallel,
            adapters=adapters,
            **model_arguments(args),
            **engine_arguments(args),
            check_memory=args.check_memory,
            **text_arguments(args),
            before_loading=check,
        )
        dialect, said = checked[0]
        with llm:
            answerer = Answerer(llm, dialect, next(iter(adapters), None))
            answerer.params(settings.sampling)
            reader = choose_reader()
            if reader.interactive:
                screen.remark(
                    f"{llm.plan.model}, {llm.engine.longest} tokens of context. /help lists the commands, "
                    "Ctrl+C ends an answer, Ctrl+D leaves."
                )
            if said is not None:
                screen.remark(said)
            talk = Talk(answerer, Conversation(args.system), settings, reader, screen)
            talk.run()
    return int(talk.failed and not reader.interactive)


def check_before_loading(
    args: argparse.Namespace, settings: Settings, prepared: Prepared, tokenizer: Tokenizer
) -> tuple[Dialect, str | None]:
    """Check what can be known before weights are read: the model talks, and its template takes what was asked for.

    Returns how it writes, and what is to be said of its thinking.  ConfigError, CheckpointError or RequestError.
    """
    from pymllm.cli.chat.answering import render
    from pymllm.cli.chat.conversation import Conversation
    from pymllm.cli.chat.settings import check_thinking
    from pymllm.errors import ConfigError
    from pymllm.text.dialect import dialect_of

    prepared.model.check_generates()
    tokenizer.encode("x")
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the model has no chat template, so it cannot chat",
            code="chat-template-missing",
            file=str(prepared.checkpoint.path),
            expected="an instruct model, whose folder has a template",
            fix="Give one with --chat-template FILE, or have the model complete a text: pymllm run --raw MODEL PROMPT.",
        )
    dialect = dialect_of(tokenizer)
    said = check_thinking(args.thinking, dialect)
    for system in dict.fromkeys((None, args.system)):
        first = Conversation(system, [{"role": "user", "content": "x"}])
        render(tokenizer, dialect, first.for_model(), settings.variables(dialect))
    return dialect, said


def _refuse_torchrun() -> None:
    from pymllm.errors import ConfigError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "pymllm chat starts its ranks itself",
            code="chat-parallel",
            expected="--tensor-parallel-size N, without torchrun",
            found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
        )
