"""Losses by context and by position of a model whose every loss is known, and the passages they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import ScoringBackend
from megatron_prolong.evaluation.documents import Passage, read_passages
from megatron_prolong.evaluation.perplexity import measure


class Known:
    """The loss of a token is its number, and one nat more for each token of context."""

    def token_logprobs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return -(np.array(ids[1:], dtype=np.float32) + len(ids))


def test_losses_by_context_are_of_the_same_tokens_and_by_position_of_the_longest() -> None:
    passages = [Passage(str(first), np.arange(first, first + 1024)) for first in (0, 1000)]
    found = measure(cast(ScoringBackend, Known()), passages, [1024, 256, 1024])
    assert found.window == 128
    last = 1023 - 127 / 2  # mean of the last 128 tokens of the first passage
    assert [(at.context, at.loss) for at in found.by_context] == [
        (length, pytest.approx(last + 500 + length)) for length in (256, 1024)
    ]
    assert found.by_context[0].passage_losses == pytest.approx((last + 256, last + 1256))
    edges = [(1, 128), (128, 256), (256, 512), (512, 1024)]
    assert [(bucket.start, bucket.end) for bucket in found.by_position] == edges
    for bucket in found.by_position:
        mean = (bucket.start + bucket.end - 1) / 2 + 1024
        assert bucket.passage_losses == pytest.approx((mean, mean + 1000))
        assert bucket.loss == pytest.approx(mean + 500)


def test_the_window_is_never_more_than_256_tokens() -> None:
    passages = [Passage("", np.arange(2000))]
    found = measure(cast(ScoringBackend, Known()), passages, [2000, 1500])
    assert found.window == 256
    assert [(bucket.start, bucket.end) for bucket in found.by_position][-1] == (1024, 2000)


def test_passages_begin_documents_that_are_long_enough(tmp_path: Path, tokenizer: Any) -> None:
    with MDSWriter(
        tmp_path / "packs", {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32"}
    ) as writer:
        ids, edges = np.arange(100, dtype=np.uint32), np.array([[0, 60], [60, 100]], np.uint32)
        writer.write({"input_ids": ids, "indices": edges})
    passages = read_passages([tmp_path], tokenizer, 40, 9, seed=1)
    assert [passage.tokens.tolist() for passage in passages] == [list(range(40)), list(range(60, 100))]
    assert len(read_passages([tmp_path], tokenizer, 41, 9, seed=1)) == 1
    with pytest.raises(UserError, match="no document of 61 tokens, the longest has 60"):
        read_passages([tmp_path], tokenizer, 61, 9, seed=1)
