"""`device="gpu"`: MLX computes it all, where the machine has a GPU. Here the processor stands in its place."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest

from mlxqwen.device import Device
from mlxqwen.errors import OptionError
from mlxqwen_convert import convert
from mlxqwen_convert.errors import ResumeError
from mlxqwen_convert.memory import expected_peak, weights_in_flight
from mlxqwen_convert.pipeline import NumpyRows, Written, numpy_target, write_task
from mlxqwen_convert.plan import Options, Plan, make_plan
from mlxqwen_convert.tasks import Task, computing_on
from tests.command_line import run
from tests.convert.checkpoints import make_source

CPU = mx.Device(mx.cpu)
GPU = mx.Device(mx.gpu)


class Crash(BaseException):
    """The process ends here."""


class WithGpu(Device):
    """A machine whose GPU computes as its processor does."""

    @property
    def gpu(self) -> mx.Device:
        return CPU


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxqwen_convert.tasks.WEIGHTS_PER_TASK", 8192)


def use(monkeypatch: pytest.MonkeyPatch, machine: Device) -> None:
    monkeypatch.setattr("mlxqwen_convert.conversion.current_device", lambda: machine)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, WithGpu("a GPU", True, 1 << 34, 1 << 34))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Device("a processor", False, 1 << 34, 1 << 34))


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> list[mx.Device]:
    """MLX's default devices, the last of which counts, of a Mac that in truth computes on its processor alone."""
    found = [GPU]
    monkeypatch.setattr(mx, "default_device", lambda: found[-1])
    monkeypatch.setattr(mx, "set_default_device", found.append)
    monkeypatch.setattr(mx, "stream", lambda _: pytest.fail("sets the default device of all threads"))
    use(monkeypatch, Device("a Mac", True, 1 << 34, 1 << 34))
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*folder.glob("*.safetensors"), folder / "config.json"]}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("bf16", {}),
        ("bf16", {"bits": 8, "keep": {"*.down_proj": 3, "*.up_proj": 6}}),
        ("bf16", {"bits": 3, "quality": True}),
        ("f32", {"bits": 5, "dtype": "float16"}),
        ("fp8", {}),
        ("fp8", {"bits": 4, "lm_head_bits": 16}),
        ("fp8-channel", {"bits": 16}),
        ("awq", {}),
        ("awq", {"bits": 3, "embed_bits": 8}),
        ("gptq", {"dtype": "bfloat16"}),
    ],
)
def test_mlx_makes_all_of_it_with_the_same_bytes(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    """Where a GPU rounds as the processor does, it makes what NumPy and MLX make there."""
    source = make_source(tmp_path / "in", form).write().folder
    convert(source, tmp_path / "cpu", **options)
    with patch.object(NumpyRows, "make", side_effect=Crash):
        report = convert(source, tmp_path / "gpu", device="gpu", workers=3, **options)
    assert report.verified
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    cards = [(tmp_path / device / "README.md").read_text() for device in ("cpu", "gpu")]
    requantized = any(row.method == "quantize" for row in report.kinds)
    assert ["computed on a GPU" in card for card in cards] == [False, requantized]


@pytest.mark.parametrize(("device", "computing"), [("gpu", GPU), ("cpu", CPU)])
@pytest.mark.parametrize("crash", [False, True])
def test_mlx_is_left_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    defaults: list[mx.Device],
    device: str,
    computing: mx.Device,
    crash: bool,
) -> None:
    """All threads compute on one device, and nobody's default is changed by workers that end one after the other."""
    source = make_source(tmp_path / "in", "fp8").write().folder
    seen: set[tuple[mx.Device, ...]] = set()

    def write(plan: Plan, task: Task, *rest: Any) -> Written:
        seen.add(tuple(defaults))
        if crash and task.start:
            raise Crash
        return write_task(plan, task, *rest)

    monkeypatch.setattr("mlxqwen_convert.conversion.write_task", write)
    try:
        convert(source, tmp_path / "out", bits=3, device=device, workers=4)
        assert not crash
    except Crash:
        assert crash
    assert [*seen] == [(GPU, computing)]
    assert defaults == [GPU, computing, GPU]


class Turn:
    """Held by one thread at a time, while nothing else is computed; notes MLX's default device around it."""

    def __init__(self, defaults: list[mx.Device]) -> None:
        self.defaults, self.lock, self.around = defaults, threading.Lock(), list[mx.Device]()

    def __enter__(self) -> None:
        self.lock.acquire()
        self.around.append(self.defaults[-1])

    def __exit__(self, *_: object) -> None:
        self.around.append(self.defaults[-1])
        self.lock.release()


def test_others_compute_on_their_device_between_two_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defaults: list[mx.Device]
) -> None:
    source = make_source(tmp_path / "in", "awq").write().folder
    convert(source, tmp_path / "whole")
    turn, tasks = Turn(defaults), 0

    def write(*rest: Any) -> Written:
        nonlocal tasks
        tasks += 1
        assert turn.lock.locked()
        assert defaults[-1] == CPU
        return write_task(*rest)

    monkeypatch.setattr("mlxqwen_convert.conversion.write_task", write)
    convert(source, tmp_path / "out", workers=4, turn=turn)
    assert tasks > 4
    assert turn.around == [GPU, GPU] * tasks
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_all_workers_convert_at_once_where_all_compute_on_one_device(tmp_path: Path) -> None:
    class Never:
        def __enter__(self) -> None:
            pytest.fail("taken")

        def __exit__(self, *_: object) -> None: ...

    convert(make_source(tmp_path / "in", "awq").write().folder, tmp_path / "out", turn=Never())


def test_who_wants_another_device_waits(defaults: list[mx.Device]) -> None:
    def other() -> None:
        with computing_on(CPU):
            pass

    with computing_on(GPU):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(timeout=0.05)
        assert defaults == [GPU, GPU]
    thread.join(timeout=30)
    assert defaults == [GPU, GPU, GPU, CPU, GPU]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("dry_run", [False, True])
def test_refused_without_a_gpu(tmp_path: Path, dry_run: bool) -> None:
    source = make_source(tmp_path / "in", "bf16").write().folder
    with pytest.raises(OptionError, match="device: found gpu, expected cpu: MLX has no GPU here") as caught:
        convert(source, tmp_path / "out", device="gpu", dry_run=dry_run)
    assert caught.value.hint == "Leave it out: the processor converts on all its cores."
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("device", ["GPU", "metal", "", None])
def test_other_devices(tmp_path: Path, device: Any) -> None:
    source = make_source(tmp_path / "in", "bf16").write().folder
    with pytest.raises(OptionError, match=f"device: found {device!r}, expected cpu or gpu"):
        convert(source, tmp_path / "out", device=device)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("no_gpu")
def test_the_command_refuses_in_its_own_words(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write().folder
    result = run("convert", str(source), str(tmp_path / "out"), "--device", "gpu")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: --device: found gpu, expected cpu: MLX has no GPU here\n")
    assert run("convert", str(source), str(tmp_path / "out"), "--device", "metal").status == 2
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.usefixtures("gpu")
def test_the_command(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write().folder
    result = run("convert", str(source), str(tmp_path / "out"), "--device", "gpu")
    assert result.status == 0
    assert "verified, in " in result.out
    assert "computed on a GPU" in (tmp_path / "out/README.md").read_text()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("begun", "resumed", "words"),
    [
        ("cpu", "gpu", "begun with no options, found --device gpu"),
        ("gpu", "cpu", "begun with --device gpu, found none"),
    ],
)
def test_two_devices_are_not_mixed(tmp_path: Path, begun: str, resumed: str, words: str) -> None:
    source, done = make_source(tmp_path / "in", "fp8").write().folder, 0

    def stop(stage: str, weights: int, total: int) -> None:
        nonlocal done
        done += 1
        if done == 5:
            raise Crash

    with pytest.raises(Crash):
        convert(source, tmp_path / "out", device=begun, progress=stop)
    with pytest.raises(ResumeError, match=words):
        convert(source, tmp_path / "out", device=resumed, resume=True)
    assert convert(source, tmp_path / "out", device=begun, resume=True).resumed
    convert(source, tmp_path / "whole", device=begun)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_memory_is_counted_without_numpy(tmp_path: Path, form: str) -> None:
    """Its buffers are not there; MLX has as much in hand as it may have, and no more."""
    folder = make_source(tmp_path / "in", form).write().folder
    by_gpu, by_mlx = (make_plan(folder, options) for options in (Options(device="gpu"), Options(quality=True)))
    parts = [(planned, part) for planned in by_gpu.modules for part in range(len(planned.parts))]
    assert not any(numpy_target(by_gpu, planned, part) for planned, part in parts)
    assert weights_in_flight(by_gpu) == weights_in_flight(by_mlx)
    assert expected_peak(by_gpu) == expected_peak(by_mlx) <= 96 << 20
