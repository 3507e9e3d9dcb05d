"""A prompt's cache in a file: system prompts and documents are read once, and not again in the next run."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxqwen.cache import KVCache, cache_identity, load_cache, make_cache
from mlxqwen.cache.prefix import PrefixCache, common_prefix
from mlxqwen.device import Device, current_device
from mlxqwen.errors import CacheError, InsufficientMemoryError, MlxqwenError, OptionError
from mlxqwen.files.checkpoint import read_header
from mlxqwen.model.qwen3 import Qwen3ForCausalLM

__all__ = ["PromptCache", "check_prompt_cache", "check_prompt_cache_file", "weights_digest"]

logger = logging.getLogger("mlxqwen")

_FORMAT = "mlxqwen-prompt-cache-2"
_WORDS = {2: mx.uint16, 4: mx.uint32}  # as wide as an item
_MAX_TOKENS = 8_000_000  # their ids stand in the header, which may have 100 MB
_LEFT_BEHIND = 24 * 3600  # seconds, after which what is being written is not any more
_OTHER_FILE = "Give each model and each set of options a file of its own, or remove this one to begin anew."
_NO_PROMPT_CACHE = "Give another name, or remove the file: it is made anew where there is none."
_MADE_ANEW = "Give the name of a file: it is made where there is none."


class PromptCache:
    """A cache for prompts that share their front, kept in a file from one run to the next.

    A prompt is read only from where it differs from what the cache holds, which at first is what the file holds. The
    file never loses what it has: `save` adds to it if what was read last goes on with all of it, as a conversation does
    that continues. Where that branches off, as another question about the same document does, the file stays as it is,
    and whatever is asked next shares the same front. To begin with something else, remove the file. One that cannot be
    written to (`chmod -w`) stays as it is for good.

    A window (`max_kv_size`) that is full cannot go back: a prompt that branches off is read anew. So a file from before
    the window was full is not replaced by one from after; one that was full from the beginning is only good for a
    conversation that continues.

    The file knows the weights by `weights_digest`, and its own numbers by sums, so that damage is found. Who can write
    it decides what the model takes for read: it deserves the trust that the model's own files do.

    Args:
        path: the file; it need not be there yet.
        model: reads the prompts.
        max_kv_size, keep, kv_bits: of the cache, as for `make_cache`.
        device: the machine; by default this one.

    Raises:
        CacheError: the file is no prompt cache or a damaged one, or one of another model or of other options; or it
            could never be written.
        InsufficientMemoryError: it is larger than the memory that is left.
        OptionError: options of the cache that cannot be.

    Attributes:
        path, model: as given.
        held: what has been read.
        stored: the tokens that the file held when it was opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Qwen3ForCausalLM,
        *,
        max_kv_size: int | None = None,
        keep: int = 4,
        kv_bits: int | None = None,
        device: Device | None = None,
    ) -> None:
        self.path = Path(path)
        self.model = model
        self._weights = weights_digest(model)
        self._max_kv_size, self._keep, self._kv_bits = max_kv_size, keep, kv_bits
        self.held = PrefixCache(self.new_cache())
        self.stored: tuple[int, ...] = ()
        stored = check_prompt_cache_file(path)
        if stored is not None:
            self._check(stored)
            self.stored = stored.tokens
            self.held = PrefixCache(self._load(stored, device or current_device()), stored.tokens)

    def new_cache(self) -> KVCache:
        """An empty cache of the same kind."""
        return make_cache(self.model, max_kv_size=self._max_kv_size, keep=self._keep, kv_bits=self._kv_bits)

    @property
    def unstored_tokens(self) -> int:
        """How many of the tokens read last were not in the file when it was opened."""
        return len(self.held.tokens) - common_prefix(self.held.tokens, self.stored)

    def save(self) -> bool:
        """Write what was read last, if it goes on with all that the file holds → whether it was written.

        The file is replaced as a whole or not at all; a new one, which tells what was said, is its owner's alone. What
        another run has added in the meantime counts as held. Not written is what was read with weights that have been
        changed since.

        Raises:
            CacheError: it cannot be written.
        """
        tokens, cache = self.held.tokens, self.held.cache
        if not tokens or len(tokens) != cache.offset or not self._may_write(tokens, cache):
            return False
        if weights_digest(self.model) != self._weights:
            logger.warning("%s: stays as it is, for the model's weights were changed while this run went on", self.path)
            return False
        _fit_buffers(cache)
        metadata = {
            "prompt_cache": _FORMAT,
            "weights": self._weights,
            "dtype": _name(self.model.dtype),
            "tokens": ",".join(map(str, tokens)),
            "sums": _cache_digest(cache, tokens),
        }
        from tempfile import TemporaryDirectory

        target = self.path.resolve()  # a link stays one
        try:
            prefix = _partial_prefix(target)
            _remove_left_behind(target.parent, prefix)
            with TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
                written = Path(folder) / "cache.safetensors"
                cache.save(written, metadata)
                if not self._may_write(tokens, cache):  # writing takes long enough for another run to end
                    return False
                written.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o600)
                written.replace(target)
        except CacheError:
            raise
        except MlxqwenError as error:
            raise _unwritable(self.path, _reason(error.__context__ or error)) from None
        except OSError as error:
            raise _unwritable(self.path, _reason(error)) from None
        return True

    def _may_write(self, tokens: Sequence[int], cache: KVCache) -> bool:
        """Whether nothing that the file is good for would be lost; what is in the way of a longer one is told."""
        try:
            stored = check_prompt_cache_file(self.path)
            if stored is not None:
                self._check(stored)
        except CacheError as error:
            if not os.path.lexists(self.path):
                raise
            logger.warning("%s; the file was changed while this run went on, and stays as it is", error.problem)
            return False
        if len(tokens) > _MAX_TOKENS:
            logger.warning("%s: stays as it is, for a file may hold at most %s tokens", self.path, f"{_MAX_TOKENS:,}")
            return False
        if stored is None:
            return True
        if len(tokens) <= len(stored.tokens) or common_prefix(stored.tokens, tokens) < len(stored.tokens):
            return False
        if stored.can_go_back and not cache.can_trim(1):
            return False
        if not os.access(self.path, os.W_OK) or not os.access(self.path.resolve().parent, os.W_OK):
            logger.warning("%s: cannot be written to, so it stays as it is", self.path)
            return False
        return True

    def _check(self, stored: _StoredPrompt) -> None:
        """Refuse what this model, computing in this way, would not have written. Raises `CacheError`."""
        own = self.new_cache()
        expected = {
            "model": ("a model of another shape or RoPE scaling", cache_identity(self.model.config)),
            "kv_bits": ("other --kv-bits", str(own.kv_bits or 0)),
            "kv_group_size": ("other groups of its quantized numbers", str(own.kv_group_size)),
            "max_kv_size": ("another --max-kv-size", str(own.max_kv_size or 0)),
            "keep": ("another --kv-keep", str(own.keep)),
            "user.dtype": ("another dtype", _name(self.model.dtype)),
        }
        for name, (what, value) in expected.items():
            found = stored.metadata.get(name)
            if found != value:
                shown = "" if name == "model" else f": found {_number(found)}, expected {_number(value)}"
                raise CacheError(f"{self.path}: made with {what}{shown}", hint=_OTHER_FILE)
        if stored.metadata.get("user.weights") != self._weights:
            raise CacheError(
                f"{self.path}: made with other weights than this model's, or by another version of mlxqwen",
                hint=_OTHER_FILE,
            )
        if stored.metadata.get("offsets") != str(len(stored.tokens)):
            raise _damaged(self.path)
        if max(stored.tokens) >= self.model.config.vocab_size:
            raise _damaged(self.path)

    def _load(self, stored: _StoredPrompt, device: Device) -> KVCache:
        left = device.usable_memory - mx.get_active_memory()
        if stored.nbytes > left:
            raise InsufficientMemoryError(
                f"{self.path}: takes {stored.nbytes / 1e9:.1f} GB, this machine has {max(left, 0) / 1e9:.1f} GB left",
                hint="Remove the file, or use --kv-bits 8 or a smaller model, with a file of its own.",
            )
        try:
            cache, metadata = load_cache(self.path, self.model)
            same = metadata.get("tokens") == stored.metadata["user.tokens"]
            if not same or metadata.get("sums") != _cache_digest(cache, stored.tokens):
                raise _damaged(self.path)
        except CacheError:
            raise
        except MlxqwenError as error:
            raise CacheError(error.problem, hint=_NO_PROMPT_CACHE) from None
        except RuntimeError as error:  # MLX reads a file's numbers late
            if "allocate" in str(error):
                raise
            raise _damaged(self.path) from None
        return cache


def check_prompt_cache(name: str, found: object, model: Qwen3ForCausalLM) -> PromptCache:
    """Refuse what is no prompt cache, or is one of another model. Raises `OptionError`, `CacheError`."""
    if not isinstance(found, PromptCache):
        raise OptionError(f"{name}: found {type(found).__name__}, expected what PromptCache(path, model) makes")
    if found.model is not model:
        raise CacheError(f"{name}: made for another model", hint="Make it with PromptCache(path, engine.model).")
    return found


@dataclass(frozen=True, slots=True)
class _StoredPrompt:
    """What the header of a file says."""

    tokens: tuple[int, ...]
    metadata: Mapping[str, str]
    nbytes: int

    @property
    def can_go_back(self) -> bool:
        window = self.metadata.get("max_kv_size", "0")
        return window == "0" or len(self.tokens) <= int(window)


def check_prompt_cache_file(path: str | os.PathLike[str]) -> _StoredPrompt | None:
    """Read the header of a prompt cache; None if there is no such file, but could be, or where a link leads.

    Raises:
        CacheError: something else is there, or nothing can be.
    """
    if not os.fspath(path):
        raise CacheError("prompt cache: found an empty name, expected that of a file", hint=_MADE_ANEW)
    path = Path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise CacheError(f"{path}: a folder, expected a file", hint="Give the name of a file in it.")
        if not stat.S_ISREG(kind):
            raise CacheError(f"{path}: not a regular file, expected the name of one", hint=_MADE_ANEW)
        tensors, metadata = read_header(path)
    except CacheError:
        raise
    except FileNotFoundError:
        _check_place(path)
        return None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise CacheError(f"{path}: cannot be read: {problem}", hint="Give another name.") from None
    except MlxqwenError as error:
        raise CacheError(error.problem, hint=_NO_PROMPT_CACHE) from None
    if metadata.get("user.prompt_cache") != _FORMAT:
        raise CacheError(f"{path}: no prompt cache, or one of another version of mlxqwen", hint=_NO_PROMPT_CACHE)
    try:
        tokens = tuple(map(_token, metadata["user.tokens"].split(",")))
    except (KeyError, ValueError):
        raise _damaged(path) from None
    return _StoredPrompt(tokens, metadata, sum(tensor.nbytes for tensor in tensors.values()))


def weights_digest(model: Qwen3ForCausalLM) -> str:
    """Tells a model from another of the same shape: SHA-256 over each row's sum of bit patterns.

    All weights are read once, as they are to decode a token. It cannot miss that a single number of a row differs, but
    that a row has the same numbers in another order, or changes that cancel to the bit: no training and no quantization
    makes those. It is no defence against somebody who looks for two models of one digest. The same weights in another
    dtype, or laid out in memory in another way, have another digest.
    """
    parameters: Any = tree_flatten(cast(Any, model).parameters())
    return _digest(parameters)


def _cache_digest(cache: KVCache, tokens: Sequence[int]) -> str:
    """The same over what a cache holds, whose buffers are full, and over the tokens that it was made of."""
    parts = (
        (f"{number} {name} {place}", part)
        for number, layer in enumerate(cache)
        for name, stored in (("keys", layer.keys), ("values", layer.values))
        for place, part in enumerate(stored)
    )
    return _digest([("tokens", mx.array(list(tokens), dtype=mx.uint32)[:, None]), *parts])


def _digest(arrays: Iterable[tuple[str, mx.array]]) -> str:
    sums = {
        f"{name} {array.dtype} {array.shape}\n": mx.sum(array.view(_WORDS[array.dtype.size]), axis=-1)
        for name, array in arrays
    }
    mx.eval(sums)
    import hashlib

    sha = hashlib.sha256()
    for name, row_sums in sums.items():
        sha.update(name.encode())
        sha.update(memoryview(cast(Any, row_sums)))
    return sha.hexdigest()


def _fit_buffers(cache: KVCache) -> None:
    """Let go of slots without tokens, a layer at a time, so that a file is written without a second cache."""
    slots = cache.placement.slots_for(cache.offset)
    for layer in cache:
        layer.keys = tuple(mx.contiguous(part[..., :slots, :]) for part in layer.keys)
        layer.values = tuple(mx.contiguous(part[..., :slots, :]) for part in layer.values)
        mx.eval(layer.keys, layer.values)


def _partial_prefix(target: Path) -> str:
    """Of the folders in which `target` is made: the same in every run, and short however long its name is."""
    return f".partial-{zlib.crc32(os.fsencode(target.name)):08x}-"


def _remove_left_behind(folder: Path, prefix: str) -> None:
    """Remove what runs that were killed have left."""
    for left in folder.glob(f"{prefix}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(left)


def _check_place(path: Path) -> None:
    """Complain before a long prompt is read."""
    folder = (path.resolve() if path.is_symlink() else path).parent
    if not folder.is_dir():
        raise CacheError(f"{path}: there is no folder {folder}", hint="Make it first, or give another name.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(path, "no permission to write in its folder")


def _token(digits: str) -> int:
    token = int(digits)
    if token < 0:
        raise ValueError
    return token


def _number(found: str | None) -> str:
    return "none" if found in (None, "0") else str(found)[:40]


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _damaged(path: Path) -> CacheError:
    return CacheError(f"{path}: damaged: what it holds does not belong together", hint="Remove it to begin anew.")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _unwritable(path: Path, reason: str) -> CacheError:
    return CacheError(
        f"{path}: cannot be written: {reason}", hint="Check the folder's permissions and the free space, or the name."
    )
