"""Qwen3 in MLX: its layers, loading, and the memory that a checkpoint takes.

`Qwen3ForCausalLM` maps token ids `[B, L]` to logits `[B, L, vocab_size]`; `load_model` reads one from a checked folder;
`measure` and `size_up` tell what it takes from headers alone.

Tokens go in, logits come out. A cache is known only by the two protocols `ModelCache` and `LayerCache`. Nothing here
samples, knows text or converts formats.
"""
