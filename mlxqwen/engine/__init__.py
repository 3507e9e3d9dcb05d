"""What owns the model: requests in, tokens and events out."""
