"""The table of FP8 recipes by GPU generation."""

import pytest

from megatron_prolong.recipe.fp8 import fp8_problem

HOPPER, ADA, AMPERE, BLACKWELL = (9, 0), (8, 9), (8, 0), (10, 0)


@pytest.mark.parametrize(
    ("recipe", "capability", "cp"),
    [("tensorwise", HOPPER, 8), ("delayed", ADA, 1), ("blockwise", HOPPER, 1), ("mxfp8", BLACKWELL, 8)],
)
def test_what_runs(recipe, capability, cp):
    assert fp8_problem(recipe, capability, cp) is None


@pytest.mark.parametrize(
    ("recipe", "capability", "cp", "advice"),
    [
        ("tensorwise", AMPERE, 1, "use precision: bf16"),
        ("mxfp8", HOPPER, 1, "use fp8_recipe: tensorwise or delayed or blockwise"),
        ("blockwise", BLACKWELL, 1, "use fp8_recipe: tensorwise or delayed or mxfp8"),
        ("blockwise", HOPPER, 2, "padded for context parallelism: use tensorwise"),
    ],
)
def test_what_is_refused_and_what_to_do(recipe, capability, cp, advice):
    assert advice in fp8_problem(recipe, capability, cp)
