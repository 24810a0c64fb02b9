"""`pymllm serve --ray`: its options, and the server's options for replicas that Ray starts.  docs/scale-out.md."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.output import say
from pymllm.gpus import named_gpu

if TYPE_CHECKING:
    from pymllm.server.ray_app import Scale

# How often the replicas are counted, to say when one is gone or there again.
COUNT_SECONDS = 2.0
ROUTINGS = ("load", "session")


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server on Ray."""
    group = parser.add_argument_group("several machines, or several replicas on one (Ray Serve)")
    group.add_argument(
        "--ray", action="store_true", help="let Ray start replicas of the model, and send each request to one"
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        default=os.environ.get("RAY_ADDRESS"),
        help="a cluster that runs: auto for this machine's, or HOST:PORT; default: RAY_ADDRESS, or else Ray is started "
        "here and ended with the server",
    )
    group.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN:MAX",
        help="how many replicas run; MIN:MAX lets Ray choose by load; default: 1",
    )
    group.add_argument(
        "--cpus-per-rank",
        type=_cpus,
        metavar="N",
        help="CPUs that Ray sets aside for each rank, which is also its number of threads; default: what lets all "
        "replicas run, or 1 beside a GPU",
    )
    group.add_argument(
        "--routing",
        choices=ROUTINGS,
        help="who gets a request: the less loaded of two replicas (load, the default), or always the same one for the "
        "same x-session-id header, whose prefix cache then knows the conversation (session)",
    )


def check_ray_options(args: argparse.Namespace) -> None:
    """Refuse options of Ray without --ray, and those that Ray's replicas cannot have."""
    given = {"--replicas": args.replicas, "--cpus-per-rank": args.cpus_per_rank, "--routing": args.routing}
    if args.ray_address != os.environ.get("RAY_ADDRESS"):
        given["--ray-address"] = args.ray_address
    for option, value in given.items():
        if value is not None and not args.ray:
            args.parser.error(f"{option} needs --ray")
    if args.ray and args.nnodes > 1:
        args.parser.error("--nnodes is for ranks without Ray; the ranks of a replica on Ray share a machine")
    if args.ray and named_gpu(args.device) is not None:
        args.parser.error(
            f"--device {args.device}: Ray chooses the GPUs of its replicas; ask for --device cuda"
        )
    if args.ray and args.port == 0 and args.ray_address is not None:
        args.parser.error("--port 0 takes a free port of this machine alone: choose one for the cluster")


def serve_on_ray(args: argparse.Namespace, make_app: Callable[..., Any], name: str) -> int:
    """Run `pymllm serve --ray` until a signal ends it.  Returns the exit code.

    make_app: makes a replica's application of `args`, in its process.  name: what clients call the model.
    """
    stop = _Stop()
    with _cluster(args), _deployed(args, make_app) as scale:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop.handle)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{args.port}/v1"
        say(f"Serving {name} at {url} on Ray: {scale.describe()}. Ctrl+C stops.")
        _watch(stop, scale)
        say("Finishing the requests under way; Ctrl+C once more stops at once.")
    # As a program that Ctrl+C ends without a word.
    return 128 + signal.SIGINT if stop.signal == signal.SIGINT else 0


def check_ray() -> None:
    """Raise MissingExtraError where Ray Serve is not installed."""
    from pymllm.errors import MissingExtraError

    try:
        importlib.import_module("ray.serve")
    except ImportError as error:
        raise MissingExtraError(error.name or "ray.serve", "ray", "pymllm serve --ray") from None


def describe(args: argparse.Namespace, make_app: Callable[..., Any], scale: Scale) -> Any:
    """Describe the deployment to Ray."""
    from pymllm.server.ray_app import application

    make = functools.partial(make_app, portable(args))
    return application(
        make,
        scale,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        drain_seconds=args.drain_seconds,
    )


def portable(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options such that they can be sent, and mean the same in another folder.

    Folders become absolute, and files of rules are read here. The model's own files must be on every machine, under the
    same path; a hub id is fetched by each.
    """
    from pymllm.quantization.rules import read_kv_rules, read_rules

    options = {name: value for name, value in vars(args).items() if name not in ("parser", "execute")}
    options["model"] = None if args.model is None else _absolute(args.model)
    options["adapter"] = [(name, _absolute(folder)) for name, folder in args.adapter]
    for name, read in (("quant", read_rules), ("kv_cache", read_kv_rules)):
        if options[name] is not None:
            options[name] = [str(rule) for rule in read(options[name])]
    return argparse.Namespace(**options)


def _absolute(place: str) -> str:
    return str(Path(place).resolve()) if Path(place).exists() else place


def scale_of(args: argparse.Namespace) -> Scale:
    """Decide how many replicas there are, and on what; the cluster must be connected."""
    import ray

    from pymllm.server.ray_app import Scale, cpus_of_a_rank

    fewest, most = args.replicas or (1, 1)
    machines = machines_of_the_cluster()
    has_gpus = any(machine.get("GPU", 0) for machine in machines)
    gpus = int(args.device.startswith("cuda") or (args.device == "auto" and has_gpus))
    ranks = args.tensor_parallel_size
    cpus = args.cpus_per_rank or cpus_of_a_rank(machines, most, ranks, gpus)
    assert ray.is_initialized()
    return Scale(fewest, most, ranks, cpus, gpus, args.routing or "load")


def machines_of_the_cluster() -> list[Mapping[str, float]]:
    """List what each machine that is there has, in Ray's names."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def _cluster(args: argparse.Namespace) -> Iterator[None]:
    """Connect to the cluster, or start one here that ends with the block."""
    import ray

    from pymllm.errors import ConfigError

    if args.ray_address is None:
        # Ray counts its users by requests to its makers' server, unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=args.ray_address or "local",
            logging_level=logging.INFO if args.verbose else logging.ERROR,
            log_to_driver=args.verbose,
            **({"include_dashboard": False} if args.ray_address is None else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the Ray cluster {args.ray_address or 'on this machine'} cannot be reached or started: {error}",
            code="ray-address",
            fix="`ray status` tells whether one runs; docs/scale-out.md starts one.",
        ) from None
    # Ray has put a handler of its own there, whose exit code says nothing.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _deployed(args: argparse.Namespace, make_app: Callable[..., Any]) -> Iterator[Scale]:
    """Start the replicas, wait until they answer, and take them away after the block, their requests finished."""
    from ray import serve

    from pymllm.server.ray_app import APP_NAME, check_room

    scale = scale_of(args)
    if args.ray_address is None:
        # A cluster that grows by itself may make room yet.
        check_room(machines_of_the_cluster(), scale)
    level = "INFO" if args.verbose else "ERROR"
    logging.getLogger("ray.serve").setLevel(level)
    serve.start(
        http_options={"host": args.host, "port": args.port},
        proxy_location="EveryNode",
        logging_config={"log_level": level, "enable_access_log": args.verbose},
    )
    try:
        _run(describe(args, make_app, scale))
        yield scale
    finally:
        serve.delete(APP_NAME)


def _run(described: Any) -> None:
    """Start replicas, and wait until they answer.  ConfigError with their own reason where they do not start."""
    from ray import serve

    from pymllm.errors import ConfigError
    from pymllm.server.ray_app import APP_NAME

    try:
        serve.run(described, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise ConfigError(
            f"the replicas did not start: {reason_in(deployment_message() or str(error))}",
            code="ray-start",
            fix="Their logs are in the folder logs/serve of Ray's session, on the machine where each ran.",
        ) from None


def deployment_message() -> str:
    """Return what Ray says of the deployment, with a traceback where a replica failed."""
    from ray import serve

    from pymllm.server.ray_app import APP_NAME

    found = serve.status().applications.get(APP_NAME)
    return "" if found is None else "\n".join(one.message for one in found.deployments.values())


def reason_in(message: str) -> str:
    """Find the error in a message of Ray's, which has it at the end of a traceback of its own layers' and ours."""
    errors = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.+)$", message, re.MULTILINE)
    ours = [text for name, text in errors if name != "RayTaskError"]
    return (ours or [message.strip()])[-1]


class _Stop(threading.Event):
    """A signal to stop; a second one ends the process at once.  signal: which one it was, 0 until then."""

    signal = 0

    def handle(self, number: int, frame: Any) -> None:
        if self.is_set():
            os._exit(128 + number)
        self.signal = number
        self.set()


def running_replicas() -> int:
    """Count the replicas that answer."""
    from ray import serve

    from pymllm.server.ray_app import APP_NAME, DEPLOYMENT_NAME

    found = serve.status().applications[APP_NAME].deployments[DEPLOYMENT_NAME]
    return found.replica_states.get("RUNNING", 0)


def _watch(stop: threading.Event, scale: Scale) -> None:
    """Say how many replicas answer whenever that changes, until a signal comes.

    Raises ConfigError where the cluster is gone.
    """
    from pymllm.errors import ConfigError

    last = running_replicas()
    while not stop.wait(COUNT_SECONDS):
        try:
            now = running_replicas()
        except Exception as error:
            raise ConfigError(
                f"the Ray cluster does not answer, or the server was removed from it: {error}",
                code="ray-gone",
            ) from None
        if now != last:
            say(f"{now} replica{'' if now == 1 else 's'} running, {last} before; {scale.describe()} wanted.")
        last = now


def _replicas(text: str) -> tuple[int, int]:
    """Read N or MIN:MAX."""
    fewest, colon, most = text.partition(":")
    if not all(part.isascii() and part.isdecimal() for part in ([fewest, most] if colon else [fewest])):
        raise argparse.ArgumentTypeError(f"expected N or MIN:MAX, e.g. 2 or 1:4, not {text!r}")
    numbers = int(fewest), int(most) if colon else int(fewest)
    if numbers[1] < 1 or numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(
            f"expected at least 1 replica, and MIN no more than MAX, not {text!r}"
        )
    return numbers


def _cpus(text: str) -> float:
    """Read a number of CPUs above 0: an integer, or less than one, since Ray has no fractions above one."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 100000 or (number > 1 and number != int(number)):
        raise argparse.ArgumentTypeError(f"expected an integer, or a fraction below 1, not {text!r}")
    return number
