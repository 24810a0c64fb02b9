"""The flags of `pymllm serve` that say what clients may take, who may ask, and what is logged."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymllm.server.limits import Limits


def add_operation_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of limits, and those of operations."""
    limits = parser.add_argument_group("limits of the server")
    for flag, metavar, read, words in (
        ("--max-connections", "N", _count, "connections that may be open; default: 2048"),
        ("--max-body-mb", "MB", _seconds, "size of a request's body, in units of 2^20 bytes; default: 4"),
        ("--header-timeout", "S", _seconds, "seconds in which a request's headers must come; default: 10"),
        ("--body-timeout", "S", _seconds, "seconds in which its body must come; default: 30"),
        ("--keep-alive", "S", _seconds, "seconds that an idle connection stays open; default: 15"),
        (
            "--write-timeout",
            "S",
            _seconds,
            "seconds after which a client that does not read is cut off; default: 30",
        ),
        (
            "--ping-seconds",
            "S",
            _seconds_or_none,
            "seconds without a token after which a stream sends a comment; 0: never; default: 5",
        ),
        (
            "--drain-seconds",
            "S",
            _seconds_or_none,
            "seconds that requests may go on after SIGTERM or Ctrl+C; default: 30",
        ),
        (
            "--step-timeout",
            "S",
            _seconds,
            "seconds after which a step counts as hung, and /health answers 503; default: three times what the slowest "
            "step took, or the largest would take, and at least 30",
        ),
        (
            "--retry-after",
            "S",
            _seconds,
            "seconds that a refused client is told to wait; default: as long as the line takes, 1 to 60",
        ),
    ):
        limits.add_argument(flag, type=read, metavar=metavar, help=words)
    group = parser.add_argument_group("operations")
    group.add_argument(
        "--access-log",
        choices=("text", "json"),
        help="write a line for each request to stderr; default: none",
    )
    group.add_argument(
        "--cors",
        action="append",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may ask, https://chat.example.org say, or * for all; repeatable",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        type=_host,
        default=[],
        metavar="HOST",
        help="another name that this machine's own clients may call the server by, if it needs no key; * for any; "
        "repeatable",
    )
    group.add_argument("--open-metrics", action="store_true", help="let /metrics be read without the API key")


def limits_of(args: argparse.Namespace) -> Limits:
    """Make the limits that the flags ask for."""
    from pymllm.server.limits import Limits

    given: dict[str, Any] = {
        "connections": args.max_connections,
        "body_bytes": None if args.max_body_mb is None else int(args.max_body_mb * (1 << 20)),
        "header_seconds": args.header_timeout,
        "body_seconds": args.body_timeout,
        "idle_seconds": args.keep_alive,
        "write_seconds": args.write_timeout,
        "ping_seconds": args.ping_seconds,
        "drain_seconds": args.drain_seconds,
        "step_seconds": args.step_timeout,
        "retry_after": args.retry_after,
    }
    return Limits(**{name: value for name, value in given.items() if value is not None})


def _number(least: float, words: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # A day and more is no limit, and a loop's timers have one.
        if not least <= value <= 1e6:
            raise argparse.ArgumentTypeError(f"expected {words}, not {text!r}")
        return value

    return read


_seconds = _number(1e-3, "a number of at least 0.001, at most 1000000")
_seconds_or_none = _number(0.0, "a number of at least 0, at most 1000000")


def _origin(text: str) -> str:
    # What browsers send: no path, and "null" for pages that are files.
    if text not in ("*", "null") and not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/?#@]+/?", text):
        raise argparse.ArgumentTypeError(f"expected SCHEME://HOST[:PORT], null or *, not {text!r}")
    return text


def _host(text: str) -> str:
    if not re.fullmatch(r"[^\s/:@\[\]]+", text):
        try:
            ipaddress.IPv6Address(text[1:-1] if text[:1] + text[-1:] == "[]" else text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected a name or an address, without a port, or *, not {text!r}"
            ) from None
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= 10**6:
        raise argparse.ArgumentTypeError(f"expected 1 to 1000000, not {text!r}")
    return int(text)
