"""What a conversion holds at most: whole processes measured, and the allowance that bounds them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import make_checkpoint as make_checkpoint_script
import pytest
from make_checkpoint import SHAPES, make_checkpoint

from mlxqwen_convert import bfloat16, fp8_rows
from mlxqwen_convert.memory import expected_peak, numpy_bytes, strip_bytes, weights_in_flight
from mlxqwen_convert.pipeline import NumpyRows, numpy_target
from mlxqwen_convert.plan import Options, make_plan
from mlxqwen_convert.tasks import Allowance, Task, chunks_of, smallest_chunk, tasks_of
from tests.convert.checkpoints import make_source

ROOT = Path(__file__).resolve().parents[2]
_MEASURED = """
import json, os, sys
import mlx.core as mx
from mlxqwen.device import Device
from mlxqwen_convert import convert
Device.gpu = mx.Device(mx.cpu)  # for a GPU: what matters is that MLX computes everything
report = convert(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]), **json.loads(sys.argv[4]))
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(peak, report.expected_peak_bytes)
"""


Made = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """One layer as wide as that of a release, otherwise small, or one with words for NumPy to quantize; made once each.

    Numbers that are slow to draw repeat.
    """
    small = {"hidden_size": 512, "num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "wide", {**SHAPES["Qwen3-32B"], **small, "vocab_size": 2048})
        patch.setitem(SHAPES, "tall", {**SHAPES["Qwen3-8B"], **small, "vocab_size": 30_000})
        for draw in ("_normal", "_e4m3"):
            drawn = getattr(make_checkpoint_script, draw)(0, 1 << 20)
            patch.setattr(make_checkpoint_script, draw, lambda start, count, drawn=drawn: drawn[:count])

        @cache
        def make(shape: str, form: str) -> Path:
            folder = tmp_path_factory.mktemp(f"{shape}-{form}") / "in"
            make_checkpoint(folder, shape, form=form)
            return folder

        yield make


def _peaks(source: Path, output: Path, workers: int, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a whole process held at most, and that it expected."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "convert")])}
    command = [sys.executable, "-c", _MEASURED, str(source), str(output), str(workers), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, expected = map(int, done.stdout.split())
    return peak, expected


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("workers", [1, 16])
@pytest.mark.parametrize("form", ["awq", "gptq", "bf16", "fp8"])
def test_wide_rows_and_many_workers(made: Made, tmp_path: Path, form: str, workers: int) -> None:
    peak, expected = _peaks(made("wide", form), tmp_path / "out", workers, {})
    assert peak <= expected <= 96 << 20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("fp8", {"group_size": 32}),
        ("bf16", {"bits": 8, "group_size": 32}),
        ("bf16", {"bits": 8, "keep": {"*.down_proj": 6, "*_proj": 5}}),
        ("bf16", {"embed_bits": 16, "keep": {"*.gate_proj": 16}}),
        ("bf16", {"device": "gpu"}),
        ("fp8", {"device": "gpu", "bits": 6}),
    ],
)
def test_numpy_and_mlx_side_by_side(made: Made, tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    """Each of sixteen threads has buffers for both, or MLX's alone: together they stay within what is expected."""
    peak, expected = _peaks(made("tall", form), tmp_path / "out", 16, options)
    assert peak <= expected <= 96 << 20


@pytest.mark.parametrize("form", ["awq", "gptq", "gptq8", "int4-asymmetric", "int8-asymmetric", "bf16", "fp8"])
def test_chunks_hold_what_they_may(tmp_path: Path, form: str) -> None:
    """Rows of one task, all of them in order; no packed word is cut, and no chunk is larger than it must be."""
    plan = make_plan(make_source(tmp_path / "in", form).write().folder, Options())
    for task in tasks_of(plan):
        planned = plan.modules[task.module]
        least = smallest_chunk(planned.readers[task.part])
        for weights in (1, 1000, 5000, 1 << 17):
            chunks = list(chunks_of(planned, task, weights))
            rows = [row for start, stop in chunks for row in range(start, stop)]
            assert rows == list(range(task.start, task.stop))
            assert all((start - task.start) % least == 0 for start, _ in chunks)
            most = max(weights, least * planned.module.width)
            assert all((stop - start) * planned.module.width <= most for start, stop in chunks)


def test_rows_of_packed_words_stay_together(tmp_path: Path) -> None:
    plan = make_plan(make_source(tmp_path / "in", "awq").write().folder, Options())
    number = next(n for n, planned in enumerate(plan.modules) if planned.module.kind == "attention")
    assert list(chunks_of(plan.modules[number], Task(number, 0, 0, 32), 1)) == [(0, 8), (8, 16), (16, 24), (24, 32)]


def test_the_peak_counts_rows_wider_than_all_chunks(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq")
    plan = make_plan(source.write().folder, Options())
    before, in_flight = expected_peak(plan), weights_in_flight(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxqwen_convert.memory._MOST_IN_FLIGHT", 1)
        patch.setattr("mlxqwen_convert.memory._FEWEST_IN_FLIGHT", 1)
        assert weights_in_flight(plan) == 1
        assert before - expected_peak(plan) == (in_flight - 8 * 256) * 75


@pytest.mark.parametrize("form", ["bf16", "fp8", "awq", "gptq"])
def test_what_all_threads_hold_does_not_grow_with_them(tmp_path: Path, form: str) -> None:
    """Of a wide layer: bytes of NumPy's buffers, and weights in hand; and no thread's chunks are tiny."""
    wide = {**SHAPES["Qwen3-32B"], "num_hidden_layers": 1, "vocab_size": 2048}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "one layer", wide)
        make_checkpoint(tmp_path / "in", "one layer", form=form, holes=True)
    plan = make_plan(tmp_path / "in", Options())
    for workers in (1, 2, 4, 8, 16):
        rows, in_flight = NumpyRows(numpy_bytes(plan, workers)), weights_in_flight(plan)
        for task in tasks_of(plan):
            planned = plan.modules[task.module]
            target = numpy_target(plan, planned, task.part)
            if target is not None:
                is_fp8 = planned.readers[0].label == "FP8"
                weights = rows.chunk(planned, task.part)
                held = bfloat16.working_bytes(weights, target.group_size, target.bits)
                held += fp8_rows.working_bytes(weights, target.group_size) if is_fp8 else 0
                assert held * workers <= 26 << 20
            else:
                weights = in_flight // workers * (8 if planned.method == "repack" else 1)
            chunks = list(chunks_of(planned, task, weights))
            largest = max(stop - start for start, stop in chunks) * planned.module.width
            assert largest <= max(weights, smallest_chunk(planned.readers[0]) * planned.module.width)
            assert weights >= 1 << (14 if target is None else 16)


@pytest.mark.parametrize("workers", [1, 2, 8, 16, 64])
def test_strips_of_all_workers_have_a_common_bound(workers: int) -> None:
    assert strip_bytes(workers) * 10 // 8 * workers <= 8 << 20


def test_no_more_is_in_hand_than_the_allowance() -> None:
    allowance, lock = Allowance(100), threading.Lock()
    held, most = 0, 0

    def work(weights: int) -> None:
        nonlocal held, most
        for _ in range(50):
            with allowance.taken(weights):
                with lock:
                    held += weights
                    most = max(most, held)
                with lock:
                    held -= weights

    threads = [threading.Thread(target=work, args=(weights,)) for weights in (10, 30, 40, 60, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert most <= 100
    assert held == 0


def test_more_than_the_allowance_is_had_alone() -> None:
    allowance = Allowance(100)
    order: list[str] = []

    def wide() -> None:
        with allowance.taken(1000):
            order.append("wide")

    with allowance.taken(1):
        thread = threading.Thread(target=wide)
        thread.start()
        thread.join(timeout=0.05)
        order.append("narrow")
    thread.join(timeout=30)
    assert order == ["narrow", "wide"]


def test_what_fails_gives_its_part_back() -> None:
    allowance = Allowance(100)
    with pytest.raises(ValueError, match="no"), allowance.taken(100):
        raise ValueError("no")
    with allowance.taken(100):
        pass
