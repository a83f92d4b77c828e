"""Megatron's process groups for one layout: the only place where Megatron's global state is set."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import _p2p_ops
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_prolong.mcore.adam import fused_adam_in_megatron
from megatron_prolong.mcore.cpu import cuda_on_cpu
from megatron_prolong.mcore.specs import runs_on_transformer_engine
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.runtime.launch import GROUP_TIMEOUT, refuse_few_open_files
from megatron_prolong.runtime.seeding import seed_everything


@dataclass(frozen=True)
class Axis:
    """One parallel axis as this rank sees it."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place on every axis of the layout, and the groups to talk along them.

    `dp_cp` spans data and context parallel ranks together: the ranks that hold different tokens of the global
    batch and the same weights. `hierarchical_cp` are the inner and outer group of the a2a+p2p exchange.
    """

    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    dp_cp: Axis
    hierarchical_cp: tuple[dist.ProcessGroup, ...] = ()


@contextlib.contextmanager
def megatron(layout: Layout, seed: int) -> Iterator[ParallelGroups]:
    """Set up Megatron-Core for `layout` on the initialised default process group; undone on exit.

    On a machine without CUDA this also enters the CPU compatibility layer, so everything that touches Megatron
    must happen inside.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_known_warnings_silenced())
        if not torch.cuda.is_available():
            stack.enter_context(cuda_on_cpu())
        stack.enter_context(fused_adam_in_megatron())
        # NCCL allocates for itself: what an earlier stage's model leaves behind must not stay in PyTorch's cache.
        gc.collect()
        gc.collect()  # fp8 weights refer to themselves; the first pass only frees the autograd nodes that hold them
        torch.cuda.empty_cache()
        refuse_few_open_files(_sockets(layout))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.virtual_pp if layout.virtual_pp > 1 else None,
            context_parallel_size=layout.cp,
            hierarchical_context_parallel_sizes=_hierarchy(layout),
            create_gloo_process_groups=False,
            distributed_timeout_minutes=round(GROUP_TIMEOUT.total_seconds() / 60),
        )
        stack.push(_undo_groups)
        seed_everything(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        groups = ParallelGroups(
            tp=_axis(parallel_state.get_tensor_model_parallel_group()),
            pp=_axis(parallel_state.get_pipeline_model_parallel_group()),
            cp=_axis(parallel_state.get_context_parallel_group()),
            dp=_axis(parallel_state.get_data_parallel_group()),
            dp_cp=_axis(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            hierarchical_cp=tuple(
                parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False) or ()
            ),
        )
        if torch.cuda.is_available():
            _connect(groups, layout)
        yield groups


def _sockets(layout: Layout) -> int:
    """To other ranks, at most: of the rendezvous, three groups of all ranks, and five of those that hold the same
    weights (counted at 8 to 512 ranks)."""
    return round((4 + 5 / (layout.tp * layout.pp)) * (dist.get_world_size() - 1))


def _connect(groups: ParallelGroups, layout: Layout) -> None:
    """Let NCCL take its buffers while PyTorch has none of the memory yet: at the first message they would have to
    come out of what PyTorch has cached, up to 0.7 GB a group and some GB for an all-to-all (nccl issues 964, 1685).
    """
    inner, outer = groups.hierarchical_cp or (groups.cp.group, groups.cp.group)
    norms = (  # of gradients, over all ranks that hold different ones
        parallel_state.get_intra_distributed_optimizer_instance_group()
        if layout.distributed_optimizer
        else parallel_state.get_model_parallel_group()
    )
    token = torch.zeros(layout.cp, device="cuda")
    for group in (groups.pp.group, groups.dp_cp.group, norms):  # Megatron sends along them even to oneself
        dist.all_reduce(token, group=group)
    for group in (groups.tp.group, groups.cp.group, *groups.hierarchical_cp):
        if group.size() > 1:
            dist.all_reduce(token, group=group)
    if layout.cp > 1 and "a2a" in layout.cp_exchange:
        dist.all_to_all_single(torch.empty_like(token), token, group=inner)
    if "p2p" in layout.cp_exchange and outer.size() > 2 and runs_on_transformer_engine(torch.bfloat16):
        _connect_neighbours(outer)
    if layout.virtual_pp > 1:
        _connect_neighbours(groups.pp.group)


def connect_delayed_scaling() -> None:
    """The same for the maxima of FP8's delayed scaling, which the first step shares."""
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=True)
    if group.size() > 1:
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)


def _connect_neighbours(group: dist.ProcessGroup) -> None:
    """For messages that are sent one by one, not as a batch, as by interleaved pipelines and Transformer Engine's
    ring: NCCL gives each such pair of ranks a communicator, and ranks that make theirs in different orders in the
    middle of a step wait for each other for ever (Megatron-LM 5240)."""
    ranks, own = dist.get_process_group_ranks(group), dist.get_rank(group)
    requests = _p2p_ops(
        tensor_send_prev=torch.zeros(1, device="cuda"),
        tensor_recv_prev=torch.zeros(1, device="cuda"),
        tensor_send_next=torch.zeros(1, device="cuda"),
        tensor_recv_next=torch.zeros(1, device="cuda"),
        group=group,
        prev_pipeline_rank=ranks[own - 1],
        next_pipeline_rank=ranks[(own + 1) % len(ranks)],
    )
    for request in requests.values():
        request.wait()


def _undo_groups(kind: type[BaseException] | None, *_: object) -> None:
    """Undo initialize_model_parallel, threads and connections included; Megatron itself only forgets the groups.

    NCCL's ranks end a group together. So all do it in the same order (pytorch issue 137507), and none behind an
    error, which may be its own: the others would be elsewhere (torchtitan pull request 1342). Such groups end with
    the process.
    """
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    parallel_state.destroy_model_parallel()
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # Megatron 0.16.1 keeps them
    if kind is None or dist.get_world_size() == 1:
        for group in dict.fromkeys(reversed(groups)):  # every rank has made its groups in one order
            if group not in (dist.GroupMember.NON_GROUP_MEMBER, dist.group.WORLD):
                dist.destroy_process_group(group)
    # Transformer Engine keeps delayed scaling's maxima, and the groups that share them, for all models to come.
    if fp8 := sys.modules.get("transformer_engine.pytorch.quantization"):
        fp8.FP8GlobalStateManager.reset()


@contextlib.contextmanager
def _known_warnings_silenced() -> Iterator[None]:
    """Megatron uses deprecated names of torch's, and later versions of its own; users can do nothing about that."""
    log = logging.getLogger("megatron.core")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        # The distributed optimizer looks at .grad of views into its buffers.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        try:
            yield
        finally:
            log.setLevel(level)


def _hierarchy(layout: Layout) -> list[int] | None:
    """Sizes of the inner (all-to-all, within a node) and outer (ring) level of the a2a+p2p exchange."""
    if layout.cp_exchange != "a2a+p2p" or layout.cp == 1:
        return None
    return [2, layout.cp // 2]


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)
