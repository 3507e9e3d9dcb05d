"""The sampling rules once more, in float64 numpy, written for plainness: the oracle of test_sampling.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlxqwen.sampling.sampler import SamplingParams

Floats = NDArray[np.float64]


def penalised(logits: Floats, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> Floats:
    """Logits `[V]` after bias, repetition, frequency and presence penalty."""
    scores = logits.copy()
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    for token in {*prompt, *generated}:
        positive = scores[token] > 0
        scores[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token in set(generated):
        scores[token] -= params.frequency_penalty * list(generated).count(token)
        scores[token] -= params.presence_penalty
    return scores


def probabilities(
    logits: Floats, params: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()
) -> Floats:
    """The truncated distribution `[V]`, summing to 1."""
    scores = penalised(logits, params, prompt, generated)
    if params.temperature == 0:
        return np.asarray(np.arange(scores.size) == scores.argmax(), dtype=np.float64)
    scores = (scores - scores.max()) / params.temperature
    if 0 < params.top_k < scores.size:
        scores = np.where(scores < np.sort(scores)[-params.top_k], -np.inf, scores)
    if params.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        masses = _softmax(scores)[order]
        before = np.cumsum(masses) - masses
        scores[order[before >= params.top_p]] = -np.inf
    if params.min_p > 0:
        masses = _softmax(scores)
        scores[masses < params.min_p * masses.max()] = -np.inf
    return _softmax(scores)


def total_variation(left: Floats, right: Floats) -> float:
    return float(np.abs(left - right).sum() / 2)


def assert_drawn_from(expected: Floats, tokens: Sequence[int]) -> None:
    """Chi-square at six standard deviations over twenty groups; nothing outside the distribution at all."""
    counts = np.bincount(tokens, minlength=expected.size)
    assert counts[expected == 0].sum() == 0
    # Groups in an order unrelated to probability, each of about the same mass.
    order = np.random.default_rng(0).permutation(expected.size)
    group = np.minimum(np.cumsum(expected[order]) * 20, 19.5).astype(int)
    wanted = np.bincount(group, expected[order] * len(tokens))
    found = np.bincount(group, counts[order])
    some = wanted > 0
    statistic = ((found[some] - wanted[some]) ** 2 / wanted[some]).sum()
    assert statistic < some.sum() + 6 * math.sqrt(2 * some.sum())


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)
