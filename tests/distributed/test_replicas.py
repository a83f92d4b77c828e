"""The replicas of a model share out what an evaluation asks, and the main rank gets every answer in its place."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from small_training import VOCAB_SIZE
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_prolong.evaluation.crew import Crew, crew
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.runtime.launch import World

IDS = torch.randint(0, VOCAB_SIZE, (90,), generator=torch.Generator().manual_seed(0)).tolist()
QUESTIONS = [(IDS[:40], [IDS[40:43], IDS[:5]]), (IDS[3:4], [IDS[9:10]]), (IDS[50:80], [IDS[80:], IDS[1:2]])]
PROMPTS = [question[0] for question in QUESTIONS]


def answers(rank: int, checkpoint: str, tokenizer: str) -> tuple[Any, ...] | None:
    from megatron_prolong.evaluation.ending import Ending
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.inference import load_for_inference

    layout, cpu = Layout(sequence_parallel=False), torch.device("cpu")
    with megatron(layout, seed=1) as groups:
        model = load_for_inference(Path(checkpoint), layout, groups, cpu, "fp32")
        world = World(rank, torch.distributed.get_world_size(), rank, cpu)
        with crew(model, Ending(Path(tokenizer), frozenset()), world, groups.dp) as members:
            if members is None:
                return None
            logprobs = members.continuation_logprobs(QUESTIONS)
            few = members.continuation_logprobs(QUESTIONS[:1])  # nothing for the second replica
            passages = members.token_logprobs([IDS, IDS[9:12], IDS[20:80]])
            whole = members.generate(PROMPTS, 9)
            stopped = members.generate(PROMPTS, 9, [f"<{whole[1][4]}>"])  # its text, on the second replica
            return list(chain(*logprobs, *few)), [passage.numpy() for passage in passages], whole, stopped


def test_replicas_answer_as_one_model(
    one_rank: RankPool, two_ranks: RankPool, checkpoint: str, tmp_path: Path
) -> None:
    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(VOCAB_SIZE)}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    ((logprobs, passages, texts, stopped),) = one_rank.run(answers, checkpoint, str(tmp_path))
    (found, found_passages, *found_texts), nothing = two_ranks.run(answers, checkpoint, str(tmp_path))
    stop = texts[1][4]
    assert stopped == [text[: text.index(stop) + 1] if stop in text else text for text in texts]
    assert nothing is None and len(set(logprobs)) == 5 and len(set(map(tuple, texts))) == 3
    np.testing.assert_allclose(found, logprobs, atol=1e-4)  # fp32, other products side by side
    assert [len(passage) for passage in passages] == [89, 2, 59]
    np.testing.assert_allclose(np.concatenate(found_passages), np.concatenate(passages), atol=1e-4)
    assert found_texts == [texts, stopped]


def test_who_fails_in_the_middle_of_a_call_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are in the call too, and would never hear that they are dismissed."""
    dismissed: list[bool] = []
    monkeypatch.setattr(Crew, "dismiss", lambda _: dismissed.append(True))
    model = Mock(token_logprobs=Mock(side_effect=torch.OutOfMemoryError))
    alone = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError), crew(model, Mock(), alone, Mock(rank=0, size=1)) as members:
        assert members is not None
        members.token_logprobs([IDS])
    assert not dismissed
    with (
        pytest.raises(ValueError, match="between"),
        crew(Mock(), Mock(), alone, Mock(rank=0, size=1)) as members,
    ):
        assert members is not None
        members.token_logprobs([IDS])
        raise ValueError("between two calls")
    assert dismissed == [True]


def times_fed(rank: int) -> int:
    """Of a watchdog, while only the first replica has something to answer."""
    fed: list[bool] = []
    model = Mock(token_logprobs=lambda sequences: [torch.zeros(1) for _ in sequences])
    world, dp = World(rank, 2, rank, torch.device("cpu")), Mock(rank=rank, size=2)
    with crew(model, Mock(), world, dp, Mock(feed=lambda: fed.append(True))) as members:
        for _ in range(3 if members is not None else 0):
            members.token_logprobs([IDS])
    return len(fed)


def test_a_replica_that_is_asked_nothing_is_not_taken_to_hang(two_ranks: RankPool) -> None:
    assert two_ranks.run(times_fed) == [3, 3]
