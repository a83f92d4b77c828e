"""`prolong eval run` and `data check`: the long-context suites."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_prolong.cli.counts import each_at_least
from megatron_prolong.cli.eval import (
    SHORTEST,
    Compare,
    Model,
    check_models,
    folders,
    going_on,
    is_main,
    models_of,
    names_of,
    on_all_ranks,
    one_of,
    ranks,
)
from megatron_prolong.cli.eval_harness import lm_eval, model_folders
from megatron_prolong.cli.eval_results import compare as compare_results
from megatron_prolong.cli.eval_results import judge, report
from megatron_prolong.cli.recipe import warn
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.evaluation.backend import Backend
    from megatron_prolong.evaluation.openai import OpenAIBackend
    from megatron_prolong.evaluation.short import ShortTask
    from megatron_prolong.evaluation.task import Entails, Task
    from megatron_prolong.runtime.launch import World

data_app = typer.Typer(help="The suites' data.", no_args_is_help=True, rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    """Add these commands to `prolong eval`."""
    app.command()(run)
    app.command("compare")(compare_results)
    app.command()(judge)
    app.command("lm-eval")(lm_eval)
    app.add_typer(data_app, name="data")


Suite = Annotated[str, typer.Option(help="helmet, ruler, prolong, synthetic (needs no data) or short.")]
SuiteLengths = Annotated[
    Sequence[int],
    typer.Option(
        parser=each_at_least(SHORTEST),
        metavar="TOKENS,...",
        help="Prompt and answer together, e.g. 8k,16k,32k.",
    ),
]
SUITE_LENGTHS: Any = "8k,16k,32k,64k,128k"  # typer parses defaults too
Data = Annotated[Path | None, typer.Option(help="HELMET's data directory (json_kv/, ruler/, kilt/ …, hf/).")]
Tasks = Annotated[str, typer.Option(help="Only these tasks or categories, e.g. recall,kilt_nq.")]
Server = Annotated[str | None, typer.Option(help="OpenAI-compatible server, e.g. http://localhost:8000/v1.")]


def run(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory for results, one folder per model.")],
    suite: Suite = "helmet",
    lengths: SuiteLengths = SUITE_LENGTHS,
    compare: Compare = None,
    data: Data = None,
    tasks: Tasks = "",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Questions per task (default: HELMET's).")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, hf, megatron or openai.")] = "auto",
    server: Server = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer of the served model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together (hf, megatron).")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Ranks that share each very long prompt (megatron).")] = 1,
    haystack: Annotated[Path | None, typer.Option(help="Text for generated needle tasks.")] = None,
    chat: Annotated[str, typer.Option(help="Chat template: auto (HELMET's choice), always, never.")] = "auto",
    too_long: Annotated[
        str, typer.Option(help="Beyond the model's length: refuse, truncate, allow.")
    ] = "refuse",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out tasks without data.")
    ] = False,
    nli: Annotated[Path | None, typer.Option(help="T5 NLI model for citation scores.")] = None,
    stop_newline: Annotated[
        bool, typer.Option("--stop-newline", help="End answers at a line break.")
    ] = False,
    tag: Annotated[str, typer.Option(help="Part of the file names; HELMET's scripts look for v1.")] = "v1",
    seed: Annotated[int, typer.Option(min=0, help="HELMET's is 42.")] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run finished tasks again.")] = False,
) -> None:
    """Run a suite; `prolong eval MODEL --suite …` is the same. A stopped run goes on with the same command."""
    from megatron_prolong.evaluation.backend import declared_length, load_tokenizer, tokenizer_directory
    from megatron_prolong.evaluation.documents import read_text
    from megatron_prolong.evaluation.nli import load_nli, refuse_no_model
    from megatron_prolong.evaluation.run import Settings
    from megatron_prolong.evaluation.sentences import split_sentences
    from megatron_prolong.evaluation.suite import (
        refuse_another_model,
        refuse_chat,
        refuse_cramped,
        refuse_lengths_beyond,
        run_suite,
        runnable,
    )
    from megatron_prolong.evaluation.suites import SUITES, left_out, select
    from megatron_prolong.evaluation.task import Inputs

    if suite == "short":
        _refuse_what_short_ignores(ctx)
        _run_short(models_of(model, compare), out, samples, tasks, overwrite, batch_size)
        return
    names = names_of(tasks)

    def prepare() -> tuple[list[tuple[str, str, str]], list[Task], str, Entails | None]:
        one_of("--suite", suite, (*SUITES, "short"))
        _refuse_options(chat, too_long, backend, tag, world)
        if backend != "openai" and (server or tokenizer):
            raise UserError("--server and --tokenizer are for a served model: add --backend openai")
        pairs, chosen = models_of(model, compare), select(suite, lengths, names)
        text = read_text(haystack) if haystack else ""
        if is_main(world):
            chosen = runnable(chosen, data, skip_missing)
            warn(left_out(suite, lengths, names))
        if backend != "openai":
            check_models([path for _, path in pairs], backend, cp)
        models = [(label, *_name_and_identity(path, backend)) for label, path in pairs]
        if not is_main(world):
            return models, chosen, text, None
        if nli:
            refuse_no_model(nli)
        for label, name, identity in models:
            if not overwrite:
                refuse_another_model(out / label, name, identity)
            if backend != "openai":
                declared, words = declared_length(Path(name)), load_tokenizer(tokenizer_directory(Path(name)))
            else:
                served = _connect(name, server, tokenizer)
                declared, words = served.max_length, served.tokenizer
            if declared is not None:
                refuse_lengths_beyond(chosen, name, declared, too_long)
            refuse_cramped(chosen, Inputs(data, words, seed, haystack=text))
            refuse_chat(chosen, words, chat)
            make(out / label)
        entails = None
        if nli and any(task.summarise for task in chosen):
            split_sentences("Now, not after hours of answers.")
            entails = load_nli(nli)
        return models, chosen, text, entails

    results = {}
    with folders() as make, ranks() as world, going_on(world):
        models, chosen, text, entails = on_all_ranks(world, prepare)
        for label, name, identity in models:
            settings = Settings(tag, chat, too_long, stop_newline, overwrite, identity)
            with _open(name, backend, server, tokenizer, batch_size, cp, world) as loaded:
                if loaded is not None:  # None: a rank that only lent its part of the model
                    inputs = Inputs(data, loaded.tokenizer, seed, samples, text)
                    results[label] = run_suite(chosen, loaded, inputs, settings, out / label, entails)
            del loaded  # the next model needs the memory
    if is_main(world):
        report(results, suite, out)


def _refuse_options(chat: str, too_long: str, backend: str, tag: str, world: World | None) -> None:
    """Raises UserError for a word or a tag that means nothing."""
    one_of("--chat", chat, ("auto", "always", "never"))
    one_of("--too-long", too_long, ("refuse", "truncate", "allow"))
    one_of("--backend", backend, ("auto", "hf", "megatron", "openai"))
    if backend == "openai" and world is not None:
        raise UserError("--backend openai: one process asks the server; start it without torchrun or srun")
    if "/" in tag:
        raise UserError(f"--tag {tag}: becomes a part of file names, so it cannot hold a /")


@data_app.command("check")
def data_check(
    data: Data = None,
    suite: Suite = "helmet",
    lengths: SuiteLengths = SUITE_LENGTHS,
    tasks: Tasks = "",
) -> None:
    """What of a suite's data is there, what is missing, and how to get it."""
    from rich.table import Table

    from megatron_prolong.evaluation.data_check import how_to_get, llama2_hint, needs
    from megatron_prolong.evaluation.suites import SUITES, select
    from megatron_prolong.runtime.terminal import print_table

    one_of("--suite", suite, (*SUITES, "short"))
    if suite == "short":
        print("suite short: lm-evaluation-harness fetches its data itself")
        return
    chosen = select(suite, lengths, names_of(tasks))
    table = Table(title=f"{suite} in {data or 'no directory (give --data)'}")
    for heading in ("file", "state", "tasks"):
        table.add_column(heading)
    commands: dict[str, None] = {}
    for need in needs(chosen, data):
        missing = "made offline" if need.generated else "missing"
        table.add_row(need.path, "there" if need.found else missing, ", ".join(need.tasks))
        if not need.found and not need.generated:
            commands.setdefault(how_to_get(need.path, data or Path("data")))
    print_table(table)
    if commands:
        print("To get what is missing:\n" + "\n".join(commands))
    if hint := llama2_hint(chosen, data):
        print(hint)


def _name_and_identity(path: str, backend: str) -> tuple[str, str]:
    """As results have them; what a server holds has no identity."""
    from megatron_prolong.evaluation.identity import model_identity
    from megatron_prolong.recipe.shape import model_directory

    if backend == "openai":
        return path, ""
    directory = model_directory(path)
    return str(directory), model_identity(directory)


def _open(
    path: str,
    backend: str,
    server: str | None,
    tokenizer: Path | None,
    batch_size: int,
    cp: int,
    world: World | None,
) -> AbstractContextManager[Backend | None]:
    from megatron_prolong.evaluation.backend import open_backend

    if backend == "openai":
        return nullcontext(_connect(path, server, tokenizer))
    return open_backend(path, batch_size=batch_size, kind=backend, cp=cp, world=world)


def _connect(model: str, server: str | None, tokenizer: Path | None) -> OpenAIBackend:
    from megatron_prolong.evaluation.backend import load_tokenizer
    from megatron_prolong.evaluation.client import Client
    from megatron_prolong.evaluation.openai import OpenAIBackend

    if server is None or tokenizer is None:
        raise UserError(
            "--backend openai needs --server URL, and --tokenizer DIRECTORY to count and cut prompts with"
        )
    return OpenAIBackend.connect(Client(server), model, load_tokenizer(tokenizer))


def _run_short(
    models: list[tuple[str, str]],
    out: Path,
    samples: int | None,
    names: str,
    overwrite: bool,
    batch_size: int,
) -> None:
    from megatron_prolong.evaluation.harness_scores import check_harness
    from megatron_prolong.evaluation.results import SHORT_SCORES
    from megatron_prolong.evaluation.short import print_short, run_short, select_short
    from megatron_prolong.recipe.shape import model_directory

    def prepare() -> tuple[tuple[ShortTask, ...], list[tuple[str, Path]]]:
        check_harness()
        tasks = select_short(names_of(names))
        check_models([path for _, path in models])
        directories = [(label, model_directory(path)) for label, path in models]
        if is_main(world):
            model_folders(directories, out, SHORT_SCORES, make, overwrite=overwrite)
        return tasks, directories

    results = {}
    with folders() as make, ranks() as world, going_on(world):
        tasks, found = on_all_ranks(world, prepare)
        for label, directory in found:
            results[label] = run_short(
                directory,
                out / label,
                samples,
                tasks,
                overwrite=overwrite,
                batch_size=batch_size,
                world=world,
            )
    if is_main(world):
        print_short(results)


def _refuse_what_short_ignores(ctx: typer.Context) -> None:
    given = {name for name in ctx.params if "COMMANDLINE" in str(ctx.get_parameter_source(name))}
    used = {"model", "out", "suite", "compare", "tasks", "samples", "batch_size", "overwrite"}
    if unused := [f"--{name.replace('_', '-')}" for name in sorted(given - used)]:
        raise UserError(f"--suite short has no use for {', '.join(unused)}; leave it out")
