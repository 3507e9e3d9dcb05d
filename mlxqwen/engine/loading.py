"""From a folder or hub id to a model with its tokenizer: resolve, check, convert, read, in this order."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple, Protocol, Unpack

import mlx.core as mx

from mlxqwen.engine.memory import account
from mlxqwen.engine.scheduler import EVALUATION
from mlxqwen.errors import MlxqwenError, OptionError
from mlxqwen.files.adapters import refuse_adapter
from mlxqwen.files.aliases import naming_alias
from mlxqwen.files.checkpoint import headers_read_once
from mlxqwen.files.config import ModelConfig
from mlxqwen.files.hub import resolve_model
from mlxqwen.forks import check_process
from mlxqwen.model.loading import (
    LoadOptions,
    PreparedModel,
    check_memory,
    compute_dtype,
    prepare_model,
    read_config,
)
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.shutdown import NATIVE_WORK
from mlxqwen.text.tokenizer import Tokenizer

__all__ = [
    "Conversion",
    "Converter",
    "MakeRoom",
    "OnConvert",
    "check_files",
    "load_model_alone",
    "load_models",
    "locate_model",
    "read_fitting_tokenizer",
]

OnConvert = Callable[[str, int, int], None]
"""Called as a conversion goes on: "converting" or "verifying", weights done, weights in all."""

MakeRoom = Callable[[int], None]
"""Called with the bytes that weights will take in memory, before they are converted or read."""


class Conversion(Protocol):
    """The MLX form of a folder whose format does not run: converted already, or planned and not written."""

    @property
    def size(self) -> tuple[mx.Dtype, int, int] | None:
        """The dtype of the floats, the bytes of packed codes, the number of floats; None if the MLX form exists."""

    def run(self, progress: OnConvert | None = None) -> Path:
        """The folder of the MLX form, converted now if it does not exist. Raises `MlxqwenError`."""


Converter = Callable[[Path, ExitStack], Conversion]
"""Finds or plans the MLX form of a folder, which stays where it is until the stack closes. Raises `MlxqwenError`."""


def load_models(
    path_or_id: str | PathLike[str] | None = None,
    *,
    draft: str | PathLike[str] | None = None,
    revision: str | None = None,
    on_convert: OnConvert | None = None,
    converter: Converter | None = None,
    make_room: MakeRoom | None = None,
    **options: Unpack[LoadOptions],
) -> tuple[Qwen3ForCausalLM, Tokenizer, Qwen3ForCausalLM | None]:
    """Load a model with its tokenizer, and perhaps a draft model. All checks come before weights are read.

    Args:
        path_or_id: a folder, a hub id, or None for the demo model.
        draft: folder or hub id of the draft model; `revision` and options of RoPE are not for it.
        revision: a branch, tag or commit of a hub id.
        on_convert: see `OnConvert`.
        converter: for FP8, AWQ, GPTQ and the like; by default `mlxqwen_convert` converts into the user's cache.
        make_room: see `MakeRoom`; what it raises is raised.
        options: see `prepare_model`.

    Raises:
        MlxqwenError: one of the trees in `mlxqwen.errors` and `mlxqwen_convert.errors`, by what is wrong.
    """
    check_process()
    convert = converter or _default_converter()
    folder = locate_model(path_or_id, revision=revision, **options)
    with NATIVE_WORK, naming_alias(path_or_id), ExitStack() as held:
        checked = _check(folder, convert, held, options)
        tokenizer = read_fitting_tokenizer(folder)
        make_room = make_room or (lambda nbytes: None)
        if draft is None:
            make_room(checked.weight_bytes)
            return checked.prepare(on_convert).read(_Turn()), tokenizer, None
        with _naming_the_draft(draft):
            draft_folder = locate_model(draft, **_options_of_draft(options))
        _check_vocabulary(draft_folder, folder, tokenizer)
        with _naming_the_draft(draft):
            checked_draft = _check(draft_folder, convert, held, _options_of_draft(options))
        checked.check_memory(held_bytes=checked_draft.weight_bytes)
        make_room(checked.weight_bytes + checked_draft.weight_bytes)
        prepared = checked.prepare(on_convert)
        with _naming_the_draft(draft):
            prepared_draft = checked_draft.prepare(on_convert)
        return prepared.read(_Turn()), tokenizer, prepared_draft.read(_Turn())


def load_model_alone(
    path_or_id: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    on_convert: OnConvert | None = None,
    **options: Unpack[LoadOptions],
) -> Qwen3ForCausalLM:
    """Load a model without its tokenizer, which need not be there, for those who give it token ids.

    Arguments and errors are those of `load_models`.
    """
    check_process()
    folder = locate_model(path_or_id, revision=revision, needs_tokenizer=False, **options)
    with NATIVE_WORK, naming_alias(path_or_id), ExitStack() as held:
        return _check(folder, _default_converter(), held, options).prepare(on_convert).read(_Turn())


class _Turn:
    """Holds the process's right to evaluate for a part of the work; then replies of other models have theirs."""

    def __enter__(self) -> None:
        EVALUATION.acquire()

    def __exit__(self, *error: object) -> None:
        EVALUATION.release()
        NATIVE_WORK.pause()
        if any(one.running or one.reading or one.waiting for one in account().schedulers):
            time.sleep(0.001)  # a lock that is asked for again at once is not given to others


def locate_model(
    path_or_id: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    needs_tokenizer: bool = True,
    **options: Unpack[LoadOptions],
) -> Path:
    """The folder of a model; one of the hub is downloaded, once all is checked that can be checked before.

    Args:
        path_or_id, revision: see `load_models`.
        needs_tokenizer: whether a model of the hub without a tokenizer is refused.
        options: that the model is to be loaded with.

    Raises:
        MlxqwenError: there is no such model, or it cannot be loaded.
    """
    return resolve_model(
        path_or_id, revision=revision, check=partial(check_files, needs_tokenizer=needs_tokenizer, **options)
    )


def _default_converter() -> Converter:
    def find_or_plan(folder: Path, held: ExitStack) -> Conversion:
        from mlxqwen_convert.cached import find_or_plan  # the only way from `mlxqwen` to the converter of weights

        return find_or_plan(folder, held, _turn_beside_replies)

    return find_or_plan


def _turn_beside_replies() -> _Turn | None:
    """What a conversion takes for each part of its work where models reply meanwhile: theirs may be another device."""
    return _Turn() if list(account().schedulers) else None


class _Checked(NamedTuple):
    """A folder that can be loaded, as it is or once it is converted.

    Args:
        weight_bytes: that the model takes in memory.
        dtype: that it computes in.
        found: what reads it, or what makes a folder that can be read.
    """

    folder: Path
    options: LoadOptions
    weight_bytes: int
    dtype: mx.Dtype
    found: PreparedModel | Conversion

    def check_memory(self, held_bytes: int = 0) -> None:
        """Raise `InsufficientMemoryError` unless the weights fit beside `held_bytes` of a draft model."""
        if not self.options.get("force", False):
            check_memory(self.folder, self.weight_bytes, self.dtype, held_bytes, self.options.get("device"))

    def prepare(self, on_convert: OnConvert | None) -> PreparedModel:
        """Prepare the model for reading, converted first if its format does not run."""
        if isinstance(self.found, PreparedModel):
            return self.found
        return prepare_model(self.found.run(on_convert), **self.options)


def _check(folder: Path, convert: Converter, held: ExitStack, options: LoadOptions) -> _Checked:
    """Check all of a folder that can be checked before weights are read or converted. Raises `MlxqwenError`."""
    with headers_read_once():
        config = read_config(
            folder,
            dtype=options.get("dtype"),
            rope_scaling=options.get("rope_scaling"),
            yarn_factor=options.get("yarn_factor"),
            yarn=options.get("yarn"),
        )
        if config.foreign_quantization is None:
            return _as_it_is(folder, options)
    if not options.get("ignore_adapter", False):
        refuse_adapter(folder)
    conversion = convert(folder, held)
    if conversion.size is None:
        return _as_it_is(conversion.run(), options)
    checked = _Checked(folder, options, *_in_memory(conversion.size, options), conversion)
    checked.check_memory()
    return checked


def _as_it_is(folder: Path, options: LoadOptions) -> _Checked:
    prepared = prepare_model(folder, **options)
    return _Checked(folder, options, prepared.weight_bytes, prepared.dtype, prepared)


def check_files(folder: Path, *, needs_tokenizer: bool = True, **options: Unpack[LoadOptions]) -> None:
    """Check all of a model that can be checked without its weights: headers, sizes, memory, the tokenizer.

    Nothing is logged: notes come when the weights are read.

    Args:
        folder: the model's, or a preview of it.
        needs_tokenizer: whether there has to be one.
        options: that the model is to be loaded with.

    Raises:
        MlxqwenError: it cannot be loaded.
    """
    with _quiet():
        if needs_tokenizer:
            read_fitting_tokenizer(folder)
        _check_headers(options, folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep this thread's messages out of the log."""
    thread, logger = threading.get_ident(), logging.getLogger("mlxqwen")

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_of_another)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another)


def _check_headers(options: LoadOptions, folder: Path) -> None:
    if ModelConfig.from_folder(folder).foreign_quantization is None:
        prepare_model(folder, **options)
        return
    from mlxqwen_convert.cached import planned

    if not options.get("ignore_adapter", False):
        refuse_adapter(folder)
    size, _ = planned(folder)
    if not options.get("force", False):
        check_memory(folder, *_in_memory(size, options), device=options.get("device"))


def _in_memory(size: tuple[mx.Dtype, int, int], options: LoadOptions) -> tuple[int, mx.Dtype]:
    """The bytes that a conversion of this size takes in memory, and the dtype that it computes in."""
    stored, packed_bytes, numbers = size
    compute = compute_dtype(stored, options.get("dtype"), options.get("device"))
    return packed_bytes + numbers * compute.size, compute


def _options_of_draft(options: LoadOptions) -> LoadOptions:
    """The options that a draft model is loaded with too."""
    shared = options.copy()
    shared.pop("rope_scaling", None)
    shared.pop("yarn_factor", None)
    shared.pop("yarn", None)
    return shared


def read_fitting_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder. Raises `TokenizerError`: there is none, or its ids do not fit the model."""
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(ModelConfig.from_folder(folder).vocab_size)
    return tokenizer


@contextmanager
def _naming_the_draft(typed: str | PathLike[str]) -> Iterator[None]:
    """Let errors say that they are about the draft model."""
    try:
        with naming_alias(typed):
            yield
    except MlxqwenError as error:
        raise type(error)(f"draft model: {error.problem}", hint=error.hint) from None


def _check_vocabulary(draft_folder: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Check that the draft model has the same token ids. Raises `OptionError`."""
    from mlxqwen.engine.speculation.drafter import check_vocabulary

    check_vocabulary(ModelConfig.from_folder(draft_folder), ModelConfig.from_folder(folder))
    if _are_same_files(draft_folder / "tokenizer.json", folder / "tokenizer.json"):
        return
    if not tokenizer.has_tokens_of(read_fitting_tokenizer(draft_folder)):
        raise OptionError(
            f"draft model {draft_folder}: found other tokens in its tokenizer.json than in that of {folder}, expected "
            "the same",
            hint="Take a smaller model of the same family, which shares its tokenizer.",
        )


def _are_same_files(first: Path, second: Path) -> bool:
    """Whether both files can be read and have the same SHA-256."""
    import hashlib

    try:
        with first.open("rb") as one, second.open("rb") as other:
            return hashlib.file_digest(one, "sha256").digest() == hashlib.file_digest(other, "sha256").digest()
    except OSError:
        return False
