"""What a machine is: from what MLX says, and from what a container allows."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlxqwen.device import Device, container_limit, current_device, device_from_info

GIB = 1 << 30
MACBOOK = {
    "architecture": "applegpu_g13s",
    "device_name": "Apple M1 Max",
    "max_buffer_length": 36 * GIB,
    "max_recommended_working_set_size": 48 * GIB,
    "memory_size": 64 * GIB,
    "resource_limit": 499_000,
}


def test_mac_holds_its_working_set() -> None:
    device = device_from_info(MACBOOK, is_gpu=True, physical=64 * GIB)
    assert device == Device("Apple M1 Max", True, 64 * GIB, 48 * GIB)
    assert device.compute_dtype(mx.bfloat16) == mx.bfloat16
    assert device.overlaps_steps
    assert device.compiles_kernels
    assert device.gpu == mx.Device(mx.gpu)


def test_cpu_leaves_a_tenth_and_computes_in_float32() -> None:
    for info in ({}, {"device_name": "unknown"}, {**MACBOOK, "device_name": "unknown", "memory_size": 10 * GIB}):
        device = device_from_info(info, is_gpu=False, physical=10 * GIB)
        assert device == Device("unknown", False, 10 * GIB, 9 * GIB)
        assert device.compute_dtype(mx.bfloat16) == mx.float32
        assert not device.overlaps_steps
        assert not device.compiles_kernels
        assert device.gpu is None


@pytest.mark.parametrize(("limit", "memory"), [(None, 10 * GIB), (2 * GIB, 2 * GIB), (20 * GIB, 10 * GIB)])
def test_limit_of_a_container(limit: int | None, memory: int) -> None:
    device = device_from_info({}, is_gpu=False, physical=10 * GIB, limit=limit)
    assert (device.memory, device.usable_memory) == (memory, memory * 9 // 10)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": ""}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000\n"}, 1000),
        (
            {
                "proc/self/cgroup": "0::/user.slice/one.scope\n",
                "sys/fs/cgroup/user.slice/memory.max": "500\n",
                "sys/fs/cgroup/user.slice/one.scope/memory.max": "max\n",
                "sys/fs/cgroup/user.slice/other.scope/memory.max": "1\n",
                "sys/fs/memory.max": "2\n",
            },
            500,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n1:name=systemd:/docker/1\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "700\n",
            },
            700,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "garbage\n"}, None),
    ],
)
def test_control_groups(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert container_limit(write(tmp_path, files)) == limit


def test_this_machine() -> None:
    device = current_device()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < device.usable_memory <= device.memory <= physical * 1.01
    assert device.is_gpu == (mx.default_device().type == mx.DeviceType.gpu)


@pytest.mark.parametrize(("is_gpu", "wired"), [(True, [12_000]), (False, [])])
def test_only_a_gpu_wires_memory(monkeypatch: pytest.MonkeyPatch, is_gpu: bool, wired: list[int]) -> None:
    asked: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", asked.append)
    Device("a machine", is_gpu=is_gpu, memory=16_000, usable_memory=12_000).keep_resident()
    assert asked == wired
