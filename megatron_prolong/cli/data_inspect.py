"""`prolong data inspect`, `mixture`, `verify`, `to-megatron`, `from-megatron`: look at data, check, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_prolong.cli.data import counted
from megatron_prolong.cli.recipe import Overrides, RecipePath, warn
from megatron_prolong.errors import UserError

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of MDS shards (index.json).")]
Prefix = Annotated[Path, typer.Argument(metavar="PREFIX", help="Path without .bin and .idx.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Directory of a tokenizer, model or checkpoint.")]


def inspect(
    directory: Directory,
    png: Annotated[Path | None, typer.Option(help="Write the histograms to this image.")] = None,
    sample: Annotated[
        list[int] | None,
        typer.Option(help="Show this sample as text, with boundaries and masks; may be repeated."),
    ] = None,
    tokenizer: Tokenizer = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="With --sample: tokens shown of each document (default: 200)."),
    ] = None,
) -> None:
    """Count tokens, documents and attention cost by domain and length; show samples as text."""
    from megatron_prolong.data.inspect import domain_table, length_table, plot, preview, survey
    from megatron_prolong.data.mds import read_index
    from megatron_prolong.runtime.publish import whole_file
    from megatron_prolong.runtime.terminal import screen

    if png is not None and png.suffix != ".png":
        raise UserError(f"--png {png}: the name must end in .png")
    if sample and png is not None:
        raise UserError("--png draws all samples, and --sample shows some as text: give one of them")
    if tokenizer is not None and not sample:
        raise UserError(
            "--tokenizer is for --sample NUMBER, which it turns into text: add that, or leave it out "
            "(`prolong data verify` compares a tokenizer with the data)"
        )
    if max_tokens is not None and not sample:
        raise UserError(f"--max-tokens {max_tokens} is for --sample NUMBER: add that, or leave it out")
    console = screen()
    if sample:
        if tokenizer is None:
            raise UserError("--sample shows text, so it needs --tokenizer (the directory of the tokenizer)")
        loaded = _tokenizer(tokenizer, directory)
        for index in sample:
            console.print(preview(directory, index, loaded, max_tokens=max_tokens or 200), soft_wrap=True)
        return
    domains = survey(directory)
    console.print(domain_table(domains), length_table(domains))
    if fingerprint := read_index(directory).tokenizer:
        console.print(f"fingerprint of the tokenizer: {fingerprint}")
    if png is not None:
        with whole_file(png) as temporary:
            plot(domains, str(directory)).savefig(temporary, format="png", dpi=120)
        console.print(f"histograms: {png}")


def mixture(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Open the data of every stage of a recipe; show what it draws from each domain and how often it repeats."""
    from megatron_prolong.data.inspect import usage_table
    from megatron_prolong.data.mds import common_tokenizer
    from megatron_prolong.data.mixture import Mixture, check_shards
    from megatron_prolong.recipe.inputs import tokenizer_fingerprint
    from megatron_prolong.recipe.load import load_recipe
    from megatron_prolong.runtime.terminal import screen

    console = screen()
    problems = []
    loaded = load_recipe(recipe, overrides or ())
    model = {str(loaded.model.tokenizer_path): tokenizer_fingerprint(loaded.model.tokenizer_path)}
    for stage in loaded.stages:
        if stage.mixture == "mock":
            console.print(f"{stage.name}: mock, random tokens")
            continue
        try:
            warn(check_shards([stage]))
            mixture = Mixture.of_stage(stage)
            common_tokenizer({**model, "its data": mixture.tokenizer})
        except UserError as error:
            problems.append(f"stage {stage.name}: {error}")
        else:
            console.print(usage_table(mixture, stage.name))
    if problems:
        raise UserError("\n".join(problems))


def verify(directory: Directory, tokenizer: Tokenizer = None) -> None:
    """Read every byte of a data set and list all that is damaged. Exit code 2 if anything is.

    With --tokenizer, tokens beyond its vocabulary are found too, and that they are another one's.
    """
    from megatron_prolong.data.verify import verify

    verdict = verify(directory, None if tokenizer is None else len(_tokenizer(tokenizer, directory)))
    shards = counted(verdict.num_shards, "shard")
    if verdict.num_unhashed:
        print(
            f"warning: {verdict.num_unhashed} of {shards} without a hash in the index, so a changed token in them "
            "cannot be noticed"
        )
    if verdict.problems:
        raise UserError.many(f"{directory} is damaged:", verdict.problems)
    print(f"{directory}: {shards}, {counted(verdict.num_samples, 'sample')}, nothing wrong")


def to_megatron(directory: Directory, prefix: Prefix) -> None:
    """Write a data set as Megatron's PREFIX.bin and PREFIX.idx; packs become documents of several sequences."""
    from megatron_prolong.data.megatron_indexed import to_megatron

    print(f"{prefix}.bin, {prefix}.idx: {counted(to_megatron(directory, prefix), 'document')}")


def from_megatron(
    prefix: Prefix,
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="New directory of MDS shards.")],
    domain: Annotated[str, typer.Option(help="Domain of every sample; by default the prefix's name.")] = "",
) -> None:
    """Write Megatron's PREFIX.bin and PREFIX.idx as a data set."""
    from megatron_prolong.data.megatron_indexed import from_megatron

    num_samples, num_empty = from_megatron(prefix, directory, domain or prefix.name)
    left_out = f" ({counted(num_empty, 'empty document')} left out)" if num_empty else ""
    print(f"{directory}: {counted(num_samples, 'sample')}{left_out}")


def _tokenizer(directory: Path, data: Path) -> Any:
    """The tokenizer there. Raises UserError where the data says that another one made its tokens."""
    from megatron_prolong.data.mds import common_tokenizer, read_index
    from megatron_prolong.evaluation.backend import load_tokenizer
    from megatron_prolong.recipe.inputs import tokenizer_file, tokenizer_fingerprint

    tokenizer = load_tokenizer(tokenizer_file(directory).parent)
    made_with = {str(data): read_index(data).tokenizer, str(directory): tokenizer_fingerprint(directory)}
    common_tokenizer(made_with)
    return tokenizer


def register(app: typer.Typer) -> None:
    """Add these commands to `prolong data`."""
    app.command("inspect")(inspect)
    app.command("mixture")(mixture)
    app.command("verify")(verify)
    app.command("to-megatron")(to_megatron)
    app.command("from-megatron")(from_megatron)
