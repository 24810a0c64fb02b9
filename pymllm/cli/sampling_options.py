"""The options of how an answer is sampled, for the verbs that ask a model themselves."""

from __future__ import annotations

import argparse
from typing import Any

SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("confidence_threshold", "seed", "stop"),
)


def add_sampling_options(parser: argparse.ArgumentParser, most_tokens: str) -> None:
    """Add the group "sampling"; `sampling_arguments` reads it back.

    most_tokens: the default of --max-tokens, in words.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"new tokens at most; default: {most_tokens}"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="only the likeliest tokens that have probability P together"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the likeliest"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: tokens already there are less likely"
    )
    group.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="P",
        help="of models decoded by blocks: accept tokens that are likelier; lower takes fewer steps",
    )
    group.add_argument("--seed", type=int, metavar="N", help="give the same answer each time")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable"
    )


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields of `SamplingParams` that were given."""
    return {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
