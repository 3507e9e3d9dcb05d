"""Padded rows whose padding is left out of all that computes each token by itself."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxqwen.cache import make_cache
from mlxqwen.model.packing import Packing
from mlxqwen.model.qwen3 import Qwen3ForCausalLM


def test_packing_and_back() -> None:
    packing = Packing([1, 3, 2], 3)
    padded = mx.array([[10, 0, 0], [20, 21, 22], [30, 31, 0]])
    packed = packing.pack(padded.reshape(-1))
    assert packed.tolist() == [10, 20, 21, 22, 30, 31]
    assert packing.unpack(packed).reshape(3, 3).tolist() == [[10, 10, 10], [20, 21, 22], [30, 31, 31]]


@pytest.mark.parametrize("known", [[0, 0, 0], [7, 0, 3]])
def test_padded_rows_read_as_each_of_them_alone(tiny: Qwen3ForCausalLM, known: list[int]) -> None:
    """Oracle: the same tokens in a cache of one row, which has no padding."""
    texts = [list(range(start, start + count)) for start, count in ((3, 8), (40, 2), (60, 5))]
    fronts = [list(range(80, 80 + count)) for count in known]
    together = make_cache(tiny, batch_size=3)
    width = max(known)
    if width:
        tiny(mx.array([front + [0] * (width - len(front)) for front in fronts]), together, lengths=known)
    lengths = [len(text) for text in texts]
    tokens = mx.array([text + [0] * (max(lengths) - len(text)) for text in texts])
    hidden = tiny.model(tokens, together, lengths=lengths, last_only=True)
    following = tiny(mx.array([[1], [2], [3]]), together)
    for row, (front, text) in enumerate(zip(fronts, texts, strict=True)):
        alone = make_cache(tiny)
        if front:
            tiny(mx.array([front]), alone)
        expected = tiny.model(mx.array([text]), alone, last_only=True)
        assert mx.allclose(hidden[row], expected[0], rtol=1e-5, atol=1e-5).item()
        assert mx.allclose(following[row], tiny(mx.array([[row + 1]]), alone)[0], rtol=1e-5, atol=1e-5).item()
    assert together.offsets == tuple(have + length + 1 for have, length in zip(known, lengths, strict=True))
