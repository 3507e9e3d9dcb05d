"""Sampling: which token comes next.

`SamplingParams` holds the parameters, `resolve_sampling` fills them from the checkpoint's file, the model card's
profile and the user's options, `Sampler` draws, and a `Constraint` restricts or replaces draws.

Logits go in, tokens come out, both as arrays for all rows at once. Nothing here knows text, prompts or the model.
"""
