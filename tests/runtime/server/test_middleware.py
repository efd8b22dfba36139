"""What every request meets, whatever it asks: keys, bounds, errors, the log."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.support.scripted_engine import LiveServer, live_server

ASK = {"messages": [{"role": "user", "content": "a secret"}]}
THINKING = {"chat_template_kwargs": {"thinking": True}}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(tiny_checkpoint, lambda prompt: "It rains." * 20, max_body_bytes=10_000, max_requests=4) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    keys: dict[str, Any] = {"api_keys": ("user-key",), "admin_keys": ("admin-key",)}
    with live_server(tiny_checkpoint, lambda prompt: "It rains.", **keys) as made:
        yield made


def call(
    server: LiveServer, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Return status, decoded body and headers of one request."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    made = json.loads(text) if answer.headers.get_content_type() == "application/json" else text
    return answer.status, made, {name.lower(): value for name, value in answer.getheaders()}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", CHAT, b"", 400, "messages"),
        ("POST", CHAT, b"{", 400, "not valid JSON"),
        ("POST", CHAT, b"[]", 400, "expected a JSON object"),
        ("POST", CHAT, b"\xff\xfe", 400, "not valid JSON"),
        ("POST", CHAT, b"[" * 5000, 400, "nested"),
        ("POST", CHAT, b'{"messages": NaN}', 400, "not valid JSON"),
        ("POST", CHAT, {}, 400, "messages"),
        ("POST", CHAT, {"messages": []}, 400, "no messages"),
        ("POST", CHAT, {"messages": "hi"}, 400, "messages"),
        ("POST", CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ("POST", CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "tool"),
        ("POST", CHAT, ASK | {"n": 10**9}, 400, "n is"),
        ("POST", CHAT, ASK | {"n": True}, 400, "n"),
        ("POST", CHAT, ASK | {"temperature": "hot"}, 400, "temperature"),
        ("POST", CHAT, ASK | {"max_tokens": 0}, 400, "max_tokens"),
        ("POST", CHAT, ASK | {"max_tokens": 10**6}, 400, "max_tokens"),
        ("POST", CHAT, ASK | {"frobnicate": 1}, 400, "frobnicate"),
        ("POST", CHAT, ASK | {"functions": []}, 400, "use tools"),
        ("POST", CHAT, ASK | {"tools": [1]}, 400, "tools"),
        ("POST", CHAT, ASK | {"tool_choice": "required"}, 400, "no tools"),
        ("POST", CHAT, ASK | {"response_format": {"type": "xml"}}, 400, "response_format"),
        ("POST", CHAT, ASK | {"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("POST", CHAT, ASK | {"top_logprobs": 3}, 400, "logprobs"),
        ("POST", CHAT, ASK | {"stream": True, "stream_options": {"continuous": True}}, 400, "continuous"),
        ("POST", CHAT, ASK | {"logprobs": True, "top_logprobs": 21}, 400, "--max-logprobs"),
        ("POST", "/v1/completions", {"prompt": "a", "logprobs": -1}, 400, "--max-logprobs"),
        ("POST", CHAT, ASK | {"stream": "yes"}, 400, "stream"),
        ("POST", CHAT, ASK | {"model": "other"}, 404, "not served"),
        ("POST", CHAT, ASK | {"reasoning_effort": "none"} | THINKING, 400, "contradict"),
        ("POST", "/v1/completions", {"prompt": []}, 400, "prompt"),
        ("POST", "/v1/completions", {"prompt": ""}, 400, "no tokens"),
        ("POST", "/v1/completions", {"prompt": [[1, "a"]]}, 400, "prompt.0"),
        ("POST", "/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, 400, "stream"),
        ("POST", "/v1/responses", {"input": "x", "truncation": "auto"}, 400, "truncation"),
        ("POST", CHAT, ASK | {"stream_options": {"include_usage": True}}, 400, "stream to be true"),
        ("POST", CHAT, ASK | {"return_token_ids": True, "stream": True}, 400, "return_token_ids"),
        ("POST", "/tokenize", {}, 400, "prompt"),
        ("POST", "/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("GET", CHAT, None, 405, "POST"),
        ("GET", "/v2/chat", None, 404, "nothing"),
        ("GET", "/../etc/passwd", None, 404, "nothing"),
        ("POST", "/pause", None, 404, "--admin-key"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_line(
    server: LiveServer, method: str, path: str, body: Any, status: int, says: str
) -> None:
    came, answer, headers = call(server, method, path, body)
    assert came == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    message = answer["error"]["message"]
    assert says in message and "\n" not in message and "Traceback" not in message
    assert headers["x-request-id"]


def test_a_body_that_is_no_json_by_its_type_is_refused(server: LiveServer) -> None:
    """A page of another origin may send a form without being asked; it may not send JSON."""
    for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
        assert call(server, "POST", CHAT, ASK, {"content-type": kind})[0] == 415, kind


@pytest.mark.parametrize("says_length", [True, False])
def test_a_large_body_is_refused_before_it_is_read(server: LiveServer, says_length: bool) -> None:
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        length = "content-length: 100000000" if says_length else "transfer-encoding: chunked"
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{length}\r\n\r\n".encode()
        )
        if not says_length:
            for _ in range(4):
                client.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_given_up(tiny_checkpoint: Path) -> None:
    with live_server(tiny_checkpoint, str, read_timeout_s=0.2) as impatient:
        host, port = urlsplit(impatient.url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
            client.sendall(head.encode() + b"{")
            assert client.recv(100).startswith(b"HTTP/1.1 408")


def test_no_key_no_answer(guarded: LiveServer) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic user-key"}, {"x-api-key": ""}):
        status, answer, sent = call(guarded, "POST", CHAT, ASK, headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert sent["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("headers", [{"authorization": "Bearer user-key"}, {"x-api-key": "user-key"}])
def test_a_key_opens(guarded: LiveServer, headers: dict[str, str]) -> None:
    assert call(guarded, "POST", CHAT, ASK, headers)[0] == 200


def test_the_engine_is_changed_by_its_administrator_alone(guarded: LiveServer) -> None:
    user, admin = {"authorization": "Bearer user-key"}, {"authorization": "Bearer admin-key"}
    for path in ("/pause", "/resume", "/reset_prefix_cache"):
        assert call(guarded, "POST", path, {}, user)[0] == 401
        assert call(guarded, "POST", path, {}, admin)[0] == 200
    status, answer, _ = call(guarded, "POST", "/update_weights", {"path": "/new"}, admin)
    assert (status, answer) == (200, {"num_tensors": 3})
    assert guarded.engine.calls[-1] == ("update_weights", {"path": "/new"})


def test_health_needs_no_key_and_tells_when_the_engine_is_gone(guarded: LiveServer) -> None:
    assert call(guarded, "GET", "/health")[0] == call(guarded, "GET", "/ready")[0] == 200
    guarded.engine.dead = "the process that runs the engine ended by signal 9"
    try:
        assert call(guarded, "GET", "/health")[0] == 503
        status, answer, _ = call(guarded, "POST", CHAT, ASK, {"x-api-key": "user-key"})
        assert (status, answer["error"]["code"]) == (503, "engine_dead")
    finally:
        guarded.engine.dead = ""


def test_a_server_that_ends_takes_nothing_new(server: LiveServer) -> None:
    server.context.draining = "the server ends"
    try:
        assert call(server, "POST", CHAT, ASK)[0] == 503
        assert call(server, "GET", "/ready")[0] == 503
        assert call(server, "GET", "/health")[0] == 200
    finally:
        server.context.draining = ""


def test_more_requests_than_may_be_are_told_to_wait(server: LiveServer) -> None:
    server.engine.hold = True
    waiting = []
    try:
        for _ in range(4):
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
            connection.request("POST", CHAT, json.dumps(ASK), {"content-type": "application/json"})
            waiting.append(connection)
        until(lambda: server.context.num_running == 4)
        status, answer, headers = call(server, "POST", CHAT, ASK)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")
    finally:
        server.engine.hold = False
        assert [one.getresponse().status for one in waiting] == [200] * 4
        for one in waiting:
            one.close()
    until(lambda: server.context.num_running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(server: LiveServer, stream: bool) -> None:
    before = len(server.engine.aborted)
    server.engine.hold = True
    try:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
        body = json.dumps(ASK | {"stream": stream})
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        until(lambda: server.context.num_running == 1)
        connection.close()
        until(lambda: len(server.engine.aborted) == before + 1)
        until(lambda: server.context.num_running == 0)
    finally:
        server.engine.hold = False
    assert not server.engine.running


def test_the_log_has_no_text_and_no_key(guarded: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "seekforge.server"):
        call(guarded, "POST", CHAT, ASK, {"x-api-key": "user-key"})
        call(guarded, "POST", CHAT, ASK | {"temperature": "a secret"}, {"x-api-key": "user-key"})
        call(guarded, "POST", CHAT, {"messages": [{"role": "a secret"}]}, {"x-api-key": "user-key"})
        call(guarded, "POST", CHAT, ASK | {"a secret": 1}, {"x-api-key": "user-key"})
        call(guarded, "POST", CHAT + "?key=a secret".replace(" ", "%20"), ASK, {"x-api-key": "user-key"})
        call(guarded, "POST", CHAT, ASK, {"authorization": "Bearer wrong-key"})
        until(lambda: len(caplog.records) == 6)  # a line is written when its answer has been sent
    assert "secret" not in caplog.text and "-key" not in caplog.text and "rains" not in caplog.text
    line = json.loads(caplog.records[0].getMessage())
    assert (line["status"], line["path"]) == (200, CHAT)
    assert line["prompt_tokens"] > 0 and line["completion_tokens"] > 0


def test_a_bug_is_told_by_its_number_and_logged_with_its_traceback(
    server: LiveServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine, "script", lambda prompt: 1 / 0)
    status, answer, headers = call(server, "POST", CHAT, ASK)
    assert status == 500 and headers["x-request-id"] in answer["error"]["message"]
    assert "ZeroDivisionError" in caplog.text and "division" not in answer["error"]["message"]


def test_a_request_keeps_the_id_that_it_came_with(server: LiveServer) -> None:
    assert call(server, "GET", "/health", None, {"x-request-id": "mine-1"})[2]["x-request-id"] == "mine-1"
    assert call(server, "GET", "/health", None, {"x-request-id": "a b"})[2]["x-request-id"] != "a b"


def test_no_other_origin_may_read_answers(server: LiveServer, tiny_checkpoint: Path) -> None:
    origin = {"origin": "https://other.example"}
    assert "access-control-allow-origin" not in call(server, "GET", "/v1/models", None, origin)[2]
    with live_server(tiny_checkpoint, str, cors_origins=("https://other.example",)) as opened:
        allowed = call(opened, "GET", "/v1/models", None, origin)[2]["access-control-allow-origin"]
    assert allowed == "https://other.example"


def test_a_name_that_is_not_ours_is_refused_where_only_we_are_reached(tiny_checkpoint: Path) -> None:
    with live_server(tiny_checkpoint, str, allowed_hosts=("localhost", "127.0.0.1")) as local:
        assert call(local, "GET", "/health")[0] == 200
        assert call(local, "GET", "/health", None, {"host": "LOCALHOST:80"})[0] == 200
        for name in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            assert call(local, "GET", "/v1/models", None, {"host": name})[0] == 421


def test_a_model_is_told_by_its_name(server: LiveServer) -> None:
    assert call(server, "GET", "/v1/models/scripted")[1]["id"] == "scripted"
    assert call(server, "GET", "/v1/models/other")[0] == 404
    assert call(server, "POST", "/v1/models")[2]["allow"] == "GET"


def test_counters_have_vllms_names_beside_ours(server: LiveServer) -> None:
    call(server, "POST", CHAT, ASK)
    call(server, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True})
    text = call(server, "GET", "/metrics")[1]
    assert 'vllm:request_success_total{finished_reason="length",model_name="scripted"}' in text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
    ):
        for prefix in ("seekforge:", "vllm:"):
            assert f'\n{prefix}{name}{{model_name="scripted"}}' in text, name
    assert 'vllm:request_success_total{finished_reason="stop",model_name="scripted"}' in text


def test_text_becomes_tokens_and_back(server: LiveServer) -> None:
    made = call(server, "POST", "/tokenize", {"prompt": "It rains.", "return_token_strs": True})[1]
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert call(server, "POST", "/detokenize", {"tokens": made["tokens"]})[1] == {"prompt": "It rains."}
    chat = call(server, "POST", "/tokenize", ASK)[1]
    text = call(server, "POST", "/detokenize", {"tokens": chat["tokens"]})[1]["prompt"]
    assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>a secret")


def test_the_page_may_run_nothing_but_itself(server: LiveServer) -> None:
    status, text, headers = call(server, "GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text


def until(done: Any, seconds: float = 20.0) -> None:
    """Wait for something that a server does a moment later."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
