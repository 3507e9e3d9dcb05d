"""What a request asks of its reply, a form and calls of tools → what makes the constraint of the reply."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from mlxqwen.chat.pipeline import ReplyPipeline
from mlxqwen.chat.structured.call_grammar import arguments_schema, call_grammar
from mlxqwen.chat.structured.compiler import CompiledGrammar, GrammarCompiler, grammar_compiler
from mlxqwen.chat.structured.constraint import GrammarConstraint, ReplyTokens
from mlxqwen.chat.structured.grammar import reply_grammar
from mlxqwen.chat.structured.response_format import AnswerFormat
from mlxqwen.chat.structured.tool_choice import CallRules, is_strict
from mlxqwen.errors import OptionError, one_line
from mlxqwen.text.tokenizer import Tokenizer

__all__ = ["reply_constraint"]

logger = logging.getLogger("mlxqwen")

_CallRules: TypeAlias = Callable[[tuple[int | None, int | None]], str]


def reply_constraint(
    tokenizer: Tokenizer, vocab_size: int, ends: Collection[int], answer: AnswerFormat | None, calls: CallRules
) -> Callable[[ReplyPipeline | None], GrammarConstraint] | None:
    """What makes the constraint of a reply, given its pipeline; None if nothing is asked of it.

    Where calls are required, the answer's format has no say: the reply is calls. Where they are the model's choice, it
    is either calls or an answer in its format.

    Args:
        tokenizer, vocab_size, ends: as for `grammar_compiler`.
        answer: the format of the answer.
        calls: which calls there are.

    Raises:
        OptionError: what cannot be compiled in bounds, or needs llguidance where it is not installed.
    """
    has_calls = bool(calls.tools) and calls.mode != "none"
    if answer is None and (not calls.tools or calls.is_free):
        return None
    tokens = ReplyTokens(tokenizer, vocab_size, ends)
    if answer is not None and not has_calls:
        grammar = grammar_compiler(tokenizer, vocab_size, ends).compile(reply_grammar(answer, None), "response_format")
        return partial(GrammarConstraint, tokens, grammar, is_json=answer.kind == "json_schema")
    if answer is None and calls.mode == "none":
        return partial(GrammarConstraint, tokens, None, is_free=True, calls=0)
    if answer is None and calls.mode == "auto":
        if tokens.call is None or tokens.end_call is None:
            raise OptionError(
                "tools: found a tokenizer without tokens for calls, expected them where calls are restricted"
            )
        most = 1 if calls.most_one else None
        if not (calls.is_narrowed or any(map(is_strict, calls.tools))):
            return partial(GrammarConstraint, tokens, None, is_free=True, calls=most)
        compiler = grammar_compiler(tokenizer, vocab_size, ends)
        grammar = _compiled(compiler, tokens, None, _call_rules(calls.tools, tokens, compiler, most_one=True))
        return partial(GrammarConstraint, tokens, grammar, is_free=True, calls=most)
    compiler = grammar_compiler(tokenizer, vocab_size, ends)
    rules = _call_rules(calls.tools, tokens, compiler, most_one=calls.most_one)
    answer = None if calls.mode == "required" else answer
    grammar = _compiled(compiler, tokens, answer, rules)
    is_json = answer is None or answer.kind == "json_schema"
    return partial(GrammarConstraint, tokens, grammar, knows_tags=True, is_json=is_json)


def _compiled(
    compiler: GrammarCompiler, tokens: ReplyTokens, answer: AnswerFormat | None, rules: _CallRules
) -> CompiledGrammar:
    """The grammar of calls, or of them or an answer."""
    where = "tools" if answer is None else "response_format, tools"
    on_trial = reply_grammar(answer, rules((None, None)))
    return compiler.compile(reply_grammar(answer, rules((tokens.call, tokens.end_call))), where, on_trial=on_trial)


def _call_rules(
    tools: Sequence[Mapping[str, Any]], tokens: ReplyTokens, compiler: GrammarCompiler, *, most_one: bool
) -> _CallRules:
    """What makes the Lark grammar of calls, given the tokens of the tags.

    The arguments of a tool that is not strict are any object where its schema cannot be compiled, with a note.
    """
    try:
        rules = partial(call_grammar, tools, most_one=most_one)
        _compiled(compiler, tokens, None, rules)
        return rules
    except OptionError:
        if all(map(is_strict, tools)):
            raise
    problems = _schema_problems(tools, compiler)
    for place, problem in problems.items():
        name = tools[place]["function"].get("name")
        if is_strict(tools[place]):
            raise OptionError(
                f"tool {name!r:.80}: parameters: found what cannot be compiled: {problem}",
                hint="Leave out what it names, or leave out strict: calls are then written as the model likes.",
            )
        logger.warning("%s", one_line(f"tool {name!r:.80}: calls are not kept to its parameters: {problem}", 300))
    rules = partial(call_grammar, tools, most_one=most_one, open_arguments=problems)
    try:
        _compiled(compiler, tokens, None, rules)
        return rules
    except OptionError as error:  # each schema can be compiled, all together cannot
        rest = [place for place, tool in enumerate(tools) if not is_strict(tool) and place not in problems]
        if not rest:
            raise
        logger.warning("%s", one_line(f"tools: calls of {len(rest)} are not kept to their parameters: {error}", 300))
    return partial(call_grammar, tools, most_one=most_one, open_arguments={*problems, *rest})


def _schema_problems(tools: Sequence[Mapping[str, Any]], compiler: GrammarCompiler) -> dict[int, str]:
    """Why the schemas of some tools cannot be compiled, by the place of the tool."""
    problems: dict[int, str] = {}
    grammars: dict[int, str] = {}
    for place, tool in enumerate(tools):
        try:
            grammars[place] = reply_grammar(None, f"start: %json {arguments_schema(tool['function'])}")
        except OptionError as error:
            problems[place] = error.problem
    found = compiler.problems(list(grammars.values()))
    for (place, grammar), problem in zip(grammars.items(), found, strict=True):
        if problem is None:
            try:
                compiler.compile(grammar, "parameters")
            except OptionError as error:
                problem = error.problem
        if problem is not None:
            problems[place] = problem
    return problems
