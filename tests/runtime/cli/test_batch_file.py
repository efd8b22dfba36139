"""Files of requests: what a line may be, what is refused before anything is loaded, how an interrupted run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from seekforge.runtime.cli import main as cli
from seekforge.runtime.cli.batch_file import NOT_IN_BATCH
from seekforge.runtime.cli.run import run
from seekforge.runtime.cli.sampling_options import OPTIONS, STRUCTURED, WITHOUT_OPTION
from seekforge.runtime.engine.engine_folder import Engine
from seekforge.runtime.sampling.params import SamplingParams, StructuredOutputsParams

OPTS = ("--max-tokens", "4", "--greedy", "--ignore-eos", "--quiet")


def invoke(*args: str | Path, **more: Any) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], **more)


def refused(*args: str | Path) -> str:
    result = invoke(*args)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output + repr(result.exception)
    assert result.stderr.startswith("error: ")
    return result.stderr


class Batch:
    def __init__(self, engine: Path, folder: Path) -> None:
        self.engine, self.requests, self.results = engine, folder / "in.jsonl", folder / "out.jsonl"

    def write(self, *lines: Any, raw: bytes | None = None) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.requests.write_bytes(text.encode() if raw is None else raw)

    def args(self, *more: str) -> tuple[str | Path, ...]:
        return ("run", self.engine, "--batch", self.requests, "--output", self.results, *OPTS, *more)

    def run(self, *more: str) -> list[dict[str, Any]]:
        result = invoke(*self.args(*more))
        assert result.exit_code == 0, result.output + repr(result.exception)
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.results.read_bytes().split(b"\n")[:-1]]

    def refused(self, *more: str) -> str:
        before = self.results.read_bytes() if self.results.exists() else None
        line = refused(*self.args(*more))
        assert (self.results.read_bytes() if self.results.exists() else None) == before
        return line


@pytest.fixture
def batch(toy_engine: Path, tmp_path: Path) -> Batch:
    return Batch(toy_engine, tmp_path)


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose weights must not be read."""
    monkeypatch.setattr(Engine, "open_backend", lambda *args, **kwargs: pytest.fail("the engine was loaded"))


# --- lines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_a_line_ends_at_a_newline_alone(batch: Batch, char: str) -> None:
    line = json.dumps({"prompt": f"a{char}b", "id": "x"}, ensure_ascii=False)
    batch.write(raw=line.replace("\\r", "\\r").encode() + b"\n")
    assert [answer["id"] for answer in batch.run()] == ["x"]


def test_byte_order_mark_carriage_returns_empty_lines_and_no_last_newline(batch: Batch) -> None:
    batch.write(raw=b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}')
    assert sorted(answer["id"] for answer in batch.run()) == [1, 4]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: "),
        ('{"prompt": "é"}'.encode("utf-16"), "line 1: "),
        (b'{"prompt": "\\ud800"}\n', "line 1: "),
        (b'{"prompt": "a", "prompt": "b"}\n', "line 1: "),
        (b'{"prompt": "a", "temperature": NaN}\n', "line 1: "),
        (b'{"prompt": "a", "seed": 1e999}\n', "line 1: "),
        (b"[" * 100_000, "line 1: "),
        (b"null\n", "line 1: "),
        (b'{"prompt": {}}\n', "line 1: "),
        (b'{"prompt": null}\n', 'expected either "prompt" or "messages"'),
        (b'{"prompt": ""}\n', "the prompt has no tokens"),
        (b'{"prompt": "a", "id": true}\n', "id is True"),
        (b'{"prompt": "a", "id": 1.5}\n', "id is 1.5"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "a", "id": 1}\n', "line 2: id 1 stands there twice"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "line 2: id '1' stands there twice"),
        (b'{"prompt": "a", "id": "2"}\n{"prompt": "b"}\n', "line 2: id 2 stands there twice"),
        (b'{"prompt": "a", "taps": ["expert_ids"]}\n', "taps cannot be asked for in a batch"),
        (b'{"prompt": "a", "max_tokens": 99999}\n', "more than max_model_len"),
        (b'{"prompt": "a", "regex": "a"}\n', "unknown key 'regex'"),
        (b"", "holds no request"),
        (b'{"custom_id": "a"}\n', "url is None"),
        (b'{"custom_id": "a", "url": "/v1/embeddings", "body": {}}\n', "url is '/v1/embeddings'"),
        (b'{"custom_id": "", "url": "/v1/completions", "body": {"prompt": "a"}}\n', "custom_id is ''"),
        (
            b'{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {"prompt": "a"}}\n',
            "method is 'GET'",
        ),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "stream": true}}\n', "body.stream"),
        (b'{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "a", "nonsense": 1}}\n', "body.nonsense"),
        (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": "a"}}\n', "body.messages"),
        (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": []}}\n', "has no messages"),
    ],
)
def test_a_bad_line_is_one_line_before_anything_is_loaded(
    batch: Batch, unloadable: None, raw: bytes, words: str
) -> None:
    batch.write(raw=raw)
    assert words in batch.refused() and str(batch.requests) in batch.refused()


def test_a_file_that_is_none_is_one_line(batch: Batch, unloadable: None, tmp_path: Path) -> None:
    for place, words in ((tmp_path, "is a folder"), (Path("/dev/zero"), "is a device"), (tmp_path / "no", "No such")):
        batch.requests = place
        assert words in batch.refused()


# --- parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["requests", "results"])
def test_a_file_of_ten_terabytes_is_one_line(batch: Batch, unloadable: None, which: str) -> None:
    """A hole takes no room on the disk, and as one line all of memory."""
    batch.write({"prompt": "a"})
    place = batch.requests if which == "requests" else batch.results
    place.touch()
    os.truncate(place, 10 << 40)
    line = refused(*batch.args())
    assert str(place) in line and "has more than 268,435,456 bytes" in line


def test_every_parameter_is_an_option_or_says_why_not() -> None:
    every = {field.name for field in fields(SamplingParams)}
    assert OPTIONS.keys() | WITHOUT_OPTION.keys() == every and not OPTIONS.keys() & WITHOUT_OPTION.keys()
    assert STRUCTURED.keys() == {field.name for field in fields(StructuredOutputsParams)}
    taken = {parameter.name for parameter in run.params}
    assert OPTIONS.keys() | STRUCTURED.keys() <= taken
    assert NOT_IN_BATCH.keys() <= every


#: A value of each parameter that is not its default.
VALUES: dict[str, Any] = {
    "n": 2, "best_of": 2, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5,
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"7": 100}, "bad_words": ["cat"],
    "allowed_token_ids": [5, 6], "seed": 3, "max_tokens": 3, "min_tokens": 2, "stop": ["zz"],
    "include_stop_str_in_output": True, "stop_token_ids": [9], "ignore_eos": False, "detokenize": False,
    "skip_special_tokens": False, "spaces_between_special_tokens": False, "truncate_prompt_tokens": 1, "logprobs": 2,
    "prompt_logprobs": 2, "structured_outputs": {"choice": ["a", "b"]}, "skip_reading_prefix_cache": True,
    "thinking_token_budget": 0,
}  # fmt: skip


def test_a_line_takes_every_parameter_and_each_changes_the_request(chatting: Batch) -> None:
    batch = chatting  # its vocabulary has the end of a thought
    assert VALUES.keys() | NOT_IN_BATCH.keys() == {field.name for field in fields(SamplingParams)}
    lines = [{"prompt": "the cat", "id": name, name: value} for name, value in VALUES.items()]
    lines[list(VALUES).index("structured_outputs")]["ignore_eos"] = False
    batch.write({"prompt": "the cat", "id": "plain"}, *lines)
    answers = {answer["id"]: answer for answer in batch.run()}
    assert answers.keys() == {"plain", *VALUES}
    assert len({answer["request"] for answer in answers.values()}) == len(answers)
    assert answers["logit_bias"]["completions"][0]["token_ids"] == [7] * 4
    assert set(answers["allowed_token_ids"]["completions"][0]["token_ids"]) <= {5, 6}
    assert [len(entry["top"]) for entry in answers["prompt_logprobs"]["prompt_logprobs"][1:]] != []
    assert answers["prompt_logprobs"]["prompt_logprobs"][0] is None
    assert len(answers["n"]["completions"]) == 2 and len(answers["max_tokens"]["completions"][0]["token_ids"]) == 3
    assert answers["structured_outputs"]["completions"][0]["text"] in ("a", "b")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--logit-bias", "7:100"), {"logit_bias": {7: 100.0}}),
        (("--logit-bias", "7:100,8:-5", "--logit-bias", "9:1"), {"logit_bias": {7: 100.0, 8: -5.0, 9: 1.0}}),
        (("--min-p", "0.1", "--top-k", "-1"), {"min_p": 0.1, "top_k": 0}),
        (("--bad-words", "a", "--bad-words", "b"), {"bad_words": ("a", "b")}),
        (("--stop-token-ids", "1,2"), {"stop_token_ids": (1, 2)}),
        (("--json-schema", '{"type": "object"}'), {"structured_outputs": {"json": {"type": "object"}}}),
        (("--choice", "a", "--choice", "b"), {"structured_outputs": {"choice": ("a", "b")}}),
        (("--regex", "@{file}"), {"structured_outputs": {"regex": "a+"}}),
        (("--json-object", "--disable-any-whitespace"), {"structured_outputs": {"json_object": True}}),
        (("--no-skip-special-tokens",), {"skip_special_tokens": False}),
    ],
)
def test_options_are_the_parameters(tmp_path: Path, args: tuple[str, ...], expected: dict[str, Any]) -> None:
    from seekforge.runtime.cli.sampling_options import params_of

    (tmp_path / "file").write_text("a+")
    typed = [arg.format(file=tmp_path / "file") if arg.startswith("@") else arg for arg in args]
    context = run.make_context("run", ["engine", "--prompt", "a", *typed])
    given = {name: context.params[name] for name in (*OPTIONS, *STRUCTURED)}
    params = SamplingParams(**params_of(given))
    for name, value in expected.items():
        found = getattr(params, name)
        if isinstance(value, dict) and name == "structured_outputs":
            assert {key: getattr(found, key) for key in value} == value
        else:
            assert found == value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", ""), "the prompt has no tokens"),
        (("--prompt", "a", "--max-tokens", "5000"), "more than max_model_len"),
        (("--prompt", "a", "--stop-token-ids", "99999999"), "out of range"),
        (("--prompt", "a", "--logit-bias", "99999999:1"), "out of range"),
        (("--prompt", "a", "--regex", "("), "regex"),
        (("--prompt", "a", "--regex", "a", "--choice", "b"), "expected exactly one of"),
        (("--prompt", "a", "--json-schema", "{"), "--json-schema"),
        (("--prompt", "a", "--grammar", "@/nowhere"), "/nowhere"),
        (("--prompt", "a", "--min-tokens", "9", "--max-tokens", "3"), "min_tokens is 9"),
        (("--prompt", "a", "--stop", ""), "stop"),
        (("--prompt", "a", "--n", "1000", "--json"), "n is 1000"),
        (("--prompt", "a", "--best-of", "2"), "--best-of needs"),
        (("--prompt", "a", "--prompt-logprobs", "2"), "--prompt-logprobs needs"),
        (("--batch", "-"), "belong together"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    toy_engine: Path, unloadable: None, args: tuple[str, ...], words: str
) -> None:
    assert words in refused("run", toy_engine, "--quiet", *args)


# --- places ---------------------------------------------------------------------------------------------------


def command(batch: Batch, output: str, requests: str | None = None) -> list[str]:
    places = ["--batch", requests or str(batch.requests), "--output", output]
    return [sys.executable, "-m", "seekforge", "run", str(batch.engine), *places, *OPTS]


@pytest.mark.parametrize("output", ["-", "/dev/stdout", "/dev/fd/1"])
def test_stdout_takes_results(batch: Batch, output: str) -> None:
    batch.write({"prompt": "a"})
    done = subprocess.run(command(batch, output), capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["id"] == 1 and done.stderr == ""


def test_stdin_and_pipes_give_requests(batch: Batch, tmp_path: Path) -> None:
    text = json.dumps({"prompt": "a", "id": "x"})
    for place in ("-", "/dev/stdin"):
        done = subprocess.run(
            command(batch, "-", place), input=text, capture_output=True, text=True, check=True, timeout=120
        )
        assert json.loads(done.stdout)["id"] == "x"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(text))
    writer.start()
    batch.requests = pipe
    assert [answer["id"] for answer in batch.run()] == ["x"]
    writer.join()


# --- going on -------------------------------------------------------------------------------------------------


def test_answers_to_other_requests_are_not_taken_for_answers(batch: Batch) -> None:
    batch.write({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"})
    first = batch.run()
    assert batch.run() == first, "nothing is asked twice"
    batch.write({"prompt": "a", "id": "x"}, {"prompt": "c", "id": "y"})
    assert "the answer to 'y' there is to another request" in batch.refused()
    batch.write({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"})
    assert "the answer to " in batch.refused("--min-tokens", "2"), "an option changed"
    batch.write({"prompt": "new"}, {"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"})
    assert {answer["id"] for answer in batch.run()} == {"x", "y", 1}


def test_line_numbers_that_moved_are_noticed(batch: Batch) -> None:
    batch.write({"prompt": "a"}, {"prompt": "b"})
    batch.run()
    batch.write({"prompt": "new"}, {"prompt": "a"}, {"prompt": "b"})
    assert "the answer to 1 there is to another request" in batch.refused()


def test_a_cut_line_is_asked_again_and_other_content_is_kept(batch: Batch) -> None:
    batch.write({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"})
    whole = batch.run()
    lines = batch.results.read_bytes().splitlines(keepends=True)
    batch.results.write_bytes(lines[0] + lines[1][:9])
    assert sorted(map(str, batch.run())) == sorted(map(str, whole))
    for other in (b"precious\n", b'{"id": "x"}\n', b"[]\n", b"\xff\n"):
        batch.results.write_bytes(other)
        assert "holds something else than results" in batch.refused()


# --- messages and OpenAI's form -------------------------------------------------------------------------------


@pytest.fixture
def chatting(chat_engine: Path, tmp_path: Path) -> Batch:
    """A batch of an engine that has conversations."""
    return Batch(chat_engine, tmp_path)


def test_messages_are_a_prompt_and_their_answer_a_message(chatting: Batch) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    prompt = "<｜begin▁of▁sentence｜><｜User｜>the cat<｜Assistant｜><think>"
    chatting.write(
        {"messages": messages, "id": "chat", "chat_template_kwargs": {"thinking": True}},
        {"prompt": prompt, "id": "plain"},
    )
    (chat,), (plain,) = (
        {answer["id"]: answer["completions"] for answer in chatting.run()}[key] for key in ("chat", "plain")
    )
    message = chat.pop("message")
    assert chat == plain
    assert message == {"role": "assistant", "content": "", "reasoning_content": plain["text"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}], "thinking": True}, "unknown key 'thinking'"),
        ({"prompt": "a", "tools": []}, "tools belongs to messages"),
        ({"messages": "a"}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "unknown key 'chat_template'"),
    ],
)
def test_a_conversation_that_is_none_is_named(chatting: Batch, line: dict[str, Any], message: str) -> None:
    chatting.write(line)
    assert message in chatting.refused()


def test_an_engine_without_encoding_is_one_line(batch: Batch) -> None:
    batch.write({"messages": [{"role": "user", "content": "a"}]})
    assert "have no chat encoding here" in batch.refused()


TOOLS = [{"type": "function", "function": {"name": "now"}}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "the cat"}], **more}


def test_openai_lines_are_answered_in_their_form(chatting: Batch) -> None:
    chat = {"method": "POST", "url": "/v1/chat/completions"}
    chatting.write(
        {"custom_id": "a", **chat, "body": body(logprobs=True, top_logprobs=2, n=2)},
        {"custom_id": "b", **chat, "body": body(max_completion_tokens=2, chat_template_kwargs={"thinking": True})},
        {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": "the cat", "max_tokens": 3, "logprobs": 1}},
        {"custom_id": "d", **chat, "body": body(tools=TOOLS, tool_choice="none", top_k=1, stream=False, user="u")},
    )
    answers = {answer["custom_id"]: answer for answer in chatting.run()}
    assert answers.keys() == {"a", "b", "c", "d"}
    for answer in answers.values():
        assert answer.keys() == {"id", "custom_id", "response", "error"} and answer["error"] is None
        assert answer["response"]["status_code"] == 200 and answer["id"].startswith("batch_req_")
        assert set(answer["response"]["body"]["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    choices = answers["a"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    content = choices[0]["logprobs"]["content"]
    assert len(content) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert "".join(entry["token"] for entry in content) == choices[0]["message"]["content"]
    assert answers["b"]["response"]["body"]["usage"]["completion_tokens"] == 2
    assert answers["b"]["response"]["body"]["choices"][0]["finish_reason"] == "length"
    plain = answers["c"]["response"]["body"]
    assert plain["object"] == "text_completion" and len(plain["choices"][0]["logprobs"]["tokens"]) == 3
    assert set(answers["b"]["response"]["body"]["choices"][0]["message"]) == {"role", "content", "reasoning_content"}
    again = invoke(*chatting.args())
    assert again.exit_code == 0 and len(chatting.answers()) == 4
