"""The options that verbs share: which model, and how to run it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

SHIPPED = "the small model that comes with pymllm"
ABOUT_RULES = """PATTERN is a layer's name in the checkpoint, as `pymllm plan --all` lists them; * stands for one part
between dots, ** for any number of them. METHOD: int4, int8, fp8, ..., or none for floats."""


def add_common_options(parser: argparse.ArgumentParser, *, everywhere: bool = False) -> None:
    """Add -v and -q.  everywhere: to the command itself, whose defaults are those of every verb."""
    default: Any = False if everywhere else argparse.SUPPRESS
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=default,
        help="log one line for each phase; print long lists whole",
    )
    group.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=default,
        help="nothing on stderr but warnings and errors: no bars, no notes",
    )


def add_model_options(parser: argparse.ArgumentParser, *, positional: bool = True) -> None:
    """Add MODEL and every option that `pymllm.load_model` takes; `model_arguments` reads them back."""
    if positional:
        parser.add_argument(
            "model", nargs="?", metavar="MODEL", help=f"a folder, or a hub id org/name; default: {SHIPPED}"
        )
    group = parser.add_argument_group("the model", ABOUT_RULES)
    add_rule_options(group, "'**.mlp.**=fp8'")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (a GPU where torch has one), cpu, cuda or, of several GPUs, cuda:1; cuda:sm90, hip:gfx942, ... only "
        "to plan",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        help="what layers pass to each other: float32, float16, bfloat16 or auto (the checkpoint's dtype; "
        "on a CPU, float32 if the checkpoint is quantised)",
    )
    group.add_argument(
        "--compute",
        choices=("auto", "exact", "checkpoint"),
        default="auto",
        help="whether kernels may round their inputs to fewer bits inside: where that is faster (auto, the default), "
        "never (exact), or only as the checkpoint asks for (checkpoint)",
    )
    group.add_argument(
        "--kernel",
        action="append",
        type=_kernel,
        default=[],
        metavar="OPERATION=NAME",
        help="force a kernel, e.g. linear=reference; `pymllm doctor` lists them; repeatable",
    )
    group.add_argument(
        "--kv-cache",
        action="append",
        metavar="METHOD|PATTERN=METHOD",
        help="how keys and values are stored: fp8, int8, none or a dtype, for all attention layers or those that match",
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--definition",
        choices=("auto", "transformers"),
        default="auto",
        help="whose modules run: pymllm's own where it has the model type (auto, the default), or transformers' class",
    )
    group.add_argument(
        "--strategy",
        metavar="NAME[:KEY=VALUE,...]",
        help="how answers are decoded, e.g. block_diffusion:block_length=32; default: as the model was trained for",
    )
    group.add_argument(
        "--no-memory-check",
        action="store_false",
        dest="check_memory",
        help="load even if the plan says that it does not fit",
    )
    group.add_argument(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="divide the model over N ranks: those of torchrun, or else N processes that are started here",
    )
    group.add_argument(
        "--expert-parallel",
        action="store_true",
        help="for a model with experts: each rank holds some experts whole, not a share of every expert",
    )
    add_common_options(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `LLM` for how requests run; `engine_arguments` reads them back."""
    group = add_cache_options(parser)
    group.add_argument(
        "--prefix-reuse",
        choices=("on", "off"),
        default="on",
        help="whether a request takes over what others have computed of the same first tokens; default: on",
    )
    group.add_argument(
        "--warm-up",
        choices=("on", "off"),
        default="on",
        help="whether a GPU's kernels are compiled before the first request, which would wait for them; default: on",
    )
    add_packed_cache_option(parser)


def add_packed_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add --packed-cache, a keyword of `LLM`."""
    parser.add_argument(
        "--packed-cache",
        metavar="auto|off|DIR",
        default="auto",
        help="where packed weights are kept, so that the next start maps them: auto (a file as large as the packed "
        "weights of each model from 256 MiB on, in ~/.cache/pymllm/packed or $PYMLLM_CACHE; at most 50 GB, and a tenth "
        "of the disk stays free), off (nothing is written), or a folder; default: auto",
    )


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """Add --chat-template and --tokenizer, keywords of `LLM`; `text_arguments` reads them back."""
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a file of Jinja text, or such text, in place of the checkpoint's chat template",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a folder, tokenizer.json, .gguf file or hub id whose tokenizer takes the place of the checkpoint's",
    )


def text_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of `LLM` that `add_template_option` added."""
    return {"chat_template": args.chat_template, "tokenizer": args.tokenizer}


def add_cache_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options for the size of the KV cache; `cache_arguments` reads them back.  Returns their group."""
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--max-model-len",
        type=positive,
        metavar="N",
        help="the most tokens that a request may have, its answer included; default: as the model has positions",
    )
    group.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help="what the KV cache may take, e.g. 2GB, 512MiB, or 30%% of what is free beside the weights; default: 25%%, "
        "but no more than 16384 tokens, or one request of the longest context, need; on a GPU 90%% of what "
        "steps leave, but no more than 64 requests need",
    )
    return group


def cache_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of `plan` and `LLM` that `add_cache_options` added."""
    return {"max_model_len": args.max_model_len, "kv_memory": args.kv_memory}


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of `LLM` that `add_engine_options` added."""
    reuse = args.prefix_reuse == "on"
    settings = {"prefix_reuse": reuse, "warm_up": args.warm_up == "on", "packed_cache": args.packed_cache}
    return {**settings, **cache_arguments(args)}


def add_rule_options(group: argparse._ArgumentGroup, example: str) -> None:
    """Add --quant and --quant-file, which fill one list: the order of rules matters, as the first match wins."""
    group.add_argument(
        "--quant",
        action="append",
        metavar="PATTERN=METHOD[:KEY=VALUE,...]",
        help=f"the method of the layers that match, e.g. {example}; repeatable, the first match wins",
    )
    group.add_argument(
        "--quant-file",
        action="append",
        type=Path,
        dest="quant",
        metavar="FILE",
        help="a file of such rules, one a line; it takes its place among the --quant options",
    )


def adapter(text: str) -> tuple[str, str]:
    """Read the NAME=DIR of --adapter."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, not {text!r}")
    return name, folder


def _kernel(text: str) -> tuple[str, str]:
    operation, equals, name = text.partition("=")
    if not (operation and equals and name):
        raise argparse.ArgumentTypeError(f"expected OPERATION=NAME, e.g. linear=reference, not {text!r}")
    return operation, name


def positive(text: str) -> int:
    """Read an argument that must be an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of `load_model`, `plan` and `verify`.  ConfigError for an operation that has no kernels."""
    _check_isa()
    if args.kernel:
        _check_operations([operation for operation, _ in args.kernel])
    return {
        "quant": args.quant,
        "device": args.device,
        "dtype": args.dtype,
        "compute": args.compute,
        "kernels": dict(args.kernel),
        "kv_cache": args.kv_cache,
        "revision": args.revision,
        "definition": args.definition,
        "strategy": args.strategy,
    }


def model_or_shipped(model: str | None) -> str | Path:
    """Return MODEL as it was given, or else the shipped model's folder."""
    from pymllm.api import shipped_model

    return shipped_model() if model is None else model


def _check_operations(operations: list[str]) -> None:
    from pymllm.errors import unknown_name
    from pymllm.kernels.registry import KERNELS

    for operation in operations:
        if operation not in KERNELS:
            raise unknown_name("kernel operation", operation, KERNELS, code="kernel-operation")


def _check_isa() -> None:
    """Check PYMLLM_CPU_ISA, which a user sets: a wrong value is an error like any other (ConfigError)."""
    if "PYMLLM_CPU_ISA" in os.environ:
        from pymllm.errors import ConfigError
        from pymllm.kernels.native.extension import probe

        try:
            probe()
        except ValueError as error:
            raise ConfigError(str(error), code="cpu-isa") from None
