"""Questions of the short suite's kind, asked of a checkpoint in place and through lm-eval's own model.

Both get the same questions in one process on one thread: a prompt of 300 to 700 tokens (as five examples make it)
and four choices of eight tokens, scored by log-probability. Times are of the processor.

    python benchmarks/evaluation/short.py          # writes benchmarks/evaluation/short.json
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure
import torch
from inference import timed, write_models
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron_prolong.evaluation.backend import open_backend
from megatron_prolong.evaluation.harness import HarnessModel

QUESTIONS = 48
CHOICES = 4
CASES = [{"batch_size": size, "layers": 2, "hidden": 512} for size in (1, 8)]


def questions() -> list[Instance]:
    """Every choice of every question, one after another."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(1, 8000)}" for _ in range(count))

    asked = []
    for number in range(QUESTIONS):
        prompt = words(draw.randint(300, 700))
        for choice in range(CHOICES):
            asked.append(Instance("loglikelihood", {}, (prompt, " " + words(8)), number * CHOICES + choice))
    return asked


def speed(case: dict[str, Any]) -> dict[str, Any]:
    """Processor seconds of both, and how far their log-probabilities lie apart."""
    torch.set_num_threads(1)
    asked, size = questions(), case["batch_size"]
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), case["layers"], case["hidden"])
        theirs = HFLM(
            pretrained=str(paths["hf"]), add_bos_token=False, batch_size=size, device="cpu", dtype="float32"
        )
        with open_backend(paths["megatron"], batch_size=size) as backend:
            assert backend is not None
            ours = HarnessModel(backend, add_bos=False, ask_greedy=False)
            found = {}
            for name, model in (("lm_eval", theirs), ("megatron", ours)):
                model.loglikelihood(asked[:CHOICES], disable_tqdm=True)  # what loads lazily
                found[name] = timed(lambda model=model: model.loglikelihood(asked, disable_tqdm=True))
    apart = [abs(a[0] - b[0]) for a, b in zip(found["lm_eval"][1], found["megatron"][1], strict=True)]
    seconds = {name: took for name, (took, _) in found.items()}
    return {
        **{f"{name}_questions_per_cpu_second": round(QUESTIONS / took, 2) for name, took in seconds.items()},
        "megatron_times_lm_eval": round(seconds["lm_eval"] / seconds["megatron"], 2),
        "largest_difference_of_a_logprob": round(max(apart), 6),
    }


def main() -> None:
    rows = []
    for case in CASES:
        rows.append({**case, **measure.in_fresh_process(__file__, case, 1200)})
        print(rows[-1], flush=True)
    result = {"questions": QUESTIONS, "choices": CHOICES, "rows": rows}
    measure.write_result(Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    measure.run(__doc__, speed, main)
