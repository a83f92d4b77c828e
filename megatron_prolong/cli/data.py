"""`prolong data`: from texts to packed sequences, step by step.

The commands that look at data (inspect, verify, convert) live in cli/data_inspect.py and join this app there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from megatron_prolong.cli.counts import OfDomain, at_least, each_at_least, of_domain
from megatron_prolong.cli.eval import going_on
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.data.executors import Executor

R = TypeVar("R")
app = typer.Typer(help="Tokenize, filter, pack and look at training data.", no_args_is_help=True)

Paths = Annotated[list[str], typer.Argument(metavar="IN... OUT", help="Inputs, then the directory to write.")]
Kind = Annotated[str | None, typer.Option(help="See `prolong data sources`; found out if absent.")]
TextField = Annotated[
    str | None, typer.Option(help="Field that holds the text (default: text); `a.b` reaches inside.")
]
OnBadInput = Annotated[str, typer.Option(help="Stop at the first bad record, or skip and count.")]
Workers = Annotated[int, typer.Option(help="Processes; 0 takes one per core.", min=0)]
ExecutorName = Annotated[str, typer.Option("--executor", help="Where the work is done: local or ray.")]
UINT32 = 2**32 - 1  # the largest token id, and NumPy's largest seed
SlurmArray = Annotated[
    bool,
    typer.Option("--slurm-array", help="Do this Slurm array job's share (SLURM_ARRAY_TASK_ID, …_COUNT)."),
]


@app.command()
def sources() -> None:
    """List the kinds of sources that tokenize reads."""
    from megatron_prolong.data.sources import SOURCES

    for source in SOURCES.values():
        typer.echo(f"{source.kind:14}{source.about}")
    typer.echo(f"{'chat':14}JSON Lines of chats: a list of role and content in the field `messages`")


@app.command()
def tokenize(
    paths: Paths,
    tokenizer: Annotated[Path, typer.Option(help="Directory of a tokenizer, model or checkpoint.")],
    kind: Kind = None,
    domain: Annotated[str | None, typer.Option(help="Name of the domain (default: the name of OUT).")] = None,
    domain_field: Annotated[
        str | None, typer.Option(help="Field that names a record's domain; --domain: of those without.")
    ] = None,
    text_field: TextField = None,
    messages_field: Annotated[
        str | None, typer.Option(help="With --chat: field that holds the messages (default: messages).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Records are chats, whatever their --kind.")] = False,
    max_chat_tokens: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            metavar="TOKENS",
            help="Cut longer chats after the last whole assistant turn, e.g. 64K.",
        ),
    ] = None,
    on_bad_input: OnBadInput = "stop",
    workers: Workers = 0,
    executor: ExecutorName = "local",
    slurm_array: SlurmArray = False,
) -> None:
    """Turn texts, repositories or chats into tokenized documents."""
    from megatron_prolong.data.tokenize import TokenizeOptions
    from megatron_prolong.data.tokenize import tokenize as run

    inputs, out = _split(paths)
    names = {"text_field": text_field, "messages_field": messages_field}
    fields = {name: value for name, value in names.items() if value is not None}
    chats = chat or kind == "chat"
    if chats and text_field is not None:
        raise UserError(f"--text-field {text_field}: chats have --messages-field; leave it out")
    if not chats and messages_field is not None:
        raise UserError(f"--messages-field {messages_field} is for chats: add --chat, or leave it out")
    options = TokenizeOptions(
        kind=kind,
        domain=domain if domain is not None else "" if domain_field else out.name,
        domain_field=domain_field,
        **fields,
        chat=chat,
        max_chat_tokens=max_chat_tokens,
        on_bad_input=_stop_or_skip(on_bad_input),
    )
    how = _how(executor, workers, slurm_array)
    report = _done(out, lambda: run(inputs, tokenizer, out, options, **how))
    typer.echo(f"{out}: {counted(report.documents, 'document')}, {counted(report.tokens, 'token')}")
    if report.targets:
        typer.echo(f"  {report.targets:,} tokens ({report.targets / report.tokens:.1%}) are training targets")
    if report.forced_cuts:
        typer.echo(f"  {report.forced_cuts:,} forced cuts in texts without blanks or newlines")
    _print_counts("left out", report.left_out)


@app.command()
def group(
    paths: Paths,
    by: Annotated[
        str,
        typer.Option(help="Field that names a row's group, e.g. max_stars_repo_name; `a.b` reaches inside."),
    ],
    path_field: Annotated[
        str | None,
        typer.Option(
            help="Rows are files: field with the path of each; without it, rows stay in their order."
        ),
    ] = None,
    kind: Kind = None,
    text_field: TextField = None,
    on_bad_input: OnBadInput = "stop",
    workers: Workers = 0,
    executor: ExecutorName = "local",
    slurm_array: SlurmArray = False,
) -> None:
    """Put rows of files in order, for tokenize to make one document of every repository."""
    from megatron_prolong.data.group import GroupOptions
    from megatron_prolong.data.group import group as run

    inputs, out = _split(paths)
    options = GroupOptions(
        by=by,
        path_field=path_field,
        kind=kind,
        text_field=text_field or "text",
        on_bad_input=_stop_or_skip(on_bad_input),
    )
    how = _how(executor, workers, slurm_array)
    report = _done(out, lambda: run(inputs, out, options, **how))
    typer.echo(f"{out}: {counted(report.documents, 'row')}")
    _print_counts("left out", report.left_out)


@app.command("filter")
def filter_(
    paths: Paths,
    min_length: Annotated[
        list[OfDomain] | None,
        typer.Option(
            parser=of_domain,
            metavar="[DOMAIN=]TOKENS",
            help="Drop shorter ones: 64K tokens, or books=32K for one domain; repeatable.",
        ),
    ] = None,
    max_length: Annotated[
        list[OfDomain] | None,
        typer.Option(
            parser=of_domain, metavar="[DOMAIN=]TOKENS", help="Drop longer ones; written like --min-length."
        ),
    ] = None,
    duplicates: Annotated[
        bool, typer.Option("--duplicates", help="Drop exact duplicates but the first.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(help="File of an evaluation set (text, JSON, JSONL, Parquet); repeatable."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--ngram", help="With --against: words that must be the same in a row (default: 13)."),
    ] = None,
    hits: Annotated[
        int | None,
        typer.Option(
            help="With --against: different n-grams that a document must share to be dropped (default: 1)."
        ),
    ] = None,
    predicate: Annotated[
        str | None, typer.Option(help="module:function; called with tokens, domain, text; True keeps.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The data's tokenizer, for --against and text.")
    ] = None,
    workers: Workers = 0,
    executor: ExecutorName = "local",
    slurm_array: SlurmArray = False,
) -> None:
    """Drop tokenized documents by length, as duplicates, as contaminated, or by your own rule."""
    from megatron_prolong.data.filter import FilterOptions, filter_documents

    inputs, out = _split(paths)
    rule = {name: value for name, value in (("n", n), ("hits", hits)) if value is not None}
    if rule and not against:
        raise UserError(
            "--ngram and --hits are for --against FILE, an evaluation set: add it, or leave them out"
        )
    options = FilterOptions(
        min_length=_by_domain("--min-length", min_length or []),
        max_length=_by_domain("--max-length", max_length or []),
        duplicates=duplicates,
        against=tuple(against or ()),
        **rule,
        predicate=predicate,
        tokenizer=str(tokenizer) if tokenizer else None,
    )
    how = _how(executor, workers, slurm_array)
    report = _done(out, lambda: filter_documents(inputs, out, options, **how))
    kept, all_tokens = counted(report.kept_documents, "document"), counted(report.tokens, "token")
    typer.echo(f"{out}: kept {kept}, {counted(report.kept_tokens, 'token')}")
    typer.echo(f"  of {counted(report.documents, 'document')}, {all_tokens}")
    _print_counts("dropped documents", {reason: counts[0] for reason, counts in report.dropped.items()})
    for example in report.examples[:5]:
        typer.echo(f"  contaminated: {example}")


@app.command()
def pack(
    paths: Paths,
    length: Annotated[
        int, typer.Option(parser=at_least(1), metavar="TOKENS", help="Tokens of a pack, e.g. 64K.")
    ],
    mode: Annotated[
        str,
        typer.Option(
            help="single: long documents cut into whole packs; concat: one after the other, a cut document "
            "goes on in the next pack; bestfit: no document that fits is cut."
        ),
    ],
    min_length: Annotated[
        int,
        typer.Option(
            parser=at_least(0),
            metavar="TOKENS",
            help="Drop documents below this and, but for single, rests of documents.",
        ),
    ] = 1,
    lengths: Annotated[
        Sequence[int] | None,
        typer.Option(
            parser=each_at_least(1),
            metavar="TOKENS,...",
            help="With single: chunk lengths, each into a subset of its own, e.g. 64K,512K.",
        ),
    ] = None,
    overlap: Annotated[
        int,
        typer.Option(
            parser=at_least(0),
            metavar="TOKENS",
            help="Tokens that the next piece of a cut document repeats.",
        ),
    ] = 0,
    intact: Annotated[
        bool, typer.Option("--intact", help="Drop the rest of a cut document (chats).")
    ] = False,
    bos: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Id to begin every document with (default: none).")
    ] = None,
    eos: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Id to end every document with (default: none).")
    ] = None,
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, max=UINT32, help="Seed of a random order of the documents.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Name to write instead of the input's.")] = None,
    workers: Workers = 0,
    executor: ExecutorName = "local",
    slurm_array: SlurmArray = False,
) -> None:
    """Pack tokenized documents into sequences of one length, with an account of every token."""
    from megatron_prolong.data.pack import PackOptions
    from megatron_prolong.data.pack import pack as run

    inputs, out = _split(paths)
    options = PackOptions(
        length=length,
        mode=mode,  # type: ignore[arg-type]
        min_length=min_length,
        lengths=tuple(lengths or ()),
        overlap=overlap,
        intact=intact,
        bos=bos,
        eos=eos,
        shuffle_seed=shuffle_seed,
        domain=domain,
    )
    how = _how(executor, workers, slurm_array)
    report = _done(out, lambda: run(inputs, out, options, **how))
    for subset, count in report.packs.items():
        typer.echo(f"{out / subset}: {counted(count, 'pack')} of {options.length:,} tokens")
    typer.echo(f"  {counted(report.tokens, 'token')} of {counted(report.documents, 'document')}")
    typer.echo(f"+ {report.added:,} added (bos, eos) + {report.repeated:,} repeated (overlap)")
    typer.echo(f"= {report.packed:,} packed ({report.packed / report.capacity:.2%} of the packs' room)")
    typer.echo(f"+ {sum(report.dropped.values()):,} dropped")
    _print_counts("dropped tokens", report.dropped)


@app.command()
def merge(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with data sets somewhere below it.")],
) -> None:
    """Join all data sets below a directory under one index, leaving their shards where they are."""
    from megatron_prolong.data.mds import merge_tree

    typer.echo(f"{root}: {counted(merge_tree(root), 'sample')}")


def _split(paths: list[str]) -> tuple[list[str], Path]:
    if len(paths) < 2:
        raise UserError("give at least one input and, last, the directory to write")
    return paths[:-1], Path(paths[-1])


def _stop_or_skip(on_bad_input: str) -> Literal["stop", "skip"]:
    if on_bad_input not in ("stop", "skip"):
        raise UserError(f"--on-bad-input {on_bad_input}: must be stop or skip")
    return on_bad_input  # type: ignore[return-value]


def _by_domain(option: str, lengths: Sequence[OfDomain]) -> dict[str, int]:
    found: dict[str, int] = {}
    for domain, tokens in lengths:
        if domain in found:
            raise UserError(
                f"{option}: given twice for {domain or 'all domains'} ({found[domain]:,} and {tokens:,} tokens); "
                "keep one (books=32K is for one domain)"
            )
        found[domain] = tokens
    return found


def _executor(name: str, workers: int) -> Executor:
    from megatron_prolong.data.executors import LocalProcesses, Ray
    from megatron_prolong.runtime.cores import usable_cores

    if name not in ("local", "ray"):
        raise UserError(f"--executor {name}: must be local or ray")
    if name == "ray" and workers:
        raise UserError(f"--workers {workers}: Ray's cluster says how many there are; leave it out")
    return Ray() if name == "ray" else LocalProcesses(workers or usable_cores())


def _how(executor: str, workers: int, slurm_array: bool) -> dict[str, Any]:
    """The arguments that say where a job is done."""
    slurm = dict(os.environ) if slurm_array else None
    return {"executor": _executor(executor, workers), "slurm": slurm}


def _done(out: Path, run: Callable[[], R | None]) -> R:
    """The report of a job; the command ends here where other jobs of an array still have tasks to do."""
    with going_on():
        report = run()
    if report is None:
        typer.echo(f"this job's share is done; {out} appears when the other jobs are done too")
        raise typer.Exit
    return report


def counted(count: int, noun: str) -> str:
    """'1 shard', '2,048 shards'."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def _print_counts(title: str, counts: Mapping[str, Any]) -> None:
    if counts:
        typer.echo(f"  {title}:")
        for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
            typer.echo(f"    {count:>12,}  {reason}")
