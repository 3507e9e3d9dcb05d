"""Speculative decoding: tokens are guessed, one pass of the model checks several guesses, and only what the model would
have drawn itself is told (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023).

The model's own sampler draws at every guessed position, with the very random numbers and penalties that it would have
there; a guess counts while it equals the draw, and the first draw that differs is the reply's next token. So a reply is
the one that the same seed gives without speculation, whoever guesses, up to the rounding of logits that are computed
for several positions at once.
"""
