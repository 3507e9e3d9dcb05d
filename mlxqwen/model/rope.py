"""Rotary position embeddings, plain or stretched by YaRN."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TypeAlias

import mlx.core as mx

from mlxqwen.files.config import ModelConfig, YarnScaling

__all__ = ["Rope", "Turns", "rope_of", "rope_wavelengths", "rotate", "turned", "turns"]

Turns: TypeAlias = tuple[mx.array, mx.array]
"""Cosines and signed sines of the angles that tokens are rotated by."""


def rope_wavelengths(head_dim: int, theta: float, scaling: YarnScaling | None) -> list[float]:
    """The `head_dim / 2` divisors of the position: pair `d` turns by `position / wavelength[d]` radians.

    Without scaling `theta ** (2d / head_dim)`. With YaRN (Peng et al., 2023, section 3.2) pairs that turn more than
    `beta_fast` times within the trained context keep their wavelength, those that turn less than `beta_slow` times are
    slowed `factor` times, and a linear ramp joins the two.
    """
    wavelengths = [theta ** (pair / head_dim) for pair in range(0, head_dim, 2)]
    if scaling is None:
        return wavelengths

    def pair_that_turns(times: float) -> float:
        trained = scaling.original_max_position_embeddings
        return head_dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the reference's guard against an empty ramp
    slowed = [min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(len(wavelengths))]
    return [w / (s / scaling.factor + (1.0 - s)) for w, s in zip(wavelengths, slowed, strict=True)]


def rotate(x: mx.array, wavelengths: mx.array, offset: int | mx.array) -> mx.array:
    """Rotate `x` `[B, heads, L, head_dim]`, whose first token is at `offset` (one for all, or `[B]`)."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=wavelengths)


def turns(wavelengths: mx.array, offset: int | mx.array, length: int) -> Turns:
    """What `rotate` multiplies `length` tokens by, float32 `[1 or B, 1, length, head_dim]`: the cosines of all angles,
    and the sines with the signs that `turned` adds them with.

    Args:
        wavelengths: `[head_dim / 2]`.
        offset: the position of the first token, one for all rows or `[B]`.
        length: tokens a row.
    """
    first = mx.array(offset, dtype=mx.float32).reshape(-1, 1, 1)
    positions = first + mx.arange(length, dtype=mx.float32)
    angles = positions[..., None] * mx.reciprocal(wavelengths)
    cosines, sines = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cosines, cosines], axis=-1), mx.concatenate([-sines, sines], axis=-1)


def turned(x: mx.array, by: Turns) -> mx.array:
    """`x` `[B, heads, L, head_dim]` rotated as `rotate` does, to the last bit, by `turns` that layers share."""
    cosines, sines = (part.astype(x.dtype) for part in by)
    half = x.shape[-1] // 2
    return x * cosines + mx.concatenate([x[..., half:], x[..., :half]], axis=-1) * sines


class Rope:
    """Rotates the halves of each head by its position (the "rotate half" form that Qwen3 was trained with)."""

    def __init__(self, head_dim: int, theta: float, scaling: YarnScaling | None = None) -> None:
        self.wavelengths = mx.array(rope_wavelengths(head_dim, theta, scaling), dtype=mx.float32)
        # The factor multiplies queries and keys alike, so that their products carry it squared.
        self.score_factor = 1.0 if scaling is None else scaling.attention_factor**2

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotate `x` `[B, heads, L, head_dim]`, whose first token is at `offset` (one for all, or `[B]`)."""
        return rotate(x, self.wavelengths, offset)

    def at(self, x: mx.array, positions: mx.array) -> mx.array:
        """Rotate `x` `[B, heads, L, head_dim]` to `positions` `[B, L]`, in any order."""
        B, heads, L, head_dim = x.shape
        tokens = x.transpose(0, 2, 1, 3).reshape(B * L, heads, 1, head_dim)
        return self(tokens, positions.reshape(B * L)).reshape(B, L, heads, head_dim).transpose(0, 2, 1, 3)


def rope_of(config: ModelConfig) -> Rope:
    """The RoPE of a model under `config.rope_scaling`, made once."""
    return _rope(config.head_dim, config.rope_theta, config.rope_scaling)


@lru_cache(maxsize=64)
def _rope(head_dim: int, theta: float, scaling: YarnScaling | None) -> Rope:
    return Rope(head_dim, theta, scaling)
