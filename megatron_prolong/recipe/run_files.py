"""Names in a run directory beside those of its stages, for all that write or read them, or check stages' names."""

from pathlib import Path

RESOLVED_RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
INITIAL = "initial"
"""The weights before the first stage, where they had to be converted or made."""
SIDECAR = "hf"
"""Tokenizer and configs, which every checkpoint takes along."""
EVALUATION = "evaluation"
LATEST = "latest"
"""In the directory of a stage: the name of its newest checkpoint."""

SAVING, DELETING = "step_*.partial", "step_*.removed.tmp-*"
"""Likewise: what is being saved or deleted, or was by a killed process. Others may be making other things there."""

RESERVED_STAGE_NAMES = (INITIAL, SIDECAR, "export", TENSORBOARD, EVALUATION, LATEST)


def complete_checkpoints(stage_dir: Path) -> dict[int, Path]:
    """Step to directory, oldest first; what is being written or deleted has a suffix."""
    found = {path.name.removeprefix("step_"): path for path in sorted(stage_dir.glob("step_*"))}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def history(stage_dir: Path) -> dict[int, Path]:
    """`complete_checkpoints` up to the one that `latest` names; all of them where there is no such file."""
    complete, pointer = complete_checkpoints(stage_dir), stage_dir / LATEST
    if not pointer.exists():
        return complete
    newest = pointer.read_text(errors="replace").strip()
    return {step: path for step, path in complete.items() if path.name <= newest}


def nearest_existing(path: Path) -> Path:
    """`path`, or what is there of the way to it."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())
