"""A keyed permutation of 0 .. n-1 that is computed, not stored. Version 1; a run's order depends on it, so it never
changes.

A Feistel network over the grid a x b with a = ceil(sqrt(n)), b = ceil(n / a), six rounds of addition modulo a and b;
results past the end are permuted again until they fall inside (cycle walking), which keeps it a bijection. The round
function is the finaliser of splitmix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

VERSION = 1
ROUNDS = 6


def key_of(*parts: object) -> int:
    """64-bit key from any values, by sha256 of their texts."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, (VERSION, *parts))).encode()).digest()[:8], "little")


def permute(indices: np.ndarray, count: int, key: int) -> np.ndarray:
    """The images of `indices` (int64, each in 0 .. count-1) under the permutation of `count` items that `key` names."""
    values: np.ndarray = np.asarray(indices).astype(np.uint64)
    if count <= 1:
        return values.astype(np.int64)
    width = math.isqrt(count - 1) + 1
    height = -(-count // width)
    round_keys = [np.uint64(key_of(key, number)) for number in range(ROUNDS)]
    values = _rounds(values, width, height, round_keys)
    while (outside := values >= count).any():
        values[outside] = _rounds(values[outside], width, height, round_keys)
    return values.astype(np.int64)


def _rounds(values: np.ndarray, width: int, height: int, round_keys: list[np.uint64]) -> np.ndarray:
    columns, rows = np.uint64(width), np.uint64(height)
    left: np.ndarray = values // rows
    right: np.ndarray = values % rows
    for number, round_key in enumerate(round_keys):
        if number % 2 == 0:
            left = (left + _mix(right + round_key) % columns) % columns
        else:
            right = (right + _mix(left + round_key) % rows) % rows
    return left * rows + right


def _mix(values: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
