"""Scores equal HELMET's: its own outputs on generated strings (data/helmet_vectors.json), and cases by hand.

The vectors are what HELMET's utils.py (April 2025, with rouge_score and pytrec_eval) returned for the strings
of `strings.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_prolong.evaluation.bootstrap import difference_interval, mean_interval
from megatron_prolong.evaluation.ranking import parse_ranking, ranking_metrics
from megatron_prolong.evaluation.task import score_text
from megatron_prolong.evaluation.text_metrics import (
    answer_list,
    f1,
    normalize_answer,
    parse_output,
    ruler_recall,
    text_metrics,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "helmet_vectors.json").read_text())
NAMES = ("exact_match", "f1", "substring_exact_match")
ROUGE = ("rougeL_f1", "rougeL_recall", "rougeLsum_f1", "rougeLsum_recall")


def test_two_models_without_a_row_in_common_have_no_difference() -> None:
    """As when the judge's answers could be read for other rows of each."""
    nan = float("nan")
    assert difference_interval([nan, 1.0], [0.0, nan], ["a", "b"]) is None
    found = difference_interval([nan, 1.0], [0.0, 0.5], ["a", "b"])
    assert found is not None and found.mean == -0.5 and math.isnan(found.low), "of one question"


def test_an_interval_is_over_questions_not_rows() -> None:
    """Half of 400 questions answered: 0.5 ± 1.96 · 0.5 / √400. Asked four times each they are no more certain."""
    right, questions = [0.0, 1.0] * 200, range(400)
    once = mean_interval(right, questions)
    assert (once.mean, once.low, once.high) == pytest.approx((0.5, 0.451, 0.549), abs=0.003)
    four_times = mean_interval(
        [*right, *right, *right, *right], [*questions, *questions, *questions, *questions]
    )
    assert four_times == once
    single = mean_interval([0.0, 1.0], ["same", "same"])
    assert single.mean == 0.5 and math.isnan(single.low) and math.isnan(single.high), "nothing to resample"
    two = mean_interval([0.0, 1.0], ["one", "another"])
    assert (two.low, two.high) == (0.0, 1.0)


def test_text_scores_of_a_thousand_strings_are_helmets() -> None:
    assert len(VECTORS["text"]) >= 1000
    for prediction, answers, expected in VECTORS["text"]:
        scores = text_metrics(prediction, answers)
        assert [float(scores[name]) for name in (*NAMES, *ROUGE)] == pytest.approx(expected, abs=1e-8), (
            prediction
        )


def test_the_vectors_are_not_trivial() -> None:
    columns = list(zip(*(expected for _, _, expected in VECTORS["text"]), strict=True))
    for column in columns:
        # Exact matches are rare among generated strings: six in the thousand.
        assert 5 <= sum(value > 0 for value in column) <= 0.98 * len(column)


def test_parsed_outputs_are_helmets() -> None:
    for output, prefix, expected in VECTORS["parse"]:
        assert parse_output(output, prefix) == expected, output


def test_parsed_rankings_are_helmets() -> None:
    for output, expected in VECTORS["ranking"]:
        assert list(parse_ranking(output).items()) == [tuple(pair) for pair in expected], output


def test_ranking_measures_are_those_of_trec_eval() -> None:
    for ranking, relevance, cut_offs, expected in VECTORS["measures"]:
        scores = ranking_metrics(dict(ranking), relevance, cut_offs)
        assert scores == pytest.approx(expected, abs=1.1e-5)
        assert all(score == round(score, 5) for score in scores.values()), "as HELMET rounds every row"


def test_of_equal_scores_the_later_id_is_first_and_a_label_below_zero_is_no_gain() -> None:
    scores = ranking_metrics({"3": 1, "1": 1, "2": 2}, {"1": 2, "2": -2, "3": 1}, [2])
    assert (scores["P@2"], scores["MRR"]) == (0.5, 0.5)
    assert scores["NDCG@2"] == pytest.approx((1 / math.log2(3)) / (2 + 1 / math.log2(3)), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("A", ""),
        ("re-rank", "rerank"),
        ("an\tan", ""),
        ("U.S.", "us"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_an_answer_of_only_an_article_matches_an_empty_output() -> None:
    scores = text_metrics("", ["A", "A. option"])
    assert scores["exact_match"] and scores["substring_exact_match"]


def test_yes_and_no_must_be_equal() -> None:
    assert f1("yes it is", "yes") == f1("yes", "yes it is") == 0.0
    assert f1("Yes.", "yes") == 1.0


def test_answers_of_all_forms() -> None:
    assert answer_list("x") == ["x"] and answer_list([["x", "y"], ["z"]]) == ["x", "y", "z"]


def test_ruler_recall_is_the_share_found() -> None:
    assert ruler_recall("values: 12, ABC", ["12", "aBc", "7", "8", "9"]) == 0.4


def test_the_better_of_the_whole_and_the_parsed_answer_counts() -> None:
    said = score_text("I think so.\nAnswer: Paris\nNext", {"answer": "Paris"})
    assert (said.parsed, said.scores["exact_match"]) == ("Paris", 1)
    assert score_text("Paris\nAnswer: none", {"answer": "Paris"}).scores["substring_exact_match"] == 1


def test_a_prefix_alone_on_its_line_gives_nothing() -> None:
    assert parse_output("Answer:\nParis") == ""


def test_a_list_without_arrows_is_one_id_and_an_output_without_any_an_unknown_one() -> None:
    assert parse_ranking("12, 5, 7") == {"12": 1}
    assert parse_ranking("None of them.") == {"none of them.": 1}
