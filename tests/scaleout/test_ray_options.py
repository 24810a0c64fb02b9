"""`pymllm serve --ray` without Ray: its options, what a rank takes, what a replica is sent, and its health."""

from __future__ import annotations

import argparse
import asyncio
import pickle
import sys

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from pymllm.cli import main, ray_application, ray_serve, serve
from pymllm.errors import ConfigError
from pymllm.server import ray_app
from pymllm.server.ray_app import Scale


@pytest.mark.parametrize(
    ("text", "numbers"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4)), ("0:2", (0, 2))]
)
def test_replicas_are_a_number_or_a_range(text, numbers):
    assert ray_application.parse_command(["--replicas", text]).replicas == numbers


@pytest.mark.parametrize("text", ["0", "-1", "2:1", "0:0", "a", "1:", ":2", "1:2:3", "1.5", "", "²"])
def test_what_is_no_number_of_replicas_is_refused(text):
    with pytest.raises(ConfigError, match="replica"):
        ray_application.parse_command(["--replicas", text])


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "inf", "x"])
def test_what_ray_cannot_set_aside_is_refused(text):
    with pytest.raises(ConfigError, match="fraction below 1"):
        ray_application.parse_command(["--cpus-per-rank", text])


@pytest.mark.parametrize(
    "words", [["--replicas", "2"], ["--cpus-per-rank", "2"], ["--routing", "load"], ["--ray-address", "auto"]]
)
def test_options_of_ray_need_ray(words, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["serve", *words]) == 2
    assert f"{words[0]} needs --ray" in capsys.readouterr().err


def test_a_variable_of_ray_s_alone_asks_for_nothing(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args([])
    args.parser = parser
    serve.check_arguments(args)


def test_a_free_port_of_this_machine_is_none_of_the_cluster(capsys):
    assert main(["serve", "--ray", "--ray-address", "auto", "--port", "0"]) == 2
    assert "choose one for the cluster" in capsys.readouterr().err


def test_machines_of_ranks_are_none_of_ray_s(capsys):
    words = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-port", "1"]
    assert main(["serve", "--ray", *words]) == 2
    assert "--nnodes is for ranks without Ray" in capsys.readouterr().err


def test_a_missing_ray_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    assert main(["serve", "--ray"]) == 1
    brought = capsys.readouterr().err.partition("pip install ")[2]
    assert "'ray[serve]>=" in brought and "'uvicorn" in brought  # of its own, and of the extra that it names


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "80"],
        ["--host", "0.0.0.0"],
        ["--ray-address", "auto"],
        ["--no-such"],
        ["--max-running", "0"],
    ],
)
def test_a_serve_config_is_refused_what_it_says_elsewhere(words):
    with pytest.raises(ConfigError) as refused:
        ray_application.parse_command(["model", *words])
    assert words[0] in str(refused.value)


@pytest.mark.parametrize("args", [{}, {"command": "model"}, {"command": [1]}, {"command": [], "model": "m"}])
def test_args_of_a_serve_config_are_a_command(args):
    with pytest.raises(ConfigError, match="command"):
        ray_application.application(args)


def test_what_is_sent_to_a_replica_means_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "rules").write_text("# first\n**.mlp.**=fp8\n")
    words = [
        "model",
        "--adapter",
        "a=lora",
        "--adapter",
        "b=org/name",
        "--quant",
        "lm_head=int8:group_size=32",
    ]
    words += ["--quant-file", "rules", "--kv-cache", "fp8", "--api-key", "k", "--max-running", "3"]
    args = ray_serve.portable(ray_application.parse_command(words))
    assert args.model == str(tmp_path / "model")
    assert args.adapter == [("a", str(tmp_path / "lora")), ("b", "org/name")]
    assert args.quant == ["lm_head=int8:group_size=32", "**.mlp.**=fp8"]
    assert args.kv_cache == ["**=fp8"]
    assert vars(pickle.loads(pickle.dumps(args))) == vars(args)
    options = serve.model_options(args)
    assert options["quant"] == args.quant and options["adapters"] == dict(args.adapter)


def test_a_hub_id_is_sent_as_it_is():
    assert ray_serve.portable(ray_application.parse_command(["org/name"])).model == "org/name"


# By hand: 2 machines of 8 and 6 CPUs hold 3 ranks of 4, or 7 ranks of 2, but only one of 8.
MACHINES = [{"CPU": 8.0}, {"CPU": 6.0}, {"GPU": 1.0}]


@pytest.mark.parametrize(
    ("replicas", "ranks", "cpus"),
    [
        (1, 1, 8),
        (2, 1, 6),
        (3, 1, 4),
        (4, 1, 3),
        (7, 1, 2),
        (14, 1, 1),
        (15, 1, 1),
        (1, 2, 4),
        (3, 2, 2),
        (0, 1, 8),
    ],
)
def test_ranks_get_as_many_cpus_as_let_all_run(replicas, ranks, cpus):
    assert ray_app.cpus_of_a_rank(MACHINES, replicas, ranks, gpus=0) == cpus


def test_a_rank_beside_a_gpu_gets_one_cpu():
    assert ray_app.cpus_of_a_rank(MACHINES, 1, 1, gpus=1) == 1
    assert ray_app.cpus_of_a_rank([], 1, 1, gpus=0) == 1


@pytest.mark.parametrize(
    ("scale", "fits"),
    [
        (Scale(3, 3, cpus=4), True),
        (Scale(4, 4, cpus=4), False),
        (Scale(1, 9, cpus=8), True),  # the others may find room later
        (Scale(1, 1, ranks=2, cpus=4), True),
        (Scale(2, 2, ranks=2, cpus=4), False),  # the ranks of a replica share a machine
        (Scale(140, 140, cpus=0.1), True),
        (Scale(141, 141, cpus=0.1), False),
        (Scale(1, 1, cpus=1, gpus=1), False),  # the machine with a GPU has no CPU here
    ],
)
def test_replicas_that_do_not_fit_are_refused(scale, fits):
    if fits:
        ray_app.check_room(MACHINES, scale)
    else:
        with pytest.raises(ConfigError, match="do not fit"):
            ray_app.check_room(MACHINES, scale)


@pytest.mark.parametrize(
    ("scale", "bundle"),
    [
        (Scale(cpus=0.5), {"CPU": 0.5}),
        (Scale(cpus=2, ranks=4), {"CPU": 8}),
        (Scale(cpus=0.5, ranks=2), {"CPU": 1}),
        (Scale(cpus=0.3, ranks=4), {"CPU": 2}),  # 1.2, and Ray has no fractions above one
        (Scale(cpus=0.1, ranks=10), {"CPU": 1}),
        (Scale(cpus=1, gpus=1, ranks=8), {"CPU": 8, "GPU": 8}),
    ],
)
def test_a_replica_takes_what_all_its_ranks_need(scale, bundle):
    assert scale.bundle == bundle


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (500, False)])
def test_a_replica_is_as_healthy_as_its_application_says(status, healthy):
    app = FastAPI()

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "a rank is silent"}, status)

    replica = ray_app.ModelReplica(lambda: (None, app))
    assert replica.__serve_build_asgi_app__() is app
    if healthy:
        asyncio.run(replica.check_health())
    else:
        with pytest.raises(RuntimeError, match=f"{status}.*a rank is silent"):
            asyncio.run(replica.check_health())


def test_the_error_of_a_replica_is_found_in_what_ray_says():
    said = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:pymllm:model.initialize_and_get_metadata() (pid=1, ip=10.0.0.1, actor_id=2)
  File "somewhere.py", line 5, in find
    raise ConfigError(
pymllm.errors.ConfigError: 'x' is no folder; expected one. Check the spelling.

The above exception was the direct cause of the following exception:

ray::ServeReplica:pymllm:model.initialize_and_get_metadata() (pid=1, ip=10.0.0.1, actor_id=2)
RuntimeError: Traceback (most recent call last):
pymllm.errors.ConfigError: 'x' is no folder; expected one. Check the spelling."""
    assert ray_serve.reason_in(said) == "'x' is no folder; expected one. Check the spelling."
    assert ray_serve.reason_in("no room\n") == "no room"
