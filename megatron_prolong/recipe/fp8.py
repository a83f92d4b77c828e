"""Which FP8 recipe runs on which GPU: a table, so that a wrong choice is refused before it costs queue time.

Sources: transformer_engine/pytorch/quantization.py (check_fp8_support, check_mxfp8_support,
check_fp8_block_scaling_support) and TransformerEngine issues 2892 and 2994.
"""

from __future__ import annotations

from typing import Literal

Fp8Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]

# Compute capabilities from … up to (not including).
_CAPABILITIES: dict[Fp8Recipe, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorwise": ((8, 9), (99, 0)),  # Ada, Hopper, Blackwell: each tensor scaled by its current maximum
    "delayed": ((8, 9), (99, 0)),  # by the maxima of earlier steps
    "blockwise": ((9, 0), (10, 0)),  # Hopper: 128×128 blocks; Blackwell would emulate it with mxfp8
    "mxfp8": ((10, 0), (12, 0)),  # Blackwell's own: blocks of 32
}
# Tokens per rank must be a multiple of this: under sequence parallelism TE gathers activations in FP8, blockwise in
# whole blocks of 128, mxfp8 of 32 (is_quantizable in its tensor/); products need 8 of the others.
TOKEN_MULTIPLE = 128


def fp8_problem(recipe: Fp8Recipe, capability: tuple[int, int], cp: int) -> str | None:
    """Why this FP8 recipe cannot run on a GPU of this compute capability, or None.

    FP8 is for matrix products; attention stays in bf16 (TE's FP8 attention of packed documents has no backward
    before Blackwell).
    """
    lowest, beyond = _CAPABILITIES[recipe]
    if not lowest <= capability < beyond:
        possible = [name for name, (low, high) in _CAPABILITIES.items() if low <= capability < high]
        advice = f"use fp8_recipe: {' or '.join(possible)}" if possible else "use precision: bf16"
        return f"fp8_recipe {recipe} does not run on compute capability {capability[0]}.{capability[1]}: {advice}"
    return fp8_layout_problem(recipe, cp)


def fp8_layout_problem(recipe: Fp8Recipe, cp: int) -> str | None:
    """Why this FP8 recipe runs on no GPU at this layout, or None."""
    if recipe == "blockwise" and cp > 1:
        return "fp8_recipe blockwise crashes on documents padded for context parallelism: use tensorwise"
    return None


def fp8_parameters_problem(recipe: Fp8Recipe, *, distributed_optimizer: bool) -> str | None:
    """Why the weights of an fp8 stage cannot be kept in fp8 only, or None.

    With mxfp8 Megatron gathers them in bf16 all the same, through the gradients' buffer; with blockwise and delayed
    their scales would have to be gathered and saved too.
    """
    if recipe != "tensorwise":
        return f"needs fp8_recipe: tensorwise, not {recipe}"
    if not distributed_optimizer:
        return "needs layout.distributed_optimizer: true, which keeps the fp32 weights they are made of"
    return None
