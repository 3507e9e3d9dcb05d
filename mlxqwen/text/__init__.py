"""Text and token ids: the tokenizer, chat templates, stop strings.

`Tokenizer` reads a checkpoint's tokenizer files, and maps text to ids and back; `render_chat` runs a chat template in a
bounded sandbox; `SafeChatEncoder` lets only the template say special tokens; `StopStrings` finds the end of a reply.

Messages and text go in, ids come out, and back. What a conversation means is for `mlxqwen.chat`. Nothing here has a
model or arrays, and nothing of a tokenizer file or template is executed outside of the sandbox.
"""
