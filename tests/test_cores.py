"""Products shared among a processor's cores: the same bits as on one, with weights that were changed too."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxqwen.cache import make_cache
from mlxqwen.device import CORES_VARIABLE, Device, device_from_info, usable_cores
from mlxqwen.errors import OptionError
from mlxqwen.model import cores
from mlxqwen.model.cores import Shares, ranges, shares_of
from mlxqwen.model.loading import load_model
from tests.test_device import write
from tests.test_fusion import CPU, GPU, MODELS, folder_of
from tests.tiny_checkpoints import prompt

THREE = dataclasses.replace(CPU, cores=3)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that parts are computed on, once a share of any size is worth it."""
    monkeypatch.setattr(cores, "_LEAST", 1)
    used: list[Any] = []
    stream = cores._stream

    def recorded(core: int) -> Any:
        used.append(core)
        return stream(core)

    monkeypatch.setattr(cores, "_stream", recorded)
    return used


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_to_the_last_bit(tmp_path: Path, name: str, streams: list[Any]) -> None:
    """Prompts of several lengths, then tokens one by one; experts in few rows and in many."""
    folder = folder_of(tmp_path, *MODELS[name])
    ids = mx.array([prompt(40, 96, seed) for seed in range(3)])
    lone, shared = (load_model(folder, device=device) for device in (CPU, THREE))
    caches = [make_cache(model, batch_size=3) for model in (lone, shared)]
    for start, stop in ((0, 1), (1, 3), (3, 36), (36, 37), (37, 38)):
        expected, found = (
            model(ids[:, start:stop], cache) for model, cache in zip((lone, shared), caches, strict=True)
        )
        assert mx.array_equal(found, expected)
    assert set(streams) == {0, 1, 2}


def test_small_products_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_stream", lambda core: pytest.fail("shared"))
    model = load_model(folder_of(tmp_path, *next(iter(MODELS.values()))), device=THREE)
    mx.eval(model(mx.array([[1, 2, 3]])))


@pytest.mark.parametrize(
    ("has_openblas", "rows", "parts"), [(False, 2, 1), (False, 4, 2), (True, 4, 1), (True, 256, 2)]
)
def test_many_rows_that_openblas_multiplies_at_once_are_not_worth_a_share(
    has_openblas: bool, rows: int, parts: int
) -> None:
    """A matrix of a demo's size: the threads would wait for one another longer than they multiply."""
    shares = shares_of(dataclasses.replace(CPU, cores=2, has_openblas=has_openblas))
    assert shares is not None
    seen: list[mx.array] = []

    def product(x: mx.array, weight: mx.array) -> mx.array:
        seen.append(weight)
        return x @ weight.T

    shares.product(product, mx.ones((rows, 512)), mx.ones((512, 512)))
    assert len(seen) == parts


def by_rows(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


def test_weights_in_the_place_of_others_count(streams: list[Any]) -> None:
    shares, x = Shares(3), mx.random.normal((2, 8), key=mx.random.key(0))
    for seed in (1, 2, 2, 3):
        weight = mx.random.normal((7, 8), key=mx.random.key(seed))
        assert mx.array_equal(shares.product(by_rows, x, weight), x @ weight.T)
    weight[2:6] = 1.5
    assert mx.array_equal(shares.product(by_rows, x, weight), x @ weight.T)
    assert len(streams) == 15


def test_gradients_go_through_the_parts(streams: list[Any]) -> None:
    shares, x = Shares(3), mx.random.normal((2, 8), key=mx.random.key(0))
    weight = mx.random.normal((7, 8), key=mx.random.key(1))
    found, expected = (
        mx.grad(lambda weight, product=product: mx.square(product(x, weight)).sum())(weight)
        for product in (lambda x, weight: shares.product(by_rows, x, weight), by_rows)
    )
    assert mx.allclose(found, expected, atol=1e-5)
    assert len(streams) >= 3


def test_each_thread_computes_on_its_own(streams: list[Any]) -> None:
    shares, x, weight = Shares(2), mx.ones((1, 8)), mx.ones((6, 8))
    mx.eval(x, weight)
    sums: list[float] = []

    def run() -> None:
        sums.append(float(shares.product(by_rows, x, weight).sum()))

    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert sums == [48.0] * 3


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 1 << 40))
def test_ranges_cover_all_and_are_even(size: int, count: int, multiplications: int) -> None:
    parts = ranges(size, count, multiplications)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))
    lengths = [part.stop - part.start for part in parts]
    assert 1 <= min(lengths) >= max(lengths) - 1
    assert len(parts) == max(1, min(size, count, multiplications >> 19))


def test_what_shares() -> None:
    assert shares_of(CPU) is None
    assert isinstance(shares_of(THREE), Shares)
    assert shares_of(GPU) is None
    for is_gpu, count in ((True, 1), (False, 6)):
        assert device_from_info({}, is_gpu=is_gpu, physical=1 << 30, cores=6) == Device(
            "unknown", is_gpu, 1 << 30, (1 << 30) * 9 // 10, cores=count
        )


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/d\n4:memory:/d\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/d/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores_that_a_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], count: int
) -> None:
    monkeypatch.delenv(CORES_VARIABLE, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores(write(tmp_path, files)) == count


@pytest.mark.parametrize(
    ("asked", "count"), [("", 8), ("1", 1), (" 3 ", 3), ("8", 8), ("64", 8), ("0" * 30 + "2", 2), ("9" * 30, 8)]
)
def test_fewer_may_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv(CORES_VARIABLE, asked)
    assert usable_cores(tmp_path) == count


@pytest.mark.parametrize("asked", ["0", "-1", "1.5", "two", "²", "0" * 30])
def test_no_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(CORES_VARIABLE, asked)
    with pytest.raises(
        OptionError, match=rf"MLXQWEN_CORES: found '{re.escape(asked)}', expected a whole number from 1"
    ):
        usable_cores(tmp_path)


def test_other_systems_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CORES_VARIABLE, raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores(tmp_path) == 1
