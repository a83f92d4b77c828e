"""Rules about layouts that the recipes of test_validate.py cannot break: their model is one, and small."""

from typing import Any

import pytest

from megatron_prolong.recipe.layout_rules import layout_problems, te_exchanges
from megatron_prolong.recipe.schema import Layout
from tests.recipe.conftest import SHAPE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 48}, "hidden_size to be a multiple of 32, but it is 48"),
        ({"ffn_hidden_size": 96}, "ffn_hidden_size / tp to be a multiple of 32, but it is 48"),
        ({"head_dim": 12}, "num_heads · head_dim / tp to be a multiple of 32, but it is 48"),
    ],
)
def test_fp8_needs_wide_weights(change: dict[str, Any], said: str) -> None:
    layout, shape = Layout(tp=2), SHAPE.replace(**change)
    assert layout_problems(layout, shape, None) == []
    (problem,) = layout_problems(layout, shape, None, "fp8")
    assert said in problem.rule


@pytest.mark.parametrize(
    ("exchange", "cp", "theirs"),
    [("p2p", 4, True), ("a2a", 2, True), ("a2a", 4, False), ("all_gather", 2, False), ("a2a+p2p", 4, False)],
)
def test_which_exchanges_transformer_engine_does_itself(exchange: str, cp: int, theirs: bool) -> None:
    assert te_exchanges(exchange, cp, kv_heads=2) == theirs


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        (Layout(tp=2), {"ffn_hidden_size": 33}, "must divide the model's ffn_hidden_size 33"),
        (Layout(cp=4, cp_exchange="a2a+p2p"), {}, None),
        (Layout(cp=5, cp_exchange="a2a+p2p"), {}, "needs an even cp of at least 4, not 5"),
        # Two query heads and one of keys and values on a rank: whole ones for a pair of ranks, not for four.
        (Layout(tp=4, cp=4, cp_exchange="a2a+p2p"), {}, None),
        (Layout(cp=8, cp_exchange="a2a"), {"num_heads": 12}, "num_heads / tp, 12, to be a multiple of 8"),
        (Layout(tp=4, cp=4, cp_exchange="a2a"), {}, "num_heads / tp, 2, to be a multiple of 4"),
    ],
)
def test_what_ranks_share_must_be_whole(layout: Layout, change: dict[str, Any], said: str | None) -> None:
    found = [problem.rule for problem in layout_problems(layout, SHAPE.replace(**change), None)]
    assert len(found) == (said is not None) and all(said in rule for rule in found)
