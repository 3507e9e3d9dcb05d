"""What this machine is and holds.

Everything that differs between Apple's GPU and a CPU is decided here, from one frozen object, so that tests can hold a
Mac of any size in their hands.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

__all__ = ["Device", "current_device"]


@dataclass(frozen=True, slots=True)
class Device:
    """A machine as mlxqwen sees it. Sizes in bytes.

    Args:
        name: the chip's or processor's name.
        is_gpu: whether MLX computes on a GPU by default.
        memory: the physical memory.
        usable_memory: what weights and caches together may take. On Metal the working set that the system recommends,
            elsewhere the physical memory less a tenth for everything else.
    """

    name: str
    is_gpu: bool
    memory: int
    usable_memory: int

    def compute_dtype(self, checkpoint_dtype: mx.Dtype) -> mx.Dtype:
        """The dtype to compute in: the checkpoint's on a GPU, float32 on a CPU.

        MLX's CPU backend sums quantized products in the activations' dtype: bfloat16 is less exact there, and slower.
        """
        return checkpoint_dtype if self.is_gpu else mx.float32

    @property
    def overlaps_steps(self) -> bool:
        """Whether the next decode step is queued before the last token is read.

        This hides the host's work behind a GPU's; the price is one unused step after an end-of-text token. A CPU has
        nothing to hide it behind.
        """
        return self.is_gpu


@cache
def current_device() -> Device:
    """The machine this process runs on."""
    is_gpu = mx.default_device().type == mx.DeviceType.gpu
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = mx.device_info()
    memory = int(info.get("memory_size", physical))
    usable = int(info.get("max_recommended_working_set_size", memory * 9 // 10))
    return Device(str(info.get("device_name", "unknown")), is_gpu, memory, usable)
