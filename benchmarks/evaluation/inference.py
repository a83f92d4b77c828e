"""The megatron backend beside the hf backend on the same weights, and the memory of a long prefill.

- speed: both read the same prompt and decode the same tokens in one process on one thread, taking turns at every
  prefill and every token, so that whatever else the machine does falls on both. Times are of the processor, not of
  the clock. The hf backend is transformers with sdpa attention and the same chunked prefill.
- memory: what reading one prompt adds at its highest to the resident memory of a fresh process.

    python benchmarks/evaluation/inference.py          # writes benchmarks/evaluation/inference.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_prolong.convert.to_megatron import to_megatron
from megatron_prolong.evaluation.backend import Prompt, open_backend
from megatron_prolong.evaluation.hf import HuggingFaceBackend
from megatron_prolong.evaluation.megatron import MegatronBackend
from megatron_prolong.mcore.attention import KeyValueCache

VOCAB_SIZE = 8192
BACKENDS = ("hf", "megatron")
SPEED = [
    {"tokens": 4096, "new_tokens": 64, "layers": 2, "hidden": 512, "repeats": 3},
    {"tokens": 16384, "new_tokens": 64, "layers": 2, "hidden": 512, "repeats": 1},
]
MEMORY = [
    {"backend": backend, "tokens": tokens, "layers": 1, "hidden": 64}
    for backend, tokens in (
        ("megatron", 32768), ("hf", 32768), ("megatron", 65536), ("hf", 65536), ("megatron", 131072),
    )
]  # fmt: skip


def write_models(root: Path, layers: int, hidden: int) -> dict[str, Path]:
    """Random weights, once in each format; a tokenizer for which every word is a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), max_position_embeddings=2**17,
        initializer_range=0.1, bos_token_id=None, eos_token_id=VOCAB_SIZE - 1,
        rope_parameters={"rope_type": "default", "rope_theta": 8e6},
    )  # fmt: skip
    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    paths = {"hf": root / "hf", "megatron": root / "megatron"}
    LlamaForCausalLM(config).save_pretrained(paths["hf"])
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{VOCAB_SIZE - 1}").save_pretrained(
        paths["hf"]
    )
    to_megatron(paths["hf"], paths["megatron"])
    return paths


def prompt_of(tokens: int) -> list[int]:
    return torch.randint(VOCAB_SIZE - 1, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


def hf_steps(backend: HuggingFaceBackend, prompt: list[int]) -> Iterator[int]:
    """The first new token, then one by one those that follow."""
    cache = DynamicCache()
    following = backend._prefill(torch.tensor([prompt]), None, cache)
    while True:
        yield int(following)
        following = backend._forward(following[:, None], None, cache)


def megatron_steps(backend: MegatronBackend, prompt: list[int]) -> Iterator[int]:
    model, cache, following = backend.inference.inference, KeyValueCache(), prompt[-1]
    model._read([prompt[:-1]], [cache])
    while True:
        following = int(model._forward([torch.tensor([following])], [cache])[-1].argmax())
        yield following


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = step()
    return time.process_time() - start, result


@torch.inference_mode()
def speed(case: dict[str, Any]) -> dict[str, Any]:
    prompt = prompt_of(case["tokens"])
    prefill: dict[str, list[float]] = {name: [] for name in BACKENDS}
    decode: dict[str, list[float]] = {name: [] for name in BACKENDS}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), case["layers"], case["hidden"])
        with open_backend(paths["hf"]) as hf, open_backend(paths["megatron"]) as ours:
            for _ in range(case["repeats"]):
                steps = {"hf": hf_steps(hf, prompt), "megatron": megatron_steps(ours, prompt)}
                texts: dict[str, list[int]] = {name: [] for name in BACKENDS}
                for number in range(case["new_tokens"]):
                    for name in BACKENDS:
                        seconds, token = timed(steps[name].__next__)
                        (decode if number else prefill)[name].append(seconds)
                        texts[name].append(token)
    found: dict[str, Any] = {"same_tokens": texts["hf"] == texts["megatron"]}
    total = {}
    for name in BACKENDS:
        token = statistics.median(decode[name])
        total[name] = min(prefill[name]) + token * (case["new_tokens"] - 1)
        found[name] = {
            "prefill_tokens_per_cpu_second": round(case["tokens"] / min(prefill[name])),
            "decode_tokens_per_cpu_second": round(1 / token, 1),
            "cpu_seconds": round(total[name], 3),
        }
    found["megatron_times_hf"] = round(total["hf"] / total["megatron"], 2)
    return found


def memory(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder), case["layers"], case["hidden"])
        with open_backend(paths[case["backend"]]) as backend:
            assert backend is not None
            words = [" ".join(f"w{token}" for token in prompt_of(size)) for size in (4096, case["tokens"])]
            backend.generate([Prompt(words[0])], 1)  # the chunk's own activations, and what loads lazily
            with measure.PeakMemory() as peak:
                taken, _ = timed(lambda: backend.generate([Prompt(words[1])], 1))
    cache = 2 * case["layers"] * max(1, case["hidden"] // 128) * 64 * 4 * case["tokens"]
    return {
        "added_mib": round(peak.added_bytes / measure.MIB),
        "key_value_cache_mib": round(cache / measure.MIB),
        "cpu_seconds": round(taken, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case")
    case = parser.parse_args().case
    if case is not None:
        fields = json.loads(case)
        torch.set_num_threads(1)
        print(json.dumps(memory(fields) if "backend" in fields else speed(fields)))
        return
    result: dict[str, Any] = {"speed": [], "memory": []}
    for name, cases in (("speed", SPEED), ("memory", MEMORY)):
        for fields in cases:
            result[name].append({**fields, **measure.in_fresh_process(__file__, fields, 1200)})
            print(result[name][-1], flush=True)
    measure.write_result(Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    main()
