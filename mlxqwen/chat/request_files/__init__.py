"""What is asked and answered in files: one conversation, or many requests in JSON Lines and the answers to them.

Modules are imported one by one: a command that reads one conversation has no use for the others.
"""
