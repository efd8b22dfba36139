"""The manifests of `deploy/` against the schemas that API servers validate with.

Kubernetes' own kinds: `kubernetes-validate`, which brings the schemas. Others: SEEKFORGE_CRDS names a folder with the
CustomResourceDefinitions as their projects publish them (docs/deploy.md says which); the rules in CEL that some of them
have beside their schema are not evaluated. An unknown field, which an API server would drop, is an error here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
OBJECTS: list[dict[str, Any]] = [
    one
    for name in ("kubernetes", "leaderworkerset", "kuberay")
    for one in yaml.safe_load_all((DEPLOY / f"{name}.yaml").read_text(encoding="utf-8"))
]
CORE = [one for one in OBJECTS if one["apiVersion"] in ("v1", "apps/v1")]
CUSTOM = [one for one in OBJECTS if one not in CORE]
#: The Kubernetes whose schemas are taken.
VERSION = "1.37"
CRDS = os.environ.get("SEEKFORGE_CRDS", "")


def kind_of(one: dict[str, Any]) -> str:
    return f"{one['kind']}-{one['metadata']['name']}"


@pytest.mark.slow  # needs a library that the other tests do not have
@pytest.mark.parametrize("one", CORE, ids=kind_of)
def test_objects_of_kubernetes_are_valid(one: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validate.validate(one, VERSION, strict=True)
    wrong = copy.deepcopy(one)
    wrong["spec" if "spec" in one else "data"] = "text"
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, VERSION, strict=True)


def schemas_of(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the `apiVersion` and the schema of each version of a kind."""
    for path in sorted(folder.glob("*.yaml")):
        for crd in yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if crd and crd.get("kind") == "CustomResourceDefinition" and crd["spec"]["names"]["kind"] == kind:
                for version in crd["spec"]["versions"]:
                    yield f"{crd['spec']['group']}/{version['name']}", version["schema"]["openAPIV3Schema"]


def closed(schema: Any) -> Any:
    """Return a structural schema that refuses fields it does not have, as `kubectl` does with strict validation."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items()}
    has_fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if has_fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def fields_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object inside of a value, and itself."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from fields_of(one)


@pytest.mark.slow  # needs schemas that are not here
@pytest.mark.skipif(not CRDS, reason="SEEKFORGE_CRDS names no folder of CustomResourceDefinitions")
@pytest.mark.parametrize("one", CUSTOM, ids=kind_of)
def test_objects_of_other_projects_are_valid(one: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (kubernetes-validate brings it)")
    found = dict(schemas_of(Path(CRDS), one["kind"]))
    assert one["apiVersion"] in found, f"{one['kind']} is there in {sorted(found)}"
    schema = closed(found[one["apiVersion"]])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, which the schema leaves open
    validator = jsonschema.Draft202012Validator(schema)
    assert not [f"{error.json_path}: {error.message}" for error in validator.iter_errors(one)]
    wrong = copy.deepcopy(one)
    for spec in list(fields_of(wrong["spec"])):
        if "containers" in spec or spec is wrong["spec"]:
            spec["containerz"] = []
    missed = [error.json_path for error in validator.iter_errors(wrong) if "containerz" in error.message]
    assert len(missed) == sum("containerz" in spec for spec in fields_of(wrong["spec"])) > 0, "it looks at every pod"
