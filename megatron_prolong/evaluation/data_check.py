"""What of the evaluation data is there, and how to get the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from megatron_prolong.evaluation.task import Task
from megatron_prolong.evaluation.tasks.icl import LENGTHS
from megatron_prolong.evaluation.tasks.long_documents import LLAMA2

ARCHIVE = (
    "curl -LO https://huggingface.co/datasets/princeton-nlp/HELMET/resolve/main/data.tar.gz  # 11 GB\n"
    "tar -xzf data.tar.gz  # 34 GB, makes data/"
)
_HUB = {
    "hf/trec": ("CogComp/trec", None),
    "hf/banking77": ("PolyAI/banking77", None),
    "hf/clinc_oos": ("clinc/clinc_oos", "plus"),
    "hf/nlu_evaluation_data": ("xingkunliuxtracta/nlu_evaluation_data", None),
    "hf/narrativeqa": ("deepmind/narrativeqa", None),
    "hf/multi_lexsum": ("allenai/multi_lexsum", "v20230518"),
}


@dataclass(frozen=True)
class Need:
    """One file or folder that some tasks read."""

    path: str
    found: bool
    tasks: tuple[str, ...]
    generated: bool
    """Made offline instead when it is not there."""


def needs(tasks: Sequence[Task], data: Path | None) -> list[Need]:
    """Everything the tasks read, in order, and whether it is there."""
    readers: dict[str, list[Task]] = {}
    for task in tasks:
        for path in task.needs:
            readers.setdefault(path, []).append(task)
    return [
        Need(
            path=path,
            found=all(path not in task.missing(data) for task in users),
            tasks=tuple(dict.fromkeys(task.name for task in users)),
            generated=all(task.generated for task in users),
        )
        for path, users in readers.items()
    ]


def llama2_hint(tasks: Sequence[Task], data: Path | None) -> str:
    """What to add for documents cut to the same text as HELMET's; empty when there is nothing to say."""
    cut = any(task.category in ("longqa", "summ") for task in tasks)
    folder = (data or Path("data")) / LLAMA2
    if not cut or folder.exists():
        return ""
    return (
        "The model's tokenizer cuts long documents; for the same text as HELMET's, add Llama-2's (gated):\n"
        f"hf download meta-llama/Llama-2-7b-hf --include 'token*' --local-dir {quote(str(folder))}"
    )


def how_to_get(path: str, data: Path) -> str:
    """The command that puts a missing file into the data directory."""
    folder = quote(str(data))
    if path == "hf/infinitebench":
        return (
            "for s in longbook_qa_eng longbook_choice_eng longbook_sum_eng; do curl -L --create-dirs "
            f"-o {folder}/hf/infinitebench/$s.jsonl "
            "https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench/resolve/main/$s.jsonl; done"
        )
    if path in _HUB:
        name, config = _HUB[path]
        # The converted Parquet branch: these data sets have loading scripts, which `datasets` no longer runs.
        part = config or "default"
        return (
            f"hf download {name} --repo-type dataset --revision refs/convert/parquet --include '{part}/**' "
            f"--local-dir {folder}/{path}.parquet && mkdir -p {folder}/{path} && for f in "
            f"{folder}/{path}.parquet/{part}/*/*.parquet; do "
            f'cp "$f" {folder}/{path}/"$(basename "$(dirname "$f")")-$(basename "$f")"; done'
        )
    if path.startswith("prompts/"):
        return f"git clone https://github.com/princeton-nlp/HELMET && cp -r HELMET/prompts {folder}/"
    length = re.fullmatch(r"ruler/qa_\d/validation_(\d+)\.jsonl", path)
    if length and int(length[1]) not in LENGTHS:
        return (
            "HELMET has none of this length; they are made of squad.json and hotpotqa.json in "
            f"{data}/ruler_source/, which RULER's scripts/data/synthetic/json/download_qa_dataset.sh writes"
        )
    return f"{ARCHIVE}  # then give --data data"
