"""Layouts that divide neither the batch nor its sequences, nor the key/value heads, train like one process."""

from __future__ import annotations

import pytest

ONE_PACK = [f"stage.{stage}.batch_tokens=64" for stage in ("short", "long")]  # two documents


@pytest.fixture(scope="module")
def one_pack(workspace):
    """The losses of one process."""
    workspace.train("one-pack", *ONE_PACK)
    return workspace.losses("one-pack")


@pytest.mark.parametrize(
    "ranks, layout",
    [(3, []), (2, ["layout.pp=2", "layout.virtual_pp=2"])],
    ids=["a-rank-without-documents", "fewer-micro-batches-than-stages"],
)
def test_batches_need_not_be_divisible(workspace, one_pack, ranks, layout):
    run = f"one-pack-{ranks}"
    workspace.train(run, *ONE_PACK, *layout, "--processes", str(ranks))
    assert workspace.losses(run) == pytest.approx(one_pack, rel=1e-5)


@pytest.mark.parametrize(
    "cp, exchange",
    [(3, "p2p"), (4, "a2a")],
    ids=["64-tokens-in-6-chunks", "2-kv-heads-on-4-ranks"],
)
def test_neither_need_sequences_and_key_value_heads(workspace, undisturbed, cp, exchange):
    run = f"divided-{exchange}"
    workspace.train(run, f"layout.cp={cp}", f"layout.cp_exchange={exchange}", "--processes", str(cp))
    assert workspace.losses(run) == pytest.approx(undisturbed, rel=1e-5)
