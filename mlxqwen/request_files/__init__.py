"""What is asked and answered in files: one conversation, or many requests in JSON Lines and the answers to them."""

from mlxqwen.request_files.answers import AnswerFile
from mlxqwen.request_files.batch import BatchRequest, parse_requests
from mlxqwen.request_files.conversations import MessagesWithTools, parse_conversation, parse_tools

__all__ = ["AnswerFile", "BatchRequest", "MessagesWithTools", "parse_conversation", "parse_requests", "parse_tools"]
