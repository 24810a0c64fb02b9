"""deploy/: what the images, the unit and the manifests name is there, and their command lines are ours."""

from __future__ import annotations

import configparser
import importlib
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pymllm.cli import _parse, _parser, serve
from pymllm.cli.ray_application import parse_command
from pymllm.server.gate import OPEN_PATH
from tests.processes import ROOT, run

DEPLOY = ROOT / "deploy"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
IMAGES = {"pymllm:latest": "Dockerfile", "pymllm:ray": "Dockerfile", "pymllm:cuda": "Dockerfile.cuda"}
# What the LeaderWorkerSet controller sets in every container of a group, here for the second machine of two.
OF_THE_GROUP = {
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "LWS_LEADER_ADDRESS": "pymllm-0.pymllm.default",
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def instructions(name: str) -> list[tuple[str, str]]:
    """Read a Dockerfile: each instruction and its argument, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in lines]


def entrypoint(name: str) -> list[str]:
    (line,) = [rest for word, rest in instructions(name) if word == "ENTRYPOINT"]
    words: list[str] = yaml.safe_load(line)  # the form of a list, which needs no shell
    return words


def parsed(words: list[str]) -> Any:
    """Parse a whole command line as `pymllm` does, and check it as far as can be done without a model."""
    program, *argv = words
    assert Path(program).name == "pymllm" and argv[0] == "serve"
    args = _parse(_parser(argv), argv)
    serve.check_arguments(args)
    return args


def drain_seconds(args: Any) -> float:
    return args.drain_seconds if getattr(args, "drain_seconds", None) is not None else 30


def pods(name: str) -> list[tuple[str, dict[str, Any]]]:
    """List the pod templates of a manifest, each with where it stands."""
    found = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            if "containers" in value.get("spec", {}):
                found.append((path, value))
                return
            for key, below in value.items():
                walk(below, f"{path}.{key}")
        elif isinstance(value, list):
            for index, below in enumerate(value):
                walk(below, f"{path}[{index}]")

    for document in documents(name):
        walk(document, document["kind"])
    return found


PAGE = (ROOT / "docs" / "scale-out.md").read_text()
COMMANDS = re.findall(r"^pymllm serve .+?(?=  +#|$)|(?<=`)pymllm serve [^`]+(?=`)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_s_commands_are_those_of_our_command_line(command):
    args = parsed(shlex.split(command))
    assert args.ray is ("--ray" in command)


def test_the_page_has_the_commands_the_config_and_the_table():
    assert len(COMMANDS) >= 8
    config = yaml.safe_load(PAGE.split("```yaml")[1].split("```")[0])
    (app,) = config["applications"]
    (service,) = documents("kuberay.yaml")
    there = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]
    assert app["import_path"] == there["import_path"]
    assert parse_command(app["args"]["command"]).replicas == parse_command(there["args"]["command"]).replicas
    table = (ROOT / "benchmarks" / "results" / "sizing.md").read_text().split("\n\n", 1)[1]
    assert table in PAGE


MANIFESTS = ("kubernetes.yaml", "kuberay.yaml", "leaderworkerset.yaml")
PODS = [pytest.param(name, pod, id=f"{name}:{where}") for name in MANIFESTS for where, pod in pods(name)]
# KubeRay runs `ray start` in its containers; ours run the image's command.
SERVERS = [param for param in PODS if param.values[0] != "kuberay.yaml"]


def command_of(container: dict[str, Any]) -> list[str]:
    """Return what a container runs: the image's words, then its own, with the variables that Kubernetes puts in."""
    assert "command" not in container
    values = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one} | OF_THE_GROUP
    words = [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], word) for word in container["args"]]
    return entrypoint(IMAGES[container["image"]]) + words


def test_the_manifests_have_as_many_pods_as_they_should():
    assert [len(pods(name)) for name in MANIFESTS] == [1, 2, 2]


@pytest.mark.parametrize(("name", "pod"), SERVERS)
def test_a_container_s_words_are_those_of_our_command_line(name, pod):
    for container in pod["spec"]["containers"]:
        args = parsed(command_of(container))
        assert args.host == "0.0.0.0", "kubelet's probes come from outside the pod"
        stop = (
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        )
        assert stop[0] == "sleep"
        spare = pod["spec"]["terminationGracePeriodSeconds"] - float(stop[1]) - drain_seconds(args)
        assert spare >= 10, "SIGKILL would come before the requests are finished"
        if "ports" in container:
            ports = {one["name"]: one["containerPort"] for one in container["ports"]}
            assert args.port in ports.values()
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container[probe]["httpGet"]
                assert asked["path"] == OPEN_PATH and ports[asked["port"]] == args.port
            assert (
                container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
                >= 600
            )
        else:
            assert args.node_rank != 0, "a pod that serves has a port"


@pytest.mark.parametrize(("name", "pod"), PODS)
def test_a_pod_mounts_its_own_volumes_and_asks_for_what_it_may_have(name, pod):
    volumes = {one["name"] for one in pod["spec"].get("volumes", [])}
    for container in pod["spec"]["containers"]:
        assert container["image"] in IMAGES
        mounted = {one["name"] for one in container.get("volumeMounts", [])}
        assert mounted == volumes
        limits, requests = (container["resources"].get(key, {}) for key in ("limits", "requests"))
        assert "memory" in limits
        assert all(limits.get(key, value) == value for key, value in requests.items())
        # Only the image's own folders, and /tmp and /dev/shm, which every machine has.
        folders = {one["mountPath"] for one in container.get("volumeMounts", [])}
        assert folders <= {"/home/pymllm/hub", "/tmp", "/dev/shm"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_secrets_are_made_by_the_command_above_and_variables_are_read_by_us(name):
    made = re.findall(
        r"^#   kubectl create secret generic (\S+) --from-literal=(\w+)=", (DEPLOY / name).read_text(), re.M
    )
    used, source = set(), "".join(path.read_text() for path in (ROOT / "pymllm").rglob("*.py"))
    for _, pod in pods(name):
        for variable in (one for container in pod["spec"]["containers"] for one in container.get("env", [])):
            if (secret := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                used.add((secret["name"], secret["key"]))
            if variable["name"].startswith("PYMLLM_"):
                assert f'"{variable["name"]}"' in source
    assert used == set(made)


@pytest.mark.parametrize("name", ["kubernetes.yaml", "leaderworkerset.yaml"])
def test_services_lead_to_ports_of_pods(name):
    services = [document for document in documents(name) if document["kind"] == "Service"]
    assert len(services) == 1
    chosen = [
        pod
        for _, pod in pods(name)
        if services[0]["spec"]["selector"].items() <= pod.get("metadata", {}).get("labels", {}).items()
    ]
    assert len(chosen) == 1, "the pods of a LeaderWorkerSet that are no leaders answer nobody"
    names = {port["name"] for container in chosen[0]["spec"]["containers"] for port in container["ports"]}
    assert all(port["targetPort"] in names for port in services[0]["spec"]["ports"])


def test_the_deployment_chooses_its_own_pods():
    (deployment,) = [one for one in documents("kubernetes.yaml") if one["kind"] == "Deployment"]
    assert (
        deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    )


def test_the_group_is_as_large_as_its_ranks_need():
    (group,) = [one for one in documents("leaderworkerset.yaml") if one["kind"] == "LeaderWorkerSet"]
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == int(OF_THE_GROUP["LWS_GROUP_SIZE"])
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    for key in ("leaderTemplate", "workerTemplate"):
        (container,) = template[key]["spec"]["containers"]
        args = parsed(command_of(container))
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert args.tensor_parallel_size == template["size"] * gpus
        assert args.nnodes == template["size"]


def test_the_rayservice_runs_our_application():
    (service,) = documents("kuberay.yaml")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (app,) = config["applications"]
    module, _, name = app["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    args = parse_command(app["args"]["command"])
    cluster = service["spec"]["rayClusterConfig"]
    ray = re.search(r"^ray==(\S+)", CONSTRAINTS, re.MULTILINE)
    assert ray is not None and cluster["rayVersion"] == ray[1]
    containers = [
        container
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    ]
    ports = [{port["name"]: port["containerPort"] for port in one["ports"]} for one in containers]
    assert all(one["serve"] == config["http_options"]["port"] for one in ports)
    assert config["http_options"]["host"] == "0.0.0.0"
    (group,) = cluster["workerGroupSpecs"]
    assert float(containers[1]["resources"]["limits"]["cpu"]) == args.cpus_per_rank
    assert args.replicas == (group["minReplicas"], group["maxReplicas"])
    assert all(group["rayStartParams"] is not None for group in (cluster["headGroupSpec"], group))
    assert drain_seconds(args) + 10 <= group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_ray_s_own_schema_takes_the_serve_config():
    schema = pytest.importorskip("ray.serve.schema")
    (service,) = documents("kuberay.yaml")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))


@pytest.mark.parametrize(("name", "pod"), PODS)
def test_kubernetes_schemas_take_the_pods(name, pod):
    validate = pytest.importorskip("kubernetes_validate")
    # A pod template of any kind of object stands in a Deployment's place.
    labels = {"app": "x", **pod.get("metadata", {}).get("labels", {})}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "x"},
        "spec": {
            "selector": {"matchLabels": {"app": "x"}},
            "template": {**pod, "metadata": {"labels": labels}},
        },
    }
    validate.validate(deployment, "1.37", strict=True)


@pytest.mark.parametrize("name", ["kubernetes.yaml", "leaderworkerset.yaml"])
def test_kubernetes_schemas_take_its_own_kinds(name):
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(name):
        if document["kind"] in ("Deployment", "Service"):
            validate.validate(document, "1.37", strict=True)


KNOWN = {
    "ARG",
    "FROM",
    "RUN",
    "WORKDIR",
    "COPY",
    "USER",
    "ENV",
    "EXPOSE",
    "HEALTHCHECK",
    "STOPSIGNAL",
    "ENTRYPOINT",
}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_built_from_files_that_are_there(name):
    found = instructions(name)
    assert {word for word, _ in found} <= KNOWN
    stages = [re.search(r" AS (\w+)$", rest) for word, rest in found if word == "FROM"]
    names = {stage[1] for stage in stages if stage is not None}
    assert stages[-1] is None
    for word, rest in found:
        if word == "COPY" and (stage := re.match(r"--from=(\w+) ", rest)) is not None:
            assert stage[1] in names
    # The last stage runs as nobody in particular, with no compiler's leftovers of the index.
    users = [rest for word, rest in found if word == "USER"]
    assert users and users[-1].isdecimal() and int(users[-1]) > 0
    for word, rest in found:
        if word == "RUN" and "apt-get install" in rest:
            assert rest.startswith("apt-get update &&") and "rm -rf /var/lib/apt/lists/*" in rest
            assert "--no-install-recommends" in rest and "--yes" in rest


def test_the_images_are_built_from_what_pyproject_needs():
    taken = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / name).exists() for name in taken)
    named = {"pyproject.toml", "constraints.txt", "CMakeLists.txt", "kernels", "pymllm"}
    named |= {re.search(r'^path = "(.+)"', PYPROJECT, re.MULTILINE)[1]}  # of the page that an index shows
    named |= set(re.findall(r'"(\w+)"', re.search(r"^license-files = \[(.+)\]", PYPROJECT, re.MULTILINE)[1]))
    assert set(taken) == named


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_serves(name):
    found = instructions(name)
    args = parsed(entrypoint(name))
    assert args.host == "0.0.0.0"
    assert dict(found)["EXPOSE"] == str(args.port)
    assert f"http://127.0.0.1:{args.port}{OPEN_PATH}" in dict(found)["HEALTHCHECK"]
    extras = set(
        re.findall(r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1], re.MULTILINE)
    )
    (default,) = [rest for word, rest in found if word == "ARG" and rest.startswith("EXTRAS=")]
    said = re.findall(r"EXTRAS=([\w,]+)", (DEPLOY / name).read_text())
    for chosen in [default.split('"')[1], *said]:
        assert set(chosen.split(",")) <= extras
    python = next(rest for word, rest in found if word == "ARG" and rest.startswith("PYTHON="))
    least = re.search(r'requires-python = ">=3\.(\d+)"', PYPROJECT)[1]
    assert int(python.partition("3.")[2]) >= int(least)


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read(DEPLOY / "pymllm.service")
    return parser


def test_the_unit_runs_our_command_and_lets_it_finish():
    service = unit()["Service"]
    args = parsed(shlex.split(service["ExecStart"]))
    assert args.host in serve.LOOPBACK, "its key may be missing"
    assert service["KillMode"] == "mixed", "SIGTERM to the server's workers would end requests under way"
    assert float(service["TimeoutStopSec"]) >= drain_seconds(args) + 10


def test_systemd_takes_the_unit(tmp_path):
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("there is no systemd-analyze")
    text = (DEPLOY / "pymllm.service").read_text()
    # It wants the program to be there.
    there = tmp_path / "pymllm.service"
    there.write_text(text.replace("/opt/pymllm/bin/pymllm", "/bin/true"))
    done = run([analyze, "verify", "--man=no", str(there)])
    assert done.returncode == 0 and "pymllm.service" not in done.stderr, done.stderr
