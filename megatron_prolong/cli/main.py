"""The `prolong` command: registers one thin file per command and turns UserError into its exit code."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from megatron_prolong.cli import (
    convert,
    data,
    data_inspect,
    doctor,
    eval,
    eval_suite,
    launch,
    plan,
    recipe,
    runs,
    train,
)
from megatron_prolong.errors import JointError, RankLost, UserError
from megatron_prolong.runtime.gpu_environment import set_gpu_environment
from megatron_prolong.runtime.orphans import follow_launcher
from megatron_prolong.runtime.passing import exit_code
from megatron_prolong.runtime.publish import is_disk_full, wanted_name

app = typer.Typer(
    name="prolong",
    help="Long-context continued training of Llama models on Megatron-Core.",
    epilog="--debug, anywhere on the line, shows where an error arose.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"megatron-prolong {version('megatron-prolong')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(train.train)
app.command()(train.status)
app.add_typer(convert.app, name="convert")
data_inspect.register(data.app)
app.add_typer(data.app, name="data")
eval_suite.register(eval.app)
app.add_typer(eval.app, name="eval")
app.add_typer(recipe.app, name="recipe")
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(runs.runs)
app.command()(runs.report)
app.command()(launch.launch)


def run() -> None:
    """Console entry point. `--debug` anywhere on the line keeps the traceback of a user error."""
    follow_launcher(signal.SIGKILL)  # also while torch is imported
    # A crash below Python (a mapped shard that the file server no longer gives, a library's bug) says where it was.
    faulthandler.enable(2)
    # No locale, and no name of a file, ends a run that is about to print it.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    set_gpu_environment()  # before a command imports torch, which reads some of it as it does
    try:
        _run()
    except BaseException as error:
        if not _is_one_of_many():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _is_one_of_many() -> bool:
    """Whether this rank fails alone, or another one is gone: `distributed` leaves its groups as they are, and the
    interpreter's end would wait for the others when it aborts them (nccl issue 1777)."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_world_size() > 1


def _run() -> None:
    """A path that cannot be read or written, or a full disk, is a user error wherever it comes up; a file server's
    fault that passes ends with 1, so that a batch job is started again."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) != len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="prolong")
    except UserError as error:
        if debug:
            raise
        if not isinstance(error, JointError) or error.said_here:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except RankLost as event:
        print(f"error: {event}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if debug or (error.filename is None and not is_disk_full(error)):
            raise
        path = error.filename2 or error.filename  # of a rename, the name that was wanted
        where = f"{wanted_name(str(path))}: " if path else ""
        print(f"error: {where}{error.strerror} (--debug shows where)", file=sys.stderr)
        sys.exit(exit_code(error))
