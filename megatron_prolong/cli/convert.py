"""`prolong convert`: Hugging Face checkpoints to Megatron's format and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron, on any CPU.", no_args_is_help=True
)

Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 (default: as stored)")]


@app.command("to-megatron")
def to_megatron(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face Llama directory")],
    out: Annotated[Path, typer.Argument(help="checkpoint directory to make")],
    dtype: Dtype = None,
) -> None:
    """Hugging Face -> Megatron, loadable at any layout."""
    from megatron_prolong.convert import to_megatron as convert

    convert.to_megatron(hf_dir, out, dtype)
    typer.echo(f"wrote {out}")


@app.command("to-hf")
def to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint of ours, or Megatron-LM's torch_dist")],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to make")],
    rope_base: Annotated[float | None, typer.Option(help="RoPE base (default: as trained)")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens (default: as trained)")] = None,
    dtype: Dtype = None,
    contradict: Annotated[
        bool, typer.Option("--contradict", help="allow a RoPE base or length other than what was trained")
    ] = False,
    hf: Annotated[
        Path | None, typer.Option("--hf", help="Hugging Face directory to take config and tokenizer from")
    ] = None,
) -> None:
    """Megatron -> Hugging Face; prints how config.json differs from the original's."""
    from megatron_prolong.convert import to_hf as convert

    changes = convert.to_hf(checkpoint, out, rope_base, max_length, dtype, contradict=contradict, sidecar=hf)
    for line in changes:
        typer.echo(f"  {line}")
    typer.echo(f"wrote {out}")
