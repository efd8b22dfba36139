"""Questions to an engine, answered together and kept: what a context is scored at, what is generated after it.

All questions of a kind come at once, and the engine batches them itself. An answer is found again by what was asked. No
lm_eval here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seekforge.common.errors import EngineError, RequestError
from seekforge.runtime.chat import markup
from seekforge.runtime.chat.request import ChatOptions, ChatRequest
from seekforge.runtime.engine.chat_output import with_messages
from seekforge.runtime.engine.outputs import RequestOutput
from seekforge.runtime.evaluation.answers import Answer, AnswerStore, request_digest
from seekforge.runtime.evaluation.generation import generation_params
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams
from seekforge.runtime.text.segments import SegmentedText

#: Called with what is asked ("loglikelihood", "generate_until"), how many are answered, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """How questions are put.

    Attributes:
        chat: contexts are conversations (`conversation_text`), encoded as the model's family does.
        thinking: with `chat`, the model reasons before it answers; only the answer is scored.
        add_bos_token: begin every context that is no conversation with the model's begin-of-sequence token.
        seed: the seed of sampled answers; each question and repeat has one of its own that follows from it.
        sampling: fields of `SamplingParams` that go before what a task says.
    """

    chat: bool = False
    thinking: bool = False
    add_bos_token: bool = False
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """What is asked once, however often it is wanted.

    Attributes:
        digest: what its answer is found by.
        prompt, params: what the engine gets.
        num_scored: how many of the prompt's last tokens are scored; 0 generates.
        chat: the conversation that the prompt is made of.
        until: texts at which an answer is cut that the engine did not end at.
    """

    digest: str
    prompt: list[int] | SegmentedText
    params: SamplingParams
    num_scored: int = 0
    chat: ChatRequest | None = None
    until: tuple[str, ...] = ()


def conversation_text(messages: Sequence[Mapping[str, str]], *, begins_answer: bool = True) -> str:
    """Return a conversation as the text of a context.

    Args:
        messages: roles and contents.
        begins_answer: False goes on with the last message, the assistant's.
    """
    return json.dumps([list(messages), begins_answer], ensure_ascii=False)


class Asker:
    """Makes questions and has an `LLM` answer them.

    Attributes:
        llm: the engine; it stays the caller's, who closes it.
        options: how questions are put.
        num_truncated: contexts that were longer than the engine takes and lost their beginning.
    """

    def __init__(
        self,
        llm: LLM,
        options: AskOptions | None = None,
        *,
        store: AnswerStore | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Keep what it needs.

        Args:
            llm: a loaded engine.
            options: None takes the defaults.
            store: where answers are looked up and kept; None keeps them in memory.
            progress: called as answers come.
        """
        self.llm, self.options = llm, options or AskOptions()
        self._store = AnswerStore() if store is None else store
        self._progress = progress
        self._repeats: Counter[str] = Counter()
        self.num_truncated = 0

    @property
    def max_length(self) -> int:
        """Most tokens of context and continuation but the last: one place is for a token that is generated."""
        return self.llm.max_model_len - 2

    @property
    def end_token_id(self) -> int:
        """The end of a text.

        Raises:
            EngineError: the engine knows none.
        """
        ends = self.llm.engine.manifest.eos_token_ids
        if not ends:
            raise EngineError(
                f"{self.llm.engine.folder}: names no end of sequence, which evaluation needs; build it again"
            )
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning of a sequence, or its end where there is none."""
        begin = self.llm.engine.manifest.config.get("bos_token_id")
        if isinstance(begin, int) and not isinstance(begin, bool):
            return begin
        token = self.llm.engine.tokenizer.token_id(markup.BOS)
        return self.end_token_id if token is None else token

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Return the tokens of a text; one that `begins` starts as the options say."""
        ids = self.llm.engine.tokenizer.encode(text)
        if not begins or not self.options.add_bos_token or ids[:1] == [self.prefix_token_id]:
            return ids
        return [self.prefix_token_id, *ids]

    def encode_conversation(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation and of what the assistant says."""
        prompt = self._conversation(context, SamplingParams()).prompt
        tokenizer = self.llm.engine.tokenizer
        return tokenizer.encode_segments(prompt, self.llm.max_model_len), tokenizer.encode_text(continuation)

    def scored(self, context: list[int], continuation: list[int]) -> Question:
        """Return the question for the log-probability of a continuation.

        Raises:
            RequestError: the continuation is empty, or alone longer than the engine takes.
        """
        if not continuation:
            raise RequestError("a continuation has no tokens, so nothing can be scored; see the task's choices")
        ids = [*context, *continuation]
        if len(ids) > self.max_length + 1:
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation has {len(continuation):,} tokens, the engine takes {self.max_length:,}; "
                    "score it with loglikelihood_rolling, or build an engine with a longer --max-model-len"
                )
            self.num_truncated += 1
            ids = ids[-(self.max_length + 1) :]
        digest = request_digest(self.llm.engine.manifest.digest, ids, num_scored=len(continuation))
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        return Question(digest, ids, params, num_scored=len(continuation))

    def generated(self, context: str, settings: Mapping[str, Any]) -> Question:
        """Return the question for a text after a context; a sampled one is another each time it is asked.

        Args:
            context: text, or a conversation.
            settings: as `generation_params` takes them.

        Raises:
            RequestError: a setting is not known, or the answer has no room.
        """
        options = self.options
        params, until = generation_params(settings, options.sampling, thinking=options.thinking)
        chat = self._conversation(context, params) if options.chat else None
        if chat is not None:
            prompt, params = chat.prompt, chat.params
        else:
            prompt = self._fitting(self.encode(context), params.max_tokens or 1)
        engine = self.llm.engine.manifest.digest
        repeat = 0
        if not params.greedy:
            plain = request_digest(engine, prompt, params=params)
            repeat = self._repeats[plain]
            self._repeats[plain] += 1
            drawn = hashlib.sha256(f"{options.seed} {repeat} {plain}".encode()).digest()[:8]
            params = replace(params, seed=int.from_bytes(drawn) >> 1)
            chat = None if chat is None else replace(chat, params=params)
        return Question(request_digest(engine, prompt, params=params, repeat=repeat), prompt, params, 0, chat, until)

    def ask(self, kind: str, questions: Sequence[Question]) -> list[Answer]:
        """Return the answer to each question; what is not known is asked, once, and kept as it comes.

        Raises:
            RequestError: a question cannot be served, or the engine failed on some; what was answered is kept.
        """
        pending = list({one.digest: one for one in questions if self._store.get(one.digest) is None}.values())
        waiting = {one.digest for one in pending}
        done, total = sum(one.digest not in waiting for one in questions), len(questions)
        wanted = Counter(one.digest for one in questions)
        self._report(kind, done, total)
        failed: list[str] = []
        for number, output in self.llm.as_completed((one.prompt, one.params) for one in pending):
            errors = [one.error or "" for one in output.outputs if one.finish_reason == "error"]
            if errors:
                failed += errors
                continue
            self._store.add(_answer(pending[number], output))
            done += wanted[pending[number].digest]
            self._report(kind, done, total)
        if failed:
            raise RequestError(
                f"{len(failed)} of {len(pending)} requests failed ({failed[0]}); run again to repeat them"
            )
        answers = [self._store.get(one.digest) for one in questions]
        return [answer for answer in answers if answer is not None]

    def _conversation(self, context: str, params: SamplingParams) -> ChatRequest:
        messages, begins_answer = json.loads(context)
        options: ChatOptions = {"chat_template_kwargs": {"thinking": self.options.thinking}}
        if not begins_answer:
            options["continue_final_message"] = True  # with the beginning of the answer that the task gives
        return self.llm.chat_request(messages, params, **options)

    def _fitting(self, ids: list[int], max_tokens: int) -> list[int]:
        room = self.llm.max_model_len - max_tokens
        if room < 1:
            raise RequestError(
                f"a task generates up to {max_tokens:,} tokens, the engine has room for {self.llm.max_model_len:,} "
                "with the question; pass fewer --max-tokens, or build an engine with a longer --max-model-len"
            )
        if len(ids) > room:
            self.num_truncated += 1
            ids = ids[-room:]
        return ids

    def _report(self, kind: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(kind, done, total)


def _answer(question: Question, output: RequestOutput) -> Answer:
    first = output.outputs[0]
    if question.num_scored:
        rows = (output.prompt_logprobs or ())[-question.num_scored :]
        entries = [row for row in rows if row is not None]
        assert len(entries) == question.num_scored
        return Answer(
            request=question.digest,
            logprob=float(sum(entry.logprob for entry in entries)),
            is_greedy=all(entry.rank == 1 for entry in entries),
        )
    text, reasoning = first.text, ""
    if question.chat is not None:
        message = with_messages(output, question.chat).outputs[0].message
        assert message is not None
        text, reasoning = message.content or "", message.reasoning_content or ""
    return Answer(
        request=question.digest,
        text=text,
        reasoning=reasoning,
        finish_reason=first.finish_reason,
        num_tokens=len(first.token_ids),
    )
