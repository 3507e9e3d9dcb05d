"""The demo model: the text that it learns from, its training and tuning, and what it gets right.

`python scripts/demo COMMAND` runs one of them.
"""
