"""Scores of answers with citations: HELMET's eval_alce.py (Gao et al. 2023).

Percentages are means over items. Citation scores ask a natural-language-inference model whether the cited
passages support each sentence; without one only the answer scores are given.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prolong.evaluation.sentences import split_sentences
from megatron_prolong.evaluation.task import Entails, Row
from megatron_prolong.evaluation.text_metrics import normalize_answer, text_metrics

MAX_CITATIONS = 3
MIN_SENTENCE_CHARACTERS = 5


@dataclass(frozen=True)
class Citations:
    """Shares of one answer: sentences that their citations support, citations that are needed."""

    recall: float
    precision: float


def clean_output(output: str) -> str:
    """Line breaks become spaces before anything is scored."""
    return re.sub(r"\n+", " ", output).replace("<|im_end|>", "")


def remove_citations(text: str) -> str:
    """The text without its [1][2] marks."""
    return re.sub(r"\[\d+", "", re.sub(r" \[\d+", "", text)).replace(" |", "").replace("]", "")


def answer_text(item: Row) -> str:
    """The output without line breaks and citations."""
    return remove_citations(clean_output(item["output"]))


def str_em(item: Row) -> float:
    """ASQA: share of the sub-questions with a short answer in the output."""
    text = normalize_answer(answer_text(item))
    found = [
        any(normalize_answer(answer) in text for answer in pair["short_answers"]) for pair in item["qa_pairs"]
    ]
    return sum(found) / len(found)


def rouge_l_sum(item: Row) -> float:
    """ASQA: ROUGE-L F1 over sentences, with that of two experts' long answers which is nearer."""
    experts = [expert["long_answer"] for expert in item.get("annotations") or []][:2] or [item["answer"]]
    output, *answers = ("\n".join(split_sentences(text.lower())) for text in (answer_text(item), *experts))
    return float(text_metrics(output, answers)["rougeLsum_f1"])


def qampari_scores(item: Row) -> dict[str, float]:
    """QAMPARI: precision and recall of a comma-separated list; recall counts at most five answers (top5)."""
    listed = [normalize_answer(part.strip()) for part in _comma_parts(answer_text(item))]
    predictions = [text for text in listed if text]
    answers = [[normalize_answer(alias) for alias in aliases] for aliases in item["answers"]]
    aliases = {alias for group in answers for alias in group}
    hits = sum(any(alias in predictions for alias in group) for group in answers)
    precision = sum(text in aliases for text in predictions) / len(predictions) if predictions else 0.0
    recall, top5 = hits / len(answers), min(5, hits) / min(5, len(answers))
    return {
        "num_preds": len(predictions),
        "qampari_prec": precision,
        "qampari_rec": recall,
        "qampari_rec_top5": top5,
        "qampari_f1": _harmonic(precision, recall),
        "qampari_f1_top5": _harmonic(precision, top5),
    }


def statements(item: Row, listed: bool) -> list[str]:
    """What must be supported: sentences, or with `listed` (QAMPARI) the question with each item of the list."""
    output = clean_output(item["output"])
    if listed:
        return [f"{item['question']} {part.strip()}" for part in _comma_parts(output)]
    return [text for text in split_sentences(output) if len(text.strip()) >= MIN_SENTENCE_CHARACTERS]


def citation_scores(item: Row, listed: bool, entails: Entails) -> Citations | None:
    """Citation recall and precision of one answer; None when it says nothing."""
    parts = statements(item, listed)
    if not parts:
        return None
    supported = needed = total = 0
    for part in parts:
        references = cited(part)
        if not references or any(place >= len(item["docs"]) for place in references):
            continue
        references = references[:MAX_CITATIONS]
        total += len(references)
        claim = remove_citations(part).strip()
        if entails(_passages(item, references), claim):
            supported += 1
            needed += _needed(item, references, claim, entails)
    return Citations(supported / len(parts), needed / total if total else 0.0)


def _needed(item: Row, references: list[int], claim: str, entails: Entails) -> int:
    """Citations that support the claim alone, or without which the rest does not."""
    count = 0
    for place in references:
        if entails(_passages(item, [place]), claim):
            count += 1
            continue
        rest = list(references)
        rest.remove(place)
        count += not entails(_passages(item, rest), claim)
    return count


def cited(text: str) -> list[int]:
    """Document numbers of the [n] marks, counted from 0."""
    return [int(mark[1:]) - 1 for mark in re.findall(r"\[\d+", text)]


def summarise(items: Sequence[Row], entails: Entails | None, *, listed: bool) -> dict[str, float]:
    """HELMET's .score content: percentages, length in words.

    Citation scores and rougeLsum, which need sentences, are there only with a model for `entails`. rougeLsum is the
    mean itself, which HELMET estimates with an unseeded bootstrap.
    """
    summary = {"length": float(np.mean([len(answer_text(item).split()) for item in items]))}
    if listed:
        summary |= {"str_em": 0.0, "str_hit": 0.0}  # HELMET's, of a data set without sub-questions
        scores = [qampari_scores(item) for item in items]
        for name in scores[0]:
            values = [score[name] for score in scores]
            summary[name] = float(np.mean(values)) if name == "num_preds" else _percent(values)
    else:
        values = [str_em(item) for item in items]
        summary["str_em"] = _percent(values)
        summary["str_hit"] = _percent([value == 1 for value in values])
    if entails is not None:
        if not listed:
            summary["rougeLsum"] = _percent([rouge_l_sum(item) for item in items])
        found = [citation_scores(item, listed, entails) for item in items]
        known = [citations for citations in found if citations is not None]
        summary["citation_rec"] = _percent([one.recall for one in known])
        summary["citation_prec"] = _percent([one.precision for one in known])
        positions = Counter(
            place for item in items for part in statements(item, listed) for place in cited(part)
        )
        summary["citation_positions"] = dict(positions)  # type: ignore[assignment]
    return summary


def _percent(shares: Sequence[float]) -> float:
    """100 times their mean; 0 for none."""
    return 100 * float(np.mean(shares)) if shares else 0.0


def _comma_parts(output: str) -> list[str]:
    return output.rstrip().rstrip(".").rstrip(",").split(",")


def _passages(item: Row, places: Sequence[int]) -> str:
    documents = [item["docs"][place] for place in places]
    return "\n".join(f"Title: {document['title']}\n{document['text']}" for document in documents)


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
