"""Functions as tools: their schemas, the schemas of strangers, and the calls that a model makes.

`tool_schema` makes the schema of a function; `check_tool_schemas` checks schemas that somebody else wrote; `call_tool`
checks a call's arguments, makes it, and returns the text for the model. A call reaches only a function that the caller
gave, and only with arguments that fit its schema. No reference in a schema is fetched, and no pattern is matched.
"""

from mlxqwen.chat.tools.calls import call_tool
from mlxqwen.chat.tools.functions import tool_schema
from mlxqwen.chat.tools.schemas import check_tool_schemas

__all__ = ["call_tool", "check_tool_schemas", "tool_schema"]
