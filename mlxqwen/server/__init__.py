"""The server: HTTP in OpenAI's form (and its relatives) over one engine.

Requests come in on an asyncio loop that computes nothing: bodies are read in bounds, checked and rendered by a few
threads, and the engine's own thread takes the steps. After each step it wakes the loop, which sends what is there.
"""
