"""Programs of real clients, unpatched, that `scripts/clients` runs in environments of their own."""
