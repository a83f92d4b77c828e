"""How documents are handed to Transformer Engine. The kernels themselves need a GPU (tests/gpu)."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from megatron_prolong.mcore import transformer_engine
from megatron_prolong.mcore.attention import DocumentAttention, Documents
from megatron_prolong.mcore.specs import runs_on_transformer_engine
from megatron_prolong.mcore.transformer_engine import (
    TransformerEngineAttention,
    split_documents,
    to_documents,
    to_slices,
    transformer_engine_block_spec,
    whole_documents,
)
from megatron_prolong.model.context_parallel import ContextParallel
from megatron_prolong.model.context_plan import ContextPlan

CPU = torch.device("cpu")


def test_without_cuda_the_native_layers_are_taken():
    assert not torch.cuda.is_available() and not runs_on_transformer_engine(torch.bfloat16)


def test_whole_documents_start_at_zero_and_padding_is_one_more():
    packed = whole_documents((5, 8, 20), 24, CPU)
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 15, 19]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 12
    assert packed.cu_seqlens_q_padded is None
    assert whole_documents((0, 7), 7, CPU).cu_seqlens_q.tolist() == [0, 7]


def test_beyond_512_documents_empty_ones_round_their_number_up():
    """cuDNN plans its kernels anew for every number of them."""
    for documents, told in ((512, 512), (513, 1024), (1024, 1024)):
        packed = whole_documents(tuple(range(documents + 1)), documents, CPU)
        found = packed.cu_seqlens_q.tolist()
        assert len(found) == told + 1 and found[: documents + 1] == list(range(documents + 1))
        assert set(found[documents:]) == {documents} and packed.max_seqlen_q == 1


def test_padding_is_part_of_a_split_document():
    plan = ContextPlan.build([0, 10, 13, 30], cp_size=2, split_threshold_tokens=5)
    packed = split_documents(ContextParallel(plan, 0, None, "p2p"), CPU)
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 12, 32]
    assert packed.cu_seqlens_q_padded is None
    assert packed.max_seqlen_q == 20
    assert plan.split_tokens * 2 == 32  # what both ranks hold together


def test_every_layer_of_a_micro_batch_gets_the_same_tensors():
    assert whole_documents((0, 4, 9), 9, CPU) is whole_documents((0, 4, 9), 9, CPU)


def test_keys_and_values_begin_their_memory():
    """TE refuses others (utils.py: get_qkv_layout), and the local documents lie behind the split ones."""

    def module(q, k, v, *_, packed_seq_params):
        assert k.storage_offset() == 0 and v.contiguous().storage_offset() == 0
        seen.append(packed_seq_params.cu_seqlens_q.tolist())
        return q.flatten(1)

    seen: list[list[int]] = []
    attention = TransformerEngineAttention.__new__(TransformerEngineAttention)
    torch.nn.Module.__init__(attention)
    attention.whole = attention.split = module
    plan = ContextPlan.build([0, 10, 13, 30], cp_size=2, multiple=4, split_threshold_tokens=5)
    documents = Documents(cu_seqlens=plan.local_cu_seqlens(0), context=ContextParallel(plan, 0, None, "p2p"))
    num_tokens = plan.slice_length(0)
    q, k, v = (torch.randn(num_tokens, heads, 8) for heads in (4, 2, 2))
    assert torch.equal(torch.cat(attention.attend(q, k, v, documents)), q.flatten(1))
    assert seen == [[0, 12, 32], [0, 3, num_tokens - 16]]


def test_the_output_of_one_call_is_not_copied():
    """The kernel keeps its output for the backward, and the projection behind it keeps its input."""
    made = []

    def module(q, k, v, *_, packed_seq_params):
        made.append(q.flatten(1))
        return made[-1]

    attention = TransformerEngineAttention.__new__(TransformerEngineAttention)
    torch.nn.Module.__init__(attention)
    attention.whole, attention.split, attention.query_factor = module, None, None
    q, k, v = (torch.randn(9, 1, heads, 8) for heads in (4, 2, 2))
    out = attention(q, k, v, None, packed_seq_params=Documents(cu_seqlens=(0, 4, 9)))
    assert len(made) == 1 and out.data_ptr() == made[0].data_ptr()


@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_tokens_of_an_all_to_all_are_put_into_document_order_and_back(cp_size):
    lengths = [1, 40, 7, 16]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    plan = ContextPlan.build(starts, cp_size=cp_size)
    slices = torch.cat([plan.take(torch.arange(64), rank, -1) for rank in range(cp_size)])
    boundaries = torch.tensor(plan.cu_seqlens_padded, dtype=torch.int32)
    ordered = to_documents(slices[:, None], boundaries, None, cp_size)
    for length, start, padded in zip(lengths, starts, boundaries[:-1].tolist(), strict=False):
        assert ordered[padded : padded + length, 0].tolist() == list(range(start, start + length))
    assert torch.equal(to_slices(ordered, boundaries, cp_size)[:, 0], slices)


@pytest.mark.parametrize("looks_up", [True, False], ids=["2.12", "2.20, which has a kernel"])
def test_transformer_engine_takes_that_order(monkeypatch, looks_up):
    package = "transformer_engine.pytorch.attention.dot_product_attention"
    parent, exchange = ModuleType(package), ModuleType("context_parallel")
    parent.context_parallel = exchange
    ours = {
        "reorder_seq_chunks_after_a2a_before_attn_thd": to_documents,
        "reorder_seq_chunks_before_a2a_after_attn_thd": to_slices,
    }
    if looks_up:
        vars(exchange).update(dict.fromkeys(ours))
    names = package.split(".")
    for end in range(1, len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[:end]), ModuleType(names[end - 1]))
    monkeypatch.setitem(sys.modules, package, parent)
    transformer_engine._order_at_once()
    expected = ours if looks_up else dict.fromkeys(ours)
    assert {name: getattr(exchange, name, None) for name in ours} == expected


@pytest.mark.parametrize(
    "capability, flash_attn, nondeterministic, expected",
    [
        ((9, 0), False, "1", TransformerEngineAttention),
        ((10, 3), False, "1", TransformerEngineAttention),
        ((8, 9), True, "1", TransformerEngineAttention),
        ((8, 0), False, "1", DocumentAttention),
        ((12, 0), False, "1", DocumentAttention),
        ((9, 0), True, "0", DocumentAttention),
    ],
)
def test_attention_is_our_own_where_transformer_engine_would_materialise_scores(
    capability, flash_attn, nondeterministic, expected, monkeypatch
):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", nondeterministic)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(transformer_engine, "_takes_flash_attention", lambda: flash_attn)
    (layer,) = transformer_engine_block_spec(1).layer_specs
    assert layer.submodules.self_attention.submodules.core_attention is expected
