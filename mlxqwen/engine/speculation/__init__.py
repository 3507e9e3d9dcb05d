"""Speculative decoding: a drafter guesses tokens, and one pass of the model checks several guesses (Leviathan et al.,
"Fast Inference from Transformers via Speculative Decoding", 2023).

The model's own sampler draws at every guessed position, with the random numbers and penalties that it would have there.
A guess counts while it equals the draw, and the first draw that differs is the reply's next token. So a reply is the
one that the same seed gives without speculation, whatever guesses, up to the rounding of logits that are computed for
several positions at once.

In go a generation with its cache and sampler; out come its next tokens. Nothing here changes which token is drawn.
"""
