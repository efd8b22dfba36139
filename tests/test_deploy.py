"""The files of `deploy/` start what there is, ask for paths that are answered, and find each other by their labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from seekforge.runtime.cli.serve import serve
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
    assert len(names) == 3 and all(name.removeprefix("vllm:") in sources for name in names)
