"""`pymllm pack`: keep a model's packed weights ahead of its first start, without running it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pymllm.cli.options import add_model_options, add_packed_cache_option, model_arguments, model_or_shipped
from pymllm.cli.output import show

if TYPE_CHECKING:
    from pymllm.weights.report import LoadReport

EXAMPLES = """A start takes what was kept if it has the same options of the model (docs/starting.md).

examples:
  pymllm pack ./model
  pymllm pack org/name --quant '**.mlp.**=int4' --packed-cache DIR"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm pack [MODEL] [options]", EXAMPLES
    add_model_options(parser)
    add_packed_cache_option(parser)


def execute(args: argparse.Namespace) -> int:
    from pymllm.api import load_model
    from pymllm.errors import ConfigError
    from pymllm.loading.packed_cache import cache_folder

    if args.packed_cache == "off":
        raise ConfigError(
            "nothing would be kept",
            code="packed-cache",
            expected="auto or a folder",
            found="--packed-cache off",
        )
    if args.tensor_parallel_size > 1:
        raise ConfigError(
            "weights are kept for one rank at a time",
            code="packed-cache",
            expected="--tensor-parallel-size 1",
            found=str(args.tensor_parallel_size),
            fix="Start the model with its ranks once: each keeps its own.",
        )
    folder = cache_folder() if args.packed_cache == "auto" else args.packed_cache  # who asks has chosen
    model = load_model(
        model_or_shipped(args.model),
        packed_cache=folder,
        check_memory=args.check_memory,
        **model_arguments(args),
    )
    report: LoadReport = model.load_report  # type: ignore[assignment]
    if not (report.kept_in or report.taken_from):
        raise ConfigError(
            "the packed weights of this model were not kept",
            code="packed-cache",
            fix="See docs/starting.md: which are not; -v tells why.",
        )
    show(report.kept_in or f"{report.taken_from} (was kept before)")
    return 0
