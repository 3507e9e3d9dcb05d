"""Functions as tools: schemas from signatures, schemas from strangers, and the calls that a model makes."""

from mlxqwen.chat.tools.calls import call_tool
from mlxqwen.chat.tools.functions import tool_schema
from mlxqwen.chat.tools.schemas import check_tool_schemas

__all__ = ["call_tool", "check_tool_schemas", "tool_schema"]
