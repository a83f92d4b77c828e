"""The light evaluation at the end of a stage: the recipe's `evaluation:` section on one loaded model."""

from __future__ import annotations

from pathlib import Path

from megatron_prolong.evaluation.backend import open_backend
from megatron_prolong.evaluation.identity import model_identity
from megatron_prolong.evaluation.results import Result
from megatron_prolong.evaluation.run import Settings
from megatron_prolong.evaluation.suite import run_suite, runnable
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.task import Inputs
from megatron_prolong.recipe.schema import EvaluationSpec


def evaluate_checkpoint(spec: EvaluationSpec, checkpoint: Path, out: Path) -> list[Result]:
    """Run the suite on a finished checkpoint; resumable, results as files under `out`.

    Call it outside any Megatron setup: it makes its own. Lengths beyond the model's are allowed, because
    seeing them fail before a stage and work after it is the point.
    """
    tasks = runnable(select(spec.suite, spec.lengths, spec.tasks), spec.data, skip_missing=True)
    settings = Settings(too_long="allow", model_identity=model_identity(checkpoint))
    with open_backend(checkpoint) as backend:
        return run_suite(
            tasks, backend, Inputs(spec.data, backend.tokenizer, max_samples=spec.samples), settings, out
        )


def scores(results: list[Result]) -> dict[str, float]:
    """For the metrics log: eval/TASK/LENGTH → 0 to 100."""
    return {f"eval/{result.name}/{result.length}": result.score for result in results}
