"""What this machine is and holds.

Everything that differs between Apple's GPU and a CPU is decided here, from one frozen object, so that tests can hold a
Mac of any size in their hands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxqwen.blas import has_small_kernels, uses_openblas
from mlxqwen.errors import OptionError

__all__ = ["CORES_VARIABLE", "NEVER", "Device", "container_limit", "current_device", "device_from_info", "usable_cores"]

CORES_VARIABLE = "MLXQWEN_CORES"
"""The environment variable that says how many cores a product on the CPU is shared among at most."""

NEVER = 1 << 62
"""More rows than there are."""

_NO_LIMIT = 1 << 62  # version 1 spells "none" as a number close to 2**63


@dataclass(frozen=True, slots=True)
class Device:
    """A machine as mlxqwen sees it. Sizes in bytes.

    Args:
        name: the chip's or processor's name.
        is_gpu: whether MLX computes on a GPU by default.
        memory: the physical memory, or what a container leaves of it.
        usable_memory: what weights and caches together may take. On Metal the working set that the system recommends,
            elsewhere the memory less a tenth for everything else.
        has_openblas: whether float32 products on the CPU are OpenBLAS's.
        cores: that a product on the CPU is shared among; one on a GPU.
        has_small_kernels: whether OpenBLAS computes small products without copying the matrices first.
    """

    name: str
    is_gpu: bool
    memory: int
    usable_memory: int
    has_openblas: bool = False
    cores: int = 1
    has_small_kernels: bool = False

    def compute_dtype(self, checkpoint_dtype: mx.Dtype) -> mx.Dtype:
        """The dtype to compute in: the checkpoint's on a GPU, float32 on a CPU.

        MLX's CPU backend sums quantized products in the activations' dtype: bfloat16 is less exact there, and slower.
        """
        return checkpoint_dtype if self.is_gpu else mx.float32

    @property
    def gpu(self) -> mx.Device | None:
        """Where MLX computes on the GPU; None without one."""
        return mx.Device(mx.gpu) if self.is_gpu else None

    def keep_resident(self) -> None:
        """On a GPU, ask the system to keep as much memory wired as it recommends, so that weights are not paged out."""
        if self.is_gpu:
            mx.set_wired_limit(self.usable_memory)

    @property
    def reading_threads(self) -> int:
        """Threads that read weights at once: what keeps an SSD busy beside a GPU, at most a CPU's cores."""
        return 4 if self.is_gpu else min(self.cores, 8)

    @property
    def fuses_attention(self) -> bool:
        """Whether one kernel computes attention and never holds its scores."""
        return self.is_gpu

    @property
    def has_fast_kernels(self) -> bool:
        """Whether a norm or rotation of `mx.fast` is one kernel. A CPU has it spelled out in a dozen primitives."""
        return self.is_gpu

    @property
    def multiplies_by_openblas(self) -> bool:
        """Whether OpenBLAS computes the products that it computes."""
        return self.has_openblas and not self.is_gpu

    @property
    def attends_by_head(self) -> bool:
        """Whether attention in float32 is computed by the heads that share keys, each core some of them, where it is
        much work. MLX computes it on one core of a CPU.
        """
        return not self.is_gpu and (self.cores > 1 or self.has_openblas)

    def dense_from(self, bits: int = 32) -> int:
        """From how many rows on one product of dequantized weights is quicker than what MLX does row by row.

        MLX's CPU backend unpacks the weights anew for every row, which took 0.9 ns a weight. Dequantized, one row took
        0.6 ns in 4 bits and 0.4 in 8 where OpenBLAS has small kernels, and 1.0 in 4 bits with its others; in 3 bits,
        which are dequantized less quickly, 7. Weights of 32 bits are not quantized; experts are of them, too.
        """
        if not self.multiplies_by_openblas:
            return NEVER
        if bits not in (2, 4, 8, 32):
            return 8
        return 1 if self.has_small_kernels else 2

    @property
    def overlaps_steps(self) -> bool:
        """Whether the next decode step is queued before the last token is read.

        This hides the host's work behind a GPU's; the price is one unused step after an end-of-text token. A CPU has
        nothing to hide it behind.
        """
        return self.is_gpu

    @property
    def begins_layers(self) -> bool:
        """Whether a layer's computation is begun before the next one is described.

        A CPU computes on another thread meanwhile. A GPU's decode step is begun ahead as a whole: see `overlaps_steps`.
        """
        return not self.is_gpu

    @property
    def compiles_kernels(self) -> bool:
        """Whether chains of elementwise operations are compiled into one kernel.

        A GPU's driver does that in passing; on a CPU, MLX starts a C++ compiler for each.
        """
        return self.is_gpu


def device_from_info(
    info: Mapping[str, Any],
    *,
    is_gpu: bool,
    physical: int,
    limit: int | None = None,
    has_openblas: bool = False,
    cores: int = 1,
    has_small_kernels: bool = False,
) -> Device:
    """The machine that MLX describes.

    Args:
        info: what `mx.device_info()` says; Metal's has `memory_size` and `max_recommended_working_set_size`.
        is_gpu: whether MLX computes on a GPU by default.
        physical: memory of the machine in bytes, in case MLX does not say.
        limit: the most that this process may take, in bytes, if something confines it.
        has_openblas: whether float32 products on the CPU are OpenBLAS's.
        cores: that this process may use.
        has_small_kernels: whether OpenBLAS computes small products without copying the matrices first.
    """
    memory = int(info.get("memory_size") or physical)
    memory = memory if limit is None else min(memory, limit)
    working_set = info.get("max_recommended_working_set_size") if is_gpu else None
    usable = min(int(working_set or memory * 9 // 10), memory)
    name = str(info.get("device_name", "unknown"))
    return Device(name, is_gpu, memory, usable, has_openblas, 1 if is_gpu else cores, has_small_kernels)


def container_limit(root: Path = Path("/")) -> int | None:
    """Bytes that Linux control groups (version 2 or 1) let this process take; None without a limit.

    `root` is where `/proc` and `/sys` are found. A group's limit binds all groups inside it, so the smallest counts.
    """
    limits = [
        _read_limit(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        for version, folder in _control_groups("memory", root)
    ]
    smallest = min(limits, default=_NO_LIMIT)
    return None if smallest >= _NO_LIMIT else smallest


def usable_cores(root: Path = Path("/")) -> int:
    """Processors that Linux lets this process run on, less what control groups withhold; 1 on other systems.

    `MLXQWEN_CORES` may ask for fewer. `root` is as for `container_limit`.

    Raises:
        OptionError: `MLXQWEN_CORES` is no whole number from 1.
    """
    asked = os.environ.get(CORES_VARIABLE, "").strip()
    most = int(asked.lstrip("0")[:9] or 0) if asked.isascii() and asked.isdigit() else 0
    if asked and not most:
        raise OptionError(f"{CORES_VARIABLE}: found {asked[:40]!r}, expected a whole number from 1")
    cores = _cores_of_this_process(root)
    return min(cores, most) if asked else cores


def _cores_of_this_process(root: Path) -> int:
    if not hasattr(os, "sched_getaffinity"):
        return 1
    cores = len(os.sched_getaffinity(0))
    for version, folder in _control_groups("cpu", root):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            share = int(quota) // int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or the word "max"
            continue
        if share >= 0:  # version 1 spells "none" as -1
            cores = min(cores, max(share, 1))
    return cores


def _control_groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """The version and folder of each control group that this process is in, those around it included."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            version, top = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            version, top = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = top / group.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top):
                yield version, folder


def _read_limit(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or the word "max"
        return _NO_LIMIT


@cache
def current_device() -> Device:
    """The machine this process runs on."""
    is_gpu = mx.default_device().type == mx.DeviceType.gpu
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return device_from_info(
        mx.device_info(),
        is_gpu=is_gpu,
        physical=physical,
        limit=container_limit(),
        has_openblas=uses_openblas(),
        cores=usable_cores(),
        has_small_kernels=has_small_kernels(),
    )
