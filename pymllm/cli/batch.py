"""`pymllm batch`: answer a file of requests into another.  docs/serving.md describes the lines."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pymllm.cli.options import (
    SHIPPED,
    adapter,
    add_engine_options,
    add_model_options,
    add_template_option,
    engine_arguments,
    model_arguments,
    positive,
    text_arguments,
)
from pymllm.cli.output import say
from pymllm.cli.serve import SHIPPED_NAME, served_name

if TYPE_CHECKING:
    from pymllm.server.batch_file import Counts
    from pymllm.server.service import Service

EPILOG = """A line of IN is a request of OpenAI's batch format, {"custom_id", "method", "url", "body"}, or a body alone,
{"prompt": ..., "max_tokens": 16}. Answers come to OUT as they finish. The same command once more goes on where it was
interrupted. The exit code is 1 where lines have failed.

examples:
  pymllm batch requests.jsonl answers.jsonl --model ./model
  echo '{"prompt": "def fibonacci(n):", "temperature": 0}' > in.jsonl && pymllm batch in.jsonl out.jsonl

docs/serving.md describes the lines."""

# The least number of places in the line: as many answers as one line may ask for.
LEAST_WAITING = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm batch IN OUT [--model MODEL] [options]", EPILOG
    parser.add_argument("source", type=Path, metavar="IN", help="a file with a request a line")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file that gets an answer a line")
    parser.add_argument(
        "--model", metavar="MODEL", help=f"a folder, or a hub id org/name; default: {SHIPPED}"
    )
    parser.add_argument(
        "--model-name", metavar="NAME", help="what requests call the model; default: MODEL's last part"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        type=adapter,
        default=[],
        metavar="NAME=DIR",
        help="a LoRA adapter that requests choose by NAME as their model; repeatable",
    )
    parser.add_argument(
        "--max-running", type=positive, default=64, metavar="N", help="answers made together; default: 64"
    )
    parser.add_argument(
        "--progress",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether to show a bar; default: on a terminal",
    )
    parser.add_argument(
        "--pooling",
        metavar="MODE",
        help="how /v1/embeddings makes a vector of a text: mean, cls or lasttoken, say; default: as the folder says",
    )
    add_template_option(parser)
    add_engine_options(parser)
    add_model_options(parser, positional=False)


def execute(args: argparse.Namespace) -> int:
    from pymllm.errors import ConfigError, MissingExtraError

    try:
        importlib.import_module("pydantic")
    except ModuleNotFoundError:
        raise MissingExtraError("pydantic", "server", "pymllm batch") from None
    if args.tensor_parallel_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "pymllm batch runs on one rank only",
            code="batch-parallel",
            expected="--tensor-parallel-size 1, without torchrun",
        )
    if args.source.is_dir() or (args.target.exists() and not args.target.is_file()):
        raise ConfigError(
            "the input and the output must be files",
            code="batch-input",
            file=str(args.source if args.source.is_dir() else args.target),
        )
    if args.source.exists() and args.target.exists() and args.target.samefile(args.source):
        raise ConfigError(
            "the output would be written over the requests",
            code="batch-output",
            file=str(args.target),
            fix="Choose another output file.",
        )
    from pymllm.loading.progress import progress_bar
    from pymllm.server.batch_file import count_lines, open_output, recover

    show = {"auto": None, "on": True, "off": False}[args.progress]
    # The output is opened before the model loads, so that what is wrong with it shows at once.
    with _open_input(args.source) as source, open_output(args.target) as target:
        done = recover(target, str(args.target))
        # A pipe is read once.
        total = count_lines(args.source) if args.source.is_file() else None
        service = _load(args, show)
        try:
            with progress_bar("batch", total, show, "line") as tell:
                counts = asyncio.run(_run(service, args.max_running, source, target, done, tell))
        except KeyboardInterrupt:
            say(f"Interrupted. {args.target} has what is done; the same command goes on from there.")
            raise
    say(f"{counts.answered} answered, {counts.failed} failed, {counts.skipped} done before: {args.target}")
    return 1 if counts.failed else 0


def _open_input(source: Path) -> IO[bytes]:
    from pymllm.errors import ConfigError

    try:
        return open(source, "rb")
    except OSError as error:
        raise ConfigError(
            f"the file cannot be read: {error.strerror}", code="batch-input", file=str(source)
        ) from None


def _load(args: argparse.Namespace, show: bool | None) -> Service:
    from pymllm.api import LLM
    from pymllm.server.service import Service

    llm = LLM(
        args.model,
        adapters=dict(args.adapter),
        **model_arguments(args),
        **engine_arguments(args),
        check_memory=args.check_memory,
        progress=show,
        pooling=args.pooling,
        **text_arguments(args),
    )
    name = args.model_name or (SHIPPED_NAME if args.model is None else served_name(args.model))
    return Service(llm, name, args.max_running, max(args.max_running, LEAST_WAITING))


async def _run(
    service: Service,
    together: int,
    source: IO[bytes],
    target: IO[bytes],
    done: set[int],
    tell: Callable[[int], object],
) -> Counts:
    """Answer the file.  Twice as many lines as run are read and encoded, so that none is waited for."""
    from pymllm.server.batch_file import BatchFile

    return await BatchFile(service, 2 * together, tell).run(source, target, done)
