"""Which token comes next: parameters, the truncated distribution, and the draw.

Logits go in, tokens come out. Nothing here knows text, prompts or the model.
"""
