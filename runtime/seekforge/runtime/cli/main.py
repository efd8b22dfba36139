"""`seekforge`: the root of the command line.

Commands are a table of dotted names and help texts, imported when called: `--help` loads nothing heavy, and commands
of the exporter are reachable without the runtime importing it. Whatever goes wrong with the input or the
environment is one line on stderr and exit code 2; a traceback is a bug of ours.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem

from seekforge.common.cli.options import Group
from seekforge.common.cli.terminal import drop, echo, flush_streams, one_line, prepare_streams, write
from seekforge.common.errors import SeekforgeError
from seekforge.common.requirements import own_version
from seekforge.common.system import Terminated, check_platform
from seekforge.plugins.faults import as_fault
from seekforge.runtime.cli.output_paths import check_outputs_of


class _Command(NamedTuple):
    target: str
    section: str
    help: str


COMMANDS: dict[str, _Command] = {
    "new-checkpoint": _Command(
        "seekforge.exporter.checkpoint.cli:new_checkpoint",
        "Make an engine",
        "Write a small checkpoint of the model's structure, trained or random.",
    ),
    "train": _Command(
        "seekforge.exporter.training.cli:train", "Make an engine", "Train a small checkpoint, or one trained on."
    ),
    "export": _Command(
        "seekforge.exporter.program.cli:export", "Make an engine", "Turn a checkpoint into one ONNX program."
    ),
    "build": _Command(
        "seekforge.exporter.builder.cli:build", "Make an engine", "Turn a program into an engine for a target."
    ),
    "kernels": _Command(
        "seekforge.exporter.builder.kernels_cli:kernels",
        "Make an engine",
        "Compile the operators' GPU kernels, estimate their launches.",
    ),
    "run": _Command("seekforge.runtime.cli.run:run", "Use it", "Generate text with an engine."),
    "chat": _Command("seekforge.runtime.cli.chat:chat", "Use it", "Talk with an engine, with thoughts and tools."),
    "serve": _Command(
        "seekforge.runtime.cli.serve:serve", "Use it", "Serve an engine over HTTP, as OpenAI's clients expect it."
    ),
    "dynamo": _Command(
        "seekforge.runtime.dynamo.cli:dynamo", "Use it", "Serve an engine as a worker of NVIDIA Dynamo."
    ),
    "ray": _Command("seekforge.runtime.ray.cli:ray", "Use it", "Serve replicas of an engine with Ray Serve."),
    "bench": _Command(
        "seekforge.runtime.cli.bench:bench", "Use it", "Measure an engine: throughput, latency, what the host costs."
    ),
    "eval": _Command(
        "seekforge.runtime.cli.eval:evaluate", "Check it", "Score an engine on tasks of lm-evaluation-harness."
    ),
    "parity": _Command(
        "seekforge.exporter.parity.cli:parity", "Check it", "Prove an engine against PyTorch, or find where it differs."
    ),
    "dump": _Command(
        "seekforge.runtime.cli.dump:dump", "Check it", "Write what an engine computes, to compare elsewhere."
    ),
    "inspect": _Command(
        "seekforge.exporter.inspect.cli:inspect", "Check it", "Show what a checkpoint, a program or an engine is."
    ),
    "targets": _Command(
        "seekforge.exporter.builder.targets_cli:targets", "Plan it", "List the GPUs that engines are built for."
    ),
    "plan": _Command("seekforge.exporter.planner.cli:plan", "Plan it", "Say which GPUs, and how many, a model needs."),
    "doctor": _Command(
        "seekforge.runtime.cli.doctor:doctor", "Plan it", "Show what is installed and what can be done here."
    ),
    "completion": _Command(
        "seekforge.runtime.cli.completion:completion", "Plan it", "Print what lets a shell complete commands."
    ),
}

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143
_COMMAND = "seekforge.command"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM, as of `timeout` and service managers, into an exception of the main thread."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LazyGroup(Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        ctx.meta[_COMMAND] = cmd_name  # click sets invoked_subcommand later, after an import that may fail
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        return check_outputs_of(getattr(importlib.import_module(module), attribute))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(command.section for command in COMMANDS.values()):
            with formatter.section(section):
                rows = [(name, one.help) for name, one in COMMANDS.items() if one.section == section]
                formatter.write_dl(rows, col_max=16)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the commands, of which none is imported for that."""
        names = [CompletionItem(name, help=one.help) for name, one in COMMANDS.items() if name.startswith(incomplete)]
        return names or click.Command.shell_complete(self, ctx, incomplete)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run and exit: 0 done, 2 an error (one line on stderr), 130 interrupted, 143 terminated."""
        prepare_streams()
        # torch makes a folder for a compiler that nothing here uses, `torchinductor_NAME` among the temporary files of
        # all, when it is imported; one that is there already it leaves as it is
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent))
        code: Any = EXIT_ERROR
        try:
            check_platform()
            code = super().main(
                args,
                "seekforge",  # under every name it is started by
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
        except SeekforgeError as error:
            _fail(str(error))
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            help_hint = f" (see '{context.command_path} --help')" if context is not None else ""
            _fail(error.format_message() + help_hint)
        except click.Abort:
            code = EXIT_INTERRUPTED
        finally:
            whole = flush_streams()
        code = code if isinstance(code, int) else 0
        sys.exit(code if whole else code or 1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminable():
                return super().invoke(ctx)
        except SeekforgeError as error:
            _fail(str(error))
        except (KeyboardInterrupt, click.Abort) as error:
            sys.exit(EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED)
        except BrokenPipeError:
            drop(sys.stdout)  # who read our output is gone
            sys.exit(1)
        except (ModuleNotFoundError, MemoryError, OSError, EOFError, ValueError) as error:
            fault = as_fault(error, ctx.meta.get(_COMMAND, "this command"))
            if fault is None:
                raise
            _fail(str(fault))


def _fail(message: str) -> NoReturn:
    write(f"error: {one_line(message)}\n", err=True)
    sys.exit(EXIT_ERROR)


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        echo(f"seekforge {own_version()}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def main() -> None:
    """Compile DeepSeek-V3.2 into an engine and run it: checkpoint, export, build, run."""


if __name__ == "__main__":
    main()
