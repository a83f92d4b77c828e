"""`prolong plan`: which layout runs a recipe on a cluster, how fast, at what price."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_prolong.cli.recipe import RecipePath
from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from megatron_prolong.plan.hardware import Gpu
    from megatron_prolong.plan.report import StagePlan
    from megatron_prolong.plan.search import Candidate


def plan(
    recipe: RecipePath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="E.g. model.path=DIR with config.json is enough."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job.")] = 8,
    gpu: Annotated[str, typer.Option(help="GPU model of the hardware table.")] = "h100-80g",
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Play 64 batches of the mixture through the best layout.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 5,
    write: Annotated[Path | None, typer.Option(help="Write the recipe at its best layouts.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with memory bars and the frontier.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    hardware: Annotated[Path | None, typer.Option(help="A hardware table of your own.")] = None,
    te: Annotated[
        bool | None,
        typer.Option("--te/--no-te", help="With Transformer Engine; by default if it is installed here."),
    ] = None,
    flash3: Annotated[
        bool | None,
        typer.Option(
            "--flash3/--no-flash3",
            help="Where PyTorch attends, with FlashAttention-3 (Hopper); by default if it is installed here.",
        ),
    ] = None,
) -> None:
    """Predict memory, speed and price of every layout of each stage, and say why the others fail.

    Exits with 2 when no layout runs some stage.
    """
    import json
    from importlib.util import find_spec

    from megatron_prolong.plan.hardware import find_gpu
    from megatron_prolong.plan.page import plan_page
    from megatron_prolong.plan.report import plan_stage, to_json, with_best_layouts
    from megatron_prolong.recipe.load import dump_recipe, load_recipe
    from megatron_prolong.recipe.validate import incoming_shape
    from megatron_prolong.runtime.publish import write_durably

    device = find_gpu(gpu, hardware)
    loaded = load_recipe(recipe, overrides or ())
    shape = incoming_shape(loaded)
    names = [one.name for one in loaded.stages]
    if stage is not None and stage not in names:
        raise UserError(f"--stage {stage}: {recipe} has no such stage, only {', '.join(names)}")
    if write is not None and write.resolve() == recipe.resolve():
        raise UserError(f"--write {write}: that is the recipe itself; give the planned one another name")
    te = find_spec("transformer_engine") is not None if te is None else te
    flash = _flash(flash3, device)
    plans = [
        plan_stage(
            loaded,
            one,
            shape,
            gpus,
            device,
            transformer_engine=te,
            flash=flash,
            simulated_steps=64 if simulate else 0,
        )
        for one in loaded.stages
        if stage in (None, one.name)
    ]
    if json_output:
        print(json.dumps([to_json(one, device, top) for one in plans], indent=1))
    else:
        for one in plans:
            _print(one, device, top, loaded.checkpoint.every)
        _print_total(plans, device)
    if html is not None:
        write_durably(html, plan_page(loaded.name, plans, device))
        typer.echo(f"wrote {html}", err=True)
    if missing := [f"stage {one.stage.name}: {_why_none(one)}" for one in plans if one.best is None]:
        raise UserError.many(f"no layout runs on {gpus} × {gpu}:", missing)
    if write is not None:
        write_durably(write, dump_recipe(with_best_layouts(loaded, plans)))
        typer.echo(f"wrote {write}", err=True)


def _flash(wanted: bool | None, gpu: Gpu) -> str:
    """What is behind PyTorch's flash attention: "flash3" if it is wanted, or installed here and nothing is said."""
    from megatron_prolong.runtime.flash_attention_3 import is_flash_attention_3_installed

    if gpu.efficiency.flash3 is None:
        if wanted:
            raise UserError(
                f"--flash3: {gpu.name} has no `flash3` among its efficiencies in the hardware table"
            )
        return "flash2"
    installed = is_flash_attention_3_installed() if wanted is None else wanted
    return "flash3" if installed else "flash2"


def _print(plan: StagePlan, gpu: Gpu, top: int, steps_between_checkpoints: int) -> None:
    from megatron_prolong.page.amount import amount
    from megatron_prolong.plan.report import kernels_in_words

    stage, world = plan.stage, plan.written.job.world_size
    print(
        f"\n{stage.name}: {stage.num_steps} steps of {stage.batch_sequences} × {stage.sequence_length} tokens "
        f"on {world} × {gpu.name}\n  document lengths: {plan.batches.source}\n"
        f"  layers and attention: {kernels_in_words(plan.written.job)}"
    )
    if plan.written.runs:
        print(f"  recipe's layout ({plan.written.name}): {_summary(plan.written, gpu, stage.num_steps)}")
        if why := plan.why_slower():
            print(f"    slower than the best mostly by {why}")
        assert plan.written.time is not None
        hours = amount(plan.written.time.total * steps_between_checkpoints / 3600)
        print(
            f"  a checkpoint every {steps_between_checkpoints} steps (checkpoint.every): every {hours} hours"
        )
    else:
        print(f"  recipe's layout ({plan.written.name}) does not run: {plan.written.reason}")
    if plan.best is None:
        print("  no layout runs.")
    else:
        _print_layouts(plan, gpu, top)
        _print_best(plan.best)
    if (played := plan.simulation) is not None:
        spread = ", ".join(f"{name} {amount(seconds)}" for name, seconds in played.percentiles().items())
        print(
            f"  {len(played.seconds)} steps played: {spread} s; ranks busy {played.utilisation:.0%}, dealt out as "
            f"drawn {played.utilisation_as_drawn:.0%}"
        )
    _print_reasons(plan)


def _print_layouts(plan: StagePlan, gpu: Gpu, top: int) -> None:
    """The table of the fastest."""
    from rich.table import Table

    from megatron_prolong.plan.figures import figures
    from megatron_prolong.runtime.terminal import print_table

    memory = f"GB of {gpu.memory_bytes / 1e9:.1f}"
    table = Table("layout", memory, "s/step", "tok/s/GPU", "MFU", "GPU-hours", "USD")
    for candidate in plan.ranked(top):
        table.add_row(candidate.name, *figures(candidate, gpu, plan.stage.num_steps))
    print_table(table)
    if note := plan.head_room(top):
        print(f"  {note}")


def _print_best(best: Candidate) -> None:
    """What its memory, traffic and time are made of."""
    from dataclasses import asdict

    from megatron_prolong.page.amount import amount
    from megatron_prolong.plan.memory import parked_bytes
    from megatron_prolong.plan.volume import step_volume

    assert best.memory is not None and best.time is not None
    print("  best, GB: " + ", ".join(f"{k} {amount(v / 1e9)}" for k, v in best.memory.parts().items()))
    if parked := max(parked_bytes(best.job, rank) for rank in range(best.job.layout.pp)):
        print(f"  best, GB in host memory: {amount(parked / 1e9, 0)} for each GPU")
    sent = asdict(step_volume(best.job, pp_rank=0))
    print(
        "  best, GB sent per step, all documents split: "
        + ", ".join(f"{k} {amount(v / 1e9)}" for k, v in sent.items())
    )
    print("  best, seconds: " + ", ".join(f"{k} {amount(v, 2)}" for k, v in best.time.parts().items()))


def _print_reasons(plan: StagePlan) -> None:
    if not (reasons := plan.reasons()):
        return
    print(f"  {sum(count for _, count in reasons)} of {len(plan.candidates)} layouts do not run:")
    for reason, count in reasons:
        print(f"    {count:5d}  {reason}")
    if (miss := plan.nearest_miss()) is not None:
        print(f"    nearest miss: {miss.name}: {miss.reason}")


def _why_none(plan: StagePlan) -> str:
    if (miss := plan.nearest_miss()) is not None:
        return f"nearest miss: {miss.name}: {miss.reason}"
    return "; ".join(reason for reason, _ in plan.reasons())


def _print_total(plans: list[StagePlan], gpu: Gpu) -> None:
    if len(plans) < 2 or any(plan.best is None for plan in plans):
        return
    from megatron_prolong.page.amount import amount

    hours = sum(plan.best.gpu_hours(plan.stage.num_steps) for plan in plans if plan.best is not None)
    world = plans[0].written.job.world_size
    print(
        f"\nall stages at their best: {amount(hours, 0)} GPU-hours, "
        f"{amount(hours / world, 0)} hours on {world} GPUs, "
        f"USD {amount(hours * gpu.price_per_hour, 0)} at {gpu.price_per_hour}/h"
    )


def _summary(candidate: Candidate, gpu: Gpu, num_steps: int) -> str:
    from megatron_prolong.plan.figures import figures

    memory, seconds, speed, utilisation, hours, money = figures(candidate, gpu, num_steps)
    return (
        f"{memory} GB, {seconds} s/step, {speed} tok/s/GPU, MFU {utilisation}, {hours} GPU-hours, USD {money}"
    )
