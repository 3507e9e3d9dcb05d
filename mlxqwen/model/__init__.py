"""Qwen3 in MLX: layers, loading, and what a checkpoint takes.

Tokens go in, logits come out. A cache is known only by the two protocols that it keeps.
"""
