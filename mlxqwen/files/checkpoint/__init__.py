"""Weight files: a folder → a validated table of tensors; tensors → a folder, atomically.

The only room that touches weight files.
"""

from mlxqwen.files.checkpoint.blank import blank_arrays, have_pages
from mlxqwen.files.checkpoint.folder import INDEX_NAME, Checkpoint, headers_read_once
from mlxqwen.files.checkpoint.reading import TensorReader
from mlxqwen.files.checkpoint.safetensors_file import (
    ITEM_BYTES,
    MLX_DTYPES,
    TensorInfo,
    load_safetensors,
    read_header,
)
from mlxqwen.files.checkpoint.spare import SpareTensors, spare_tensors
from mlxqwen.files.checkpoint.writing import save_safetensors, write_checkpoint

__all__ = [
    "INDEX_NAME",
    "ITEM_BYTES",
    "MLX_DTYPES",
    "Checkpoint",
    "SpareTensors",
    "TensorInfo",
    "TensorReader",
    "blank_arrays",
    "have_pages",
    "headers_read_once",
    "load_safetensors",
    "read_header",
    "save_safetensors",
    "spare_tensors",
    "write_checkpoint",
]
