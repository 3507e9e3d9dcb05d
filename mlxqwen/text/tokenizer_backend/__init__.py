"""What turns text into ids and ids into spellings: the `tokenizers` library, or a compiled form of what it read.

The library needs a third of a second to read Qwen3's `tokenizer.json`, most of it for a hash map of 151,387 merges of
which a prompt uses a handful. So the tables of vocabulary and merges are kept in the user's cache folder, in a form
that needs no reading. A library tokenizer without merges still normalizes, splits and finds added tokens; what it
splits into bytes is merged by the tables, until so much has been encoded that the whole tokenizer is worth its price.
"""

from mlxqwen.text.tokenizer_backend.library import LibraryBackend, TokenizerBackend
from mlxqwen.text.tokenizer_backend.opening import open_backend

__all__ = ["LibraryBackend", "TokenizerBackend", "open_backend"]
