"""Which rows of which tensor are which: Hugging Face Llama on one side, Megatron's GPTModel on the other.

The two formats hold the same rows in another order and under other names, so one table of rules is the whole
mapping, and both directions read it:

* layers are stacked: `decoder.layers.….weight` is [L, rows, columns], layer l is `model.layers.l.….weight`;
* a Megatron tensor repeats a block of `parts`: linear_qkv repeats, per KV group, its query heads, key head and
  value head (Megatron `SelfAttention.get_query_key_value_tensors`); linear_fc1 is the gate, then the up
  projection (Megatron `MLP.forward`, `torch.chunk`); all others are one part once.

Names carry Transformer Engine's norm names (the norm belongs to the linear layer after it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_prolong.recipe.shape import ModelShape

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Rows:
    """Rows start … start + count of tensor `name`, in layer `layer` where layers are stacked."""

    name: str
    layer: int | None
    start: int
    count: int


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        key: Megatron's name.
        parts: (Hugging Face name, rows per block); `{layer}` in the name stands for the layer's number.
        columns: length of a row; None for vectors, whose rows are single numbers.
        blocks: how often the parts repeat.
    """

    key: str
    parts: tuple[tuple[str, int], ...]
    columns: int | None
    blocks: int = 1

    @property
    def per_layer(self) -> bool:
        """Whether the layers are stacked on axis 0."""
        return self.key.startswith(LAYERS)

    @property
    def block_rows(self) -> int:
        """Rows of one block."""
        return sum(rows for _, rows in self.parts)

    @property
    def rows(self) -> int:
        """Rows of one layer."""
        return self.blocks * self.block_rows

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns] of one layer, or [rows] for a vector."""
        return (self.rows,) if self.columns is None else (self.rows, self.columns)


@dataclass(frozen=True)
class Tensor2D:
    """One tensor of either format, without its layer axis, and where its rows are in the other format."""

    rule: Rule
    name: str
    layer: int | None
    part: int | None
    """Index into `rule.parts` for a Hugging Face tensor; None for a Megatron tensor, which has them all."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.rule.rows if self.part is None else self.rule.blocks * self.rule.parts[self.part][1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, columns], or [rows] for a vector."""
        return (self.rows, *self.rule.shape[1:])

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * (self.rule.columns or 1)

    def sources(self, start: int, stop: int) -> Iterator[Rows]:
        """The rows of the other format that make up rows start … stop of this tensor, in order."""
        rule = self.rule
        step = rule.block_rows if self.part is None else rule.parts[self.part][1]
        while start < stop:
            block, row = divmod(start, step)
            if self.part is None:
                index, row = _part_at(rule, row)
                name, part_rows = rule.parts[index]
                name, layer, first = name.format(layer=self.layer), None, block * part_rows + row
            else:
                part_rows, before = step, sum(rows for _, rows in rule.parts[: self.part])
                name, layer, first = rule.key, self.layer, block * rule.block_rows + before + row
            count = min(part_rows - row, stop - start)
            yield Rows(name, layer, first, count)
            start += count


def rules(shape: ModelShape) -> list[Rule]:
    """The mapping table of a model; every Megatron tensor once."""
    hidden, head = shape.hidden_size, shape.head_dim
    heads_per_group = shape.num_heads // shape.num_kv_heads
    layer, attention, mlp = (
        "model.layers.{layer}.",
        "model.layers.{layer}.self_attn.",
        "model.layers.{layer}.mlp.",
    )
    table = [
        Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", shape.vocab_size),), hidden),
        Rule(
            f"{LAYERS}self_attention.linear_qkv.layer_norm_weight",
            ((f"{layer}input_layernorm.weight", hidden),),
            None,
        ),
        Rule(
            f"{LAYERS}self_attention.linear_qkv.weight",
            (
                (f"{attention}q_proj.weight", heads_per_group * head),
                (f"{attention}k_proj.weight", head),
                (f"{attention}v_proj.weight", head),
            ),
            hidden,
            blocks=shape.num_kv_heads,
        ),
        Rule(
            f"{LAYERS}self_attention.linear_proj.weight",
            ((f"{attention}o_proj.weight", hidden),),
            shape.num_heads * head,
        ),
        Rule(
            f"{LAYERS}mlp.linear_fc1.layer_norm_weight",
            ((f"{layer}post_attention_layernorm.weight", hidden),),
            None,
        ),
        Rule(
            f"{LAYERS}mlp.linear_fc1.weight",
            (
                (f"{mlp}gate_proj.weight", shape.ffn_hidden_size),
                (f"{mlp}up_proj.weight", shape.ffn_hidden_size),
            ),
            hidden,
        ),
        Rule(f"{LAYERS}mlp.linear_fc2.weight", ((f"{mlp}down_proj.weight", hidden),), shape.ffn_hidden_size),
        Rule("decoder.final_layernorm.weight", (("model.norm.weight", hidden),), None),
    ]
    if not shape.tie_embeddings:
        table.append(Rule("output_layer.weight", (("lm_head.weight", shape.vocab_size),), hidden))
    return table


def megatron_tensors(shape: ModelShape) -> list[Tensor2D]:
    """Every Megatron tensor, one entry per layer, in the order of the model."""
    return [Tensor2D(rule, rule.key, layer, None) for rule, layer in _in_model_order(shape)]


def hf_tensors(shape: ModelShape) -> list[Tensor2D]:
    """Every Hugging Face tensor, in the order of the model."""
    return [
        Tensor2D(rule, name.format(layer=layer), layer, part)
        for rule, layer in _in_model_order(shape)
        for part, (name, _) in enumerate(rule.parts)
    ]


def _in_model_order(shape: ModelShape) -> Iterator[tuple[Rule, int | None]]:
    table = rules(shape)
    embedding, *rest = [rule for rule in table if not rule.per_layer]
    yield embedding, None
    for layer in range(shape.num_layers):
        for rule in table:
            if rule.per_layer:
                yield rule, layer
    for rule in rest:
        yield rule, None


def _part_at(rule: Rule, row: int) -> tuple[int, int]:
    """Which part holds `row` of a block, and the row within it."""
    for index, (_, rows) in enumerate(rule.parts):
        if row < rows:
            return index, row
        row -= rows
    raise AssertionError("row outside its block")
