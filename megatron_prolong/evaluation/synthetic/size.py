"""How much haystack fits a token budget, and rows that are filled to it."""

from __future__ import annotations

from collections.abc import Callable

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.task import Row


def fitting_rows(
    make: Callable[[int, int], Row],
    count_tokens: Callable[[Row], int],
    limit: int,
    num_rows: int,
    start: int = 64,
) -> list[Row]:
    """`num_rows` rows whose prompts have at most `limit` tokens, and hardly fewer.

    Args:
        make: the row with so many units of haystack, and its index. The size is found with row 0; rows that come
            out longer lose some units, down to one.
        count_tokens: of the prompt that a row makes.
        num_rows: 0 only asks whether one unit fits.

    Raises:
        UserError: not even one unit fits.
    """
    if not num_rows:
        _smallest(lambda count: count_tokens(make(count, 0)), limit)
        return []
    size = largest_fit(lambda count: count_tokens(make(count, 0)), limit, start)
    rows = []
    for index in range(num_rows):
        count = size
        while count_tokens(row := make(count, index)) > limit and count > 1:
            count -= max(1, count // 50)
        rows.append(row)
    return rows


def largest_fit(count_tokens: Callable[[int], int], limit: int, start: int = 64) -> int:
    """The largest number of units whose text has at most `limit` tokens.

    `count_tokens(n)` renders n units and counts; it is called five to ten times, because a million tokens
    take a second to count.

    Raises:
        UserError: not even one unit fits.
    """
    low, low_tokens = 1, _smallest(count_tokens, limit)
    high: int | None = None
    guess = start
    while high is None or high - low > 1:
        tokens = count_tokens(guess)
        rate = max((tokens - low_tokens) / (guess - low), 1e-9)
        if tokens <= limit:
            low, low_tokens = guess, tokens
        else:
            high = guess
        guess = low + max(1, int((limit - low_tokens) / rate * 0.995))
        if high is not None and guess >= high:
            guess = (low + high) // 2
    return low


def _smallest(count_tokens: Callable[[int], int], limit: int) -> int:
    """Tokens of one unit; raises UserError when they are too many."""
    tokens = count_tokens(1)
    if tokens > limit:
        raise UserError(
            f"one unit of the task takes {tokens} tokens, more than the {limit} that the length allows; "
            "ask for longer --lengths, or leave the task out (--tasks)"
        )
    return tokens
