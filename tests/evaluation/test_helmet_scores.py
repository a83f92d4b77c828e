"""Citation and judge's scores are those of HELMET's eval_alce.py and scripts/eval_gpt4_*.py on the same outputs.

Needs a checkout of HELMET, named by the environment variable HELMET, and what it imports (pytrec_eval); without
one, citation scores are compared with what it once returned.
"""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helmet_checkout import HELMET, needs_helmet
from strings import sentence

from megatron_prolong.evaluation import alce
from megatron_prolong.evaluation.client import Client
from megatron_prolong.evaluation.judge import Judge, judge_results

HELMETS = {
    False: {
        "length": 15.42,
        "str_em": 48.0,
        "str_hit": 26.66666667,
        "rougeLsum": 12.56779025,
        "citation_rec": 33.27812871,
        "citation_prec": 35.09493624,
    },
    True: {
        "length": 15.42,
        "str_em": 0.0,
        "str_hit": 0.0,
        "num_preds": 4.25,
        "qampari_prec": 3.9588707,
        "qampari_rec": 3.66666667,
        "qampari_rec_top5": 4.4,
        "qampari_f1": 3.48835011,
        "qampari_f1_top5": 3.81188474,
        "citation_rec": 26.1812335,
        "citation_prec": 36.84709642,
    },
}
"""What eval_alce.py (April 2025) returned for `cited_answers`."""
DOCUMENTS = [{"title": f"D{n}", "text": f"Paris {n}"} for n in range(6)]


def supports(passage: str, claim: str) -> bool:
    """A model of entailment with opinions: the sum of the passage's numbers, and the length of the claim."""
    return (sum(int(word) for word in passage.split() if word.isdigit()) + len(claim)) % 3 > 0


def import_script(name: str, monkeypatch: pytest.MonkeyPatch, folder: str = "") -> Any:
    pytest.importorskip("pytrec_eval")
    monkeypatch.syspath_prepend(str(HELMET))
    monkeypatch.syspath_prepend(str(HELMET / folder))
    return importlib.import_module(name)


def split(text: str) -> list[str]:
    """punkt is data that not every machine has."""
    return text.split(". ")


def cited_answers(listed: bool) -> list[dict[str, Any]]:
    rng = random.Random(1)
    items = []
    for number in range(300):
        cited = "".join(f"{sentence(rng)} [{rng.randint(0, 7)}][{rng.randint(1, 6)}]. " for _ in range(3))
        gold: dict[str, Any] = {
            "qa_pairs": [{"short_answers": ["Paris", "3,000"]}, {"short_answers": ["1989", "born"]}],
            "annotations": [
                {"long_answer": "Paris, 1989. New York"},
                {"long_answer": "Born in 1989 in Paris"},
            ],
        }
        if listed:
            gold = {"answers": [["Paris", "the paris"], ["New York"], ["hotel"], ["B."], ["C"], ["1989"]]}
        output = rng.choice([cited, sentence(rng), cited.replace(". ", ", ")])
        items.append(
            {"question": f"q{number}?", "answer": "Paris", "output": output, "docs": DOCUMENTS, **gold}
        )
    return items


def score_citations(listed: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(alce, "split_sentences", split)
    return alce.summarise(cited_answers(listed), supports, listed=listed)


@pytest.mark.parametrize("listed", [False, True])
def test_citation_scores_are_what_helmet_gave(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = score_citations(listed, monkeypatch)
    ours.pop("citation_positions")
    assert ours == pytest.approx(HELMETS[listed], abs=1e-6)
    assert 10 < ours["citation_rec"] < 90 and 10 < ours["citation_prec"] < 90


def test_marks_are_no_words_of_an_answer() -> None:
    assert alce.remove_citations("a [12][3] | b.") == "a b."
    assert alce.clean_output("a\n\nb<|im_end|>") == "a b"


@pytest.mark.parametrize(
    ("num_answers", "num_said", "top5"), [(2, 2, 1.0), (2, 1, 0.5), (9, 4, 0.8), (9, 7, 1.0)]
)
def test_five_answers_of_a_list_are_enough(num_answers: int, num_said: int, top5: float) -> None:
    answers = [f"x{number}" for number in range(num_answers)]
    item = {"output": ", ".join(answers[:num_said]), "answers": [[answer] for answer in answers]}
    scores = alce.qampari_scores(item)
    assert (scores["qampari_rec"], scores["qampari_rec_top5"]) == (num_said / num_answers, top5)


def test_without_experts_the_answer_itself_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alce, "split_sentences", split)
    assert alce.rouge_l_sum({"output": "In Paris [1].", "answer": "in Paris."}) == 1.0


@needs_helmet
@pytest.mark.parametrize("listed", [False, True])
def test_citation_scores_are_helmets(listed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs = import_script("eval_alce", monkeypatch)
    monkeypatch.setattr(theirs, "autoais_model", "stands in")
    monkeypatch.setattr(theirs, "_run_nli_autoais", lambda passage, claim: int(supports(passage, claim)))
    monkeypatch.setattr(theirs, "sent_tokenize", split)
    path = tmp_path / f"alce_{'qampari' if listed else 'asqa'}.json"
    path.write_text(json.dumps({"data": cited_answers(listed)}))
    theirs.main(["--f", str(path), "--citations"])
    expected = json.loads(Path(f"{path}.score").read_text())
    ours = json.loads(json.dumps(score_citations(listed, monkeypatch)))
    assert ours.pop("citation_positions") == expected.pop("citation_positions")
    # Theirs is the median of 1000 samples of the items, drawn without a seed.
    assert ours.get("rougeLsum") == pytest.approx(expected.get("rougeLsum"), abs=0.2)
    expected |= {name: ours[name] for name in ("rougeLsum",) if name in ours}
    assert ours == pytest.approx(expected)
    assert HELMETS[listed] == pytest.approx(expected)


@dataclass
class Oracle:
    """A judging model for both programs: HELMET's asks in a batch, ours one by one."""

    asked: list[str] = field(default_factory=list)

    def answer(self, prompt: str) -> str:
        rng = random.Random(prompt)
        scores = {"fluency": rng.randint(0, 1), "correctness": rng.randint(0, 3), "recall": rng.randint(0, 2)}
        scores |= {"precision": rng.randint(0, 3), "sentence_count": 3}
        return rng.choice(
            [
                'First {"fluency": 9}. So ' + json.dumps(scores),
                f"```json\n{json.dumps(scores)}\n```",
                "unsure",
            ]
        )

    def generate_batch(self, prompt: list[str], batch_file: str) -> list[dict[str, str]]:
        self.asked += prompt
        return [{"output": self.answer(text)} for text in prompt]


@needs_helmet
@pytest.mark.parametrize("name", ["narrativeqa", "infbench_sum_eng", "multi_lexsum"])
def test_judgements_are_helmets(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "eval_gpt4_longqa" if name == "narrativeqa" else "eval_gpt4_summ"
    theirs = import_script(script, monkeypatch, "scripts")
    rng = random.Random(2)
    items = [
        {
            "id": n,
            "question": f"q{n}",
            "answer": ["the fox", "fox"],
            "summary/long": f"long {n}",
            "output": sentence(rng) + "\nAnswer:\n more",
            "keypoints": ["a", "b"][: n % 3],
        }
        for n in range(150)
    ]
    for folder, points in (
        ("infbench/longbook_sum_eng_keypoints", "keypoints"),
        ("multi_lexsum/multi_lexsum_val", "summary/short_keypoints"),
    ):
        file = tmp_path / "data" / f"{folder}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(
            "".join(json.dumps({"id": item["id"], points: item["keypoints"]}) + "\n" for item in items)
        )
    path = tmp_path / f"{name}_v1_in8192_shots2.json"
    path.write_text(json.dumps({"data": items, "averaged_metrics": {}}))
    monkeypatch.chdir(tmp_path)
    oracle, asked = Oracle(), []
    expected = theirs.check_metrics(oracle, str(path), str(tmp_path / "theirs"))["averaged_metrics"]

    def one(judge: Judge, prompt: str, max_tokens: int) -> str:
        asked.append(prompt)
        return oracle.answer(prompt)

    monkeypatch.setattr(Judge, "_one", one)
    (written,) = judge_results(tmp_path, Judge(Client("", concurrency=1), "o", tmp_path / "cache"), HELMET)
    assert asked == list(dict.fromkeys(oracle.asked))
    assert json.loads(written.read_text())["averaged_metrics"] == pytest.approx(expected)
    assert all(value > 0 for value in expected.values())
