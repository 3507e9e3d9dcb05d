"""Conversations and batches as files: one conversation, or requests in JSON Lines and the answers to them.

Text of a file goes in, checked messages, tools and options come out; answers are appended to a file that a later run
can continue. Nothing here asks a model. Modules are imported one by one: a command that reads one conversation does not
need the others.
"""
