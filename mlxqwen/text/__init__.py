"""Text and token ids: the tokenizer, chat templates run in bounds, stop strings, forged special tokens kept text.

Messages and text go in, ids come out, and back. What a conversation means is for `mlxqwen.chat`.
"""
