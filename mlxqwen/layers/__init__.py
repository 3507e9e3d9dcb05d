"""Qwen3's layers: arrays in, arrays out. Module names equal the names in the checkpoints."""
