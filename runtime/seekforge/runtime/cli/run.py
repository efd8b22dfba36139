"""`seekforge run`: generate text with an engine, streamed to stdout; everything else goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.filesize import decimal

from seekforge.common.cli.console import Stages
from seekforge.common.cli.options import Tokens, command, json_option, quiet_option, threads_option
from seekforge.common.cli.terminal import write, write_generated, write_json
from seekforge.runtime.chat.messages import Message
from seekforge.runtime.chat.request import ChatRequest
from seekforge.runtime.cli.batch_file import (
    Request,
    answered,
    completion_json,
    prompt_logprobs_json,
    read_requests,
    run_batch,
)
from seekforge.runtime.cli.options import check_checkpoint, checkpoint_option, drafts_option, open_engine
from seekforge.runtime.cli.sampling_options import params_of, sampling_options
from seekforge.runtime.engine.chat_output import AnswerReader, with_messages
from seekforge.runtime.engine.outputs import RequestMetrics, RequestOutput
from seekforge.runtime.llm import LLM
from seekforge.runtime.llm_metrics import LLMMetrics
from seekforge.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from seekforge.formats.engine.verify import Verification
    from seekforge.formats.loader import LoadProgress
    from seekforge.runtime.engine.engine_folder import Engine


#: Tokens that a conversation may have besides its texts.
_CHAT_TOKENS = 64


def _loading(stages: Stages) -> Callable[[LoadProgress], None]:
    def update(load: LoadProgress) -> None:
        share = load.done_bytes / (load.total_bytes or 1)
        stages.update(f"weights  {decimal(load.done_bytes)} of {decimal(load.total_bytes)} ({share:.0%})")

    return update


@command(
    "run",
    examples=(
        'seekforge run engine --prompt "Once upon a time" --max-tokens 64',
        'seekforge run engine --prompt "2+2=" --greedy --json',
        "seekforge run engine --batch requests.jsonl --output answers.jsonl",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue, encoded as it is: nothing is added.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message; a thought goes to stderr.")
@click.option("--system", help="With --chat: what the model is told before.")
@click.option("--thinking", is_flag=True, help="With --chat: let the model reason before it answers.")
@click.option(
    "--batch",
    type=click.Path(path_type=Path, allow_dash=True),
    help="JSONL file of requests (see above), instead of --prompt; - is stdin.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    help="JSONL file of results; what it holds is not run again. - is stdout.",
)
@click.option("--greedy", is_flag=True, help="Take the most likely token each time.")
@sampling_options
@drafts_option
@checkpoint_option
@threads_option
@click.option("--max-model-len", type=Tokens(), help="Tokens to make room for. Default: prompt and --max-tokens.")
@click.option(
    "--verify",
    is_flag=True,
    help="Read every byte of the engine, also of files that were verified before and are unchanged.",
)
@click.option("--no-self-check", is_flag=True, help="Do not compare with the results stored in the engine.")
@quiet_option
@json_option
def run(
    engine: Path,
    prompt: str | None,
    chat: bool,
    system: str | None,
    thinking: bool,
    batch: Path | None,
    output: Path | None,
    greedy: bool,
    num_speculative_tokens: int,
    checkpoint: Path | None,
    threads: int | None,
    max_model_len: int | None,
    verify: bool,
    no_self_check: bool,
    quiet: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Generate text with ENGINE, a folder written by 'seekforge build'.

    A line of a --batch file is an object with "prompt" (text or token ids) or "messages" and, if it likes, "id" and any
    sampling parameter ("max_tokens", "temperature", "stop", ...), which goes before the options given here; or a line
    of OpenAI's batch files ("custom_id", "url", "body"), which is answered in their form. Results are written to
    --output as they end, one object a line, with the "id" (else the line number). Run the same command again after an
    interruption: requests that have a result are left out. An answer to another request of that id, or of another
    engine, is refused.

    Every request and option is checked before the engine is loaded.
    """
    _refuse_contradictions(prompt, batch, output, greedy, as_json, sampling)
    if not chat and (system is not None or thinking):
        raise click.UsageError(f"{'--thinking' if system is None else '--system'} belongs to --chat")
    if chat and prompt is None:
        raise click.UsageError("--chat takes its message from --prompt; a --batch has messages of its own")
    stages = Stages(quiet=quiet or as_json)
    changes = ({"temperature": 0} if greedy else {}) | params_of(sampling)
    replace(SamplingParams(), **changes)  # what no engine takes is refused before one is read
    loading = time.monotonic()

    opened = open_engine(engine, stages, verify=verify)
    target = opened.manifest.target
    check_checkpoint(opened, checkpoint)
    stages.done(f"engine   {engine}: target {target.name}, {_verified(opened.verification)}")

    num = max(sampling["n"] or 1, sampling["best_of"] or 1)
    limits = opened.manifest.limits
    params = SamplingParams()
    requests: list[Request] = []
    conversation: ChatRequest | None = None

    def check(llm: LLM) -> None:
        nonlocal params, requests, conversation
        params = replace(llm.default_sampling_params, **changes)
        if chat and prompt is not None:
            messages = [*([] if system is None else [Message("system", system)]), Message("user", prompt)]
            conversation = llm.chat_request(messages, params, chat_template_kwargs={"thinking": thinking})
            params = conversation.params
        if prompt is not None:
            llm.check(prompt if conversation is None else conversation.prompt, params)
        if batch is not None and output is not None:
            requests = read_requests(batch, params, llm, opened.manifest.digest)
            answered(output, requests)

    stages("loading")
    room = None
    if prompt is not None:
        room = _room(opened, f"{system or ''}{prompt}", sampling["max_tokens"] + (_CHAT_TOKENS if chat else 0))
    llm = LLM(
        opened,
        max_batch_size=min(num, limits.max_batch_size) if batch is None else None,
        num_speculative_tokens=num_speculative_tokens,
        checkpoint=checkpoint,
        on_load=_loading(stages),
        before_load=check,
        threads=threads,
        self_check=not no_self_check,
        max_model_len=max_model_len or room,
    )
    with llm:
        load_s = time.monotonic() - loading
        cache = decimal(llm.num_blocks * opened.manifest.cache.bytes_per_block)
        stages.done(f"loaded   room for {llm.max_model_len} tokens, cache {cache}")
        stages.say(f"check    {_self_check_line(llm, no_self_check)}")
        if batch is not None and output is not None:
            run_batch(llm, requests, output, stages.say)
            return
        assert prompt is not None
        result = _run_one(llm, prompt, params, conversation, echo=not as_json)
        if as_json:
            write_json(_as_json(llm, result, load_s))
        else:
            write("\n")
    stages.say(_speed_line(result.metrics, result.outputs[0].finish_reason))
    if num_speculative_tokens:
        stages.say(_drafts_line(llm.metrics()))


def _refuse_contradictions(
    prompt: str | None,
    batch: Path | None,
    output: Path | None,
    greedy: bool,
    as_json: bool,
    sampling: Mapping[str, Any],
) -> None:
    """Refuse options that leave nothing to one another.

    Raises:
        UsageError: naming them.
    """
    if greedy and any(sampling[name] is not None for name in ("temperature", "top_p", "top_k", "min_p")):
        raise click.UsageError(
            "--greedy leaves nothing to --temperature, --top-p, --top-k and --min-p; drop one or the other"
        )
    if (prompt is None) == (batch is None):
        raise click.UsageError("give either --prompt or --batch")
    if (batch is None) != (output is None):
        raise click.UsageError("--batch and --output belong together")
    if batch is not None and output is not None:
        if as_json:
            raise click.UsageError("--batch writes JSON to --output; drop --json")
        return
    if as_json:
        return
    for name in ("logprobs", "prompt_logprobs"):
        if sampling[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --json or --batch, which have room for them")
    if (sampling["n"] or 1) > 1 or sampling["best_of"] is not None:
        raise click.UsageError(
            f"{'--n above 1' if (sampling['n'] or 1) > 1 else '--best-of'} needs --json or --batch, since completions "
            "are not streamed side by side"
        )


def _room(engine: Engine, prompt: str, max_tokens: int) -> int:
    """Return how many tokens a prompt and its answer take, of those that the engine allows."""
    most = engine.manifest.limits.max_model_len
    return max(1, min(len(engine.tokenizer.encode_at_most(prompt, most)) + max_tokens, most))


def _run_one(llm: LLM, prompt: str, params: SamplingParams, chat: ChatRequest | None, *, echo: bool) -> RequestOutput:
    source = prompt if chat is None else chat.prompt
    if not echo:
        (output,) = llm.generate(source, params)
        return output if chat is None else with_messages(output, chat)
    reader = None if chat is None else AnswerReader(chat)
    last, was_thinking = None, False
    for delta in llm.stream(source, params):
        if reader is None:
            write_generated(delta.text)
        else:
            message = reader.delta(delta).message
            assert message is not None
            write_generated(message.reasoning_content, err=True)
            was_thinking = was_thinking or bool(message.reasoning_content)
            if message.content and was_thinking:  # the answer begins a line where both are shown together
                write_generated("\n", err=True)
                was_thinking = False
            write_generated(message.content)
        last = delta.output
    assert last is not None
    return last


def _as_json(llm: LLM, output: RequestOutput, load_s: float) -> dict[str, Any]:
    first, metrics, check = output.outputs[0], output.metrics, llm.self_check
    return {
        "text": first.text,
        "token_ids": first.token_ids,
        "prompt_token_ids": output.prompt_token_ids,
        "finish_reason": first.finish_reason,
        "stop_reason": first.stop_reason,
        "prompt_logprobs": None if output.prompt_logprobs is None else prompt_logprobs_json(output),
        "completions": [completion_json(completion) for completion in output.outputs],
        "self_check": None
        if check is None
        else {"largest_difference": check.largest_difference, "tolerance": check.tolerance},
        "timings": {
            "load_s": load_s,
            "prefill_tokens": metrics.prefill_tokens,
            "prefill_s": metrics.prefill_s,
            "decode_tokens": metrics.decode_tokens,
            "decode_s": metrics.decode_s,
        },
    }


def _drafts_line(metrics: LLMMetrics) -> str:
    rates = [f"{a / p:.0%}" for p, a in zip(metrics.drafts_proposed, metrics.drafts_accepted) if p]
    return f"drafts   accepted by position: {', '.join(rates) or 'none proposed'}"


def _verified(what: Verification) -> str:
    """Say what was compared with its digests, and when."""
    before = what.num_bytes - what.read_bytes
    return f"{decimal(what.num_bytes)} verified" + (f", {decimal(before)} of it before" if before else "")


def _self_check_line(llm: LLM, switched_off: bool) -> str:
    if switched_off:
        return "self-check skipped (--no-self-check)"
    if llm.self_check is None:
        return "this engine stores no self-check; its results were not compared with anything"
    check = llm.self_check
    return (
        f"self-check passed: {check.num_values} values, largest difference {check.largest_difference:.2g} "
        f"of {check.tolerance:.2g} allowed"
    )


def _speed_line(metrics: RequestMetrics, finish_reason: str) -> str:
    prefill = metrics.prefill_tokens / max(metrics.prefill_s, 1e-9)
    line = f"speed    prefill {metrics.prefill_tokens} tokens at {prefill:.1f} tok/s"
    if metrics.decode_tokens:
        decode = metrics.decode_tokens / max(metrics.decode_s, 1e-9)
        line += f", decode {metrics.decode_tokens} tokens at {decode:.1f} tok/s"
    return f"{line}; finish: {finish_reason}"
