"""Fuzzers: random input by seeds, for a minute in CI and longer by hand; see scripts/fuzz.py."""
