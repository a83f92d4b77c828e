"""Weights and optimizer state to and from disk with Megatron's dist_checkpointing: any layout to any other.

A checkpoint directory holds Megatron's torch_dist files, `prolong.json` (what it is) and `hf/` (the tokenizer and
configs of the source, travelling along). Directories are written aside and renamed when complete.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import queue
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_prolong.convert.unpickle import COMMON_STATE, load_metadata
from megatron_prolong.errors import JointError, PassingError, UserError
from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.optimizer_shards import METADATA, optimizer_state
from megatron_prolong.runtime.agreement import together
from megatron_prolong.runtime.checksums import Entries, HashingFile
from megatron_prolong.runtime.passing import is_passing, patiently
from megatron_prolong.runtime.replace import replaced

_MEGATRON = Version(megatron_version).release
# Megatron-Core 0.17 gave what is replaced here another name and place, and would leave writing to another package.
_SINCE_0_17 = _MEGATRON >= (0, 17)
_OWN_WRITER: dict[str, Any] = {"async_strategy": "mcore"} if _SINCE_0_17 else {}
_NO_PLAN = pickle.dumps((None, None, None))


def training_state(model: StageModel, optimizer: MegatronOptimizer) -> ShardedStateDict:
    """What a checkpoint holds of this rank's weights and optimizer, as references. Collective.

    Weights that are kept in fp8 are saved from the optimizer's fp32 ones, rounded to bf16: those in fp8 would lose
    what training has changed below their 4 bits.
    """
    model.gather_weights()
    state = _model_state(model)
    if model.config.fp8_param:
        return {"optimizer": optimizer_state(optimizer, state, with_weights=True)}
    return {**state, "optimizer": optimizer_state(optimizer, state)}


def state_bytes(state: ShardedStateDict) -> int:
    """Bytes on disk of tensors whose main replica is here: summed over the ranks, the size of the checkpoint."""
    return sum(
        value.data.numel() * value.data.element_size()
        for value in _tensors(state)
        if is_main_replica(value.replica_id)
    )


@dataclass
class Snapshot:
    """This rank's share of a checkpoint, copied to host memory: training may go on while it is written."""

    directory: Path
    request: AsyncRequest

    def write(self) -> Entries:
        """Write and sync this rank's files; returns their checksums. Talks to nobody, so a thread can do it."""
        if not self.request.async_fn_args:
            return {}
        _, buckets, results = self.request.async_fn_args
        written, entries = {}, {}
        for index, (path, name, (objects, tensors)) in enumerate(buckets):
            with Path(path).open("wb") as file:
                hashing: Any = HashingFile(file)
                written[index] = [
                    _write_item(
                        _StorageWriterTransforms(), hashing, data, item, name, SerializationFormat.TORCH_SAVE
                    )
                    for item, data in [*objects, *tensors]
                ]
                entries[name] = hashing.entry
                file.flush()
                os.fsync(file.fileno())
        results.put(written)
        return entries

    def finish(self) -> None:
        """Write the table of contents, when every rank has written. Collective."""
        for finalize in self.request.finalize_fns:
            finalize()


class SaveStrategy(FullyParallelSaveStrategyWrapper):
    """Shares the writing out over all ranks that hold the same numbers, and plans it once for the saves of a stage.

    Planning takes every rank through what all ranks hold, while training waits. A plan is used again as long as
    every rank holds the same shards, whatever their numbers, in the same group. It is kept as bytes: as objects
    (34,000 on rank 0 of 512) it would be looked through after every step, for garbage.
    """

    parallelization_group: Any

    def __init__(self) -> None:
        super().__init__(_Strategy())
        self._plan = _NO_PLAN

    def async_save(self, sharded_state_dict: ShardedStateDict, *args: Any) -> AsyncRequest:
        """Plan, or use the plan there is; and have Megatron's writer list what this rank writes. Collective."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        shards = [shard.without_data() for shard in nested_values(sharded_state_dict)]
        planned_for, replicas, strategy = pickle.loads(self._plan)
        planned = torch.tensor(int(group is self.parallelization_group and shards == planned_for))
        dist.all_reduce(planned, op=dist.ReduceOp.MIN)  # ranks plan together or not at all
        if planned:
            for shard, replica in zip(nested_values(sharded_state_dict), replicas, strict=True):
                shard.replica_id = replica
            return strategy.async_save(sharded_state_dict, *args)
        self.parallelization_group, self._plan, strategy = group, _NO_PLAN, _Strategy()
        self.apply_saving_parallelization(sharded_state_dict)
        replicas = [shard.replica_id for shard in nested_values(sharded_state_dict)]
        request = strategy.async_save(sharded_state_dict, *args)
        self._plan = pickle.dumps((shards, replicas, strategy))
        return request


def take_snapshot(directory: Path, state: ShardedStateDict, strategy: SaveStrategy) -> Snapshot:
    """Share the writing out over all ranks that hold the same numbers, and copy this rank's share. Collective.

    Megatron's own asynchronous writer forks processes (with CUDA and threads alive) and starts a manager to talk
    to them, 3 s before the first byte; a thread needs neither, as torch.save and hashing release the GIL.

    Args:
        directory: exists and is empty; gets common.pt now (before 0.19), the rest from `write` and `finish`.
        strategy: one for all saves of a stage.
    """
    live = {value.data.untyped_storage().data_ptr() for value in _tensors(state)}
    quickly = [
        # no manager
        (filesystem_async, f"{'' if _SINCE_0_17 else '_'}get_write_results_queue", queue.SimpleQueue),
        (torch_dist, "MCoreSavePlanner", _SavePlanner),
    ]
    with warnings.catch_warnings(), replaced(quickly):
        warnings.simplefilter("ignore")
        request = dist_checkpointing.save(
            state, str(directory), strategy, async_sharded_save=True, content_metadata=dict(METADATA),
            validate_access_integrity=False,  # the strategy does the same again
            **_OWN_WRITER,
        )  # fmt: skip
    if request.async_fn_args:
        rank, buckets, results = request.async_fn_args
        copied = [
            (path, name, (objects, [(item, _to_host(tensor, live)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in buckets
        ]
        request = request._replace(async_fn_args=[rank, copied, results], preload_fn=None)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return Snapshot(directory, request)


class _Strategy(torch_dist.TorchDistSaveShardedStrategy):
    """Megatron's, with the plan and the table of contents of its first save for all later ones. Two differences:
    Megatron's makes them twice and compares, but trusts that no rank's shards have changed. And it tells the ranks
    through their GPUs that all is written, for which NCCL would make a communicator of all ranks in the middle of
    training."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1, cached_metadata=True)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> AsyncRequest:
        _, metadata, _ = planned
        if metadata is not None:  # on rank 0; with the plans of all ranks it says everything twice
            vars(metadata).pop("all_local_plans", None)
        self.cached_global_metadata, self.validated_cache_reuse = metadata, True

        def finish() -> None:
            results: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object(writer.retrieve_write_results(), results)
            if results is not None:
                patiently(lambda: writer.finish(metadata, results), f"writing {writer.path}/.metadata")

        return AsyncRequest(None, writer.get_save_function_and_args()[-1], [finish])


class _SavePlanner(torch_dist.MCoreSavePlanner):
    """Megatron's planner, but for torch's proof that no two boxes of a tensor overlap: it compares a box with most
    others of its tensor, while all ranks wait."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Whether something is missing or there twice is seen by counting."""
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                corners = {chunk.offsets for chunk in entry.chunks}
                elements = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
                assert len(corners) == len(entry.chunks) and elements == math.prod(entry.size), key
        return plans, metadata


def load_weights(directory: Path, model: StageModel) -> None:
    """Load the weights of a checkpoint saved or converted at any layout. Collective.

    Raises:
        UserError: tensors are missing or of another shape than the model's.
    """
    loaded = _read(directory, _model_state(model))
    _load_model(model, loaded)
    for index, chunk in enumerate(model.bare_chunks):
        for name, weight in chunk.named_parameters():
            if is_float8tensor(weight):  # the optimizer takes its fp32 weights from here, once: unrounded
                weight._high_precision_init_val = loaded[_chunk_key(index, len(model.chunks))][name]


def load_weights_and_optimizer(directory: Path, model: StageModel, optimizer: MegatronOptimizer) -> None:
    """Load weights, fp32 main weights and Adam moments (with their step count). Collective."""
    state = _model_state(model)
    loaded = _read(directory, {**state, "optimizer": optimizer_state(optimizer, state)})
    _load_model(model, loaded)
    found = loaded["optimizer"]
    found.pop("param_state", None)  # the distributed optimizer's shards, read into their places
    _take_settings(found.get("optimizer", found)["param_groups"], optimizer)
    optimizer.load_state_dict(found)


def _take_settings(saved: list[dict[str, Any]], optimizer: MegatronOptimizer) -> None:
    """Give an optimizer's saved groups its settings of now: of theirs only the step count is of use.

    Megatron finds a group in the file by such settings, since 0.19.2 by the learning rate of the stage too; and
    another Adam's lack what this one reads in them. `wd_mult` tells ours apart (mcore/optimizer.py).
    """
    for group in saved:
        for own in optimizer.param_groups:
            if own["wd_mult"] == group["wd_mult"]:
                group.update({key: own[key] for key in own.keys() - {"params", "step"}})


def _model_state(model: StageModel) -> ShardedStateDict:
    chunks = model.bare_chunks
    states = [_without_extra_state(chunk.sharded_state_dict(metadata=dict(METADATA))) for chunk in chunks]
    return {_chunk_key(index, len(chunks)): state for index, state in enumerate(states)}


def _chunk_key(index: int, num_chunks: int) -> str:
    return "model" if num_chunks == 1 else f"model{index}"


def _without_extra_state(state: ShardedStateDict) -> ShardedStateDict:
    """Drop the `_extra_state` objects: empty in native layers, FP8 scaling history (soon rebuilt) in TE's."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


class _SafeReader(FileSystemReader):
    """torch's reader, but for the table of contents: torch unpickles that file, which runs what is in it."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Built of plain data classes only; read once."""
        if self._metadata is None:
            self._metadata = load_metadata(Path(self.path) / ".metadata")
        return self._metadata


class _WeightsOnlyPlanner(torch_dist.MCoreLoadPlanner):
    """Megatron's planner, but for stored objects: torch unpickles those without any restriction."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Plain values and tensors only."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _read(directory: Path, state: ShardedStateDict) -> dict[str, Any]:
    reader = _SafeReader(str(directory))  # one for all, as Megatron asks for the table of contents twice
    common = together(lambda: _common_values(directory, reader))
    force_all_tensors_to_non_fp8(state)  # 0.19 would read into fp8 tensors, rounding
    without_code = [
        (torch_dist, "_get_filesystem_reader", lambda *_, **__: reader),
        (torch_dist, "MCoreLoadPlanner", _WeightsOnlyPlanner),
        (serialization, "load_common_state_dict", lambda _: common),  # asked for since 0.19
    ]
    try:
        with warnings.catch_warnings(), replaced(without_code):
            warnings.simplefilter("ignore")
            # Of the ranks that hold the same weights one reads each of them, and hands it on.
            strategy = FullyParallelLoadStrategyWrapper(
                serialization.get_default_load_sharded_strategy(str(directory)),
                parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
            strict = StrictHandling.RAISE_UNEXPECTED
            return dist_checkpointing.load(state, str(directory), strategy, strict=strict)
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"checkpoint {directory} does not fit this model: {error}") from error
    except CheckpointException as error:  # on all ranks, with what any of them met
        unreadable = _unreadable(directory, error)
        raise JointError(
            str(unreadable), said_here=dist.get_rank() == 0, exit_code=unreadable.exit_code
        ) from error


def _common_values(directory: Path, reader: _SafeReader) -> object:
    """What a checkpoint holds beside tensors. Megatron reads it and `metadata.json` itself, expecting no damage.
    common.pt is a pickle, loaded as weights only since torch 2.6, as the tensors always were."""
    config, common = directory / "metadata.json", directory / "common.pt"
    _undamaged(config, lambda: dist_checkpointing.core.maybe_load_config(str(directory)))
    if not common.exists() and COMMON_STATE in reader.read_metadata().state_dict_metadata:
        if _MEGATRON < (0, 19):
            raise UserError(
                f"{directory}: saved by Megatron-Core 0.19 or later, and {megatron_version} cannot load it"
            )
        return _common_object(directory, reader)
    return _undamaged(common, lambda: torch.load(common, weights_only=True))


def _undamaged(path: Path, read: Callable[[], object]) -> object:
    if not path.exists():
        raise UserError(f"{path}: no such file; the checkpoint is incomplete")
    try:
        return read()
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path}: damaged, or not plain values ({_first_line(error)})") from error


def _common_object(directory: Path, reader: _SafeReader) -> object:
    state: dict[str, Any] = {COMMON_STATE: io.BytesIO()}
    planner = _WeightsOnlyPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.distributed.checkpoint.load(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise _unreadable(directory, error) from error
    return state[COMMON_STATE][0]


def _unreadable(directory: Path, error: CheckpointException) -> UserError:
    causes = sorted({_first_line(cause) for cause, _ in error.failures.values()})
    kind = PassingError if all(is_passing(cause) for cause, _ in error.failures.values()) else UserError
    return kind.many(f"checkpoint {directory} cannot be read:", causes)


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _tensors(state: ShardedStateDict) -> list[ShardedTensor | ShardedTensorFactory]:
    return [
        value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory)
    ]


def _to_host(tensor: torch.Tensor, live: set[int]) -> torch.Tensor:
    """Into pinned memory from a GPU; on CPU copied, unless Megatron's writer has done so already (it does where a
    tensor is part of a larger one)."""
    if tensor.is_cpu and tensor.untyped_storage().data_ptr() not in live:
        return tensor
    return tensor.detach().to("cpu", non_blocking=True, copy=True)


def _load_model(model: StageModel, loaded: dict[str, Any]) -> None:
    chunks = model.bare_chunks
    for index, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[_chunk_key(index, len(chunks))], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
