"""Tasks of lm-evaluation-harness, loaded and scored: offline, silent, and without running what task files name.

lm_eval is imported by the functions that need it, after the switches that it and its libraries read while they are
imported. Those are of the process, so this is for a command, which ends with it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import functools
import importlib
import io
import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from seekforge.common.errors import EnvironmentFault, OptionError, OutputError, RequestError, SeekforgeError
from seekforge.common.paths import real_path
from seekforge.common.requirements import install
from seekforge.runtime.evaluation.task_files import (
    UNSAFE_LOADER,
    members,
    metrics,
    needs_download,
    read_task_file,
    tasks_inside,
)

#: Resamples for the errors of metrics that have no formula.
BOOTSTRAP_ITERS: Final = 1000
#: Warnings that say what the harness's documentation says.
_USUAL: Final = re.compile(r"is defined, but \w+ is not|not specified for metric")
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
_SILENT: Final = {
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_MULTIPROC": "1",  # bootstrapping forks a process per core, with the engine's threads in them
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks, and what they may do.

    Attributes:
        tasks: names of tasks, groups or tags; `*` stands for anything.
        include_path: a folder with task files of one's own, which go before those that come with lm_eval.
        num_fewshot: examples before each question; None takes what each task says.
        limit: questions of each task; None takes all.
        system: what the model is told first.
        chat: questions are put as conversations.
        download: data of tasks may be fetched from the hub.
        trust_task_code: task files in `include_path` may run Python that they name.
        confirm_run_unsafe_code: tasks may run what the model wrote.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    system: str | None = None
    chat: bool = False
    download: bool = False
    trust_task_code: bool = False
    confirm_run_unsafe_code: bool = False


class _Heard(logging.Handler):
    """Hands warnings of the harness on as lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        if not _USUAL.search(line):
            self._say(f"lm_eval  {line}")


def prepare(*, download: bool, copies: Path, say: Callable[[str], None]) -> None:
    """Import lm_eval, offline unless `download`, with its progress bars off and its warnings handed to `say`.

    Args:
        download: whether data of tasks may be fetched, which are kept below the user's home.
        copies: a folder for what the library datasets makes of data that lie here, for as long as tasks are used.
        say: told warnings.

    Raises:
        EnvironmentFault: it is not installed.
    """
    os.environ.update(_SILENT if download else _SILENT | _OFFLINE)
    try:
        with contextlib.nullcontext() if download else _no_sockets():
            for module in ("lm_eval.evaluator", "lm_eval.tasks", "lm_eval.api.metrics"):
                importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"the module {error.name!r} is not installed, which evaluation needs; {install('eval')}"
        ) from None
    if not download:
        _copy_into(copies)
    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [_Heard(say)], False
    logger.setLevel(logging.WARNING)


@contextlib.contextmanager
def _no_sockets() -> Iterator[None]:
    """Keep urllib3 from opening one as it is imported, to see whether there is IPv6: nothing is fetched."""
    before, socket.has_ipv6 = socket.has_ipv6, False
    try:
        yield
    finally:
        socket.has_ipv6 = before


def _copy_into(folder: Path) -> None:
    """Let datasets put its copy of data that lie here into a folder, in place of one below the user's home."""
    import datasets

    load_dataset = datasets.load_dataset

    @functools.wraps(load_dataset)
    def load(path: str, *args: Any, **options: Any) -> Any:
        if needs_download({"dataset_path": path}) is None:
            options["cache_dir"] = str(folder)
        return load_dataset(path, *args, **options)

    datasets.load_dataset = load


def load_tasks(options: TaskOptions) -> Any:
    """Return the tasks, with their data, as lm_eval has them.

    Raises:
        RequestError: there is no such task, or it wants what the options do not allow.
    """
    from lm_eval.tasks import TaskManager

    local = TaskManager(include_path=_folder(options.include_path), include_defaults=False)
    wanted = _chosen(options.tasks, local.all_tasks)
    manager = local
    if wanted is None or any(name not in local.task_index for name in _reached(wanted, local.task_index)):
        manager = TaskManager(include_path=_folder(options.include_path))  # those of lm_eval too: some seconds
        wanted = _chosen(options.tasks, manager.all_tasks)
    if wanted is None:
        raise _no_task(options, manager.all_tasks, local.all_tasks)
    for name in _reached(wanted, manager.task_index):
        entry = manager.task_index.get(name)
        if entry is not None and entry.cfg is not None:
            is_local = name in local.task_index
            _check(name, entry.cfg, entry.yaml_path if is_local else None, options, known_metrics=is_local)
    if not options.trust_task_code:
        _sandbox_templates()
    loaded = _blamed(f"tasks {', '.join(wanted)}", lambda: manager.load(list(wanted)))
    for task in loaded["tasks"].values():
        stated = task.get_config("num_fewshot")
        if options.num_fewshot is not None and stated != 0:  # a task of none says so on purpose
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif stated is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own
    return loaded


def score(model: Any, loaded: Any, options: TaskOptions) -> dict[str, Any]:
    """Return results as lm_eval gives them: `results`, `groups`, `samples`, `n-samples` and more.

    Args:
        model: a `runtime.evaluation.model.EngineModel`.
        loaded: what `load_tasks` returned.
        options: those it was called with.

    Raises:
        RequestError: a question cannot be asked, or a task's data does not fit the task.
    """
    from lm_eval.evaluator import evaluate

    return _blamed(
        "evaluation",
        lambda: evaluate(
            lm=model,
            task_dict=loaded,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
            system_instruction=options.system,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        ),
    )


def _folder(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_dir():
        raise OptionError(f"--include-path is {path}, expected a folder with task files (YAML)")
    return str(real_path(path))


def _chosen(patterns: Iterable[str], names: Sequence[str]) -> list[str] | None:
    """Return the names that are meant, each once; None where one is not there."""
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not matches:
            return None
        chosen |= dict.fromkeys(matches)
    return list(chosen)


def _reached(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """Return names with those of the tasks in their groups and tags."""
    reached: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached[name] = None
        entry = index.get(name)
        if entry is not None:
            waiting += [*entry.tags] if entry.cfg is None else members(entry.cfg)
    return list(reached)


def _no_task(options: TaskOptions, names: Sequence[str], local: Sequence[str]) -> RequestError:
    missing = next(name for name in options.tasks if name not in names and not fnmatch.filter(names, name))
    close = difflib.get_close_matches(missing, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "--include-path names a folder with task files"
    if options.include_path is not None and not close:
        hint = f"{options.include_path} has {', '.join(local) or 'no task files that can be read'}"
    return RequestError(f"no task {missing!r}; {hint}")


def _check(
    name: str, config: Mapping[str, Any], path: Path | None, options: TaskOptions, *, known_metrics: bool
) -> None:
    """Refuse a task that wants what was not allowed.

    Args:
        name: the name of the task.
        config: its keys.
        path: its file; None of a task that came with lm_eval, whose functions are installed code.
        options: what is allowed.
        known_metrics: refuse metrics that lm_eval would look for elsewhere.

    Raises:
        RequestError: naming it.
    """
    trusts = options.trust_task_code
    if path is not None and not trusts:
        functions = read_task_file(path).functions
        if functions:
            raise RequestError(
                f"task {name} ({path}) runs Python: {functions[0]}; pass --trust-task-code if you have read it"
            )
    for task in tasks_inside(config):
        if task.get("dataset_path") == UNSAFE_LOADER and not trusts:
            raise RequestError(f"task {name} reads pickles, which run what they hold; write the data as JSON lines")
        if (source := needs_download(task)) is not None and not options.download:
            raise RequestError(
                f"task {name} reads {source}, which does not lie here; pass --download where there is internet, or use "
                "a task whose data is a file (dataset_path: json)"
            )
        if known_metrics and not trusts and task.get("process_results") is None:
            _check_metrics(name, task)


def _check_metrics(name: str, task: Mapping[str, Any]) -> None:
    from lm_eval.api.registry import metric_registry

    for metric, elsewhere in metrics(task):
        if elsewhere or metric not in metric_registry:
            raise RequestError(
                f"task {name} wants the metric {metric!r} of the library evaluate, which loads code for it; use one "
                "that lm_eval has, or pass --trust-task-code"
            )


def _sandbox_templates() -> None:
    """Let templates of task files reach texts and numbers, and nothing of Python behind them."""
    import lm_eval.utils as utils
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _full(error: BaseException | None) -> OSError | None:
    """Return what of an error and its causes says that a file cannot grow."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


def _blamed(what: str, work: Callable[[], Any]) -> Any:
    """Do work of the harness, whose prints nobody reads; whatever it raises about its input becomes one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return work()
    except (SeekforgeError, MemoryError):
        raise
    except Exception as error:  # lm_eval, datasets and jinja2 raise of every kind
        full = _full(error)
        if full is not None:
            raise OutputError(
                f"{what}: lm_eval cannot write its copy of the data ({full.strerror}); free space, or name another "
                "place in the environment variable TMPDIR, or HF_HOME for what is downloaded"
            ) from error
        text = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{what}: lm_eval says {type(error).__name__}: {text}; see the task's file and data"
        ) from error
