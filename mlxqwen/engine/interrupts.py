"""When Ctrl-C is heard: behind lines that have to run together, and between the parts of a long chunk of a prompt.

MLX computes what it is given to the end, and Python hears of Ctrl-C afterwards. So what takes long is computed in
parts, which are layers of the same graph and change no number. Where one layer takes long, chunks are made shorter,
too, but only where that changes none.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mlxqwen.device import NEVER, Device
from mlxqwen.files.config import ModelConfig

__all__ = ["ReadingPace", "interrupts_deferred"]

_UNHEARD = 0.5  # seconds that a chunk may take as one
_PART = 0.25  # seconds that a part is to take
_WORK = 1.5e9  # operations of a layer that MLX's own products on the CPU do in about half a second, by 2.3 GFLOP/s


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Handle SIGINT at the end of the block. Only the main thread gets it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or not Python's to handle
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: heard.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            before(*heard[0])


class ReadingPace:
    """The pace of the last chunk, by which the next one is cut into parts of whole layers.

    Args:
        config: the model's.
        device: the machine.
        clock: seconds.
    """

    def __init__(self, config: ModelConfig, device: Device, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._layers = config.num_hidden_layers
        self._shortest = _shortest_chunk(config, device)
        self._seconds: float | None = None  # a token

    def layers_at_once(self, tokens: int) -> int:
        """How many layers to compute at a time for so many tokens: all of a quick chunk, one where nothing is known."""
        if self._seconds is None:
            return 1
        expected = self._seconds * tokens
        return self._layers if expected <= _UNHEARD else max(1, int(self._layers * _PART / expected))

    def chunk(self, tokens: int, *, is_ring: bool) -> int:
        """How many of so many tokens to read at once.

        On a CPU with MLX's own products, which are as quick for few rows as for many and give the same numbers, as many
        as go through one layer in half a second; elsewhere, and in a ring, whose numbers depend on it, all of them.
        """
        if is_ring or self._shortest == NEVER:
            return tokens
        known = 0 if self._seconds is None else int(self._layers * _UNHEARD / self._seconds)
        return min(tokens, max(self._shortest, known))

    def took(self, tokens: int, seconds: float) -> None:
        """Remember how long a chunk took."""
        self._seconds = seconds / tokens


def _shortest_chunk(config: ModelConfig, device: Device) -> int:
    """Tokens that are read at once wherever nothing is known of the pace; `NEVER` where no chunk is made shorter."""
    if device.is_gpu or device.has_openblas:
        return NEVER
    moe, width = config.moe, config.hidden_size
    inner = config.intermediate_size if moe is None else moe.num_experts_per_tok * moe.moe_intermediate_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return max(1, int(_WORK / (2 * width * (heads + 3 * inner))))
