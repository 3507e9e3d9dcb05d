"""Columns of matrices, whose pieces lie far apart in a file: read one by one, or with what lies between."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from mlxqwen.files.checkpoint import Checkpoint
from mlxqwen_convert import source_files
from mlxqwen_convert.errors import SourceChangedError
from mlxqwen_convert.source_files import SourceFiles
from tests.convert.checkpoints import DENSE, make_source

ROWS, WIDTH = 40, 24


def matrix(folder: Path) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.int32]], Path]:
    """One that is the last in its file."""
    source = make_source(folder, "bf16", DENSE)
    numbers = np.random.default_rng(0).integers(0, 1 << 30, (ROWS, WIDTH)).astype(np.int32)
    source.stored["x.qweight"] = ("I32", numbers)
    source.write()
    return numbers, folder / "model.safetensors"


@pytest.mark.parametrize("span_bytes", [1, 4 * WIDTH * 7, 1 << 18])
@pytest.mark.parametrize("longest_gap", [0, 1 << 13])
@pytest.mark.parametrize("strip_bytes", [1, 1000, 1 << 21])
def test_columns_are_those_of_the_matrix(tmp_path: Path, strip_bytes: int, longest_gap: int, span_bytes: int) -> None:
    numbers, path = matrix(tmp_path)
    info = Checkpoint.open(tmp_path).tensors["x.qweight"]
    files = SourceFiles([path], strip_bytes=strip_bytes)
    with (
        patch.object(source_files, "_LONGEST_GAP", longest_gap),
        patch.object(source_files, "_SPAN_BYTES", span_bytes),
    ):
        for start, stop in ((0, 1), (1, 8), (8, 24), (23, 24), (0, 24), (5, 6)):
            assert np.array_equal(np.asarray(files.columns(info, start, stop)), numbers[:, start:stop])
    files.close()


def test_short_gaps_take_one_call_for_many_rows(tmp_path: Path) -> None:
    _, path = matrix(tmp_path)
    info = Checkpoint.open(tmp_path).tensors["x.qweight"]
    files = SourceFiles([path], strip_bytes=1)
    with patch.object(source_files, "_read_into", wraps=source_files._read_into) as reading:
        files.columns(info, 3, 5)
        assert reading.call_count == 1
        with patch.object(source_files, "_LONGEST_GAP", 0):
            files.columns(info, 7, 9)
        assert reading.call_count == 1 + ROWS
    files.close()


@pytest.mark.parametrize("longest_gap", [0, 1 << 13])
def test_a_file_that_became_shorter_is_told(tmp_path: Path, longest_gap: int) -> None:
    _, path = matrix(tmp_path)
    info = Checkpoint.open(tmp_path).tensors["x.qweight"]
    files = SourceFiles([path], strip_bytes=1)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4 * WIDTH)
    with (
        patch.object(source_files, "_LONGEST_GAP", longest_gap),
        pytest.raises(SourceChangedError, match=r"x\.qweight"),
    ):
        files.columns(info, 3, 5)
    files.close()
