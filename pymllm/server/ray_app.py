"""The application of `app.py` as a Ray Serve deployment: replicas of one model, on one machine or several.

Ray does the cluster's work: it places the replicas, sends each request to one, watches them, starts others in place of
those that are gone, and adds and removes them by their load. A replica is one actor, with the model and the whole
application, and a placement group for all its ranks, which are processes that it starts.  The page: docs/scale-out.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pymllm.errors import ConfigError
from pymllm.server.gate import OPEN_PATH

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp, Message

    from pymllm.api import LLM

APP_NAME = "pymllm"
DEPLOYMENT_NAME = "model"

# What a replica gets beyond the prompts that run or wait in it: calls of /health, and requests that it refuses itself,
# with JSON that clients know. Where every replica has that many, requests wait in Ray's proxy, and as many again.
SPARE_REQUESTS = 64
# What the proxy tells whoever finds no room there either.
RETRY_AFTER_SECONDS = 5

# Ray replaces a replica that was not healthy three times.
HEALTH_PERIOD_SECONDS = 1
# A step of the model may hold Python's lock for a while.
HEALTH_TIMEOUT_SECONDS = 10
# A replica that is to go takes no new requests.
DRAIN_SECONDS = 30
# A start that fails is tried again on whichever machine has room. A model that cannot be loaded fails anywhere.
START_TRIES = 3

# Ray averages the load over twice the time for which it must last.
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10, 300

# Ray's own default sends a request to the less loaded of two replicas.
ROUTERS = {
    "load": None,
    "session": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
}


@dataclass(frozen=True)
class Scale:
    """The number of replicas, and what each of their ranks takes of a machine.

    fewest, most: of replicas; where they differ, Ray chooses by load.  ranks: of each replica.
    cpus, gpus: of each rank.  routing: a key of ROUTERS.
    """

    fewest: int = 1
    most: int = 1
    ranks: int = 1
    cpus: float = 1.0
    gpus: int = 0
    routing: str = "load"

    @property
    def bundle(self) -> dict[str, float]:
        """Return what a replica takes of a machine, in Ray's names: all its ranks, which are processes of its own."""
        cpus = self.cpus * self.ranks
        # Ray has no fractions above one.
        whole = cpus if cpus <= 1 else math.ceil(cpus - 1e-9)
        return {"CPU": whole, **({"GPU": self.gpus * self.ranks} if self.gpus else {})}

    def describe(self) -> str:
        """Say how many replicas there are, and on what."""
        count = f"{self.fewest} to {self.most}" if self.fewest < self.most else str(self.most)
        devices = f", {self.gpus} GPU" if self.gpus else ""
        ranks = f"{self.ranks} ranks each, " if self.ranks > 1 else ""
        return f"{count} replica{'s' if self.most > 1 else ''} ({ranks}{self.cpus:g} CPU{devices} a rank)"


class ModelReplica:
    """One replica: the model, and its application.

    load: loads the model and makes its application.  Ray makes a replica in a process of its own.
    """

    def __init__(self, load: Callable[[], tuple[LLM, ASGIApp]]) -> None:
        self.llm, self._application = load()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application that answers this replica's requests; Ray calls this once."""
        return self._application

    async def check_health(self) -> None:
        """Raise RuntimeError unless /health answers 200; Ray calls this, and replaces a replica that keeps raising.

        The application knows best what makes it healthy: its thread, its last step, its ranks.
        """
        status, body = await get(self._application, OPEN_PATH)
        if status != 200:
            raise RuntimeError(f"{OPEN_PATH} answers {status}: {body.decode(errors='replace')}")


async def get(app: ASGIApp, path: str) -> tuple[int, bytes]:
    """GET a path of an ASGI application, without a socket.  Returns the status and the body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost")],
        "client": None,
        "server": None,
    }
    status, body = 0, bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, body
        status = message.get("status", status)
        body += message.get("body", b"")

    await app(scope, receive, send)
    return status, bytes(body)


def application(
    load: Callable[[], tuple[LLM, ASGIApp]],
    scale: Scale,
    *,
    max_running: int,
    max_waiting: int,
    drain_seconds: float = DRAIN_SECONDS,
) -> Application:
    """Describe the deployment to Ray, which makes the replicas from it.

    load: loads the model and makes its application, in each replica's process; paths that it knows must lead to the
    same files on every machine.  max_running, max_waiting: of each replica.  drain_seconds: how long requests may go on
    in a replica that is to go.
    """
    from ray import serve

    most = max_running + max_waiting + SPARE_REQUESTS
    router = ROUTERS[scale.routing]
    deployment = serve.deployment(
        serve.ingress()(ModelReplica),
        name=DEPLOYMENT_NAME,
        ray_actor_options={
            "num_cpus": scale.bundle["CPU"],
            "num_gpus": scale.bundle.get("GPU", 0),
            # Ray would give each rank as many threads as all of them have CPUs.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(scale.cpus)))}},
        },
        # One bundle: the ranks of a replica exchange tensors in every layer, and share a machine.
        placement_group_bundles=[scale.bundle],
        placement_group_strategy="STRICT_PACK",
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"status_code": 503, "retry_after_s": RETRY_AFTER_SECONDS},
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=drain_seconds,
        max_constructor_retry_count=START_TRIES,
        **({} if router is None else {"request_router_config": {"request_router_class": router}}),
        **_count(scale, max_running),
    )
    return deployment.bind(load)


def _count(scale: Scale, running: int) -> dict[str, Any]:
    """Say how many replicas Ray keeps: so many, or by the requests that each would have.

    running: how many prompts a replica answers together. Where there are more, some of them wait.
    """
    if scale.fewest == scale.most:
        return {"num_replicas": scale.most}
    return {
        "autoscaling_config": {
            "min_replicas": scale.fewest,
            "max_replicas": scale.most,
            "target_ongoing_requests": running,
            "upscale_delay_s": UPSCALE_SECONDS,
            "look_back_period_s": 2 * UPSCALE_SECONDS,
            "downscale_delay_s": DOWNSCALE_SECONDS,
        }
    }


def cpus_of_a_rank(machines: Sequence[Mapping[str, float]], replicas: int, ranks: int, gpus: int) -> int:
    """Choose how many CPUs a rank takes: on CPUs as many as let all replicas run, beside a GPU one.

    machines: what each has, in Ray's names.  Returns at least 1.
    """
    if gpus:
        return 1
    sizes = [math.floor(machine.get("CPU", 0)) for machine in machines]
    fitting = (
        cpus for cpus in range(1, max(sizes, default=1) + 1) if room(sizes, cpus * ranks) >= max(replicas, 1)
    )
    return max(fitting, default=1)


def room(sizes: Sequence[float], size: float) -> int:
    """Count the pieces of one size that the sizes hold, none across two of them."""
    # A tenth of a CPU is no binary fraction.
    return sum(math.floor(held / size + 1e-9) for held in sizes)


def check_room(machines: Sequence[Mapping[str, float]], scale: Scale) -> None:
    """Raise ConfigError if the machines cannot hold the fewest replicas.

    machines: what each has, in Ray's names.
    """
    fitting = sum(
        min(room([machine.get(name, 0)], size) for name, size in scale.bundle.items() if size)
        for machine in machines
    )
    if fitting < scale.fewest:
        raise ConfigError(
            "the replicas do not fit on the machines of the cluster",
            code="ray-room",
            expected=f"room for {scale.fewest} replicas of {json.dumps(scale.bundle)}",
            found=f"room for {fitting}",
            fix="Choose fewer --replicas, a smaller --cpus-per-rank, or add machines.",
        )
