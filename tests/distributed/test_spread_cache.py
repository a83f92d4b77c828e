"""A cache spread over context-parallel ranks gives what one rank gives, and no rank keeps more than its share."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from small_training import VOCAB_SIZE

from megatron_prolong.model.spread_cache import _weighted
from megatron_prolong.recipe.schema import Layout

IDS = torch.randint(0, VOCAB_SIZE, (241,), generator=torch.Generator().manual_seed(0)).tolist()
# The second is shorter than the ranks are many, the last as long as several chunks.
PROMPTS = [IDS[:37], IDS[5:7], IDS[3:140]]
CHUNK_TOKENS = 16


def answers(rank: int, checkpoint: str, layout: dict[str, Any], precision: str = "fp32") -> tuple[Any, ...]:
    from megatron_prolong.mcore import inference
    from megatron_prolong.mcore.attention import KeyValueCache
    from megatron_prolong.mcore.groups import megatron

    inference.PREFILL_TOKENS = CHUNK_TOKENS
    wanted = Layout(**layout, sequence_parallel=False)
    with megatron(wanted, seed=1) as groups:
        device = torch.device(torch.cuda.current_device())
        model = inference.load_for_inference(Path(checkpoint), wanted, groups, device, precision)
        cache = KeyValueCache()
        with torch.inference_mode():
            model._read([IDS], [cache])
        return (
            model.token_logprobs([IDS])[0].numpy(),
            list(
                chain(*model.continuation_logprobs([(IDS[:90], [IDS[90:], IDS[:3]]), (IDS[:2], [IDS[:3]])]))
            ),
            model.generate(PROMPTS, 9),
            cache.length,
        )


@pytest.mark.parametrize("layout", [{"cp": 2}, {"cp": 4}, {"cp": 2, "tp": 2}], ids=str)
def test_spread_caches_answer_as_one(
    one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool, checkpoint: str, layout: dict[str, int]
) -> None:
    ((logprobs, continuations, texts, length),) = one_rank.run(answers, checkpoint, {})
    assert length == len(IDS) and len(set(map(tuple, texts))) == 3
    pool = two_ranks if layout == {"cp": 2} else four_ranks
    found = pool.run(answers, checkpoint, layout)
    for their_logprobs, their_continuations, their_texts, their_length in found:
        np.testing.assert_allclose(their_logprobs, logprobs, atol=2e-4)  # fp32, sums in another order
        np.testing.assert_allclose(their_continuations, continuations, atol=5e-3)
        assert their_texts == texts
        assert their_length <= len(IDS) / layout["cp"] + CHUNK_TOKENS
    kept = sum(length for *_, length in found)
    assert kept == len(IDS) * layout.get("tp", 1), "every token is kept once"


def test_what_the_ranks_send_is_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses all else; a GPU's kernel has log-sum-exps by heads."""
    sent: list[bool] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: sent.append(tensor.is_contiguous()))
    _weighted(torch.randn(5, 2, 8), torch.randn(2, 5).T, cast(dist.ProcessGroup, None))
    assert sent == [True]
