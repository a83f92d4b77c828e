"""Text scores as HELMET computes them (its utils.py), 0 to 1 each.

Known traits are kept, since published numbers have them: an answer that normalises to nothing ("A", "...")
is contained in every output, and equals an empty one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_CLOSED_ANSWERS = {"yes", "no", "noanswer"}


def normalize_answer(text: str) -> str:
    """Lower case, punctuation deleted, articles dropped, white space collapsed (SQuAD's normalisation)."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after normalisation."""
    return normalize_answer(prediction) == normalize_answer(answer)


def substring_exact_match(prediction: str, answer: str) -> bool:
    """The normalised answer is part of the normalised prediction."""
    return normalize_answer(answer) in normalize_answer(prediction)


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words; yes/no answers must be equal to count."""
    predicted, expected = normalize_answer(prediction), normalize_answer(answer)
    if predicted != expected and (predicted in _CLOSED_ANSWERS or expected in _CLOSED_ANSWERS):
        return 0.0
    predicted_words, expected_words = predicted.split(), expected.split()
    common = sum((Counter(predicted_words) & Counter(expected_words)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted_words), common / len(expected_words)
    return 2 * precision * recall / (precision + recall)


def answer_list(answers: Any) -> list[str]:
    """Answers come as one text, a list, or a list of lists of aliases."""
    if isinstance(answers, str):
        return [answers]
    return [alias for answer in answers for alias in ([answer] if isinstance(answer, str) else answer)]


def text_metrics(prediction: str, answers: str | Sequence[Any]) -> dict[str, float]:
    """Every score of HELMET's calculate_metrics, each the best over the answers."""
    golds = answer_list(answers)
    rouges = [_rouge().score(target=gold, prediction=prediction) for gold in golds]

    def best(score: Callable[[str, str], float]) -> Any:
        return max(score(prediction, gold) for gold in golds)

    return {
        "exact_match": best(exact_match),
        "f1": best(f1),
        "substring_exact_match": best(substring_exact_match),
        **{
            f"{kind}_{which}": max(getattr(rouge[kind], field) for rouge in rouges)
            for kind in ("rougeL", "rougeLsum")
            for which, field in (("f1", "fmeasure"), ("recall", "recall"))
        },
    }


def ruler_recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur in the prediction, ignoring case."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def parse_output(output: str, prefix: str = "Answer:") -> str:
    """What follows the first `prefix` on its line, else the first line; a repeated prefix is dropped.

    `prefix` is a regular expression for the search and plain text for the dropping, as in HELMET.
    """
    match = re.search(f"(?:{prefix})(.*)(?:\n|$)", output, re.IGNORECASE) or re.search(
        r"^(.*)(?:\n|$)", output
    )
    assert match is not None  # the second pattern matches every text
    return re.sub(f"^{re.escape(prefix)}", "", match[1].strip(), flags=re.IGNORECASE).strip()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)
