"""Averages, changes and tables of results whose every score is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import suite_plot
from megatron_prolong.evaluation.averages import Average, averages
from megatron_prolong.evaluation.changes import changes
from megatron_prolong.evaluation.results import ASKED, Result, judged_path, read_results
from megatron_prolong.evaluation.suite_plot import _short, plot_suite
from megatron_prolong.evaluation.suite_report import grids, notes, print_suite, summary
from megatron_prolong.evaluation.suites import prolong

SETTINGS = {
    **dict.fromkeys(ASKED),
    "seed": 42,
    "use_chat_template": False,
    "stop_newline": False,
    "too_long": "",
    "judge": None,
}


def result(name: str, category: str, values: list[float], **changed: Any) -> Result:
    """One of 32K with the mean of the values, asked one question each."""
    known: dict[str, Any] = {
        "path": Path(name), "name": name, "category": category, "length": 32768, "model": "m",
        "scores": {"f1": 100 * sum(values) / len(values)}, "missing": (), "stand_in": None,
        "values": tuple(values), "questions": tuple(range(len(values))), "truncated": 0,
        "settings": SETTINGS,
    }  # fmt: skip
    return Result(**{**known, **changed})


def test_scores_weigh_equally_in_a_category_and_categories_in_the_mean() -> None:
    results = [
        result("a", "cite", [0.5], scores={"str_em": 30.0, "citation_rec": 60.0}),
        result("b", "cite", [0.9], missing=("citation_rec",)),
        result("c", "summ", [0.2], scores={}, missing=("gpt-4-f1",), stand_in=20.0),
        result("d", "summ", [0.8], scores={"gpt-4-f1": 70.0}, stand_in=99.0),  # judged
        result("e", "ruler", [1.0]),
        result("f", "cite", [0.4], length=65536),
    ]
    keys = [one.key for one in results]
    assert averages(results) == [
        Average("cite", 32768, pytest.approx(60.0), True, tuple(keys[:2])),
        Average("ruler", 32768, 100.0, False, (keys[4],)),
        Average("summ", 32768, 45.0, True, tuple(keys[2:4])),
        Average("mean", 32768, pytest.approx(52.5), True, tuple(keys[:4])),
        Average("cite", 65536, 40.0, False, (keys[5],)),
    ]


def test_a_change_is_after_minus_before_in_points_and_of_what_both_have() -> None:
    before = [result("a", "rag", [0.0, 0.5]), result("only", "rag", [1.0])]
    after = [result("a", "rag", [0.25, 0.75]), result("new", "rag", [1.0])]
    (change,) = changes({"before": before, "after": after})
    assert (change.model, change.task, change.length) == ("after", "a", 32768) and change.interval is not None
    assert (change.interval.mean, change.interval.low, change.interval.high) == (25.0, 25.0, 25.0)
    other_rows = [result("a", "rag", [0.25, 0.75], questions=(1, 0))]
    assert changes({"before": before, "after": other_rows})[0].interval is None
    of_the_first, of_the_second = (
        [result("a", "rag", [0.25, math.nan])],
        [result("a", "rag", [math.nan, 0.75])],
    )
    assert changes({"before": of_the_first, "after": of_the_second})[0].interval is None, "as far as judged"
    table = grids({"before": before, "after": after}, "helmet")[1]
    cells = {row[2]: row[3:] for row in table.rows}
    assert cells["a"] == ["2", "25.0 [0, 50]", "50.0 [25, 75] +25.0 [+25, +25]"]
    assert cells["only"] == ["1", "100.0 [one question]", ""]


def test_runs_of_other_questions_are_not_paired_and_those_answered_otherwise_are_so_with_a_word() -> None:
    """RULER's questions are known by the row's number alone, the same for every seed."""
    models = {
        label: [result(name, "ruler", [0.5], settings=SETTINGS | changed) for name in ("vt", "cwe")]
        for label, changed in {"a": {}, "b": {"seed": 43}, "c": {"stop_newline": True}}.items()
    }
    assert [(one.model, one.interval is None) for one in changes(models)][::2] == [("b", True), ("c", False)]
    assert notes(models, None) == [
        "b against a: seed 43 (not 42), so no change is given: vt, cwe",
        "c against a: stop_newline True (not False): vt, cwe",
    ]


def test_of_several_metrics_the_one_in_a_cell_is_named_and_the_heatmap_shows_what_the_category_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"str_em": 40.0, "citation_rec": 2.0, "citation_prec": 3.0}
    cited = result("alce_asqa", "cite", [0.4], scores=scores)
    answered = result("alce_asqa", "cite", [0.3], scores={"str_em": 30.0}, missing=("citation_rec",))
    averaged, tasks = grids({"m": [cited], "without nli": [answered]}, None)
    assert averaged.rows[0][2:] == ["15.0", "30.0*"]
    assert tasks.rows[0][4:] == ["str_em 40.0 [one question]", "str_em 30.0 [one question]"]
    drawn: list[Any] = []
    monkeypatch.setattr(suite_plot, "heatmap", lambda axes, scores, rows: drawn.extend(scores.values()))
    plot_suite({"m": [cited]}, None, tmp_path / "suite.png")
    assert drawn == [15.0]


def test_a_task_of_two_categories_is_shown_in_both() -> None:
    """Three of RULER's needles are in HELMET's recall too, and one folder may hold both suites."""
    of_ruler, of_helmet = (
        result("niah", category, [0.5, value]) for category, value in (("ruler", 1.0), ("recall", 0.0))
    )
    models = {"before": [of_ruler, of_helmet], "after": [of_ruler, of_helmet]}
    averages_shown, tasks = grids(models, None)
    assert [row[1:3] for row in averages_shown.rows] == [["recall", "25.0"], ["ruler", "75.0"]]
    assert [row[:4] for row in tasks.rows] == [
        ["32K", "recall", "niah", "2"],
        ["32K", "ruler", "niah", "2"],
    ]
    assert [row[4][:4] for row in tasks.rows] == ["25.0", "75.0"]
    assert [one.interval and one.interval.mean for one in changes(models)] == [0.0, 0.0]


def test_averages_stand_in_the_order_of_lengths_with_the_mean_last_and_a_mark_on_what_is_partial() -> None:
    results = [
        result("a", "summ", [0.5], missing=("gpt-4-f1",)),
        result("b", "icl", [0.25]),
        result("b", "icl", [0.75], length=8192),
    ]
    rows = grids({"m": results}, None)[0].rows
    assert rows == [
        ["8K", "icl", "75.0"],
        ["32K", "icl", "25.0"],
        ["32K", "summ", "50.0*"],
        ["32K", "mean", "37.5*"],
    ]
    ruler = [
        result("r", "ruler", [1.0], length=131072)
    ]  # a published length without any category of HELMET's
    assert grids({"m": ruler}, "helmet")[0].rows[0][:3] == ["128K", "ruler", "100.0"]


def test_prolongs_development_score_is_the_mean_over_32k_and_64k_of_six_categories() -> None:
    results = of_prolong(8192, 32768, 65536)
    others = [result(name, "rag", [0.0]) for name in ("kilt_triviaqa", "infbench_qa_eng", "ruler_niah_mv")]
    cited = [result("alce_asqa", "cite", [0.0], length=length) for length in (32768, 65536)]
    models = {"m": [*results, *others, *cited], "at 32K only": [result("task", "summ", [0.5])]}
    _, over_both, _ = grids(models, "prolong")
    assert over_both.headings[:5] == ["length", "category", "m", "at 32K only", "ProLong-8B (published)"]
    assert over_both.headings[5] == "5B at 64K (published)"
    assert [row[:6] for row in over_both.rows] == [
        ["32K+64K", "icl", "100.0", "", "", ""],
        ["32K+64K", "longqa", "50.0", "", "37.7", ""],
        ["32K+64K", "rag", "62.5", "", "", ""],
        ["32K+64K", "recall", "75.0", "", "", "96.0"],
        ["32K+64K", "rerank", "87.5", "", "", "29.4"],
        ["32K+64K", "summ", "75.0", "", "40.1", ""],
        ["32K+64K", "mean", "75.0", "", "", "54.6"],
    ]
    assert {one.category: one.score for one in summary(models, "prolong")["development"]["m"]}["mean"] == 75.0
    assert len(grids(models, "helmet")) == len(grids({"m": results[:1]}, "prolong")) == 2


def of_prolong(*lengths: int) -> list[Result]:
    """Its subset of HELMET, whole."""
    scores = {"recall": 0.5, "rag": 0.25, "rerank": 0.75, "icl": 1.0, "longqa": 0.0, "summ": 0.5}
    return [
        result(task.name, task.category, [scores[task.category] if length == 32768 else 1.0], length=length)
        for length in lengths
        for task in prolong(length)
    ]


def test_without_one_of_its_tasks_there_is_no_development_score_and_a_line_says_why() -> None:
    """The mean of what is there would stand beside the paper's as if it were of the same."""
    whole = of_prolong(32768, 65536)
    models = {"whole": whole, "part": [one for one in whole if one.key != (65536, "rag", "kilt_hotpotqa")]}
    rows = {row[1]: row[2:4] for row in grids(models, "prolong")[1].rows}
    assert (rows["rag"], rows["icl"], rows["mean"]) == (["62.5", "62.5†"], ["100.0", "100.0"], ["75.0", ""])
    assert notes(models, "prolong") == ["part: no mean over 32K+64K for want of kilt_hotpotqa (64K)"]
    assert not notes(models, "helmet") and not notes({"part": of_prolong(32768)}, "prolong")


def test_what_lacks_a_task_is_marked_and_a_mean_over_fewer_categories_is_not_shown() -> None:
    nq, popqa = (result(name, "rag", [0.5]) for name in ("kilt_nq", "kilt_popqa_3"))
    rerank, kv = result("msmarco_rerank_psg", "rerank", [0.25]), result("json_kv", "recall", [1.0])
    models = {"base": [nq, popqa, rerank], "sft": [nq, rerank, kv]}
    expected = {"rag": ["50.0", "50.0†"], "recall": ["", "100.0"], "rerank": ["25.0", "25.0"]}
    assert {row[1]: row[2:4] for row in grids(models, None)[0].rows} == expected | {"mean": ["", "58.3†"]}
    of_helmet = grids({"m": [nq, popqa, rerank]}, "helmet")[0].rows
    assert [row[1:3] for row in of_helmet] == [["rag", "50.0†"], ["rerank", "25.0"], ["mean", "37.5†"]]


def test_the_terminal_says_what_was_measured_on_generated_data(capsys: pytest.CaptureFixture[str]) -> None:
    made = {**SETTINGS, "generated": True}
    both = [result("json_kv", "recall", [1.0], length=length, settings=made) for length in (8192, 32768)]
    print_suite({"m": [*both, result("kilt_nq", "rag", [0.5])]}, None)
    assert capsys.readouterr().out.splitlines()[-1] == "m: on generated data: json_kv"


def test_under_prolong_only_its_tasks_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recall is JSON-KV's alone, and so is the published score beside it."""
    recall = [result("json_kv", "recall", [1.0]), result("ruler_niah_mk_2", "recall", [0.0])]
    shown = {suite: grids({"m": recall}, suite) for suite in ("helmet", "prolong")}
    assert [shown[suite][0].rows[0][:3] for suite in shown] == [
        ["32K", "recall", "50.0†"],
        ["32K", "recall", "100.0"],
    ]
    assert len(shown["prolong"][-1].rows) == 2  # every task is listed still
    told = {suite: summary({"m": recall}, suite) for suite in ("helmet", "prolong")}
    assert [told[suite]["averages"]["m"][0].score for suite in told] == [50.0, 100.0]
    assert len(told["prolong"]["tasks"]["m"]) == 2
    drawn: list[Any] = []
    monkeypatch.setattr(
        suite_plot, "_lines", lambda axes, models, category: drawn.append(averages(models["m"]))
    )
    plot_suite({"m": recall}, "prolong", tmp_path / "suite.png")
    assert [one.score for (one,) in drawn] == [100.0]


def test_what_was_cut_and_how_much_was_asked_is_said() -> None:
    models = {
        "m": [
            result("a", "rag", [0.0, 1.0, 1.0], questions=(1, 1, 2), truncated=2),
            result("b", "rag", [1.0]),
        ]
    }
    assert notes(models, None) == ["m: contexts cut to fit: a 2/3"]
    judged = {
        "m": [result("c", "summ", [math.nan, 1.0], scores={"gpt-4-f1": 100.0}), result("d", "summ", [1.0])]
    }
    assert notes(judged, None) == ["m: left out, since the judge's answer could not be read: c 1/2"]
    told = summary(models, None)["tasks"]["m"][0]
    assert (told["rows"], told["questions"], told["truncated"]) == (3, 2, 2)
    assert summary(models, None)["changes"] == []


def test_a_folder_with_results_of_several_weights_says_so() -> None:
    """A model trained further in the same place, of which then only some tasks were run again."""
    old = [result(name, "rag", [0.0], identity="old") for name in ("a", "b")]
    mixed = {"m": [*old, result("c", "rag", [1.0], identity="new", length=8192)]}
    assert notes(mixed, None) == [
        "m: of other weights than the rest, so its averages are of no one model: c (8K)"
    ]
    assert notes({"m": old}, None) == notes({"m": []}, None) == []


@pytest.mark.parametrize("asked", ["asked", ["no key of a dictionary"], "", None])
@pytest.mark.parametrize(
    ("metric", "average", "rows", "expected"),
    [
        ("gpt-4-f1", 0.25, [{"f1": 0.5}, {"f1": 0.0}], [0.5, 0.0]),
        (
            "gpt-4-score",
            1.5,
            [{"fluency": 1, "correctness": 3}, {"fluency": 0, "correctness": 2}],
            [1.0, 0.0],
        ),
    ],
)
def test_a_judges_rows_have_the_mean_of_its_score_and_are_of_the_questions_they_name(
    asked: Any,
    metric: str,
    average: float,
    rows: list[dict[str, float]],
    expected: list[float],
    tmp_path: Path,
) -> None:
    """HELMET's averages are of 0 to 1 for summaries, and of 0 to 3 for answers."""
    items = [{"gpt-4-scores": row, "question": asked, "removed_tokens": at} for at, row in enumerate(rows)]
    write_result(tmp_path / "x_in8192_shots2.json", items, {metric: average, "rougeL_f1": 9.0}, [metric])
    (found,) = read_results(tmp_path)
    assert found.values == tuple(expected) and found.truncated == 1
    assert found.questions == (("asked", "asked") if asked == "asked" else (0, 1))
    assert found.score == pytest.approx(found.interval.mean)


def test_a_judges_score_is_stood_in_for_until_there_is_one_and_no_other_is(tmp_path: Path) -> None:
    path, averaged = tmp_path / "x_in8192_shots2.json", {"str_em": 40.0, "rougeL_f1": 9.0}
    items = [{"removed_tokens": 0, "rougeL_f1": 0.09, "qa_pairs": [{"short_answers": ["x"]}], "output": ""}]
    write_result(path, items, averaged, ["str_em", "citation_rec"])
    (cited,) = read_results(tmp_path)
    assert cited.missing == ("citation_rec",) and cited.counted == [40.0]
    write_result(path, items, averaged, ["gpt-4-f1"])
    assert [one.counted for one in read_results(tmp_path)] == [[9.0]]
    judged = [{**items[0], "gpt-4-scores": {"f1": 0.5}}]
    write_result(judged_path(path), judged, {**averaged, "gpt-4-f1": 0.5}, ["gpt-4-f1"])
    assert [one.counted for one in read_results(tmp_path)] == [[50.0]]


def test_a_smoke_test_beside_the_results_is_refused(tmp_path: Path) -> None:
    """It would be averaged with them, and stand in their place in the table of tasks."""
    names = [f"{task}_v1__in8192_size{size}_shots2.json" for task in ("x", "y") for size in (100, 2)]
    for name in names[:3]:
        write_result(tmp_path / name, [{"f1": 0.5, "removed_tokens": 0}], {"f1": 50.0}, ["f1"], name[0])
    with pytest.raises(UserError, match="delete all but one") as error:
        read_results(tmp_path)
    assert str(error.value).splitlines()[1:] == ["  - x at 8K:", f"    {names[0]}", f"    {names[1]}"]
    (tmp_path / names[1]).unlink()
    assert [one.name for one in read_results(tmp_path)] == ["x", "y"]


@pytest.mark.parametrize("kept", [0, 60, 200])
def test_a_result_that_was_copied_by_half_is_named_and_not_left_out(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x_in8192_shots2.json"
    write_result(path, [], {"f1": 50.0}, ["f1"])
    path.write_text(path.read_text()[:kept])
    with pytest.raises(
        UserError, match=r"x_in8192_shots2\.json: cannot be read .*; delete it, and run the task"
    ):
        read_results(tmp_path)


def test_a_result_without_answers_or_with_words_for_scores_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x_in8192_shots2.json"
    row = {"f1": 0.5, "rougeL_f1": 0.5, "removed_tokens": 0}
    for items, averaged, said in (
        ([], {"f1": 50.0}, "no answers"),
        ([{**row, "f1": "high"}], {"f1": 50.0}, "high"),
        ([row], {"f1": "high"}, "high"),
        ([row], {"rougeL_f1": "high"}, "high"),
    ):
        write_result(path, items, averaged, ["f1" if "f1" in averaged else "gpt-4-f1"])
        with pytest.raises(
            UserError, match=f"not a whole result .*{said}.*; delete it, and run the task again"
        ):
            read_results(tmp_path)
    write_result(
        judged_path(path), [{"gpt-4-scores": None, "removed_tokens": 0}], {"gpt-4-f1": 0.5}, ["gpt-4-f1"]
    )
    with pytest.raises(UserError, match=r"none of the judge's answers can be read\); delete it, and judge"):
        read_results(tmp_path)
    judged_path(path).write_text("{")  # what was judged is still there
    with pytest.raises(UserError, match=r"delete it, and judge its answers \(`prolong eval judge`\) again"):
        read_results(tmp_path)


def test_a_directory_of_several_models_results_names_them(tmp_path: Path) -> None:
    for model in ("base", "long"):
        (tmp_path / model).mkdir()
        write_result(tmp_path / model / "x_in8192_shots2.json", [], {"f1": 50.0}, ["f1"])
    (tmp_path / "suite.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=f"no results of a model here; give {tmp_path}/base or {tmp_path}/long"
    ):
        read_results(tmp_path)
    with pytest.raises(UserError, match="`prolong eval run MODEL --suite …` makes some"):
        read_results(tmp_path / "empty")
    (tmp_path / "empty" / "lm_eval.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds lm_eval\.json but .* under --compare"):
        read_results(tmp_path / "empty")


def write_result(
    path: Path,
    items: list[Any],
    averaged: dict[str, Any],
    metrics: list[str],
    name: str = "x",
) -> None:
    """A result file of 8K."""
    arguments = {
        "datasets": name, "category": "summ", "input_max_length": 8192, "model_name_or_path": "m",
        "generated": False, "metric_names": metrics, "question_field": "question",
    }  # fmt: skip
    path.write_text(json.dumps({"args": arguments, "data": items, "averaged_metrics": averaged}))


def test_a_tasks_name_is_one_at_all_lengths() -> None:
    names = (
        "narrativeqa_7892",
        "icl_trec_coarse_6600shot_balance",
        "kilt_popqa_3",
        "ruler_niah_mk_2",
        "json_kv",
    )
    assert [_short(name) for name in names] == [
        "narrativeqa", "icl_trec_coarse_balance", "kilt_popqa_3", "ruler_niah_mk_2", "json_kv",
    ]  # fmt: skip


def test_a_result_without_a_digest_of_its_prompts_is_known_by_its_questions() -> None:
    """One of an older version, beside a new one."""
    old, new = result("a", "rag", [0.5]), result("a", "rag", [0.5], prompts="digest")
    assert old.asks_as(new) and new.asks_as(old)
    assert not new.asks_as(result("a", "rag", [0.5], prompts="another"))


def test_the_judged_form_of_a_name_with_dots_keeps_them() -> None:
    assert judged_path(Path("a_t0.0p1.0_42.json")).name == "a_t0.0p1.0_42-gpt4eval_o.json"
