"""Run tasks on a backend: prepare, generate, score, write. HELMET's eval.py as a resumable loop.

Result files have HELMET's names and fields (its collect_results reads them), beside our own in `args`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Backend, batches, declares
from megatron_prolong.evaluation.identity import data_identity
from megatron_prolong.evaluation.partial import Generated, PartialOutputs, sample_key
from megatron_prolong.evaluation.prompts import Prepared, prepare, render
from megatron_prolong.evaluation.results import Result, judged_path, read_arguments, read_result
from megatron_prolong.evaluation.task import Entails, Inputs, Row, Task
from megatron_prolong.evaluation.tasks.long_documents import has_llama2
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.recipe.shape import read_json
from megatron_prolong.runtime.progress import track
from megatron_prolong.runtime.strict_json import write_json

SHOWN_TOKENS = 500  # of the prompt's beginning and end, in the results


@dataclass(frozen=True)
class Settings:
    """What a user may choose about a run.

    Attributes:
        tag: goes into file names; HELMET's scripts look for "v1".
        chat: "auto" is HELMET's choice per category if the model has a chat template; or "always", "never".
        too_long: what to do when prompts of this length exceed what the model declares: "refuse", "truncate"
            (to the model's length, by HELMET's rule), or "allow" (measure beyond it).
        stop_newline: end answers at the first line break. HELMET's released configurations mean to set this
            and do not, so its numbers are without.
        overwrite: run again what already has a result.
        model_identity: tells a retrained model in the same place from the old one.
    """

    tag: str = "v1"
    chat: str = "auto"
    too_long: str = "refuse"
    stop_newline: bool = False
    overwrite: bool = False
    model_identity: str = ""


def run_task(
    task: Task,
    backend: Backend,
    inputs: Inputs,
    settings: Settings,
    out: Path,
    entails: Entails | None = None,
) -> Result:
    """Run one task, or go on with it, or read its finished result if that is of the same model, data and settings.

    Raises:
        UserError: prompts that are too long for the model (with too_long "refuse"), missing data.
    """
    max_length = length_limit(task, backend.model, backend.max_length, settings.too_long)
    chat = uses_chat(task, backend.tokenizer, settings.chat)
    path = out / file_name(task, inputs, settings, chat)
    arguments = _arguments(task, backend, inputs, settings, chat)
    if path.exists() and not settings.overwrite and is_of(path, arguments):
        return _finished(path, task, entails)
    fixed = (backend.name, backend.model, settings.model_identity, settings.stop_newline)
    limits = (task.max_new_tokens, max_length)
    with _data_of(task, inputs):
        rows = task.rows(inputs)
        keys = [sample_key(*fixed, *limits, render(task, row, chat)) for row in rows]
    if not rows:
        raise UserError(f"{task.name}: its data holds no example that qualifies; `prolong eval data check`")
    started = time.monotonic()
    with PartialOutputs(path.with_name(path.name + ".partial.jsonl")) as partial:
        pending = [(row, key) for row, key in zip(rows, keys, strict=True) if key not in partial.done]
        label = f"{task.name} {format_count(task.length)}"
        for sample in track(
            _generate(task, backend, settings, pending, chat, max_length), len(pending), label
        ):
            partial.add(sample)
        samples = [partial.done[key] for key in keys]
        seconds = time.monotonic() - started
        with _data_of(task, inputs):
            content = {"args": arguments, **_score(task, rows, samples, entails, chat)}
        content["prompts"] = sample_key(*(sample_key(render(task, row, chat=False).text) for row in rows))
        content["throughput"] = len(pending) / seconds if pending else 0.0
        judged_path(path).unlink(missing_ok=True)  # its answers are no longer these
        _write(path, content)
        partial.remove()
    return read_result(path)


def _finished(path: Path, task: Task, entails: Entails | None) -> Result:
    """A result that is there, with the scores that only now have a model for them."""
    result = read_result(path)
    if not (result.missing and task.summarise and entails):
        return result
    content = read_json(path)
    content["averaged_metrics"] = task.summarise(content["data"], entails)
    _write(path, content)
    return read_result(path)


@contextmanager
def _data_of(task: Task, inputs: Inputs) -> Iterator[None]:
    """Around what reads the rows: a field that is missing or of another kind is the fault of its files, if any.

    So is what pyarrow and datasets cannot read, which they say without a name.
    """
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        if not (files := task.files(inputs.data)) or (isinstance(error, OSError) and error.filename):
            raise
        raise UserError(
            f"{task.name}: its data is not as HELMET has it ({type(error).__name__}: {error}); get "
            f"{', '.join(map(str, files))} anew (`prolong eval data check`; --debug shows what was read)"
        ) from error


def _write(path: Path, content: dict[str, Any]) -> None:
    write_json(path, content)
    write_json(path.with_name(path.name + ".score"), content["averaged_metrics"])


def file_name(task: Task, inputs: Inputs, settings: Settings, chat: bool) -> str:
    """HELMET's result file name."""
    test_name = Path(task.test_file).stem
    return (
        f"{task.name}_{settings.tag}_{test_name}_in{task.length}_size{task.samples(inputs)}_shots{task.shots}"
        f"_sampFalsemax{task.max_new_tokens}min0t0.0p1.0_chat{chat}_{inputs.seed}.json"
    )


def is_of(path: Path, arguments: dict[str, Any]) -> bool:
    """Whether a result was made with these arguments; a model that has moved is known by its identity."""
    known = read_arguments(path)
    if isinstance(known, dict) and arguments["model_identity"]:
        known["model_name_or_path"] = arguments["model_name_or_path"]
    return known == arguments


def length_limit(task: Task, model: str, declared: int, too_long: str) -> int:
    """Tokens that prompt and answer may take together.

    Raises:
        UserError: the task's length is beyond what the model declares (with too_long "refuse").
    """
    if task.length <= declared or too_long == "allow":
        return task.length
    if too_long == "truncate":
        return declared
    raise UserError(
        f"{task.name} at {format_count(task.length)}: {declares(model, declared)}; leave this length out, or say "
        "`--too-long allow` to measure beyond it, `--too-long truncate` to cut the contexts"
    )


def uses_chat(task: Task, tokenizer: Any, chat: str) -> bool:
    """Whether the task's prompts go through the chat template (`Settings.chat`)."""
    if chat == "auto":
        return task.chat and bool(getattr(tokenizer, "chat_template", None))
    return chat == "always"


def _generate(
    task: Task,
    backend: Backend,
    settings: Settings,
    pending: Sequence[tuple[Row, str]],
    chat: bool,
    max_length: int,
) -> Iterator[Generated]:
    stop = ("\n",) if settings.stop_newline else ()
    for batch in batches(pending, backend.batch_size):
        prepared = [prepare(task, row, chat, backend.tokenizer, max_length) for row, _ in batch]
        outputs = backend.generate([one.prompt for one in prepared], task.max_new_tokens, stop)
        for (_, key), one, output in zip(batch, prepared, outputs, strict=True):
            if output is None:  # an error will follow
                continue
            yield Generated(
                key=key,
                output=output,
                input_len=len(one.ids),
                output_len=len(backend.tokenizer(output, add_special_tokens=False)["input_ids"]),
                removed_tokens=one.removed_tokens,
                input_text=_shown(one, backend.tokenizer),
            )


def _shown(one: Prepared, tokenizer: Any) -> str:
    if len(one.ids) <= 2 * SHOWN_TOKENS:
        return str(tokenizer.decode(one.ids))
    return f"{tokenizer.decode(one.ids[:SHOWN_TOKENS])} <skip> {tokenizer.decode(one.ids[-SHOWN_TOKENS:])}"


def _score(
    task: Task, rows: Sequence[Row], samples: Sequence[Generated], entails: Entails | None, chat: bool
) -> dict[str, Any]:
    """data, metrics and averaged_metrics of the result file."""
    items: list[Row] = []
    metrics: dict[str, list[float]] = {}
    for row, sample in zip(rows, samples, strict=True):
        # Without a chat template the answer's first words stand in the prompt; they belong to the output.
        output = sample.output if chat else task.answer_prefix.format(**row) + sample.output
        scored = task.score(output, row)
        item = {name: value for name, value in row.items() if name != "context"}
        item.update(
            output=output,
            input_len=sample.input_len,
            output_len=sample.output_len,
            removed_tokens=sample.removed_tokens,
            input_text=sample.input_text,
            parsed_output=scored.parsed,
            **scored.scores,
        )
        items.append(item)
        lengths = {"input_len": sample.input_len, "output_len": sample.output_len}
        for name, value in {**scored.scores, **lengths}.items():
            metrics.setdefault(name, []).append(value)
    averages = {
        name: float(np.mean(values)) * (1 if "_len" in name else 100) for name, values in metrics.items()
    }
    if task.summarise is not None:
        averages = task.summarise(items, entails)
    return {"data": items, "metrics": metrics, "averaged_metrics": averages}


def _arguments(
    task: Task, backend: Backend, inputs: Inputs, settings: Settings, chat: bool
) -> dict[str, Any]:
    """HELMET's argument names, then ours."""
    there = [inputs.data is not None and (inputs.data / name).exists() for name in task.needs]
    from_file = bool(there) and all(there)
    haystack = f"prose {sample_key(inputs.haystack)[:8]}" if inputs.haystack else "noise"
    cut_by = "Llama-2's tokenizer" if has_llama2(inputs) else "the model's tokenizer"
    return {
        "tag": settings.tag,
        "model_name_or_path": backend.model,
        "datasets": task.name,
        "test_files": task.test_file if from_file else "",
        "demo_files": task.demo_file,
        "input_max_length": task.length,
        "generation_max_length": task.max_new_tokens,
        "generation_min_length": 0,
        "max_test_samples": task.samples(inputs),
        "shots": task.shots,
        "do_sample": False,
        "temperature": 0.0,
        "top_p": 1.0,
        "stop_newline": settings.stop_newline,
        "seed": inputs.seed,
        "use_chat_template": chat,
        "backend": backend.name,
        "model_identity": settings.model_identity,
        "data_identity": data_identity(task, inputs.data),
        "category": task.category,
        "metric_names": list(task.metrics),
        "question_field": task.question,
        "generated": not from_file,
        # What a task does not use makes no other result: lengths that fit, another haystack or tokenizer.
        "too_long": settings.too_long if task.length > backend.max_length else "refuse",
        "haystack": haystack if task.prose and not from_file else "",
        "documents_cut_by": cut_by if task.document_tokens else "",
    }
