"""`prolong eval`: perplexity, needle in a haystack, and the long-context suites."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from megatron_prolong.cli.counts import each_at_least
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.evaluation.backend import Backend
    from megatron_prolong.runtime.launch import World

T = TypeVar("T")


class _RunByDefault(TyperGroup):
    """`prolong eval MODEL --suite …` means `prolong eval run …`; `prolong eval --compare A B`, `… compare A B`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] == ["--compare"]:
            args = ["compare", *args[1:]]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_RunByDefault, help="Measure long-context ability.", no_args_is_help=True, rich_markup_mode=None
)

SHORTEST = 16  # less measures nothing: most often a K was forgotten
Model = Annotated[
    str,
    typer.Argument(metavar="[LABEL=]MODEL", help="Hugging Face directory, checkpoint or stage directory."),
]
Compare = Annotated[
    list[str] | None,
    typer.Option("--compare", metavar="[LABEL=]MODEL", help="Another model beside it; may be repeated."),
]
Lengths = Annotated[
    Sequence[int],
    typer.Option(
        parser=each_at_least(SHORTEST), metavar="TOKENS,...", help="Context lengths, e.g. 512,2K,8K."
    ),
]
LENGTHS: Any = "512,2K,8K"  # typer parses defaults too
Out = Annotated[Path, typer.Option(help="Directory for results.")]
Seed = Annotated[int, typer.Option(min=0, help="Chooses passages, haystacks and needles.")]


@app.command()
def perplexity(
    model: Model,
    data: Annotated[
        list[Path],
        typer.Option(help="Held-out documents: MDS directory, JSON Lines, Parquet, text, or a folder."),
    ],
    out: Out,
    lengths: Lengths = LENGTHS,
    compare: Compare = None,
    documents: Annotated[int, typer.Option(min=1, help="At most this many passages.")] = 16,
    seed: Seed = 42,
) -> None:
    """Loss on held-out documents by position and by the context given."""
    from megatron_prolong.evaluation.backend import open_backend
    from megatron_prolong.evaluation.documents import check_documents, read_passages
    from megatron_prolong.evaluation.perplexity import Perplexity, measure
    from megatron_prolong.evaluation.report import plot_perplexity, print_perplexity
    from megatron_prolong.runtime.strict_json import write_json

    def prepare() -> list[tuple[str, str]]:
        models = models_of(model, compare)
        paths = [path for _, path in models]
        check_documents(data, paths)
        check_models(paths)
        if is_main(world):
            _refuse_to_lose(out / "perplexity.json", about, models)
            make(out)
        return models

    about = {"data": [str(path) for path in data], "seed": seed}
    results: dict[str, Perplexity] = {}
    with folders() as make, ranks() as world:
        models = on_all_ranks(world, prepare)
        for label, path in models:
            with open_backend(path, world=world) as backend:
                if backend is None:  # a rank that only lent its part of the model
                    continue
                _warn_of_lengths_beyond(backend, lengths)
                passages = read_passages(data, backend.tokenizer, max(lengths), documents, seed)
                results[label] = measure(backend, passages, lengths)
    if not is_main(world):
        return
    print_perplexity(results)
    names = [passage.name for passage in passages]
    write_json(out / "perplexity.json", {**about, "passages": names, "models": results})
    plot_perplexity(results, out / "perplexity.png")
    print(f"wrote {out / 'perplexity.json'} and {out / 'perplexity.png'}")


@app.command()
def needle(
    model: Model,
    out: Out,
    lengths: Lengths = LENGTHS,
    depths: Annotated[str, typer.Option(help="Depths in percent of the context.")] = "0,25,50,75,100",
    haystack: Annotated[
        Path | None,
        typer.Option(help="Text file or folder; default: RULER's noise sentences."),
    ] = None,
    compare: Compare = None,
    trials: Annotated[int, typer.Option(min=1, help="Needles per length and depth.")] = 4,
    seed: Seed = 42,
) -> None:
    """Needle-in-a-haystack recall over depth × length."""
    from megatron_prolong.evaluation import needle as needles
    from megatron_prolong.evaluation.backend import open_backend
    from megatron_prolong.evaluation.documents import read_text
    from megatron_prolong.evaluation.report import plot_needle, print_needle
    from megatron_prolong.runtime.strict_json import write_json

    def prepare() -> tuple[list[float], str, list[tuple[str, str]]]:
        fractions, models = _depths(depths), models_of(model, compare)
        text = read_text(haystack) if haystack else needles.NOISE
        check_models([path for _, path in models])
        if is_main(world):
            _refuse_to_lose(out / "needle.json", about, models)
            make(out)
        return fractions, text, models

    about = {"haystack": str(haystack or "noise"), "seed": seed}
    results: dict[str, Any] = {}
    with folders() as make, ranks() as world:
        fractions, text, models = on_all_ranks(world, prepare)
        for label, path in models:
            with open_backend(path, batch_size=trials, world=world) as backend:
                if backend is None:  # a rank that only lent its part of the model
                    continue
                _warn_of_lengths_beyond(backend, lengths)
                results[label] = needles.run(backend, text, lengths, fractions, trials=trials, seed=seed)
    if not is_main(world):
        return
    print_needle(results)
    write_json(out / "needle.json", {**about, "models": results})
    plot_needle(results, out / "needle.png")
    print(f"wrote {out / 'needle.json'} and {out / 'needle.png'}")


def _refuse_to_lose(path: Path, about: dict[str, Any], models: list[tuple[str, str]]) -> None:
    """Raises UserError when the file holds more than the same measurement of these models would replace, or is
    damaged."""
    from megatron_prolong.evaluation.results import read_whole, whole_result

    if not path.exists():
        return
    with whole_result(path):
        there = read_whole(path)
        lost = sorted(there["models"].keys() - {label for label, _ in models})
    differing = [name for name, value in about.items() if there.get(name) != value]
    if lost or differing:
        holds = f"results of {', '.join(lost)}" if lost else f"results of another {' and '.join(differing)}"
        raise UserError(
            f"{path} holds {holds}, which would be lost; give another --out, or move the file away"
        )


@contextmanager
def ranks() -> Iterator[World | None]:
    """The ranks that torchrun or srun started, which meet once for all models; None for a process alone."""
    from megatron_prolong.runtime.rendezvous import read_rendezvous

    if read_rendezvous(os.environ).size == 1:
        yield None
    else:
        from megatron_prolong.runtime.launch import distributed

        with distributed() as world:
            yield world


def on_all_ranks(world: World | None, action: Callable[[], T]) -> T:
    """Call `action` on every rank; user errors are reported by the main one alone."""
    if world is None:
        return action()
    from megatron_prolong.runtime.agreement import together

    return together(action)


@contextmanager
def going_on(world: World | None = None) -> Iterator[None]:
    """Around what keeps all that is finished: Ctrl-C says so."""
    try:
        yield
    except KeyboardInterrupt:
        if is_main(world):
            print("stopped; the same command continues from what is finished")
        raise


def check_models(paths: list[str], kind: str = "auto", cp: int = 1) -> None:
    """Check all models before the first is measured, which may take hours."""
    from megatron_prolong.evaluation.backend import backend_kind

    for path in paths:
        backend_kind(path, kind=kind, cp=cp)


def is_main(world: World | None) -> bool:
    """True on the one rank that prints and writes."""
    return world is None or world.is_main


@contextmanager
def folders() -> Iterator[Callable[[Path], None]]:
    """Gives what makes a folder for results, before hours of measuring; those empty at the end are removed."""
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.extend(each for each in (folder, *folder.parents) if not each.exists())
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # may it be written in?
            pass

    try:
        yield make
    finally:
        for folder in sorted(made, reverse=True):  # what lies in another first
            with suppress(OSError):  # it holds something
                folder.rmdir()


def models_of(model: str, compare: list[str] | None) -> list[tuple[str, str]]:
    """(label, path) of every model; the label defaults to the directory's name."""
    pairs = []
    for text in [model, *(compare or [])]:
        label, separator, path = text.partition("=")
        named = separator and not Path(text).exists()  # runs/lr=1e-5/64k is a directory
        path_name = Path(text).name if Path(text).name not in ("", "..") else Path(text).resolve().name
        pairs.append((label, path) if named else (path_name, text))
    labels = [label for label, _ in pairs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"two models are called {', '.join(twice)}; give them names: NAME=DIRECTORY")
    return pairs


def names_of(text: str) -> list[str]:
    """Those with commas between them, of --tasks."""
    return [name for part in text.split(",") if (name := part.strip())]


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises UserError for another value."""
    if value not in allowed:
        raise UserError(f"{option} {value}: must be one of {', '.join(allowed)}")


def _warn_of_lengths_beyond(backend: Backend, lengths: Sequence[int]) -> None:
    """What `run` refuses unless told otherwise is here a fair question: does the model hold beyond its length?"""
    from megatron_prolong.evaluation.backend import declares

    if max(lengths) > backend.max_length:
        said = declares(backend.model, backend.max_length)
        print(f"warning: {said}; longer --lengths measure beyond it", file=sys.stderr)


def _depths(text: str) -> list[float]:
    """ "0,25,50" as shares, ascending."""
    try:
        depths = sorted({float(part) / 100 for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--depths {text}: write percents between 0 and 100, e.g. 0,50,100") from error
    if not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"--depths {text}: must lie between 0 and 100")
    return depths
