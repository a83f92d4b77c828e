"""The recipe's `evaluation:`: a light suite on the checkpoints of a run, called between two pieces of training."""

from __future__ import annotations

import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Backend, Prompt, ScoringBackend, batches, load_tokenizer
from megatron_prolong.evaluation.documents import Passage, check_documents, read_passages
from megatron_prolong.evaluation.identity import data_identity, model_identity
from megatron_prolong.evaluation.megatron import open_megatron
from megatron_prolong.evaluation.run import Settings
from megatron_prolong.evaluation.suite import run_suite
from megatron_prolong.evaluation.task import Inputs, Task
from megatron_prolong.recipe.schema import EvaluationSpec
from megatron_prolong.recipe.shape import read_json
from megatron_prolong.runtime.agreement import from_main
from megatron_prolong.runtime.full_gpu import naming_a_full_gpu
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.passing import patiently
from megatron_prolong.runtime.strict_json import write_json
from megatron_prolong.runtime.watchdog import Watchdog

SCORES = "scores.json"
ATTEMPT = "attempt.json"
MOST_ATTEMPTS = 2
PASSAGES_SEED = 42


@dataclass(frozen=True)
class CheckpointEvaluation:
    """Call it with a finished checkpoint, on every rank and outside any Megatron setup: it makes its own.

    Result files go to OUT/STAGE/step_00000125/, where `prolong eval compare` reads them. Lengths beyond the
    model's are allowed, because seeing them fail before a stage and work after it is the point.

    Attributes:
        held_out: what `read_held_out` gives for the spec, on the main rank; the others need none.
        interrupted: the main rank asks between prompts whether to leave the rest for another time.
    """

    spec: EvaluationSpec
    tasks: Sequence[Task]
    held_out: Sequence[Passage]
    out: Path
    world: World
    interrupted: Callable[[], bool]

    def __call__(self, checkpoint: Path) -> dict[str, float]:
        """TASK/LENGTH → 0 to 100 and held_out_loss/LENGTH → nats per token, on the main rank.

        Nothing elsewhere, when measured before, interrupted, or when MOST_ATTEMPTS starts have ended in it.
        """
        out = self.out / checkpoint.parent.name / checkpoint.name
        # Rank 0's answer: file systems show a new file to others late.
        about = from_main(self._begin(checkpoint, out) if self.world.is_main else None)
        if about is None:
            return {}
        full_gpu = partial(
            naming_a_full_gpu, lambda: str(out), "shorten evaluation.lengths, or leave evaluation out"
        )
        with (
            Watchdog(self.world.rank, start=f"the evaluation {out}") as watchdog,
            full_gpu(),
            open_megatron(checkpoint, world=self.world, watchdog=watchdog) as backend,
        ):
            if backend is None:
                return {}
            scores: dict[str, float] = {}
            try:
                with full_gpu():
                    found = self._scores(backend, about["model_identity"], out)
                _write(out / SCORES, {**about, "scores": found})
                scores = found
            except _Interrupted:
                pass
            except Exception as error:  # no reason to lose days of training
                if backend.inference.midway and self.world.size > 1:  # the others are in a call of the model
                    raise
                _warn(out, error if isinstance(error, UserError | OSError) else traceback.format_exc())
            with suppress(OSError):
                (out / ATTEMPT).unlink()
            return scores

    def _begin(self, checkpoint: Path, out: Path) -> dict[str, Any] | None:
        """What is to be measured, if it was not before and is not what seems to end every start."""
        try:
            about = self._about(checkpoint)
            if _read(out / SCORES, about):
                return None
            attempts = _read(out / ATTEMPT, about).get("attempts", 0)
            if attempts < MOST_ATTEMPTS:
                _write(out / ATTEMPT, {**about, "attempts": attempts + 1})
                return about
        except (UserError, OSError) as error:
            _warn(out, error)
            return None
        _warn(
            out,
            f"{attempts} starts have ended in it; while this is its stage's newest checkpoint, a start without "
            f"{ATTEMPT} there, or with another evaluation, tries again",
        )
        return None

    def _about(self, checkpoint: Path) -> dict[str, Any]:
        """What two measurements share whose scores are the same."""
        tasks = [f"{task.name}/{task.length}" for task in self.tasks]
        about = {
            "model_identity": model_identity(checkpoint),
            "data": [data_identity(task, self.spec.data) for task in self.tasks],
            "samples": self.spec.samples,
            "tasks": tasks,
        }
        if self.held_out:
            tasks.append(self._loss_name)
            about["held_out"] = [passage.name for passage in self.held_out]
        return about

    def _scores(self, backend: ScoringBackend, identity: str, out: Path) -> dict[str, float]:
        inputs = Inputs(self.spec.data, backend.tokenizer, max_samples=self.spec.samples)
        settings = Settings(too_long="allow", model_identity=identity)
        losses = self._losses(backend)
        results = run_suite(self.tasks, _Interruptible(backend, self.interrupted), inputs, settings, out)
        return losses | {f"{result.name}/{result.length}": result.score for result in results}

    def _losses(self, backend: ScoringBackend) -> dict[str, float]:
        losses = []
        for passages in batches(self.held_out, backend.batch_size):
            if self.interrupted():
                raise _Interrupted
            found = backend.token_logprobs([passage.tokens.tolist() for passage in passages])
            losses += [-float(logprobs.mean(dtype=np.float64)) for logprobs in found]
        return {self._loss_name: statistics.fmean(losses)} if losses else {}

    @property
    def _loss_name(self) -> str:
        return f"held_out_loss/{max(self.spec.lengths)}"


def read_held_out(spec: EvaluationSpec, tokenizer: Path) -> list[Passage]:
    """The passages of the spec's held-out documents, read before training, so that nothing in them can stop it.

    Raises:
        UserError: no documents are there, none is long enough, or they were made with another tokenizer.
    """
    if not spec.held_out:
        return []
    check_documents(spec.held_out, [str(tokenizer)])
    longest = max(spec.lengths)
    return read_passages(spec.held_out, load_tokenizer(tokenizer), longest, spec.samples, PASSAGES_SEED)


def _write(file: Path, content: Mapping[str, object]) -> None:
    patiently(lambda: write_json(file, content), f"writing {file}")


def _read(file: Path, about: Mapping[str, object]) -> dict[str, Any]:
    """A file about just this model and these questions; of others, or a damaged one, nothing."""
    try:
        found = read_json(file) if file.exists() else {}
    except UserError:
        return {}
    return found if about.items() <= found.items() else {}


def _warn(out: Path, problem: object) -> None:
    print(f"warning: {out}: not measured, training goes on: {problem}", file=sys.stderr)


class _Interrupted(Exception):  # noqa: N818 - an event, not an error
    pass


@dataclass(frozen=True)
class _Interruptible:
    """A backend that stops instead of generating once asked to; finished samples are on disk by then."""

    backend: Backend
    interrupted: Callable[[], bool]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterable[str | None]:
        if self.interrupted():
            raise _Interrupted
        return self.backend.generate(prompts, max_new_tokens, stop)
