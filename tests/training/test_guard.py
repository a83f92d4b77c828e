"""When a run is stopped, and what the message names."""

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest

from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import Stage
from megatron_prolong.training.guard import BAD_IN_A_ROW, check
from megatron_prolong.training.state import LOSS_WINDOW, TrainState
from megatron_prolong.training.step import StepMetrics

SAMPLE = PackedSequence(
    np.zeros(4, np.uint32), np.array([0, 4], np.int64), None, Identity("books", "shard.00003.mds", 17)
)
STAGE = Stage(name="64k", sequence_length=4, batch_tokens=4, steps=1, lr=1e-3, mixture="mock")


def walk(state: TrainState, losses: Iterable[float]) -> TrainState:
    """Steps with these losses, each judged and then counted; the state goes to disk and back between them."""
    for loss in losses:
        found = StepMetrics(loss, grad_norm=1.0, lr=1e-3, num_targets=3, updated=math.isfinite(loss))
        check(state, found, [SAMPLE])
        state = state.after(STAGE, [SAMPLE], found)
        state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
    return state


def test_single_bad_steps_are_forgiven_and_many_in_a_row_are_not():
    bad = [math.nan] * (BAD_IN_A_ROW - 1)
    state = walk(TrainState("64k"), [*bad, 2.0] * 3)
    assert (state.skipped, state.skipped_in_a_row, state.recent_losses) == (3 * len(bad), 0, [2.0] * 3)
    assert (state.step, state.tokens) == (3 * BAD_IN_A_ROW, 3 * BAD_IN_A_ROW * 4)
    with pytest.raises(
        UserError, match=r"64k: 5 steps in a row(?s:.*)books, shard shard\.00003\.mds, sample 17"
    ):
        walk(state, [*bad, math.inf])


def test_steps_that_the_recipe_passes_over_are_counted_but_not_judged():
    over = StepMetrics(math.nan, math.nan, lr=1e-3, num_targets=0, updated=False, wanted=False)
    state = walk(TrainState("64k"), [math.nan] * (BAD_IN_A_ROW - 1))
    for _ in range(2 * BAD_IN_A_ROW):
        check(state, over, [SAMPLE])
        state = state.after(STAGE, [SAMPLE], over)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (14, 14, 4)


def test_a_loss_that_stays_high_stops_the_run_but_an_odd_batch_or_a_high_start_does_not():
    """An odd batch comes again in a run that is started again: it must not stop there for ever."""
    start = [11.0 - 8 * step / LOSS_WINDOW for step in range(LOSS_WINDOW)]
    state = walk(TrainState("64k"), [*start, 5.0])
    assert state.recent_losses == [*start[1:], 5.0]
    state = walk(state, [*[30.0] * (BAD_IN_A_ROW - 1), 4.0, 30.0])
    with pytest.raises(UserError, match=r"loss 31\.00, and 5 steps in a row more than 3 above"):
        walk(state, [*[30.0] * (BAD_IN_A_ROW - 2), 31.0])


def test_a_loss_that_climbs_slowly_stops_the_run_too():
    """Within 250 steps the last good checkpoint may be pruned."""
    state = walk(TrainState("64k"), [2.0] * LOSS_WINDOW)
    climb = [2.0 + 0.05 * step for step in range(60)]
    state = walk(state, climb)
    with pytest.raises(
        UserError, match=r"loss 5\.2\d, and 5 steps in a row more than 3 above 2\.00, the lowest"
    ):
        walk(state, [5.0 + 0.05 * step for step in range(20)])


def test_a_checkpoint_of_before_goes_on():
    """It does not tell the usual loss; that of its last steps counts, from the next one on."""
    fields = TrainState("64k", recent_losses=[2.0] * LOSS_WINDOW).to_dict()
    del fields["usual_loss"]
    with pytest.raises(UserError, match=r"above 2\.00"):
        walk(TrainState.from_dict(fields), [2.0, *[9.0] * BAD_IN_A_ROW])
