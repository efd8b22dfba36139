"""An engine as a model of lm-evaluation-harness, in this process: `lm_eval` calls it, and it asks an `LLM`.

Importing this module imports lm_eval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from seekforge.runtime.evaluation.answers import AnswerStore
from seekforge.runtime.evaluation.asker import Asker, AskOptions, Progress, Question, conversation_text
from seekforge.runtime.evaluation.generation import cut
from seekforge.runtime.llm import LLM

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

#: Tokens of an answer where neither task nor options say how many; the harness's own default.
DEFAULT_MAX_TOKENS: Final = 256


class EngineModel(TemplateLM):
    """Scores and texts of an `LLM`, as lm_eval asks for them.

    Attributes:
        asker: what puts the questions.

    Example:
        >>> with LLM("engine/") as llm:
        ...     results = lm_eval.simple_evaluate(model=EngineModel(llm), tasks=["arc_easy"])
    """

    def __init__(
        self,
        llm: LLM,
        options: AskOptions | None = None,
        *,
        store: AnswerStore | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Make a model of a loaded engine. Arguments as of `Asker`."""
        super().__init__()
        self.asker = Asker(llm, options, store=store, progress=progress)

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.asker.end_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.asker.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls this tokenizer."""
        return f"seekforge-{self.asker.llm.engine.manifest.digest[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return a name for the encoding of conversations, which is no template."""
        return f"seekforge.runtime.chat{', thinking' if self.asker.options.thinking else ''}" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a text, which comes back with the requests about it."""
        return conversation_text(chat_history, begins_answer=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text."""
        return self.asker.encode(string, begins=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-probability of continuations of contexts, and whether each is what greedy decoding gives."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of whole texts, each token after as many before it as the engine takes."""
        texts: list[list[Question]] = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.asker.max_length,
                context_len=1,
            )
            texts.append([self.asker.scored(*make_disjoint_window(pair)) for pair in windows])
        answers = iter(self.asker.ask("loglikelihood_rolling", [one for text in texts for one in text]))
        return [sum(next(answers).logprob or 0.0 for _ in text) for text in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what the engine generates after each context, up to the texts that end it."""
        questions: list[Question] = []
        for request in requests:
            context, settings = request.args[:2]
            questions.append(self.asker.generated(context, normalize_gen_kwargs(settings, DEFAULT_MAX_TOKENS)))
        answers = self.asker.ask("generate_until", questions)
        return [cut(answer.text or "", one.until) for one, answer in zip(questions, answers, strict=True)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.asker.options.chat:
            return self.asker.encode_conversation(context, continuation)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        questions = [self.asker.scored(context, continuation) for _, context, continuation in requests]
        return [(answer.logprob or 0.0, answer.is_greedy) for answer in self.asker.ask("loglikelihood", questions)]
