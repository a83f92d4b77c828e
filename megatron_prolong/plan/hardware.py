"""What the GPUs of a cluster can do: the typed view of hardware.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_prolong.errors import UserError
from megatron_prolong.plan.memory import RankMemory

HARDWARE_FILE = Path(__file__).with_name("hardware.yaml")


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Efficiency(BaseModel):
    """Shares of the peaks that good kernels reach; attention kernels as [forward, backward], None where they do not
    run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul: Share
    matmul_fp8: float = Field(ge=0, le=1)
    flash2: tuple[Share, Share]
    te: tuple[Share, Share]
    flash3: tuple[Share, Share] | None = None
    memory: Share
    network: Share


class Gpu(BaseModel):
    """One GPU model in its usual node. Bytes, bytes/s, FLOP/s, USD; see hardware.yaml for the sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: Positive
    memory_bandwidth: Positive
    peak_flops: dict[str, Positive]
    efficiency: Efficiency
    gpus_per_node: int = Field(gt=0)
    intra_node_bandwidth: Positive
    inter_node_bandwidth: Positive
    host_bandwidth: Positive
    node_memory_bytes: Positive
    reserve_bytes: float = Field(ge=0)
    fragmentation: float = Field(ge=0, lt=1)
    price_per_hour: float = Field(ge=0)

    @model_validator(mode="after")
    def _knows_every_precision(self) -> Gpu:
        """fp8 is for compute capability 8.9 and later (recipe/fp8.py)."""
        has_fp8 = self.compute_capability >= (8, 9)
        if missing := {"bf16", *(["fp8"] if has_fp8 else [])} - self.peak_flops.keys():
            raise ValueError(f"peak_flops lacks {' and '.join(sorted(missing))}")
        if has_fp8 and not self.efficiency.matmul_fp8:
            raise ValueError("efficiency.matmul_fp8 is 0, on a GPU that has fp8")
        return self

    def matmul_flops(self, precision: str) -> float:
        """FLOP/s that large matrix products reach."""
        share = self.efficiency.matmul_fp8 if precision == "fp8" else self.efficiency.matmul
        return self.peak_flops[precision] * share

    def attention_flops(self, kernel: str, backward: bool) -> float:
        """FLOP/s of causal attention, always in bf16: Hopper has no fp8 backward for packed documents."""
        share: float = getattr(self.efficiency, kernel)[backward]
        return self.peak_flops["bf16"] * share

    def needed_bytes(self, memory: RankMemory) -> float:
        """Bytes of GPU memory that a rank's `memory` takes, with fragmentation and the reserve."""
        return memory.total * (1 + self.fragmentation) + self.reserve_bytes

    def fits(self, memory: RankMemory) -> bool:
        """Whether a rank's memory fits on this GPU."""
        return self.needed_bytes(memory) <= self.memory_bytes

    def parkable_bytes(self, world_size: int) -> float:
        """Host memory of one GPU for activations: half of its node's, for pinned blocks are rounded up to powers of
        two, and checkpoints are written from there too."""
        return self.node_memory_bytes / 2 / min(world_size, self.gpus_per_node)

    def bandwidth(self, group_size: int, stride: int) -> float:
        """Bytes/s that each rank of a group sends (and receives) in a ring or all-gather.

        Args:
            group_size: ranks of the group.
            stride: distance between neighbours in the global ranks.

        Inside a node: NVLink. Across nodes the node's network cards are shared by the group's members in the
        node; NCCL spreads a group's rings over the cards of all its members there.
        """
        if group_size * stride <= self.gpus_per_node:
            return self.intra_node_bandwidth * self.efficiency.network
        members_per_node = max(1, self.gpus_per_node // stride)
        across = self.inter_node_bandwidth * members_per_node
        return min(self.intra_node_bandwidth, across) * self.efficiency.network


def load_hardware(path: Path | None = None) -> dict[str, Gpu]:
    """GPU name → Gpu, from hardware.yaml or a file like it.

    Raises:
        UserError: the file cannot be read or an entry is not a GPU.
    """
    path = path or HARDWARE_FILE
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a hardware table: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a hardware table: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise UserError(f"{path}: a hardware table is GPU names with their numbers; copy {HARDWARE_FILE}")
    try:
        return {name: Gpu(name=name, **entry) for name, entry in content.items()}
    except (ValidationError, TypeError) as error:
        raise UserError(f"{path}: not a hardware table (like {HARDWARE_FILE}): {error}") from error


def find_gpu(name: str, path: Path | None = None) -> Gpu:
    """The GPU of that name. Raises UserError naming the known ones."""
    table = load_hardware(path)
    if name not in table:
        raise UserError(f"--gpu {name}: unknown GPU; known are {', '.join(table)} (or give --hardware FILE)")
    return table[name]
