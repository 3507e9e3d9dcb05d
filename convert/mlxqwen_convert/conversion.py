"""Plan, stream, verify, publish: a whole conversion from folder to folder.

The steps stand in one file, as their order is what keeps a folder whole: nothing is published before all is verified.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

import mlxqwen
from mlxqwen.device import current_device
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.files.adapters import refuse_adapter
from mlxqwen.files.checkpoint import TensorInfo
from mlxqwen.files.hub import looked_at, resolve_model
from mlxqwen.files.model_files import QUANTIZATION_FILES
from mlxqwen.forks import check_process
from mlxqwen_convert.companions import companion_files, config_text, copy_companions
from mlxqwen_convert.errors import (
    DiskFullError,
    OutputError,
    ResumeError,
    SourceChangedError,
    SourceUnreadableError,
    VerificationError,
)
from mlxqwen_convert.layout import INDEX_NAME, index_of
from mlxqwen_convert.memory import buffer_bytes, expected_peak, numpy_bytes, strip_bytes, weights_in_flight
from mlxqwen_convert.model_card import model_card
from mlxqwen_convert.partial import PartialFolder, exists, found_beside, partial_path, tidy_output
from mlxqwen_convert.pipeline import NumpyRows, Written, check_on_disk, is_on_disk, write_task
from mlxqwen_convert.plan import Options, Plan, make_plan
from mlxqwen_convert.report import Report, kind_rows, module_facts
from mlxqwen_convert.sizes import size_of
from mlxqwen_convert.source_files import SourceFiles
from mlxqwen_convert.target_files import PARTIAL_SUFFIX, TargetFiles, unwritable
from mlxqwen_convert.tasks import Allowance, Task, computing, cores, run, tasks_of
from mlxqwen_convert.upload import check_repo_id, require_token, upload
from mlxqwen_convert.verification import ModuleError, check_errors

__all__ = ["REPORT_NAME", "Progress", "convert"]

REPORT_NAME = "conversion_report.json"
# What else is written: config, index, report, card.
_COMPARED_BYTES = 1 << 22

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called as work goes on: what is done ("converting" or "verifying"), weights done, weights in all."""


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    dtype: str = "auto",
    lm_head_bits: int | None = None,
    embed_bits: int | None = None,
    keep: Mapping[str, int] | Iterable[tuple[str, int]] = (),
    quality: bool = False,
    strict: bool = False,
    ignore_adapter: bool = False,
    verify: bool = True,
    resume: bool = False,
    dry_run: bool = False,
    upload_repo: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    turn: AbstractContextManager[object] | None = None,
) -> Report:
    """Turn a Qwen3 checkpoint into a folder that MLX's loaders read.

    Args:
        source: a folder or a hub id, in BF16, F16, F32, FP8, AWQ, GPTQ, compressed-tensors or MLX form.
        output: the folder to write; must not exist.
        revision: a branch, tag or commit of a hub id.
        bits: 8, 6, 5, 4, 3 or 2; 16 does not quantize. By default 8 for FP8, 4 for floats, else the source's own,
            whose codes are then kept as they are.
        group_size: 32, 64 or 128 weights to a scale; by default the source's, or 64.
        dtype: of scales and of what stays unquantized: "bfloat16", "float16", "float32", or "auto": float16 for AWQ,
            GPTQ and compressed-tensors (bfloat16 for symmetric ones with such scales), else the source's.
        lm_head_bits, embed_bits: other bits for the head and for the embeddings.
        keep: bits for modules by glob, such as `{"*.down_proj": 8}`; the last that matches counts. The MoE router
            has 8 at least.
        quality: search scale and bias of each group for the least squared error; takes several times as long.
        strict: refuse, rather than leave unquantized, what groups do not divide.
        ignore_adapter: convert the weights alone where an adapter lies beside them, which is refused otherwise.
        verify: read everything back and compare it with the source.
        resume: go on with an unfinished conversion of the same source and options.
        dry_run: only plan; nothing is written. The report's `refusal` tells what the conversion itself would be
            refused for, such as an output that exists already; all that is in its way is a note.
        upload_repo: a hub id to push the finished folder to.
        workers: threads; by default one for each core.
        device: "cpu" or "gpu", where MLX then computes. Another device may round otherwise: codes near the middle
            between two, and scales that `quality` finds, can differ.
        progress: see `Progress`.
        turn: for processes that compute something else meanwhile, on another device: nobody else computes while it is
            held. It is entered for each part of the work, by any thread.

    Raises:
        MlxqwenError: one of the trees in `mlxqwen.errors` and `mlxqwen_convert.errors`, by what is wrong.
    """
    check_process()
    started = time.perf_counter()
    globs = tuple(keep.items()) if isinstance(keep, Mapping) else tuple(keep)
    options = Options(bits, group_size, dtype, lm_head_bits, embed_bits, globs, quality, strict, device)
    computing_device = _computing_device(options)
    if upload_repo is not None:
        check_repo_id(upload_repo)
        require_token(upload_repo)
    if workers is not None and workers < 1:
        raise OptionError(f"workers: found {workers}, expected at least 1")
    target, local = _path(output), _path(source)
    if local.is_dir():
        check_apart(local, target)
    if not (dry_run and os.path.lexists(target)):
        check_output(target)  # before gigabytes are downloaded
    workers = workers or cores()
    if dry_run:
        with looked_at(source, revision=revision) as folder:
            check_apart(folder, target)
            return _planned(folder, target, options, workers, ignore_adapter=ignore_adapter, resume=resume)

    def check(preview: Path) -> None:
        """Refuse what cannot be converted before its weights are downloaded."""
        make_plan(preview, options)
        if not ignore_adapter:
            refuse_adapter(preview)

    folder = resolve_model(source, revision=revision, check=check)
    check_apart(folder, target)
    # Remembered before anything is read, so that no file can change between its header and its weights.
    files = SourceFiles(_files_of(folder), strip_bytes=strip_bytes(workers))
    try:
        plan = make_plan(folder, options)
        if not ignore_adapter:
            refuse_adapter(folder)
        job = _Job(
            plan,
            files,
            target,
            None if local.is_dir() else str(source),
            workers,
            computing_device,
            turn,
            progress or _silent,
        )
        report = job.run(verify_it=verify, resume=resume, started=started)
    finally:
        files.close()
    if upload_repo is not None:
        upload(target, upload_repo)
    return report


def _planned(
    folder: Path, target: Path, options: Options, workers: int, *, ignore_adapter: bool, resume: bool
) -> Report:
    """What a conversion would write, and what it would be refused for. Nothing is written."""
    files = SourceFiles(_files_of(folder), strip_bytes=strip_bytes(workers))
    try:
        plan = make_plan(folder, options)
        if not ignore_adapter:
            refuse_adapter(folder)
        obstacles: list[MlxqwenError] = [exists(target)] if os.path.lexists(target) else []
        notes = []
        try:
            found = found_beside(target, _fingerprint(plan, files), resume=resume)
            notes += [] if found is None else [found]
        except (OutputError, ResumeError) as error:
            obstacles.append(error)
        try:
            _check_room(plan, target)
        except DiskFullError as error:
            obstacles.append(error)
        notes += [error.problem for error in obstacles]
        report = _report(plan, Path(), None, 0.0, resumed=False, verified=False, more=tuple(notes))
        return replace(report, refusal=obstacles[0].problem, hint=obstacles[0].hint) if obstacles else report
    finally:
        files.close()


def _computing_device(options: Options) -> mx.Device:
    """Raises `OptionError` for a GPU where there is none."""
    gpu = current_device().gpu
    if options.device == "cpu":
        return mx.Device(mx.cpu)
    if gpu is None:
        raise OptionError(
            "device: found gpu, expected cpu: MLX has no GPU here",
            hint="Leave it out: the processor converts on all its cores.",
        )
    return gpu


def _path(given: str | os.PathLike[str]) -> Path:
    """Raises `OptionError` for what no file system has a name for."""
    text = os.fspath(given)
    if not text or "\0" in text:
        raise OptionError(f"found the path {text!r}, expected a folder's", hint="Give the folder's name.")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home of a user that there is not
        return Path(text)


def _files_of(folder: Path) -> list[Path]:
    """What a conversion depends on, as far as it is there: a shard may lie in a folder of its own."""
    settings = ("config.json", INDEX_NAME, *QUANTIZATION_FILES)
    beside = [*(folder / name for name in settings), *(folder / name for name in companion_files(folder))]
    return [path for path in (*beside, *folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")) if path.exists()]


def check_apart(folder: Path, target: Path) -> None:
    """Raise `OutputError` if writing `target` would touch `folder`."""
    real, origin = target.resolve(), folder.resolve()
    # By the files' numbers: a disk may take several spellings for one name.
    if _is_same(real, origin):
        raise OutputError(f"{target}: is the source itself", hint="Choose an output elsewhere.")
    if any(_is_same(parent, origin) for parent in real.parents):
        raise OutputError(f"{target}: lies inside the source {folder}", hint="Choose an output elsewhere.")
    partial = partial_path(target)
    if any(_is_same(partial, part) for part in (origin, *origin.parents)):
        raise OutputError(f"{partial}: is where the source is, and would be written to", hint="Choose another output.")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def check_output(target: Path) -> None:
    """Raise `OutputError` unless `target` can be made."""
    if os.path.lexists(target):
        tidy_output(target)
        raise exists(target)
    parent = target.parent
    if not parent.is_dir():
        raise OutputError(f"{target}: its parent folder does not exist", hint=f"Make {parent} first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent}: cannot be written to", hint="Check its permissions, or choose another output.")


@dataclass(slots=True)
class _Job:
    plan: Plan
    files: SourceFiles
    output: Path
    hub_id: str | None
    workers: int
    device: mx.Device
    turn: AbstractContextManager[object] | None
    progress: Progress

    def run(self, *, verify_it: bool, resume: bool, started: float) -> Report:
        plan, files = self.plan, self.files
        fingerprint = _fingerprint(plan, files)
        files.check_unchanged()
        partial = PartialFolder(self.output, fingerprint, resume=resume)
        cache_limit = mx.set_cache_limit(buffer_bytes(weights_in_flight(plan)))
        try:
            resumed = bool(partial.done)
            notes = self._head_note(files)
            errors = self._converted(partial, verify_it=verify_it)
            seconds = time.perf_counter() - started
            report = _report(plan, self.output, errors, seconds, resumed=resumed, verified=verify_it, more=notes)
            self._finish(partial, report)
            return report
        except SourceChangedError:
            partial.discard()  # made of two sources
            raise
        finally:
            mx.set_cache_limit(cache_limit)
            partial.close()

    def _converted(self, partial: PartialFolder, *, verify_it: bool) -> dict[str, ModuleError] | None:
        """All weights, written and read back; what is no good in the source is none the next time either."""
        try:
            return self._write(partial, verify_it=verify_it)
        except (OutputError, SourceUnreadableError, VerificationError):
            raise  # of this machine, now: what is written is as good as before
        except MlxqwenError:
            partial.discard()
            raise

    def _write(self, partial: PartialFolder, *, verify_it: bool) -> dict[str, ModuleError] | None:
        plan, files = self.plan, self.files
        in_flight = weights_in_flight(plan)
        chunk, allowance = max(1, in_flight // self.workers), Allowance(in_flight)
        numpy_rows = NumpyRows(numpy_bytes(plan, self.workers))
        self._check_space(partial)
        target = TargetFiles(partial.path, plan.shards)
        around_all, around_each = computing(self.device, self.turn)
        try:
            written: dict[Task, Written] = {}

            def write(task: Task) -> Written:
                noted = partial.done.get(task.key)
                usable = noted is not None and (noted.error is not None or not verify_it)
                if noted is not None and usable and is_on_disk(plan, task, target, noted.digest):
                    return noted
                with around_each():
                    return write_task(plan, task, files, target, chunk, verify_it, allowance, numpy_rows)

            def note(task: Task, result: Written) -> None:
                written[task] = result
                if result is not partial.done.get(task.key):
                    partial.note(task.key, result)

            def check(task: Task) -> None:
                check_on_disk(plan, task, target, written[task].digest)

            with around_all:
                self._run("converting", write, note)
            target.flush()
            if not verify_it:
                return None
            errors = _summed(plan, written)
            try:
                check_errors(errors)
            except VerificationError:
                partial.discard()  # its journal has the same errors
                raise
            self._run("verifying", check, lambda task, result: None)
            return errors
        finally:
            target.close()

    def _run(self, stage: str, work: Callable[[Task], T], done: Callable[[Task, T], None]) -> None:
        """Do `work` on every task, and show how far it is."""
        seen = 0

        def finished(task: Task, result: T) -> None:
            nonlocal seen
            done(task, result)
            seen += (task.stop - task.start) * self.plan.modules[task.module].module.width
            self.progress(stage, seen, self.plan.parameters)

        run(work, tasks_of(self.plan), self.workers, finished)

    def _check_space(self, partial: PartialFolder) -> None:
        """Raise `DiskFullError` if the output cannot fit."""
        try:
            _check_room(self.plan, self.output)
        except DiskFullError:
            if not partial.done:
                partial.discard()
            raise

    def _head_note(self, files: SourceFiles) -> tuple[str, ...]:
        """Whether an ignored `lm_head` is the same as the embeddings that the config ties it to."""
        head, embeddings = self.plan.ignored_head, self.plan.modules[0].parts[0]
        if not head:
            return ()
        if _equal(files, head, embeddings):
            return ("lm_head equals the embeddings that config.json ties it to; it is left out",)
        return ("lm_head differs from the embeddings that config.json ties it to; config.json counts, it is left out",)

    def _finish(self, partial: PartialFolder, report: Report) -> None:
        plan = self.plan
        self.files.check_unchanged()
        names = {"config.json", INDEX_NAME, REPORT_NAME, "README.md", *map(str, companion_files(plan.folder))}
        names |= {shard.name for shard in plan.shards}
        partial.keep_only(names | {shard.name + PARTIAL_SUFFIX for shard in plan.shards})
        copy_companions(plan.folder, partial.path)
        partial.write_text(INDEX_NAME, index_of(plan.shards, plan.parameters))
        partial.write_text(REPORT_NAME, json.dumps(report.lasting(), indent=1, ensure_ascii=False) + "\n")
        partial.write_text("README.md", model_card(plan, report, self.output.name, self.hub_id))
        self.files.check_unchanged()
        for shard in plan.shards:
            try:
                (partial.path / (shard.name + PARTIAL_SUFFIX)).rename(partial.path / shard.name)
            except OSError as cause:
                raise unwritable(partial.path, cause) from None
        partial.write_text("config.json", config_text(plan))
        partial.publish(names)


def _fingerprint(plan: Plan, files: SourceFiles) -> dict[str, Any]:
    """What must be the same for a conversion to be resumed; from here on only the files that it reads are watched."""
    weights = {path for planned in plan.modules for path in planned.parts.paths}
    files.keep(sorted(weights.union(path for path in files.states if path.suffix != ".safetensors")))
    return {**plan.fingerprint(files.states), "versions": versions()}


def _check_room(plan: Plan, output: Path) -> None:
    """Raise `DiskFullError` if the output cannot fit. Files of an earlier run already take their part."""
    partial = partial_path(output)
    try:
        earlier = list(partial.iterdir()) if partial.is_dir() else []
        taken = sum(path.stat().st_blocks * 512 for path in earlier)
        free = shutil.disk_usage(output.parent).free
    except OSError as cause:
        raise unwritable(partial, cause) from None
    extras = sum((plan.folder / name).stat().st_size for name in companion_files(plan.folder))
    needed = plan.target_bytes + extras
    if needed - taken > free:
        raise DiskFullError(
            f"{output}: needs {size_of(needed)}, the disk has {size_of(free)} free",
            hint="Free some space, choose another disk, or ask for fewer --bits.",
        )


def _summed(plan: Plan, written: Mapping[Task, Written]) -> dict[str, ModuleError]:
    """The error of each module, its tasks summed in one order, whichever came first."""
    errors = {planned.module.path: ModuleError() for planned in plan.modules}
    for task in tasks_of(plan):
        error = written[task].error
        if error is not None:
            errors[plan.modules[task.module].module.path].add(error)
    return errors


def _equal(files: SourceFiles, one: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> bool:
    if one.keys() != other.keys():
        return False
    for word, info in one.items():
        twin = other[word]
        if (info.dtype, info.shape) != (twin.dtype, twin.shape):
            return False
        for start in range(0, info.nbytes, _COMPARED_BYTES):
            stop = min(start + _COMPARED_BYTES, info.nbytes)
            if files.read(info, start, stop) != files.read(twin, start, stop):
                return False
    return True


def versions() -> dict[str, str]:
    """What the output's bytes depend on beside the source and the options."""
    return {"mlxqwen": mlxqwen.__version__, "mlx": importlib.metadata.version("mlx")}


def _report(
    plan: Plan,
    output: Path,
    errors: dict[str, ModuleError] | None,
    seconds: float,
    *,
    resumed: bool,
    verified: bool,
    more: tuple[str, ...] = (),
) -> Report:
    target = "unquantized" if plan.target is None else f"{plan.target.bits}-bit, groups of {plan.target.group_size}"
    return Report(
        source=str(plan.folder),
        output=str(output) if output.name else "",
        source_format=plan.source.label,
        target=f"{target}, {plan.dtype}",
        dtype=plan.dtype,
        parameters=plan.parameters,
        source_bytes=plan.source_bytes,
        target_bytes=plan.target_bytes,
        bits_per_weight=plan.bits_per_weight,
        expected_peak_bytes=expected_peak(plan),
        verified=verified,
        resumed=resumed,
        seconds=seconds,
        kinds=kind_rows(plan, errors),
        notes=(*plan.notes, *more),
        versions=versions(),
        modules=module_facts(plan, errors),
    )


def _silent(stage: str, done: int, total: int) -> None:
    pass
