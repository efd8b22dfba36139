"""What the Containerfile says can be done: its sources are there and reach the builder, its extras and pins exist."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    """One FROM of the file, with the instructions below it."""

    name: str
    base: str
    steps: list[tuple[str, str]]


def stages() -> list[Stage]:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    found: list[Stage] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            found.append(Stage(name, image, []))
        elif found:
            found[-1].steps.append((word, rest.strip()))
    return found


def copied(stage: Stage) -> list[str]:
    """The sources of the COPY lines of a stage that come from the tree."""
    lines = [rest.split() for word, rest in stage.steps if word == "COPY"]
    return [source for words in lines if not words[0].startswith("--") for source in words[:-1]]


def chain(name: str) -> list[Stage]:
    """A stage and those that it builds on."""
    by_name = {stage.name: stage for stage in stages()}
    found = [by_name[name]]
    while found[-1].base in by_name:
        found.append(by_name[found[-1].base])
    return found


def test_every_instruction_is_one_that_builders_know() -> None:
    words = {word for stage in stages() for word, _ in stage.steps}
    assert words <= {"ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}


def test_sources_are_in_the_tree_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and (ROOT / ".containerignore").read_text() == (ROOT / ".dockerignore").read_text()
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = {source for stage in stages() for source in copied(stage)}
    assert {"pyproject.toml", "configs", "exporter", "plugins", "runtime"} <= sources
    for source in sources:
        optional = "[" in source  # a pattern that may match nothing: wheels for builds without a network
        assert optional or (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(name, source) or source.startswith(f"{name}/") for name in let_in), source


def test_stages_that_install_have_all_that_the_wheel_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {name.partition("/")[0] for name in wheel["packages"]} | set(wheel["force-include"])
    needed |= {wheel["hooks"]["custom"]["path"]}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    for name in ("build-cpu", "build-gpu"):
        assert needed <= {source for stage in chain(name) for source in copied(stage)}, name


def test_extras_exist_and_versions_are_the_pinned_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    lists = re.findall(r"ARG (?:GPU_)?EXTRAS=(\S+)", text)
    assert len(lists) == 2
    for extra in ",".join(lists).split(","):
        assert extra in project["optional-dependencies"], extra
    environment = dict(re.findall(r"(PIP_\w+)=(\S+)", " ".join(r for s in stages() for w, r in s.steps if w == "ENV")))
    assert environment["PIP_CONSTRAINT"] == "/src/configs/constraints.txt"
    version = re.search(r"ARG PYTHON_VERSION=(\S+)", text)
    assert version and f"Programming Language :: Python :: {version[1]}" in project["classifiers"]


def test_images_run_as_a_user_and_the_default_is_the_one_for_cpus() -> None:
    assert stages()[-1].name == "cpu"
    for name in ("cpu", "gpu"):
        steps = [step for stage in reversed(chain(name)) for step in stage.steps]
        users = [rest for word, rest in steps if word == "USER"]
        assert users and users[-1] not in ("root", "0"), name
        assert ("ENTRYPOINT", '["seekforge"]') in steps
        froms = [rest for word, rest in steps if word == "COPY"]
        assert froms == [f"--from=build-{name} /opt/seekforge /opt/seekforge"]


def test_every_argument_is_declared_by_the_stage_that_uses_it() -> None:
    """One that begins from another has none of its arguments: podman asked the network in spite of PIP_OPTIONS."""
    used = 0
    for stage in stages():
        declared = {rest.partition("=")[0] for word, rest in stage.steps if word == "ARG"}
        for word, rest in stage.steps:
            names = set(re.findall(r"\$\{(\w+)", rest)) if word in ("RUN", "COPY") else set()
            assert names <= declared, (stage.name, names - declared)
            used += len(names)
    assert used >= 4
