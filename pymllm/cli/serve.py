"""`pymllm serve`: OpenAI-style HTTP over one model.  docs/serving.md describes it."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.options import (
    adapter,
    add_engine_options,
    add_model_options,
    engine_arguments,
    model_arguments,
)
from pymllm.cli.output import say
from pymllm.cli.ray_serve import add_ray_options, check_ray, check_ray_options, serve_on_ray

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from pymllm.api import LLM

SHIPPED_NAME = "pymllm-shipped"

# Connections beyond those that run or wait: idle ones, and clients that are still sending; each may hold 4 MiB.
SPARE_CONNECTIONS = 256
LOOPBACK = ("127.0.0.1", "localhost", "::1")


EXAMPLES = """examples:
  pymllm serve ./model
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "Once upon", "max_tokens": 16}'

docs/serving.md describes the server."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm serve [MODEL] [options]", EXAMPLES
    add_model_options(parser)
    add_engine_options(parser)
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: this machine alone"
    )
    group.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="default: 8000; 0 takes a free one"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("PYMLLM_API_KEY"),
        help="the key that every request but /health must bring; better given as PYMLLM_API_KEY, which other users of "
        "this machine cannot see",
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="what clients call the model; default: MODEL's last part"
    )
    group.add_argument(
        "--adapter",
        action="append",
        type=adapter,
        default=[],
        metavar="NAME=DIR",
        help="a LoRA adapter that clients choose by NAME as their model; repeatable",
    )
    group.add_argument(
        "--max-running", type=int, default=64, metavar="N", help="prompts answered together; default: 64"
    )
    group.add_argument(
        "--step-ms",
        type=float,
        metavar="MS",
        help="how long a step may take that reads prompts beside answers; default: 150 ms",
    )
    group.add_argument(
        "--pooling",
        metavar="MODE",
        help="how /v1/embeddings makes a vector of a text: mean, cls or lasttoken, say; default: as the folder says",
    )
    group.add_argument(
        "--max-waiting", type=int, default=64, metavar="N", help="prompts that may wait; default: 64"
    )
    add_ray_options(parser)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what no server can have, as an error of usage."""
    if args.max_running < 1:
        args.parser.error("--max-running must be at least 1")
    if args.max_waiting < 0:
        args.parser.error("--max-waiting must not be negative")
    names = [name for name, _ in args.adapter]
    if len(set(names)) < len(names):
        args.parser.error("two adapters have the same name; give each --adapter a NAME of its own")
    if args.api_key == "":
        args.parser.error("--api-key (or PYMLLM_API_KEY) is empty")
    check_ray_options(args)


def execute(args: argparse.Namespace) -> int:
    check_arguments(args)
    from pymllm.errors import ConfigError, MissingExtraError

    for package in ("fastapi", "uvicorn"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise MissingExtraError(package, "server", "pymllm serve") from None
    if args.tensor_parallel_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "pymllm serve runs on one rank only",
            code="serve-parallel",
            expected="--tensor-parallel-size 1, without torchrun",
            found=f"{max(args.tensor_parallel_size, int(os.environ.get('WORLD_SIZE', '1')))} ranks",
        )
    if args.ray:
        check_ray()
        if args.ray_address is None:
            # Ray's proxies bind the port themselves; like this, a taken one is known at once.
            with bind(args.host, args.port) as listener:
                args.port = listener.getsockname()[1]
        _warn_if_open(args)
        return serve_on_ray(args, make_app, model_name(args))
    # Before the model is loaded, so that a taken port is known at once.
    with bind(args.host, args.port) as listener:
        return _serve(args, listener)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, not {text!r}")
    return int(text)


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to the port without listening: clients are refused until the model is there.

    Raises ConfigError for an address that cannot be used, or a port that is taken.
    """
    from pymllm.errors import ConfigError

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"the address {host!r} cannot be used: {error}", code="address") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}",
            code="address",
            fix="Choose another with --host and --port.",
        ) from None
    return listener


def _serve(args: argparse.Namespace, listener: socket.socket) -> int:
    import uvicorn

    from pymllm.server.header_timeout import HeaderTimeoutProtocol

    llm, app = make_app(args)
    config = uvicorn.Config(
        app,
        # It is h11's, which bounds the size of headers, as httptools does not.
        http=HeaderTimeoutProtocol,
        ws="none",
        lifespan="off",
        limit_concurrency=SPARE_CONNECTIONS + args.max_running + args.max_waiting,
        log_level=logging.INFO if args.verbose else logging.WARNING,
        access_log=args.verbose,
        server_header=False,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _warn_if_open(args)
    # On a signal uvicorn finishes its requests, then raises the signal again for the handler that was there before.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # One line: whoever starts the server waits for it.
    greeting = (
        f"Serving {model_name(args)} at http://{shown}:{port}/v1. Ctrl+C stops. {llm.plan.describe_cache()}."
    )
    make_server(config, greeting).run(sockets=[listener])
    return 0


def _warn_if_open(args: argparse.Namespace) -> None:
    if args.host not in LOOPBACK and args.api_key is None:
        say("warning: other machines can reach this server, and it has no API key.")


def make_app(args: argparse.Namespace) -> tuple[LLM, FastAPI]:
    """Load the model, and make its application; a replica of Ray's calls this in its own process."""
    from pymllm.api import LLM
    from pymllm.server.app import create_app

    llm = LLM(**model_options(args))
    app = create_app(
        llm,
        model_name=model_name(args),
        api_key=args.api_key,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
    )
    return llm, app


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of the `LLM` that is served."""
    return {
        "model": args.model,
        "adapters": dict(args.adapter),
        **model_arguments(args),
        **engine_arguments(args),
        **({} if args.step_ms is None else {"step_ms": args.step_ms}),
        "check_memory": args.check_memory,
        "pooling": args.pooling,
    }


def model_name(args: argparse.Namespace) -> str:
    """Return what clients call the model."""
    return args.model_name or (SHIPPED_NAME if args.model is None else served_name(args.model))


def served_name(model: str) -> str:
    """Return the name that clients call the model: a hub id as it is, a folder's last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def make_server(config: uvicorn.Config, greeting: str) -> uvicorn.Server:
    """Make a server that says when it listens, finishes its requests on a signal, and stops at once on a second one."""
    import asyncio

    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(greeting)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit:
                # A plain exit would wait for the generating thread.
                os._exit(128 + sig)
            super().handle_exit(sig, frame)
            # Not here: the signal may have come while a line was written, and a stream cannot be written within itself.
            said = "Finishing the requests under way; Ctrl+C once more stops at once."
            asyncio.get_running_loop().call_soon_threadsafe(say, said)

    return Server(config)
