"""The files of `deploy/` start what there is, ask for paths that are answered, and find each other by their labels."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tests.support.replicas import free_port

from seekforge.runtime.backends.ranks.nodes import SECRET
from seekforge.runtime.cli import main as cli
from seekforge.runtime.cli.serve import serve
from seekforge.runtime.ray.application import API_KEY, DEPLOYMENT, ApplicationArguments
from seekforge.runtime.server.app import ROUTES

ROOT = Path(__file__).resolve().parents[1]
OPEN = {route.path for route in ROUTES if route.method == "GET" and route.key == "none"}
OBJECTS: dict[str, dict[str, Any]] = {
    one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8"))
}
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
LWS: dict[str, dict[str, Any]] = {
    one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy/leaderworkerset.yaml").read_text(encoding="utf-8"))
}
GROUP = LWS["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
RAY = yaml.safe_load((ROOT / "deploy/kuberay.yaml").read_text(encoding="utf-8"))
SERVE_CONFIG = yaml.safe_load(RAY["spec"]["serveConfigV2"])

#: Fields that the API servers know, of what these files use: an unknown one is dropped or refused there, and said
#: by nobody here. Of Kubernetes' core/v1 and apps/v1, LeaderWorkerSet's v1, KubeRay's ray.io/v1 and the Gateway API's
#: inference extension v1.
POD_FIELDS = {
    "automountServiceAccountToken", "containers", "securityContext", "terminationGracePeriodSeconds", "volumes",
}  # fmt: skip
CONTAINER_FIELDS = {
    "name", "image", "args", "command", "env", "ports", "resources", "securityContext", "startupProbe",
    "readinessProbe", "livenessProbe", "volumeMounts", "lifecycle",
}  # fmt: skip
SPEC_FIELDS = {
    "Deployment": {"replicas", "selector", "strategy", "template"},
    "Service": {"selector", "ports", "type"},
    "InferencePool": {"selector", "targetPorts", "endpointPickerRef"},
    "RayService": {"serveConfigV2", "rayClusterConfig"},
    "LeaderWorkerSet": {"replicas", "leaderWorkerTemplate", "startupPolicy"},
}
GROUP_FIELDS = {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
API_VERSIONS = {
    "Deployment": "apps/v1",
    "Service": "v1",
    "InferencePool": "inference.networking.k8s.io/v1",
    "RayService": "ray.io/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
}
HEAD_FIELDS = {"rayStartParams", "template", "serviceType"}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def pods() -> Iterator[Mapping[str, Any]]:
    """Yield the specification of every pod of these files."""
    yield POD
    yield from (GROUP[f"{role}Template"]["spec"] for role in ("leader", "worker"))
    cluster = RAY["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def options_of(words: list[str]) -> dict[str, Any]:
    """Return what the command makes of its words; it refuses what it does not know."""
    assert words[0] == "serve"
    return serve.make_context("serve", list(words[1:]), resilient_parsing=False).params


@pytest.mark.parametrize("name", SERVICES)
def test_a_composed_service_serves_and_drains(name: str) -> None:
    service = SERVICES[name]
    options = options_of(service["command"])
    assert options["host"] == "0.0.0.0" and service["ports"][0].endswith(f":{options['port']}")
    assert float(service["stop_grace_period"].removesuffix("s")) > options["drain_timeout"]
    stages = (ROOT / "Containerfile").read_text(encoding="utf-8")
    assert f" AS {service['build']['target']}\n" in stages
    assert any(f"{options['port']}{path}'" in service["healthcheck"]["test"][-1] for path in OPEN)
    assert str(options["engine"]) in service["volumes"][0]


def test_every_service_has_an_engine_of_its_own() -> None:
    """The profile `gpu` adds to the other service, which cannot open what is for GPUs."""
    engines = [service["volumes"][0].partition(":-")[0] for service in SERVICES.values()]
    assert len(set(engines)) == len(SERVICES) == 2


def test_probes_ask_for_what_is_answered_without_a_key() -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[probe]["httpGet"]["path"] in OPEN
        assert CONTAINER[probe]["httpGet"]["port"] == CONTAINER["ports"][0]["name"]
    options = options_of(CONTAINER["args"])
    assert options["port"] == CONTAINER["ports"][0]["containerPort"]
    assert POD["terminationGracePeriodSeconds"] > options["drain_timeout"]


def test_objects_find_each_other() -> None:
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert OBJECTS["InferencePool"]["spec"]["selector"]["matchLabels"] == labels
    assert OBJECTS["InferencePool"]["spec"]["targetPorts"] == [{"number": CONTAINER["ports"][0]["containerPort"]}]
    assert OBJECTS["Service"]["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    volumes = {one["name"] for one in POD["volumes"]}
    assert {one["name"] for one in CONTAINER["volumeMounts"]} == volumes


def test_the_metrics_that_a_picker_reads_are_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "runtime").rglob("metrics*.py"))
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    names = [word for word in page.split("`") if word.startswith("vllm:")]
    assert len(names) == 4 and all(name.removeprefix("vllm:") in sources for name in names)


def test_objects_have_fields_that_are_known() -> None:
    assert set(GROUP) <= GROUP_FIELDS and GROUP["restartPolicy"] == "RecreateGroupOnPodRestart"
    for one in (*OBJECTS.values(), RAY, *(LWS[kind] for kind in ("LeaderWorkerSet", "Service", "InferencePool"))):
        kind = one["kind"]
        assert one["apiVersion"] == API_VERSIONS[kind] and set(one) == {"apiVersion", "kind", "metadata", "spec"}
        assert set(one["spec"]) <= SPEC_FIELDS[kind], kind
    for pod in pods():
        assert set(pod) <= POD_FIELDS
        for container in pod["containers"]:
            assert set(container) <= CONTAINER_FIELDS
            assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
            assert set(container["resources"]) == {"limits", "requests"}
    cluster = RAY["spec"]["rayClusterConfig"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 53), "else all of KubeRay's probes run wget"
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "they are options as text"


def test_ray_is_told_of_an_application_that_there_is() -> None:
    (application,) = SERVE_CONFIG["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    arguments = ApplicationArguments.model_validate(application["args"])
    (deployment,) = application["deployments"]
    assert deployment["name"] == DEPLOYMENT
    (group,) = RAY["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert group["replicas"] >= deployment["num_replicas"], "a replica has a machine of its own"
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert arguments.threads * limits["nvidia.com/gpu"] <= requests["cpu"], "cores that Ray reserves for all ranks"
    assert pod["terminationGracePeriodSeconds"] > arguments.drain_s
    assert any(Path(arguments.engine).is_relative_to(one["mountPath"]) for one in container["volumeMounts"])
    assert API_KEY in {one["name"] for one in container["env"]}


def test_the_page_shows_a_serve_config_that_is_one() -> None:
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    (application,) = shown["applications"]
    assert application["import_path"] == SERVE_CONFIG["applications"][0]["import_path"]
    ApplicationArguments.model_validate(application["args"])
    assert [one["name"] for one in application["deployments"]] == [DEPLOYMENT]


def test_machines_of_a_group_start_their_ranks_and_meet() -> None:
    containers = {}
    for role in ("leader", "worker"):
        template = GROUP[f"{role}Template"]
        (containers[role],) = template["spec"]["containers"]
        container, volumes = containers[role], {one["name"]: one for one in template["spec"]["volumes"]}
        assert container["command"][:2] == ["bash", "/ranks/start"]
        assert volumes["ranks"]["configMap"]["name"] == LWS["ConfigMap"]["metadata"]["name"]
        assert int(container["command"][2]) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert SECRET in {one["name"] for one in container["env"]}
    assert containers["leader"]["command"] == containers["worker"]["command"]
    options = options_of(["serve", containers["leader"]["command"][3], *containers["leader"]["args"]])
    assert options["port"] == containers["leader"]["ports"][0]["containerPort"]
    grace = [GROUP[f"{role}Template"]["spec"]["terminationGracePeriodSeconds"] for role in ("leader", "worker")]
    assert options["drain_timeout"] < grace[0] < grace[1], "the workers' ranks end behind the leader's"
    labels = GROUP["leaderTemplate"]["metadata"]["labels"]
    assert LWS["Service"]["spec"]["selector"] == labels != GROUP["workerTemplate"]["metadata"]["labels"]
    pool = LWS["InferencePool"]["spec"]
    assert pool["selector"]["matchLabels"] == labels and pool["targetPorts"] == [{"number": options["port"]}]


@pytest.mark.slow
def test_the_script_of_a_group_serves_over_two_machines_and_drains(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two groups of processes, as two pods would be: the leader's serves, and all end when it is told to."""
    run, port = CliRunner().invoke, free_port()
    program, engine = tmp_path / "program", tmp_path / "engine"
    assert run(cli.main, ["export", str(tiny_checkpoint), str(program), "--tp", "2", "--quiet"]).exit_code == 0
    made = run(cli.main, ["build", str(program), str(engine), "--target", "cpu", "--checkpoint", str(tiny_checkpoint)])
    assert made.exit_code == 0, made.output
    script, command = tmp_path / "start", tmp_path / "bin/seekforge"
    script.write_text(LWS["ConfigMap"]["data"]["start"].replace("29500", str(free_port())))
    command.parent.mkdir()
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m seekforge "$@"\n')
    command.chmod(0o755)
    common = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}", SECRET: "of a test, long enough",
        "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "127.0.0.1",
    }  # fmt: skip
    options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    pods = [
        subprocess.Popen(
            ["bash", str(script), "1", str(engine), *(options if index == 0 else [])],
            env=common | {"LWS_WORKER_INDEX": str(index)},
            start_new_session=True,
        )
        for index in (0, 1)
    ]
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            assert all(pod.poll() is None for pod in pods) and time.monotonic() < deadline
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ready", timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(0.2)
        body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 4}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 4
        pods[1].send_signal(signal.SIGTERM)  # both are told at once; the ranks of a worker wait for the leader's
        pods[0].send_signal(signal.SIGTERM)
        assert [pod.wait(60) for pod in pods] == [0, 0]
    finally:
        for pod in pods:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.pid, signal.SIGKILL)
