"""The recipe: what a YAML file may say, as frozen data. A stage is data, so a run is a list of them.

These models hold types and single-value bounds; rules between values are in `rules.py`, what needs the file system
or the size of the cluster to judge in `validate.py`. Lengths and counts are in tokens unless the name says
otherwise.
"""

from __future__ import annotations

import math
import re
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from megatron_prolong.recipe.fp8 import Fp8Recipe
from megatron_prolong.recipe.numbers import Count, Real, Steps, steps_of
from megatron_prolong.recipe.origin import Origin
from megatron_prolong.recipe.paths import Directories, UserPath
from megatron_prolong.recipe.rope import YarnScaling, yarn_attention_factor
from megatron_prolong.recipe.shape import ModelShape

Precision = Literal["fp32", "bf16", "fp8"]
CpExchange = Literal["all_gather", "p2p", "a2a", "a2a+p2p"]
Schedule = Literal["cosine", "linear", "constant"]

Positive = Annotated[Count, Field(gt=0)]
NAME_PATTERN = r"^[A-Za-z0-9_-]+$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, examples=["a-name"])]


Mixture = Annotated[
    Annotated[Directories, Tag("directories")] | Annotated[Literal["mock"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "directories"),
]
"""Directories of MDS shards with their proportions, or the word mock."""


def _recompute(mode: str) -> str:
    if not re.fullmatch(r"none|selective|all_but_attention|full|block:[1-9]\d*", mode):
        modes = "none, selective, all_but_attention, full or block:N with a number of layers"
        raise ValueError(f"must be {modes}, not {mode!r}")
    return mode


Recompute = Annotated[str, AfterValidator(_recompute), Field(examples=["full"])]


def recomputes_every_layer(mode: Recompute) -> bool:
    """Whether all layers are recomputed whole, with their attention or without."""
    return mode in ("full", "all_but_attention")


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class InitSpec(_Frozen):
    """A Llama to initialise at random; the vocabulary size comes from the tokenizer."""

    num_layers: Annotated[Positive, Field(examples=[4])]
    """Transformer layers."""
    hidden_size: Annotated[Positive, Field(examples=[256])]
    """Width of the residual stream."""
    num_heads: Annotated[Positive, Field(examples=[8])]
    """Query heads; the head size is hidden_size / num_heads."""
    num_kv_heads: Annotated[Positive, Field(examples=[2])]
    """Key/value heads (groups), a divisor of num_heads."""
    ffn_hidden_size: Annotated[Positive, Field(examples=[688])]
    """Inner width of the gated MLP."""
    max_length: Positive = 8192
    """Tokens of context written to the model's config."""
    rope_base: Annotated[Real, Field(gt=0)] = 5e5
    """RoPE base (theta) of the first stage, unless the stage says otherwise."""
    tie_embeddings: bool = False
    """Share the input embedding with the output layer."""
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-5
    """Epsilon of every RMSNorm."""
    initializer_range: Annotated[Real, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""

    def shape(self, vocab_size: int) -> ModelShape:
        """The ModelShape this describes, given the size of the tokenizer's vocabulary."""
        return ModelShape(
            **self.model_dump(), head_dim=self.hidden_size // self.num_heads, vocab_size=vocab_size
        )


class ModelSpec(_Frozen):
    """Where the weights come from: `path`, or `init` to start at random."""

    path: UserPath | None = None
    """A Hugging Face directory, or a checkpoint directory of ours (it holds prolong.json)."""
    init: InitSpec | None = None
    """Instead of `path`: the size of a model to initialise."""
    tokenizer: UserPath | None = None
    """Directory with the tokenizer; the model's own by default."""

    @property
    def tokenizer_path(self) -> Path | None:
        """The directory the tokenizer is read from."""
        return self.tokenizer or self.path


class Layout(_Frozen):
    """How one model is spread over ranks; data parallelism takes what is left: dp = world / (tp·pp·cp)."""

    tp: Positive = 1
    """Tensor-parallel ranks."""
    pp: Positive = 1
    """Pipeline-parallel ranks."""
    virtual_pp: Positive = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage, which also holds the embedding; by default as many as the others have."""
    last_stage_layers: Positive | None = None
    """Layers of the last pipeline stage, which also computes the loss; by default as many as the others have."""
    cp: Positive = 1
    """Context-parallel ranks: long documents are split over them, short ones stay whole on one."""
    sequence_parallel: bool = True
    """Split norms and residuals along the sequence over the tensor-parallel ranks; no effect at tp 1."""
    cp_exchange: CpExchange = "p2p"
    """How context-parallel ranks see each other's keys and values; Transformer Engine's kernels do p2p and a2a."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel (× context-parallel) ranks."""

    @property
    def model_ranks(self) -> int:
        """Ranks that one copy of the model takes: tp·pp·cp."""
        return self.tp * self.pp * self.cp

    def stage_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Layers of each pipeline stage, None where they do not come out even
        (megatron.core.transformer.transformer_block.get_num_layers_to_build)."""
        ends = {0: self.first_stage_layers, self.pp - 1: self.last_stage_layers}
        fixed = {stage: layers for stage, layers in ends.items() if layers is not None}
        left, free = num_layers - sum(fixed.values()), self.pp - len(fixed)
        if left < free or (left % free if free else left):
            return None
        return tuple(fixed.get(stage) or left // free for stage in range(self.pp))


class LayoutOverride(_Frozen):
    """The fields of `layout` that one stage sets differently."""

    tp: Positive | None = None
    pp: Positive | None = None
    virtual_pp: Positive | None = None
    first_stage_layers: Positive | None = None
    last_stage_layers: Positive | None = None
    cp: Positive | None = None
    sequence_parallel: bool | None = None
    cp_exchange: CpExchange | None = None
    distributed_optimizer: bool | None = None


class OptimizerSpec(_Frozen):
    """AdamW, with ProLong's values as defaults (paper, Table 9)."""

    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[Real, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Added to the root of the second moment (ProLong leaves the Hugging Face default)."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """Decoupled weight decay."""
    clip: Annotated[Real, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""
    decay_norms: bool = False
    """Decay the norm weights too, as ProLong's scripts do."""


class CheckpointSpec(_Frozen):
    """When to save, and how many to keep. Resuming is always automatic."""

    every: Positive = 125
    """Steps between checkpoints; the last step of a stage is always saved."""
    keep: Positive = 2
    """Newest checkpoints of a stage that stay on disk."""
    keep_every: Positive | None = None
    """Checkpoints whose step is a multiple of this stay too; by default none."""
    async_save: bool = True
    """Write in the background while training goes on, from a copy in host memory as large as the checkpoint."""


class LoggingSpec(_Frozen):
    """What is told of the steps."""

    every: Positive = 1
    """Steps between lines on the terminal; metrics.jsonl has every step."""
    wandb: Name | None = None
    """Weights & Biases project that gets the same numbers, where `wandb` is installed."""


class Carry(_Frozen):
    """What a stage takes from the one before; step count, schedule and data always start anew.

    Before the first stage there is `model.path`: its weights always, its optimizer where it has one.
    """

    weights: bool = True
    """Start from the weights the previous stage ended with; otherwise from the recipe's model again."""
    optimizer: bool = True
    """Keep Adam's moments; otherwise they start at zero."""


class Yarn(_Frozen):
    """YaRN's scaling of the rotary frequencies (arXiv 2309.00071), named as in config.json's `rope_scaling`."""

    factor: Annotated[Real, Field(gt=1, examples=[128])]
    """How many times the original length positions may reach."""
    original_length: Annotated[Positive, Field(examples=[8192])]
    """Tokens of context before any extension: 8192 for every Llama 3."""
    beta_fast: Annotated[Real, Field(gt=0)] = 32.0
    """Pairs of dimensions that turn more often than this within the original length keep their frequency."""
    beta_slow: Annotated[Real, Field(gt=0)] = 1.0
    """Those that turn less often are slowed down by the whole factor."""

    @property
    def scaling(self) -> YarnScaling:
        """The same for a model's shape."""
        return YarnScaling(
            factor=self.factor,
            original_max_length=self.original_length,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            attention_factor=yarn_attention_factor(self.factor),
        )


class Stage(_Frozen):
    """One continued-training run: a sequence length, a RoPE base, a mixture, a budget and a schedule."""

    name: Name
    """Unique within the recipe; names the directory of its checkpoints."""
    sequence_length: Annotated[Positive, Field(examples=[65536])]
    """Tokens of one packed sequence."""
    rope_base: Annotated[Real, Field(gt=0)] | None = None
    """RoPE base (theta); by default what the incoming weights have."""
    yarn: Yarn | None = None
    """Instead of the scaling of frequencies that the incoming weights have, if any."""
    batch_tokens: Annotated[Positive, Field(examples=[65536])]
    """Tokens of one optimizer step over all ranks; a multiple of sequence_length."""
    micro_batch_tokens: Positive | None = None
    """Tokens that one data-parallel rank holds at a time, over its context-parallel ranks; sequence_length by
    default. More makes short sequences quicker and takes more memory."""
    steps: Positive | None = None
    """Optimizer steps. Give this or `tokens`."""
    tokens: Positive | None = None
    """Token budget, rounded up to whole steps. Give this or `steps`."""
    lr: Annotated[Real, Field(gt=0, examples=[1e-5])]
    """Peak learning rate."""
    min_lr_ratio: Annotated[Real, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a fraction of `lr`."""
    warmup: Annotated[Real, Field(ge=0, lt=1)] = 0.1
    """Fraction of the steps over which the learning rate rises linearly from zero."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warmup."""
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 42
    """Seed of the order of the data."""
    skip_steps: Steps | None = None
    """Steps whose batches are passed over without an update, e.g. those of a loss spike; none by default."""
    carry: Carry = Carry()
    """What is taken from the stage before."""
    mixture: Mixture = Field(examples=["mock"])
    """Directories of MDS shards and their proportions of the sequences (sum 1), or the word mock."""
    loss_mask: bool = False
    """Train only on the tokens that the shards' mask column marks (SFT)."""
    layout: LayoutOverride = LayoutOverride()
    """Fields of the recipe's layout that this stage sets differently."""
    precision: Precision | None = None
    """This stage's precision, where it differs from the recipe's."""
    recompute: Recompute | None = None
    """This stage's recomputation, where it differs from the recipe's."""
    offload_activations: bool | None = None
    """Whether this stage's activations wait in host memory, where it differs from the recipe's."""

    @property
    def has_budget(self) -> bool:
        """Whether one of steps and tokens is given; loading refuses neither and both."""
        return (self.steps is None) != (self.tokens is None)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        assert self.has_budget
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.batch_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens the stage trains on: whole steps."""
        return self.num_steps * self.batch_tokens

    @property
    def batch_sequences(self) -> int:
        """Packed sequences of one global batch."""
        return self.batch_tokens // self.sequence_length

    @property
    def micro_batch_length(self) -> int:
        """Tokens of a micro-batch: micro_batch_tokens, or one packed sequence."""
        return self.micro_batch_tokens or self.sequence_length

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warmup, rounded up (5% of 250 is 13), as transformers does."""
        return math.ceil(round(self.warmup * self.num_steps, 6))

    def skips(self, step: int) -> bool:
        """Whether skip_steps has this one; they count from 1, as in the log."""
        return any(step in steps for steps in steps_of(self.skip_steps or ""))

    @property
    def min_lr(self) -> float:
        """Learning rate at the last step."""
        return self.lr * self.min_lr_ratio

    @property
    def domain_names(self) -> dict[str, str]:
        """Directory of the mixture → the shortest ends of the paths that tell them apart, for logs."""
        paths = [] if self.mixture == "mock" else list(self.mixture)
        depths = ({str(path): "/".join(path.parts[-depth:]) for path in paths} for depth in count(1))
        return next(names for names in depths if len(set(names.values())) == len(names))


class EvaluationSpec(_Frozen):
    """A light suite at the end of every stage; results go into the run directory and the metrics log."""

    every: Positive | None = None
    """Also after every so many steps of a stage; training pauses for it. Only at the end by default."""

    held_out: tuple[UserPath, ...] = ()
    """Held-out documents (data sets, text files, folders of text). The mean loss of as many as `samples`, each
    of as many tokens as the longest of `lengths`, is measured too."""
    suite: Literal["synthetic", "ruler", "helmet", "prolong", "none"] = "synthetic"
    """Which tasks; synthetic needs no data, none is for held_out alone."""
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (8192,)
    """Prompt and answer together, in tokens."""
    samples: Positive = 20
    """Questions per task."""
    data: UserPath | None = None
    """HELMET's data directory."""
    tasks: tuple[str, ...] = ()
    """Only these tasks or categories; all of the suite by default."""


class Recipe(_Frozen):
    """A model and the stages it goes through."""

    name: Name
    """Names the run."""
    run_dir: UserPath = Field(default_factory=lambda known: Path("runs") / known.get("name", "run"))
    """Directory for checkpoints, metrics and the resolved recipe; runs/<name> by default."""
    model: ModelSpec = Field(examples=[{"path": "unknown"}])
    """Where the weights come from."""
    layout: Layout = Layout()
    """How the model is spread over ranks, unless a stage says otherwise."""
    precision: Precision = "bf16"
    """fp32, or bf16 with fp32 main weights, or fp8 matrix products on top of bf16 (CUDA only)."""
    fp8_recipe: Fp8Recipe = "tensorwise"
    """How fp8 tensors are scaled; recipe/fp8.py says which GPU can do which."""
    fp8_parameters: bool = False
    """Keep the weights of fp8 layers in fp8 only: 2 bytes each less, and half the bytes gathered after an update.
    Needs precision fp8, fp8_recipe tensorwise and the distributed optimizer."""
    recompute: Recompute = "full"
    """Activations recomputed in the backward pass: none, the MLP's (selective), whole layers without attention
    (all_but_attention) or with it (full), or the first N layers of each model chunk (block:N)."""
    offload_activations: bool = False
    """Keep in host memory what the backward pass needs; for sequences that do not fit otherwise."""
    deterministic: bool = False
    """On a GPU: only kernels that add in the same order every time, so that a step made again at the same layout
    gives the same numbers bit for bit. Slower; meant for finding out where a number comes from."""
    loss_chunk_tokens: Positive = 2048
    """Tokens per block of logits, so that a long sequence's logits never exist at once."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """AdamW's settings."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When to save."""
    logging: LoggingSpec = LoggingSpec()
    """How often to write metrics."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    """The stages, in order."""
    evaluation: EvaluationSpec | None = None
    """What is measured at the end of every stage; nothing by default."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where the values were written, for messages."""
        return self._origin


class Settings(NamedTuple):
    """How a stage is computed, whoever says so: the fields of Recipe and of Stage have these names."""

    layout: Layout
    precision: Precision
    recompute: Recompute
    offload_activations: bool


def settings_of(recipe: Recipe, stage: Stage) -> Settings:
    """The recipe's settings, with the stage's own over them."""
    offload = stage.offload_activations
    own = stage.layout.model_dump(exclude_none=True)
    if own.get("pp", recipe.layout.pp) != recipe.layout.pp:  # its pipeline stages are others
        own = {"first_stage_layers": None, "last_stage_layers": None, **own}
    return Settings(
        layout=recipe.layout.model_copy(update=own),
        precision=stage.precision or recipe.precision,
        recompute=stage.recompute or recipe.recompute,
        offload_activations=recipe.offload_activations if offload is None else offload,
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file: the fields of Recipe, and `base`."""
    schema = Recipe.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Another recipe, relative to this file, that this one is merged over.",
    }
    schema["required"] = []  # a recipe with a base may leave out anything
    return schema
