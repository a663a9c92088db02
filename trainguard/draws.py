r"""Random numbers that depend on (seed, sample index) alone, never on worker order or batch size."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draws(index: np.ndarray, seed: int, stream: str, count: int) -> Tensor:
    r"""Uniform numbers in [0, 1) for each sample, from the counter-based generator SplitMix64 (Steele et al. 2014).

    Args:
        index: (B,) int64 sample indices.
        seed: of the whole use.
        stream: name of the use; different names give independent numbers for the same sample.
        count: how many numbers each sample gets.

    Returns:
        (B, count) float64.
    """
    start = _mix(np.array([seed % (1 << 64)], dtype=np.uint64)) ^ _mix(
        np.array([zlib.crc32(stream.encode())], np.uint64)
    )
    keys = _mix(np.asarray(index, dtype=np.int64).astype(np.uint64) ^ start)
    counter = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(keys[:, None] + counter[None, :])
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
