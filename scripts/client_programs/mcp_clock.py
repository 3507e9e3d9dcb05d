"""An MCP server over standard input and output, with one tool: a clock that stands still."""

from __future__ import annotations

from mcp.server.fastmcp import FastMCP

server = FastMCP("wall")


@server.tool(description="Tell the time of day.")
def clock() -> str:
    return "14:32"


server.run()
