"""The options of an engine's prefix store: how much memory it takes, and its folder on disk."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from mlxqwen.checks import parse_size
from mlxqwen.device import Device
from mlxqwen.engine.scheduler import STORE_SHARE, Scheduler
from mlxqwen.errors import OptionError

if TYPE_CHECKING:
    from mlxqwen.cache.disk_tier import DiskTier

__all__ = ["open_prompt_cache", "prefix_cache_bytes", "use_store"]

_DISK_SHARE = 10  # the same of a disk's size


def prefix_cache_bytes(size: int | str | None, device: Device) -> int:
    """The capacity of the store in bytes.

    Args:
        size: bytes, text such as "2GB" or "off", or None for a share of the device's memory.

    Raises:
        OptionError: no size, or more than the machine has for models.
    """
    if size is None:
        return device.usable_memory // STORE_SHARE
    if isinstance(size, str) and size.strip().lower() == "off":
        return 0
    nbytes = parse_size("prefix_cache", size)
    if nbytes > device.usable_memory:
        raise OptionError(
            f"prefix_cache: found {size}, expected at most the {device.usable_memory / 1e9:.1f} GB that this machine "
            "has for models",
            hint='Give a size such as "2GB", or "off".',
        )
    return nbytes


def open_prompt_cache(folder: str | PathLike[str]) -> DiskTier:
    """Open the disk tier in `folder`, of at most a tenth of its disk. Raises `CacheError`."""
    if not isinstance(folder, str | PathLike):
        raise OptionError(f"prompt_cache: found {type(folder).__name__}, expected the path of a folder")
    import shutil

    from mlxqwen.cache.disk_tier import DiskTier

    parent = Path(os.path.abspath(os.fspath(folder))).parent
    total = shutil.disk_usage(parent).total if parent.is_dir() else 1 << 30  # what is wrong is told below
    return DiskTier(folder, max(total // _DISK_SHARE, 1))


def use_store(
    scheduler: Scheduler,
    size: int | str | None,
    prompt_cache: str | PathLike[str] | DiskTier | None,
    device: Device,
) -> None:
    """Give a model's scheduler a store of this size and folder; None leaves either as it is."""
    if size is None and prompt_cache is None:
        return
    capacity = scheduler.store.capacity if size is None else prefix_cache_bytes(size, device)
    disk = scheduler.store.disk
    if prompt_cache is not None:
        from mlxqwen.cache.disk_tier import DiskTier

        disk = prompt_cache if isinstance(prompt_cache, DiskTier) else open_prompt_cache(prompt_cache)
    scheduler.use_store(capacity, disk)
