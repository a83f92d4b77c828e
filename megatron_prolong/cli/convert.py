"""`prolong convert`: Hugging Face checkpoints to Megatron's format and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_prolong.cli.counts import at_least
from megatron_prolong.runtime.termination import terminable

app = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron, on any CPU.", no_args_is_help=True
)

Dtype = Annotated[str | None, typer.Option(help="Write bf16, fp16 or fp32 (default: as stored).")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Files written at once (default: cores, at most 4).")
]
Verify = Annotated[bool, typer.Option("--verify", help="Compare tensors and logits afterwards.")]
# Relative to the largest logit. Both sides compute in fp32, in another order; a wrong RoPE base gives > 0.01.
LARGEST_LOGIT_DIFFERENCE = 1e-3


@app.command("to-megatron")
def to_megatron(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Hugging Face Llama directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint directory to make.")],
    dtype: Dtype = None,
    workers: Workers = None,
    verify: Verify = False,
) -> None:
    """Hugging Face -> Megatron, loadable at any layout."""
    from megatron_prolong.convert.to_megatron import to_megatron as convert
    from megatron_prolong.convert.transfer import WORKERS

    with terminable():
        convert(hf_dir, out, dtype, workers=workers or WORKERS)
    typer.echo(f"wrote {out}")
    if verify:
        _verify(hf_dir, out, hf_dir=hf_dir, checkpoint=out, cast=dtype is not None)


@app.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of ours, or Megatron-LM's torch_dist.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Hugging Face directory to make.")],
    rope_base: Annotated[
        float | None, typer.Option(min=1, help="RoPE base to write (default: as trained).")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            parser=at_least(1),
            metavar="TOKENS",
            help="Longest context to write, e.g. 64K (default: as trained).",
        ),
    ] = None,
    dtype: Dtype = None,
    workers: Workers = None,
    contradict: Annotated[
        bool, typer.Option("--contradict", help="Allow a RoPE base or length other than what was trained.")
    ] = False,
    hf: Annotated[
        Path | None, typer.Option("--hf", help="Hugging Face directory to take config and tokenizer from.")
    ] = None,
    verify: Verify = False,
) -> None:
    """Megatron -> Hugging Face; prints how config.json differs from the original's."""
    from megatron_prolong.convert.sidecar import has_tokenizer
    from megatron_prolong.convert.to_hf import to_hf as convert
    from megatron_prolong.convert.transfer import WORKERS

    with terminable():
        changes = convert(
            checkpoint,
            out,
            rope_base,
            max_length,
            dtype,
            contradict=contradict,
            sidecar=hf,
            workers=workers or WORKERS,
        )
    typer.echo(f"wrote {out}; what differs from the original's files:")
    for line in changes or ["nothing"]:
        typer.echo(f"  {line}")
    if not has_tokenizer(out):
        typer.echo(
            f"warning: {out}: no tokenizer, as none came with {hf or checkpoint}; export again with --hf DIR, a "
            "Hugging Face directory that has one",
            err=True,
        )
    if verify:
        _verify(checkpoint, out, hf_dir=out, checkpoint=checkpoint, cast=dtype is not None)


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint of any kind.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint of any kind.")],
) -> None:
    """Compare two checkpoints tensor by tensor, and their configs; exit code 1 when they differ."""
    from megatron_prolong.convert.compare import compare

    comparison = compare(a, b)
    for line in comparison.lines():
        typer.echo(line)
    if not comparison.equal:
        raise typer.Exit(1)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of any kind.")],
) -> None:
    """Print what a checkpoint holds: step, layout, shape, RoPE base, every tensor."""
    from megatron_prolong.convert.describe import describe

    for line in describe(checkpoint):
        typer.echo(line)


def _verify(source: Path, converted: Path, *, hf_dir: Path, checkpoint: Path, cast: bool) -> None:
    """Tensors, then logits; a length or RoPE base that was asked for is shown but is no failure of the tensors."""
    from megatron_prolong.convert.compare import compare
    from megatron_prolong.convert.logits import NUM_TOKENS, largest_logit_difference

    comparison = compare(source, converted, cast=cast)
    for line in comparison.lines():
        typer.echo(line)
    if not comparison.same_tensors:
        raise typer.Exit(1)
    if cast:
        typer.echo("logits not compared: the dtype changed")
        return
    difference = largest_logit_difference(hf_dir, checkpoint)
    if difference is None:
        typer.echo("logits not compared: transformers' model does not fit into memory here")
        return
    typer.echo(
        f"logits over up to {NUM_TOKENS} tokens differ from transformers' by {difference:.1e} of the largest"
    )
    if not difference < LARGEST_LOGIT_DIFFERENCE:
        typer.echo("error: that is more than rounding", err=True)
        raise typer.Exit(1)
