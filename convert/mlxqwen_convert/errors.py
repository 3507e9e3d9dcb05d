"""What the converter raises on purpose, under `mlxqwen.errors.MlxqwenError`.

ConversionError
├── SourceError          weights that cannot be converted: missing or damaged scales, codes, groups, blocks
│   ├── SourceChangedError   the source is not what it was when the conversion was planned
│   └── SourceUnreadableError   a file that the system cannot read, now at least
├── OutputError          a target that exists, overlaps the source, is locked or cannot be written
│   └── DiskFullError        too little room, before or midway; what was written can be resumed
├── ResumeError          a partial conversion that was begun from other weights or with other options
└── VerificationError    what was written is not what the source holds, within its bound
"""

from __future__ import annotations

from mlxqwen.errors import MlxqwenError

__all__ = [
    "ConversionError",
    "DiskFullError",
    "OutputError",
    "ResumeError",
    "SourceChangedError",
    "SourceError",
    "SourceUnreadableError",
    "VerificationError",
]


class ConversionError(MlxqwenError):
    """The root of the converter's errors."""


class SourceError(ConversionError):
    """Weights that cannot be converted: tensor and index are named."""


class SourceChangedError(SourceError):
    """The source is not what it was when the conversion was planned."""


class SourceUnreadableError(SourceError):
    """A file that the system cannot read; what was converted so far is as good as before."""


class OutputError(ConversionError):
    """A target that exists, overlaps the source, is in use or cannot be written."""


class DiskFullError(OutputError):
    """The disk has too little room, found before anything is written or midway."""


class ResumeError(ConversionError):
    """A partial conversion that was begun from other weights or with other options."""


class VerificationError(ConversionError):
    """What was written differs from the source by more than its bound."""
