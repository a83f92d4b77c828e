"""A few rows of every data file in HELMET's layout, made up for the tests, and the directory that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_prolong.evaluation.tasks.ruler import FOLDERS

LONG_TOKENS = 12000  # the tests lower the tasks' own bounds below this
STORY = "Once a fox met a crow. "


def write_data(root: Path) -> Path:
    """Everything the helmet and ruler suites read at 8K."""
    _write(root / "json_kv/test_k105_dep6.jsonl", [_kv(n) for n in range(8)])
    for name in FOLDERS.values():
        _write(root / f"ruler/{name}/validation_8192.jsonl", [_needle(n) | _extra(name, n) for n in range(4)])
    for name, dep, extra in (("nq-dev", 6, {}), ("triviaqa-dev", 6, {}), ("hotpotqa-dev", 3, {})):
        rows = [_passages(n, f"question {n // 2}?") | extra for n in range(8)]
        _write(root / f"kilt/{name}-multikilt_1000_k50_dep{dep}.jsonl", rows)
        demos = [_passages(n, f"train {n}?") for n in range(6)]
        _write(root / f"kilt/{name.replace('dev', 'train')}-multikilt_1000_k3_dep{dep}.jsonl", demos)
    popular = [_passages(n, f"popular {n}?") | {"id": n // 2, "s_pop": 10 ** (n % 6)} for n in range(12)]
    for k in (50, 3):
        _write(root / f"kilt/popqa_test_1000_k{k}_dep6.jsonl", popular)
    for k, size in ((50, 9), (10, 20)):
        _write(root / f"msmarco/test_reranking_data_k{k}_dep3.jsonl", [_ranked(n) for n in range(size)])
    for folder, fields in (
        ("trec", {"coarse_label": 3, "fine_label": 4}),
        ("banking77", {"label": 3}),
        ("clinc_oos", {"intent": 3}),
        ("nlu_evaluation_data", {"label": 3}),
    ):
        for split, size in (("train", 40), ("test", 12), ("validation", 12)):
            rows = [_labelled(split, n, fields) for n in range(size)]
            _write(root / f"hf/{folder}/{split}.jsonl", rows)
    _long_documents(root)
    _citations(root)
    return root


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _kv(n: int) -> dict[str, Any]:
    pairs = [[f"key-{n}-{place}", f"value-{n}-{place}"] for place in range(6)]
    context = "JSON data:\n" + json.dumps(dict(pairs), indent=4) + "\n"
    return {
        "context": context,
        "question": pairs[0][0],
        "answer": pairs[0][1],
        "demos": pairs[1:4],
        "num_kvs": 6,
        "depth": 0.0,
    }


def _needle(n: int) -> dict[str, Any]:
    return {
        "index": n,
        "input": "",
        "context": f"{STORY}\nOne of the special magic numbers for key-{n} is: 123{n}.",
        "query": f"key-{n}",
        "outputs": [f"123{n}"],
        "answer": [f"123{n}"],
        "length": 64,
        "type_needle_v": "numbers",
    }


def _extra(name: str, n: int) -> dict[str, Any]:
    """What other RULER rows have besides a needle's fields."""
    if name.startswith("qa"):
        return {"question": f"question {n}?", "query": f"question {n}?"}
    return {"example": f"example {n}" if n else "", "num_v": 5} if name in ("vt", "cwe") else {}


def _passages(n: int, question: str) -> dict[str, Any]:
    return {
        "question": question,
        "answers": [f"answer {n}", "alias"],
        "ctxs": [{"title": f"T{n}.{place}", "text": f"text {place} of {n}"} for place in range(3)],
    }


def _ranked(n: int) -> dict[str, Any]:
    labels = [0, 2, 1, 0, 3, 0, 0, 0, 0, 0]
    passages = [
        {"id": str(n * 10 + place), "text": f"passage {place}", "label": label}
        for place, label in enumerate(labels)
    ]
    return {"qid": f"q{n // 3}", "query": f"query {n // 3}", "ctxs": passages}


def _labelled(split: str, n: int, fields: dict[str, int]) -> dict[str, Any]:
    return {"text": f"{split} utterance {n}", **{name: n % size for name, size in fields.items()}}


def _long_documents(root: Path) -> None:
    long_story = STORY * (LONG_TOKENS // 4)
    asked = [
        {
            "document": {"id": f"d{n}", "text": long_story if n % 2 else STORY},
            "question": {"text": f"Who is {n}?"},
            "answers": [{"text": f"Fox {n}"}, {"text": "the fox"}],
        }
        for n in range(4)
    ]
    for split in ("train", "test"):
        _write(root / f"hf/narrativeqa/{split}.jsonl", asked)
    book = STORY * (LONG_TOKENS // 4)
    rows = [
        {
            "id": n,
            "context": book,
            "input": f"Why {n}?",
            "answer": [f"because {n}"],
            "options": [f"because {n}" if place == n else word for place, word in enumerate("wxyz")],
        }
        for n in range(4)
    ]
    for split in ("longbook_qa_eng", "longbook_choice_eng"):
        _write(root / f"hf/infinitebench/{split}.jsonl", rows)
    _write(
        root / "hf/infinitebench/longbook_sum_eng.jsonl",
        [row | {"input": "Summarize.", "options": []} for row in rows],
    )
    _write(
        root / "infbench/longbook_sum_eng_keypoints.jsonl",
        [{"id": n, "keypoints": ["a", "b"]} for n in range(4)],
    )
    cases = [
        {
            "id": f"c{n}",
            "sources": [book],
            "summary/short": f"short {n}" if n else None,
            "summary/long": f"long {n}",
        }
        for n in range(4)
    ]
    for split in ("train", "validation"):
        _write(root / f"hf/multi_lexsum/{split}.jsonl", cases)
    _write(
        root / "multi_lexsum/multi_lexsum_val.jsonl",
        [{"id": f"c{n}", "summary/short_keypoints": ["x"]} for n in range(4)],
    )


def _citations(root: Path) -> None:
    documents = [{"title": f"D{n}", "text": f"fact {n}"} for n in range(40)]
    prompts = {
        "instruction": "Write an answer and cite.",
        "demo_prompt": "{instruction}\n\nQuestion: {question}\n\n{context}\n\nAnswer: {answer}",
        "doc_prompt": "Document [{ID}](Title: {title}): {text}",
        "demos": [{"question": f"dq{n}", "answer": f"da{n} [1].", "docs": documents[:2]} for n in range(4)],
    }
    rows = {
        "asqa": {"qa_pairs": [{"short_answers": ["fact 1", "f1"]}, {"short_answers": ["fact 2"]}]},
        "qampari": {"answers": [["fact 1", "f1"], ["fact 2"]]},
    }
    for name, extra in rows.items():
        entries = [{"question": f"q{n}?", "answer": "fact 1", "docs": documents, **extra} for n in range(3)]
        (root / "alce").mkdir(parents=True, exist_ok=True)
        (root / f"alce/{name}_eval_gtr_top2000.json").write_text(json.dumps(entries))
        (root / "prompts").mkdir(exist_ok=True)
        (root / f"prompts/{name}_revised.json").write_text(json.dumps(prompts))
