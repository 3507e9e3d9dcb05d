"""Conversations and replies: turns, prompts, thinking and tool calls.

Messages go in at one side: `turns` checks them, `prompts` renders them to token ids and drops what is too long. Tokens
of a reply come in at the other: `ReplyPipeline` turns them into `Delta`s of reasoning, content and tool calls, and
`ThinkingBudget` ends a thought. `tools` makes schemas of functions and runs checked calls; `request_files` reads
conversations and batches from files.

All of it works on text and token ids: nothing here has a model, a cache or arrays. Nothing that a template, a schema or
a model says is executed, except the functions that the caller gave as tools.
"""
