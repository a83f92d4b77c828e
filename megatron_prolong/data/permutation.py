"""A shuffled order of n items with random access: no memory, and the same on every machine and version.

numpy's Generator may change its streams between releases, and a permutation of every epoch would have to
be drawn before a run could resume in the middle. A Feistel network over the next even power of two is a
bijection for any round function, and walking its cycle until the value falls below n restricts it to
[0, n) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

_WORD = (1 << 64) - 1
_NUM_ROUNDS = 6


def mix(*values: int) -> int:
    """A 64-bit hash of a tuple of integers (the finaliser of splitmix64, chained)."""
    state = 0
    for value in values:
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


class Permutation:
    """`Permutation(n, *key)[i]` for i in [0, n): every value of [0, n) once, in an order the key chooses."""

    def __init__(self, size: int, *key: int) -> None:
        assert size > 0
        self.size = size
        # At least 3 bits a side: smaller networks reach few of the possible orders.
        self._half_bits = max(3, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._round_keys = [mix(*key, number) for number in range(_NUM_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(position)
        value = self._scramble(position)
        while value >= self.size:  # fewer than 4 turns on average, but for a handful of items
            value = self._scramble(value)
        return value

    def _scramble(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mix(key, right) & self._half_mask)
        return (left << self._half_bits) | right
