"""Grammars in llguidance's JSON form: that of an answer, of calls, or of either.

See https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md for the syntax.
"""

from __future__ import annotations

import json
from typing import Any

from mlxqwen.chat.structured.response_format import AnswerFormat

__all__ = ["lark_text", "reply_grammar", "with_options"]

# At most one blank behind a comma or a colon, and nowhere else: replies get lost in white space without a bound.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def _answer_grammar(answer: AnswerFormat) -> dict[str, Any]:
    """The grammar of an answer: an entry of llguidance's list of grammars."""
    if answer.kind == "json_schema":
        return {"json_schema": with_options(json.loads(answer.source))}
    if answer.kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(lark_text, json.loads(answer.source)))}
    if answer.kind == "regex":
        return {"lark_grammar": f"start: {lark_regex(answer.source)}"}
    return {"lark_grammar": answer.source}


def reply_grammar(answer: AnswerFormat | None, calls: str | None) -> str:
    """The whole text of a grammar of an answer, of calls in Lark, or of either."""
    if answer is None:
        grammars = [{"lark_grammar": calls}]
    elif calls is None:
        grammars = [_answer_grammar(answer)]
    else:
        top = f"{calls.replace('start:', 'calls:', 1)}\nstart: @answer | calls\n"
        grammars = [{"name": "reply", "lark_grammar": top}, {"name": "answer", **_answer_grammar(answer)}]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def with_options(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with llguidance's options for JSON."""
    return {**schema, "x-guidance": _JSON_OPTIONS}


def lark_text(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def lark_regex(pattern: str) -> str:
    """A regular expression of Lark. The syntax is that of Rust's `regex`; the whole text has to match."""
    import llguidance

    made = json.loads(llguidance.LLMatcher.grammar_from_regex(pattern))
    text: str = made["grammars"][0]["lark_grammar"]
    return text.removeprefix("start: ")
