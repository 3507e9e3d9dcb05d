"""Conversations and replies: turns, prompts, thinking, tool calls; over text and ids, without a model or arrays."""
