"""Structured output: what a reply has to look like → a grammar → the constraint that keeps the reply to it.

`response_format.py` and `tool_choice.py` read what callers ask for, `json_schema.py` prepares schemas, `grammar.py` and
`call_grammar.py` write grammars, `compiler.py` has llguidance compile them, and `constraint.py` applies them to a reply
behind its thought.
"""
