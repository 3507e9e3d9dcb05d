"""A model that uses tools: ask the demo what a calculator or a clock is needed for, and see what it calls.

    python scripts/tools_example.py "What is 1234 * 56?" "What time is it?"

The demo answers with the calculator's and the clock's own results. Any function with annotations and a docstring is a
tool: `Engine.run_tools` shows the model its signature, checks the arguments of each call, makes it, and goes on.
"""

from __future__ import annotations

import argparse
import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from mlxqwen import Engine

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: The expression.
    """
    return str(_value(ast.parse(expression, mode="eval").body))


def clock() -> str:
    """Tell the time of day."""
    return datetime.now().strftime("%H:%M")


def _value(node: ast.expr) -> float:
    """The number that a parsed expression stands for: numbers and the four operations, nothing else."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"cannot calculate {ast.unparse(node)}")


def transcript(
    engine: Engine, question: str, tools: Mapping[str, Callable[..., Any]], seed: int | None = None
) -> Iterator[str]:
    """Ask, let the model use the tools, and tell line by line what was thought, called, found and answered."""
    yield f"Question: {question}"
    run = engine.run_tools([{"role": "user", "content": question}], tools, seed=seed)
    for message in run.messages:
        if message["role"] == "tool":
            yield f"Result:   {message['content']}"
            continue
        if message.get("reasoning_content"):
            yield f"Thought:  {message['reasoning_content']}"
        for call in message.get("tool_calls", ()):
            yield f"Call:     {call['function']['name']} {call['function']['arguments']}"
        if message["content"]:
            yield f"Answer:   {message['content']}"


def main() -> None:
    """Answer the questions of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=["What is 1234 * 56?", "What time is it?"])
    parser.add_argument("--model", help="a folder or hub id; by default the demo")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    engine = Engine.load(options.model)
    for question in options.questions:
        for line in transcript(engine, question, {"calculator": calculator, "clock": clock}, options.seed):
            print(line)
        print()


if __name__ == "__main__":
    main()
