"""`pymllm serve`: OpenAI-style HTTP over one model.  docs/serving.md describes it."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.options import (
    adapter,
    add_engine_options,
    add_model_options,
    add_template_option,
    engine_arguments,
    model_arguments,
    positive,
    text_arguments,
)
from pymllm.cli.output import say, warn
from pymllm.cli.ray_serve import add_ray_options, check_ray, check_ray_options, serve_on_ray
from pymllm.cli.serve_options import add_operation_options, limits_of

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from pymllm.api import LLM
    from pymllm.parallel.ranks import Ranks
    from pymllm.server.supervisor import Served

SHIPPED_NAME = "pymllm-shipped"
# How long the process waits for its last step after the server has ended.
LAST_STEP_SECONDS = 5.0
# Within so many seconds two signals are one, which a service manager has sent to every process.
SAME_SIGNAL_SECONDS = 1.0
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
    add_template_option(parser)
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
        help="the key that every request but /health and the page must bring; better given as PYMLLM_API_KEY, which "
        "other users of this machine cannot see",
    )
    group.add_argument(
        "--model-name",
        action="append",
        metavar="NAME",
        help="what clients call the model; repeatable, and answers bear the first name; default: MODEL's last part",
    )
    group.add_argument(
        "--served-model-name",
        dest="model_name",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="the same, as vLLM spells it: one name or several",
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
    add_operation_options(parser)
    add_ray_options(parser)
    add_rank_options(parser)


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of several machines."""
    group = parser.add_argument_group(
        "several machines", "All run the same command, each with its own --node-rank; node 0 serves."
    )
    group.add_argument("--nnodes", type=positive, default=1, metavar="N", help="machines; default: 1")
    group.add_argument("--node-rank", type=int, default=0, metavar="K", help="which of them this one is")
    group.add_argument(
        "--master-addr",
        default="127.0.0.1",
        metavar="HOST",
        help="the address of node 0 that the others reach",
    )
    group.add_argument(
        "--master-port", type=_port, default=0, metavar="PORT", help="where node 0 waits for them"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what no server can have, as an error of usage."""
    if args.max_running < 1:
        args.parser.error("--max-running must be at least 1")
    if args.max_waiting < 0:
        args.parser.error("--max-waiting must not be negative")
    names = [name for name, _ in args.adapter]
    if len(set(names)) < len(names):
        args.parser.error("two adapters have the same name; give each --adapter a NAME of its own")
    if "" in (args.model_name or ()):
        args.parser.error("--model-name is empty")
    if args.api_key == "":
        args.parser.error("--api-key (or PYMLLM_API_KEY) is empty")
    _check_ranks(args)
    check_ray_options(args)


def execute(args: argparse.Namespace) -> int:
    check_arguments(args)
    from pymllm.server.supervisor import Served, Supervisor

    served, ranks = Served.from_environment(), None
    if served is not None:
        served.start()
        # The other ranks load torch while this one does.
        ranks = _start_ranks(args)
    from pymllm.errors import MissingExtraError

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            raise MissingExtraError(package, "server", "pymllm serve") from None
    if args.ray:
        check_ray()
        if args.ray_address is None:
            # Ray's proxies bind the port themselves; like this, a taken one is known at once.
            with bind(args.host, args.port) as listener:
                args.port = listener.getsockname()[1]
        _warn_if_open(args)
        return serve_on_ray(args, make_app, model_names(args)[0])
    if args.node_rank:
        return _follow(args)
    if served is not None:
        return _serve(args, served.listener, served, ranks)
    # Before the model is loaded, so that a taken port is known at once.
    with bind(args.host, args.port) as listener:
        if args.tensor_parallel_size > 1:
            return Supervisor(listener, args.argv).run()
        return _serve(args, listener)


def _check_ranks(args: argparse.Namespace) -> None:
    """Refuse ranks that are not started by this verb, and machines that do not fit them.  ConfigError."""
    from pymllm.errors import ConfigError
    from pymllm.gpus import refuse_one_gpu
    from pymllm.parallel.ranks import ranks_of_node

    if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError(
            "pymllm serve starts its ranks itself",
            code="serve-parallel",
            expected="--tensor-parallel-size N, without torchrun",
            found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
        )
    refuse_one_gpu(args.device, len(ranks_of_node(args.tensor_parallel_size, args.nnodes, args.node_rank)))
    if args.nnodes > 1 and not args.master_port:
        args.parser.error("--nnodes needs --master-addr and --master-port, the same on all machines")


def _start_ranks(args: argparse.Namespace) -> Ranks:
    """Start the ranks of this machine that follow this process.  Returns where they meet it."""
    from pymllm.parallel.leader import Leader
    from pymllm.parallel.ranks import Ranks, ranks_of_node

    ranks = Ranks()
    if args.nnodes > 1:
        own = len(ranks_of_node(args.tensor_parallel_size, args.nnodes, 0)) - 1
        ranks = Ranks(args.master_addr, args.master_port, os.environ.get("PYMLLM_RANK_KEY", ""), own)
    return replace(ranks, begun=Leader.start(args.tensor_parallel_size, ranks))


def _follow(args: argparse.Namespace) -> int:
    """Keep the ranks of a machine that does not serve."""
    from pymllm.loading.agreement import settings_for_ranks
    from pymllm.parallel.ranks import ranks_of_node
    from pymllm.server.nodes import follow_on_node

    ranks = ranks_of_node(args.tensor_parallel_size, args.nnodes, args.node_rank)
    settings = settings_for_ranks(args.model, {**_model_options(args), "progress": False})
    key = os.environ.get("PYMLLM_RANK_KEY", "")
    say(f"Ranks {ranks.start} to {ranks.stop - 1} follow {args.master_addr} port {args.master_port}.")
    return follow_on_node(ranks, args.tensor_parallel_size, args.master_addr, args.master_port, key, settings)


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of `LLM` that every rank gets."""
    return {
        "adapters": dict(args.adapter),
        **model_arguments(args),
        **engine_arguments(args),
        "check_memory": args.check_memory,
        "expert_parallel": args.expert_parallel,
    }


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


def _serve(
    args: argparse.Namespace,
    listener: socket.socket,
    served: Served | None = None,
    ranks: Ranks | None = None,
) -> int:
    from pymllm.server.listening import configure

    llm, app = make_app(args, ranks)
    config = configure(app, verbose=args.verbose)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    _warn_if_open(args)
    # One line: whoever starts the server waits for it.
    address, cache = f"http://{shown}:{port}", llm.plan.describe_cache()
    greeting = (
        f"Serving {model_names(args)[0]} at {address}/v1 (a page to chat: {address}/). Ctrl+C stops. {cache}; "
        f"{llm.plan.describe_numbers()}."
    )
    if args.chat_template is not None:
        greeting += f" Chats go through {llm.tokenizer.template_for(None).file}."
    server, worker = make_server(config, greeting, served), app.state.service.worker

    def after_the_end(number: int, frame: object) -> None:
        if not server.started:
            os._exit(128 + number)

    # On a signal uvicorn finishes its requests, then raises the signal again for the handler that was there before.
    signal.signal(signal.SIGTERM, after_the_end)
    if served is not None and llm.parallel.leader is not None:
        llm.parallel.leader.on_lost = lambda error: served.replace(str(error), lambda: worker.lose(error))
        # It may have been lost in the meantime.
        llm.parallel.leader.check()
    if served is not None:
        served.take_over()
    # What is there now stays: to look through it for garbage would take some hundred milliseconds, again and again.
    gc.freeze()
    try:
        server.run(sockets=[listener])
        if served is not None and served.lost:
            # The thread that has begun to replace this server ends it.
            threading.Event().wait()
    finally:
        ended = worker.shut_down(LAST_STEP_SECONDS)
        llm.close()
        if not ended:
            # A step that never ends would keep the process.
            os._exit(0 if sys.exc_info()[0] is None else 128 + signal.SIGINT)
    return 0


def _warn_if_open(args: argparse.Namespace) -> None:
    if args.host not in LOOPBACK and args.api_key is None:
        warn("warning: other machines can reach this server, and it has no API key.")


def make_app(args: argparse.Namespace, ranks: Ranks | None = None) -> tuple[LLM, FastAPI]:
    """Load the model, and make its application; a replica of Ray's calls this in its own process.

    ranks: where several ranks meet; None: they are started here.
    """
    from pymllm.api import LLM
    from pymllm.server.access_log import AccessLog
    from pymllm.server.app import create_app

    llm = LLM(**model_options(args), ranks=ranks)
    name, *others = model_names(args)
    access_log = args.access_log or ("text" if args.verbose else None)
    app = create_app(
        llm,
        model_name=name,
        other_names=others,
        api_key=args.api_key,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        limits=limits_of(args),
        cors=args.cors,
        allowed_hosts=[*args.allowed_host, args.host],
        access_log=None if access_log is None else AccessLog(sys.stderr, access_log),
        open_metrics=args.open_metrics,
    )
    return llm, app


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the keywords of the `LLM` that is served."""
    return {
        "model": args.model,
        **_model_options(args),
        **({} if args.step_ms is None else {"step_ms": args.step_ms}),
        "pooling": args.pooling,
        **text_arguments(args),
        "tensor_parallel_size": args.tensor_parallel_size,
    }


def model_names(args: argparse.Namespace) -> list[str]:
    """Return what clients may call the model; answers bear the first name."""
    return args.model_name or [SHIPPED_NAME if args.model is None else served_name(args.model)]


def served_name(model: str) -> str:
    """Return the name that clients call the model: a hub id as it is, a folder's last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def make_server(config: uvicorn.Config, greeting: str, served: Served | None = None) -> uvicorn.Server:
    """Make a server that says when it listens, finishes its requests on a signal, and stops at once on a second one.

    served: the parent that is told, too; one signal may then come twice, from it and from whoever has sent it.
    """
    from pymllm.server.listening import DrainingServer

    def tell() -> None:
        say(greeting)
        if served is not None:
            served.say(serving=True)

    return DrainingServer(
        config,
        on_listening=tell,
        on_stopping=lambda: say("Finishing the requests under way; Ctrl+C once more stops at once."),
        same_signal_seconds=0.0 if served is None else SAME_SIGNAL_SECONDS,
    )
