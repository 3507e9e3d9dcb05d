"""What is on disk: configs, safetensors checkpoints, the hub and the user's caches; read with bounds, written whole.

Paths and names go in, checked values come out. Nothing here computes with weights.
"""
