"""`seekforge eval`: score an engine on tasks of lm-evaluation-harness; a table on stdout, or JSON."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from seekforge.common.cli.console import Column, Stages, Table, console
from seekforge.common.cli.options import (
    MOST_SEED,
    Number,
    Tokens,
    Whole,
    command,
    json_option,
    list_option,
    quiet_option,
    threads_option,
)
from seekforge.common.cli.terminal import write_json
from seekforge.common.paths import real_path
from seekforge.common.requirements import own_version
from seekforge.common.temporary import temporary_folder
from seekforge.formats.engine.manifest import load_manifest
from seekforge.runtime.cli.options import check_checkpoint, checkpoint_option, drafts_option, open_engine
from seekforge.runtime.evaluation.answers import AnswerStore
from seekforge.runtime.evaluation.asker import AskOptions
from seekforge.runtime.evaluation.harness import TaskOptions, load_tasks, prepare, score
from seekforge.runtime.evaluation.report import RESULTS, scores, summary, write_results
from seekforge.runtime.llm import LLM
from seekforge.runtime.sampling.params import SamplingParams


@command(
    "eval",
    examples=(
        "seekforge eval engine --tasks sums --include-path tasks --output scores",
        "seekforge eval engine --tasks sums --include-path tasks --chat --thinking --limit 20 --json",
        "seekforge eval engine --tasks mmlu_pro --download --chat --thinking --temperature 1 --top-p 0.95",
    ),
)
@click.argument("engine", type=click.Path(path_type=Path))
@list_option("--tasks", type=click.STRING, required=True, help="Tasks, groups or tags; * stands for anything.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    help="Folder with task files of your own (YAML).",
)
@click.option("--limit", type=Whole(1), help="Questions of each task.  [default: all]")
@click.option("--num-fewshot", type=Whole(), help="Examples before each question.  [default: the task's]")
@click.option(
    "--output",
    "store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of answers, samples and results; what it holds is not asked again.",
)
@click.option("--chat", is_flag=True, help="Put questions as messages, examples as earlier turns.")
@click.option("--system", help="With --chat: what the model is told before.")
@click.option("--thinking", is_flag=True, help="With --chat: let the model reason; the answer alone is scored.")
@click.option("--thinking-token-budget", type=Whole(-1), help="End a thought after so many tokens.")
@click.option("--max-tokens", type=Tokens(), help="Of a generated answer, its thought included.  [default: the task's]")
@click.option("--temperature", type=Number(0), help="Default: the task's, else 0, which is greedy.")
@click.option("--top-p", type=Number(0, 1, above=True), help="Default: the task's.")
@click.option("--seed", type=Whole(0, MOST_SEED), default=0, show_default=True, help="Of sampled answers.")
@click.option("--add-bos-token", is_flag=True, help="Without --chat: begin contexts with the begin-of-sequence token.")
@click.option("--max-model-len", type=Tokens(), help="Tokens to make room for.  [default: the engine's limit]")
@drafts_option
@checkpoint_option
@threads_option
@click.option("--download", is_flag=True, help="Let tasks fetch their data from the hub.")
@click.option("--trust-task-code", is_flag=True, help="Let task files of --include-path run Python that they name.")
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Let tasks run programs that the model wrote.")
@quiet_option
@json_option
def evaluate(
    engine: Path,
    tasks: tuple[str, ...],
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    store: Path | None,
    chat: bool,
    system: str | None,
    thinking: bool,
    thinking_token_budget: int | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    add_bos_token: bool,
    max_model_len: int | None,
    num_speculative_tokens: int,
    checkpoint: Path | None,
    threads: int | None,
    download: bool,
    trust_task_code: bool,
    confirm_run_unsafe_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score ENGINE on tasks of lm-evaluation-harness, in this process: log-likelihoods, multiple choice, generation.

    Nothing is downloaded, and no Python that a task file names is run, unless you say so. Run the same command again
    with the same --output after an interruption: what was answered is kept, by engine and question.
    """
    for name, value in (("--system", system), ("--thinking", thinking or None)):
        if value is not None and not chat:
            raise click.UsageError(f"{name} belongs to --chat")
    if add_bos_token and chat:
        raise click.UsageError("--add-bos-token is for contexts without --chat, which begins with that token itself")
    if thinking_token_budget is not None and not thinking:
        raise click.UsageError("--thinking-token-budget belongs to --thinking")
    fields = {
        "thinking_token_budget": thinking_token_budget,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }
    sampling = {name: value for name, value in fields.items() if value is not None}
    SamplingParams(**sampling)  # what no engine takes is refused before one is read
    options = TaskOptions(
        tasks=tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        system=system,
        chat=chat,
        download=download,
        trust_task_code=trust_task_code,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    stages = Stages(quiet=quiet or as_json)
    load_manifest(engine)  # what is no engine is said before libraries are imported
    stages("loading tasks")
    copies = click.get_current_context().with_resource(temporary_folder("seekforge-eval"))
    prepare(download=download, copies=copies, say=stages.say)
    loaded = load_tasks(options)  # and tasks that are none before the files of a large engine are compared
    opened = open_engine(engine, stages)
    check_checkpoint(opened, checkpoint)
    from seekforge.runtime.evaluation.model import EngineModel  # imports lm_eval

    ask = AskOptions(chat=chat, thinking=thinking, add_bos_token=add_bos_token, seed=seed, sampling=sampling)
    with AnswerStore(store) as answers:
        stages("loading the engine")
        with (
            LLM(
                opened,
                max_model_len=max_model_len,
                num_speculative_tokens=num_speculative_tokens,
                checkpoint=checkpoint,
                threads=threads,
            ) as llm,
            stages.steps_bar("answering") as update,
        ):
            model = EngineModel(llm, ask, store=answers, progress=lambda _, done, total: update(done / (total or 1)))
            results = score(model, loaded, options)
        if answers.num_read:
            stages.say(f"answers  {answers.num_read} were in {store}")
    if model.asker.num_truncated:
        stages.say(f"warning  {model.asker.num_truncated} contexts were too long and lost their beginning")
    manifest = opened.manifest
    result = summary(
        results,
        engine={"name": real_path(engine).name, "digest": manifest.digest, "target": manifest.target.name},
        settings=_settings(ask, options) | {"num_truncated": model.asker.num_truncated},
    )
    if store is not None:
        write_results(store, result, results.get("samples", {}))
        stages.say(f"wrote {store / RESULTS}")
    if as_json:
        write_json(result)
    elif not quiet:
        _print_table(results)


def _settings(ask: AskOptions, options: TaskOptions) -> dict[str, Any]:
    return {
        "chat": ask.chat,
        "thinking": ask.thinking,
        "system": options.system,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "add_bos_token": ask.add_bos_token,
        "seed": ask.seed,
        "sampling": dict(ask.sampling),
        "versions": {"seekforge": own_version(), "lm_eval": version("lm_eval")},
    }


def _print_table(results: dict[str, Any]) -> None:
    table = Table(
        [
            Column("task"),
            Column("examples", "number"),
            Column("metric"),
            Column("filter"),
            Column("score", "number"),
            Column("± stderr", "number"),
        ]
    )
    for one in scores(results):
        table.add(
            one.task,
            "" if one.num_fewshot is None else str(one.num_fewshot),
            one.metric,
            "" if one.filter == "none" else one.filter,
            f"{one.value:.4f}",
            "" if one.stderr is None else f"{one.stderr:.4f}",
        )
    console().print(table)
