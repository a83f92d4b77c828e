"""Ranking scores: reading a ranking out of generated text, and the cut-off measures of trec_eval.

HELMET calls pytrec_eval, whose source package compiles C and downloads trec_eval; the five measures it uses
are short, and the tests compare them with the wheel of pytrec_eval-terrier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

CUT_OFFS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_RANKING = re.compile(r"\d+(?:\s*>\s*\d+)*")


def parse_ranking(output: str) -> dict[str, int]:
    """The longest "3 > 1 > 2" of an output as scores by id, higher is better: {"3": 3, "1": 2, "2": 1}.

    Without any number the whole text stands as one unknown id.
    """
    text = re.sub(r"[\[\]:]", "", output).lower().replace("id", "")
    longest = max((match[0] for match in _RANKING.finditer(text)), key=len, default="")
    ids = [part.strip() for part in longest.split(">")] if longest else [text]
    scores: dict[str, int] = {}
    for place, name in enumerate(ids):
        scores.setdefault(name, len(ids) - place)
    return scores


def ranking_metrics(
    ranking: Mapping[str, float], relevance: Mapping[str, int], cut_offs: Sequence[int]
) -> dict[str, float]:
    """NDCG, MAP, recall and precision at each cut-off, and MRR, rounded to 5 decimals as HELMET does.

    Args:
        ranking: scores of the returned ids; equal scores are ordered by id, descending (trec_eval).
        relevance: label of every judged id; labels above 0 are relevant, and are the gain.
    """
    order = sorted(ranking, key=lambda name: (ranking[name], name), reverse=True)
    gains = [max(relevance.get(name, 0), 0) for name in order]
    ideal = sorted((label for label in relevance.values() if label > 0), reverse=True)
    scores: dict[str, float] = {}
    for cut in cut_offs:
        scores[f"NDCG@{cut}"] = _ratio(_dcg(gains[:cut]), _dcg(ideal[:cut]))
    for cut in cut_offs:
        scores[f"MAP@{cut}"] = _ratio(_precision_sum(gains[:cut]), len(ideal))
    for cut in cut_offs:
        scores[f"Recall@{cut}"] = _ratio(_hits(gains[:cut]), len(ideal))
    for cut in cut_offs:
        scores[f"P@{cut}"] = _hits(gains[:cut]) / cut
    first = next((place for place, gain in enumerate(gains, start=1) if gain > 0), None)
    scores["MRR"] = 1 / first if first else 0.0
    return {name: round(score, 5) for name, score in scores.items()}


def _hits(gains: Sequence[int]) -> int:
    return sum(gain > 0 for gain in gains)


def _precision_sum(gains: Sequence[int]) -> float:
    """Sum of the precision at each relevant place."""
    found, total = 0, 0.0
    for place, gain in enumerate(gains, start=1):
        if gain > 0:
            found += 1
            total += found / place
    return total


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
