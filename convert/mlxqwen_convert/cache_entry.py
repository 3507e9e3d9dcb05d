"""An entry of the cache of converted models: which source it belongs to, and whether the model in it is whole.

An entry's key is that of the source, the state of its files, the converter's version and its options.

    converted/KEY/NAME-mlx/           the model, absent or whole
                  NAME-mlx.partial/   the model while it is made
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import mlxqwen
from mlxqwen.files.checkpoint import INDEX_NAME
from mlxqwen.files.model_files import QUANTIZATION_FILES
from mlxqwen.files.store import Entry, Store, tell_of_others
from mlxqwen_convert.companions import companion_files
from mlxqwen_convert.errors import OutputError
from mlxqwen_convert.plan import Options
from mlxqwen_convert.source_files import file_state

__all__ = ["OPTIONS", "CacheEntry", "Source", "store"]

OPTIONS = Options()
"""What models are converted with when they are loaded."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is converted.

    Args:
        folder: without links.
        name: hub id or path.
        commit: of a hub id.
    """

    folder: Path
    name: str
    commit: str

    @classmethod
    def of(cls, folder: Path) -> Source:
        """The source in `folder`: in the hub's cache it has the hub's id and commit, elsewhere its path for a name."""
        real = folder.resolve()
        repository, snapshots, commit = ("", *real.parts)[-3:] if len(real.parts) > 2 else ("", "", "")
        if repository.startswith("models--") and snapshots == "snapshots":
            return cls(real, repository.removeprefix("models--").replace("--", "/", 1), commit)
        return cls(real, str(real), "")

    @property
    def label(self) -> str:
        """The name, with the first seven digits of the commit if there is one."""
        return f"{self.name}@{self.commit[:7]}" if self.commit else self.name

    @property
    def short_name(self) -> str:
        """Fit for a folder's name."""
        return re.sub(r"[^\w.-]+", "_", self.name.rpartition("/")[2], flags=re.ASCII).lstrip(".")[:80] or "model"

    def facts(self) -> dict[str, str]:
        """For the entry's record; a name that is no UTF-8 is spelled out."""
        facts = {"source": self.label, "folder": str(self.folder), "mlxqwen": mlxqwen.__version__}
        return {key: os.fsencode(value).decode("utf-8", "backslashreplace") for key, value in facts.items()}

    def key(self) -> str:
        """Raises `SourceError` where a file cannot be read."""
        names = {path.name for path in self.folder.glob("*.safetensors")} | {"config.json"}
        names |= {str(path) for path in companion_files(self.folder)}
        names |= {name for name in (INDEX_NAME, *QUANTIZATION_FILES) if (self.folder / name).exists()}
        states = [[name, *_state(self.folder / name)] for name in sorted(names)]
        parts = [self.name, self.commit, states, mlxqwen.__version__, asdict(OPTIONS)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _state(path: Path) -> tuple[int, int | str]:
    """Size, and time of change in nanoseconds; of a file in the hub's cache the name, which is that of its content."""
    size, changed, _ = file_state(path)
    real = path.resolve()
    return size, real.name if real.parent.name == "blobs" else changed


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The converted model of an entry."""

    entry: Entry
    name: str

    @property
    def folder(self) -> Path:
        """Where the converted model is."""
        return self.entry.folder / self.name

    @property
    def partial(self) -> Path:
        """Where the conversion writes until it is finished."""
        return self.entry.folder / f"{self.name}.partial"

    def is_whole(self) -> bool:
        """Whether the model is there, the user's own, with all its files in the sizes that they were written in."""
        sizes = (self.entry.read_record() or {}).get("files")
        return isinstance(sizes, dict) and "config.json" in sizes and sizes == self.entry.files(self.folder)

    def settle(self) -> bool:
        """Note the files of a finished model; remove a damaged one. Whether there is a whole one now."""
        record = self.entry.read_record()
        if not self.folder.is_dir():
            return False
        if record is None or "files" in record or not (self.folder / "config.json").is_file():
            if self.entry.files(self.folder) is None:
                tell_of_others(self.folder)
            self.entry.clear(self.folder)
            return False
        self.entry.make_own(self.folder)
        self.entry.write_record({**record, "files": self.entry.files(self.folder)})
        return True

    def touch(self, source: Source) -> None:
        """Note that it is used, and where the same model of the hub was found now; a cache may be read-only."""
        record, facts = self.entry.read_record(), source.facts()
        if record is not None and record.get("folder") != facts["folder"]:
            with suppress(OSError):
                self.entry.write_record({**record, **facts})
        self.entry.touch()


def store() -> Store:
    """The cache's entries. Raises `OutputError` where there can be none."""
    return Store("converted", error=OutputError)
