"""A run as one HTML page: progress, curves by stage, tokens by domain, memory, evaluation, recipe."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from math import isfinite
from typing import Any

from megatron_prolong.page.charts import lines, stacked_bars
from megatron_prolong.page.html import figure, heading, note, page, preformatted, table
from megatron_prolong.recipe.run_files import EVALUATION, RESOLVED_RECIPE
from megatron_prolong.report.history import RunHistory, StageHistory
from megatron_prolong.runtime.strict_json import with_nan

_CURVES = (
    ("loss", "loss (nats per token)", "Training loss."),
    ("grad_norm", "gradient norm", "Global gradient norm before clipping."),
    ("lr", "learning rate", "Learning rate."),
    ("tokens_per_second", "tokens per second", "Throughput over all ranks."),
    ("tflops_per_rank", "TFLOP/s per rank", "Model FLOPs by the real documents; over the GPU's peak: MFU."),
    ("balance", "mean over max", "Time of the ranks' own parts of a step: 1 where none waits for another."),
)


def run_page(run: RunHistory) -> str:
    """HTML of a run."""
    body = [note(_when(run)), *_progress(run)]
    for key, name, caption in _CURVES:
        curves = {stage.stage.name: stage.curve(key) for stage in run.stages}
        # Of a single rank the balance is null in every line.
        curves = {stage: curve for stage, curve in curves.items() if any(isfinite(y) for _, y in curve)}
        if curves:
            body.append(figure(lines(curves, "step", name), caption))
    for stage in run.stages:
        body += _domains(stage)
    body += [*_memory(run), *_evaluation(run), *_events(run)]
    body += [heading("Recipe"), preformatted((run.directory / RESOLVED_RECIPE).read_text(encoding="utf-8"))]
    return page(f"Run {run.recipe.name}", body)


def duration(seconds: float | None) -> str:
    """Days and hh:mm:ss, or a dash."""
    return "–" if seconds is None else str(timedelta(seconds=round(seconds)))


def _when(run: RunHistory) -> str:
    if run.updated is None:
        return f"{run.directory}: no step yet."
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.updated))
    return f"{run.directory}: last line written {written}."


def _progress(run: RunHistory) -> Iterator[str]:
    rows = []
    for one in run.stages:
        seconds, loss, speed = one.step_seconds, one.last("loss"), one.last("tokens_per_second")
        rows.append(
            (
                one.stage.name,
                f"{one.step} / {one.stage.num_steps}",
                f"{one.stage.sequence_length:,}",
                "–" if loss is None else f"{loss:.4f}",
                "–" if speed is None else f"{speed:,.0f}",
                "–" if seconds is None else f"{seconds:.2f}",
                "done" if one.done else duration(one.remaining_seconds),
            )
        )
    yield table(["stage", "step", "sequence length", "loss", "tokens/s", "s/step", "left"], rows)


def _domains(one: StageHistory) -> Iterator[str]:
    """Tokens by domain against what the mixture asks for."""
    counts: Mapping[str, float] | None = next(
        (r["domains"] for r in reversed(one.records) if r.get("domains")), None
    )
    if not counts:
        return
    names = one.stage.domain_names
    shares = {} if one.stage.mixture == "mock" else one.stage.mixture
    asked = {names[str(path)]: share for path, share in shares.items()}
    total = sum(counts.values())
    yield heading(f"Tokens by domain, stage {one.stage.name}")
    largest = max(counts.values())
    scale, unit = next(((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if largest >= s), (1.0, ""))
    bars = [(name, {"tokens": tokens / scale}) for name, tokens in counts.items()]
    yield figure(stacked_bars(bars, f"{unit} tokens".lstrip()), "Tokens read so far.")
    rows = [
        (name, f"{tokens:,.0f}", f"{tokens / total:.1%}", f"{asked[name]:.1%}" if name in asked else "–")
        for name, tokens in counts.items()
    ]
    yield table(["domain", "tokens", "share", "in the recipe"], rows)


def _memory(run: RunHistory) -> Iterator[str]:
    peaks = {}
    for one in run.stages:
        values = [value for _, value in one.curve("peak_memory_bytes")]
        if values:
            peaks[one.stage.name] = max(values) / 1e9
    if peaks:
        yield heading("Memory")
        bars = [(name, {"peak": peak}) for name, peak in peaks.items()]
        yield figure(stacked_bars(bars, "GB"), "Highest peak of a step on the reporting rank.")


def _evaluation(run: RunHistory) -> Iterator[str]:
    """Scores along the run, from the events; and the JSON files that `prolong eval --out RUN/evaluation` left."""
    events = [event for event in run.events if event["event"] == "evaluation"]
    files = sorted((run.directory / EVALUATION).glob("*.json"))
    if not events and not files:
        return
    yield heading("Evaluation")
    if events:
        yield _scores(events)
    for path in files:
        yield note(str(path.relative_to(run.directory)))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield note(f"cannot be read: {error}")
            continue
        yield table(["result", "value"], [(name, _short(value)) for name, value in _flat(content)][:200])


def _scores(events: list[dict[str, Any]]) -> str:
    """One row per result, one column per checkpoint that was measured; a later measurement counts."""
    columns = {f"{event['stage']} {event['step']}": with_nan(event["scores"]) for event in events}
    names = dict.fromkeys(name for found in columns.values() for name in found)
    rows = [
        (name, *(_short(found[name]) if name in found else "–" for found in columns.values()))
        for name in names
    ]
    return table(["result", *columns], rows)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects and lists with dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}" if name else str(index))
    else:
        yield name, value


def _events(run: RunHistory) -> Iterator[str]:
    others = [event for event in run.events if event["event"] != "evaluation"]
    if not others:
        return
    yield heading("Events")
    rows = []
    for event in others[-40:]:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
        facts = ", ".join(
            f"{name} {_short(value)}" for name, value in _flat(event) if name not in ("event", "time")
        )
        rows.append((when, str(event["event"]), facts))
    yield table(["time", "event", "facts"], rows)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
