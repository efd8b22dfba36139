"""The OpenAPI document says what the server takes, and whatever is sent by it is never an internal error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from tests.support.scripted_engine import LiveServer, live_server

from seekforge.runtime.server.app import ROUTES
from seekforge.runtime.server.endpoints.openapi import document

KEYS = {"authorization": "Bearer admin"}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(tiny_checkpoint, lambda prompt: "It rains.", admin_keys=("admin",)) as made:
        yield made


def test_every_route_and_field_is_described() -> None:
    made = document(ROUTES)
    assert {(method.upper(), path) for path, methods in made["paths"].items() for method in methods} == {
        (route.method, route.path) for route in ROUTES
    }
    chat = made["components"]["schemas"]["ChatCompletionBody"]
    assert chat["required"] == ["messages"]
    assert "closed" in chat["properties"]["thinking_token_budget"]["description"]


def cases(server: LiveServer, count: int) -> int:
    """Send so many generated requests to each operation; returns how many were sent."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    sent = 0
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @schemathesis_settings(count)
        @hypothesis_given(case=strategy)
        def one(case) -> None:
            nonlocal sent
            sent += 1
            answer = case.call(base_url=server.url, headers=KEYS)
            case.validate_response(answer, checks=[not_a_server_error])

        one()
    return sent


def schemathesis_settings(count: int):
    from hypothesis import HealthCheck, settings

    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def hypothesis_given(**strategies):
    from hypothesis import given

    return given(**strategies)


def test_a_few_generated_requests_find_no_internal_error(server: LiveServer) -> None:
    assert cases(server, 5) > 40


@pytest.mark.slow
def test_many_generated_requests_find_no_internal_error(server: LiveServer) -> None:
    assert cases(server, 1000) > 5000
