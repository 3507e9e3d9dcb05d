"""A `tokenizer.json` → a backend: the compiled one if there is one, else the library's."""

from __future__ import annotations

from pathlib import Path

from mlxqwen.errors import TokenizerError
from mlxqwen.files.json_file import read_bounded
from mlxqwen.text.tokenizer_backend import store
from mlxqwen.text.tokenizer_backend.compiled import CompiledBackend
from mlxqwen.text.tokenizer_backend.library import LibraryBackend, TokenizerBackend
from mlxqwen.text.tokenizer_backend.tables import DamagedTablesError

__all__ = ["open_backend"]

MAX_TOKENIZER_BYTES = 256 * 2**20
MIN_COMPILED_BYTES = 2**20
"""A smaller file is read by the library in less than 30 ms."""
MAX_COMPILED_BYTES = 64 * 2**20
"""Of a larger one the cache would grow more than anybody expects."""


def open_backend(path: Path) -> TokenizerBackend:
    """The tokenizer of a file.

    A large one is compiled in the background when it is first seen, which costs its reader the start of a process.
    From then on only its tables are read, until so much has been encoded that the whole tokenizer is worth its price.
    If the file is not there any more by then, or another one, the tables go on.

    Raises:
        TokenizerError: the file is missing, damaged, too large, or of another kind of tokenizer.
    """
    data = _read(path)
    if not MIN_COMPILED_BYTES <= len(data) <= MAX_COMPILED_BYTES or store.is_switched_off():
        return LibraryBackend.parse(data, str(path))
    digest = store.digest(data)
    entry = store.entry_path(digest)
    tables = None if entry is None else store.read_tables(entry, path)
    if entry is not None and tables is not None and "skeleton" in tables.facts:
        try:
            return CompiledBackend(tables, lambda: _read_again(path, digest))
        except DamagedTablesError:
            store.discard(entry)
            tables = None
    library = LibraryBackend.parse(data, str(path))
    if entry is not None and tables is None:
        from mlxqwen.text.tokenizer_backend import background

        background.start(path, digest, entry)
    return library


def _read_again(path: Path, digest: str) -> LibraryBackend:
    data = _read(path)
    if store.digest(data) != digest:
        raise TokenizerError(
            f"{path}: changed since it was first read, expected the same content", hint="Load the model again."
        )
    return LibraryBackend.parse(data, str(path))


def _read(path: Path) -> bytes:
    return read_bounded(path, error=TokenizerError, max_bytes=MAX_TOKENIZER_BYTES)
