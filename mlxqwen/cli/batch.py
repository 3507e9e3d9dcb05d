"""`mlxqwen generate --batch`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlxqwen.cli.generate_options import (
    cache_options,
    check_values,
    read_form,
    sampling_overrides,
)
from mlxqwen.cli.interrupts import INTERRUPTED, leave_at_once, tell_interrupted
from mlxqwen.cli.model_loading import load_engine
from mlxqwen.cli.reply_printer import print_request, yarn_field
from mlxqwen.cli.terminal import print_error
from mlxqwen.cli.text_input import read_text, source_name
from mlxqwen.console import counted
from mlxqwen.errors import MlxqwenError, OptionError, one_line
from mlxqwen.status_line import StatusLine

if TYPE_CHECKING:
    from mlxqwen.chat.request_files.answers import AnswerFile
    from mlxqwen.chat.request_files.batch import BatchRequest
    from mlxqwen.chat.structured.response_format import AnswerFormat
    from mlxqwen.engine.chat_request import ChatRequest
    from mlxqwen.engine.engine import Engine
    from mlxqwen.engine.events import Done

    _Answer = tuple[BatchRequest, dict[str, Any], int]  # its fields, and its number of tokens

__all__ = ["generate_batch"]

MAX_BATCH_BYTES = 256 * 1024 * 1024
# What answers depend on. How many are made at once, and in what steps, is not among it: a run may go on otherwise.
_SHAPING = (
    "model",
    "revision",
    "system",
    "trust_special_tokens",
    "drop_oldest",
    "thinking",
    "thinking_budget",
    "early_stop_text",
    "max_tokens",
    "stop",
    "stop_on_loop",
    "max_kv_size",
    "kv_keep",
    "kv_bits",
    "yarn_factor",
    "yarn",
    "rope_scaling",
    "dtype",
)


def generate_batch(options: Mapping[str, Any]) -> int:
    """Answer all lines of --batch that have no answer in --output → the exit status."""
    with leave_at_once():
        from mlxqwen.chat.request_files.answers import AnswerFile
        from mlxqwen.chat.request_files.batch import parse_requests
        from mlxqwen.chat.request_files.conversations import parse_tools

    check_values(options)
    source, output = options["batch"], Path(options["output"])
    if source != "-" and output.exists() and output.samefile(source):
        raise OptionError(f"{output}: found as --batch and --output, expected two files")
    requests = parse_requests(
        read_text(source, what="prompts, a line of JSON each", max_bytes=MAX_BATCH_BYTES),
        source_name(source),
        system=options["system"],
        thinking=options["thinking"],
    )
    tools = None
    if options["tools"] is not None:
        tools = parse_tools(read_text(options["tools"], what="the tools, as JSON"), source_name(options["tools"]))
        requests = [request.with_default_tools(tools) for request in requests]
    form = read_form(options)
    with AnswerFile(output, requests, _shape(options, tools, form)) as answers:
        if answers.answered and not options["quiet"]:
            sys.stderr.write(
                f"note: {one_line(str(output))} has {len(answers.answered):,} of {len(requests):,} answers\n"
            )
        try:
            missing = [request for request in requests if request.index not in answers.answered]
            _answer_all(missing, answers, {**options, "response_format": form})
        except KeyboardInterrupt:
            done = f"{len(answers.answered):,} of {len(requests):,}"
            tell_interrupted(f" after {done} answers; the same command goes on from here")
            return INTERRUPTED
        failed = answers.failed
    if failed:
        lines = f"{counted(len(requests), 'line')} {'has' if len(requests) == 1 else 'have'}"
        print_error(
            f"{output}: {failed:,} of {lines} failed",
            'Their "error" tells why. They are not tried again unless they are removed from it: the same command then '
            "answers them alone.",
        )
    return 1 if failed else 0


def _shape(options: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None, form: AnswerFormat | None) -> str:
    """A digest of the options that an answer depends on."""
    from mlxqwen.chat.request_files.batch import digest

    shaping = {**{name: options[name] for name in _SHAPING}, **sampling_overrides(options), "tools": tools}
    if form is not None:
        shaping["response_format"] = form.source
    return digest(json.dumps(shaping))


def _answer_all(requests: Sequence[BatchRequest], answers: AnswerFile, options: Mapping[str, Any]) -> None:
    from mlxqwen.engine.text_generation import yarn_line

    if not requests:
        return
    engine = load_engine(options)
    if options["verbose"]:
        _print_options(engine, options)
    progress = BatchProgress(sys.stderr, len(requests))
    tokens, started = 0, time.perf_counter()
    by_factor: Counter[float] = Counter()
    try:
        for request, fields, count in _answers(engine, requests, options):
            answers.append(request, fields)
            progress.advance(count)
            tokens += count
            by_factor.update(value for name, value in fields.items() if name == "yarn_factor")
    finally:
        progress.wipe()
    if options["verbose"]:
        seconds = time.perf_counter() - started
        sys.stderr.write(
            f"{counted(len(requests), 'answer')} of {counted(tokens, 'token')} in {seconds:.1f} s, "
            f"{tokens / seconds:.1f} tokens/s\n"
        )
        for factor in sorted(by_factor):
            sys.stderr.write(f"{counted(by_factor[factor], 'answer')}, {yarn_line('YaRN', factor)}")


def _print_options(engine: Engine, options: Mapping[str, Any]) -> None:
    overrides = sampling_overrides(options)
    opening = [{"role": "user", "content": "Hello"}]
    thinking = {name: options[name] for name in ("thinking", "thinking_budget")}
    print_request(engine, engine.sampling_for(opening, **thinking, sampling=overrides), options, overrides)


def _answers(engine: Engine, requests: Iterable[BatchRequest], options: Mapping[str, Any]) -> Iterator[_Answer]:
    """Yield the answer to each request, as it is finished.

    If several fail together, each is tried alone, so that one does not fail the others.
    """
    waiting = iter(requests)
    while True:
        begun: dict[int, BatchRequest] = {}
        failure = yield from _answers_until_failure(engine, waiting, begun, options)
        if failure is None:
            return
        if len(begun) == 1:
            yield _refusal(begun.popitem()[1], failure)
        for request in begun.values():
            yield from _answers(engine, [request], options)


def _answers_until_failure(
    engine: Engine, waiting: Iterator[BatchRequest], begun: dict[int, BatchRequest], options: Mapping[str, Any]
) -> Generator[_Answer, None, MlxqwenError | None]:
    """Yield answers up to one that fails, and why it failed; `begun` keeps the requests that are unfinished."""
    refused: list[tuple[int, MlxqwenError]] = []
    failure = None
    try:
        for number, done in _batch(engine, _conversations(waiting, begun, options), options, refused):
            yield begun.pop(number), _fields(done), done.usage.completion_tokens
            while refused:
                yield _refusal(begun.pop(refused[-1][0]), refused.pop()[1])
    except MlxqwenError as error:
        if not begun:
            raise
        failure = error
    for number, reason in refused:
        yield _refusal(begun.pop(number), reason)
    return failure


def _batch(
    engine: Engine,
    conversations: Iterator[ChatRequest],
    options: Mapping[str, Any],
    refused: list[tuple[int, MlxqwenError]],
) -> Iterator[tuple[int, Done]]:
    from mlxqwen.engine.engine import DEFAULT_BATCH_SIZE

    shared = ("thinking", "thinking_budget", "early_stop_text", "max_tokens", "stop", "stop_on_loop")
    more = ("trust_special_tokens", "drop_oldest", "prefill_chunk", "response_format")
    return engine.batch(
        conversations,
        batch_size=options["batch_size"] or DEFAULT_BATCH_SIZE,
        on_error=lambda number, error: refused.append((number, error)),
        **cache_options(options),
        **{name: options[name] for name in (*shared, *more)},
    )


def _conversations(
    requests: Iterator[BatchRequest], begun: dict[int, BatchRequest], options: Mapping[str, Any]
) -> Iterator[ChatRequest]:
    """The conversations for the engine; each request that it takes is added to `begun`, by its number."""
    from mlxqwen.engine.chat_request import ChatRequest

    for number, request in enumerate(requests):
        begun[number] = request
        sampling = {**sampling_overrides(options), **request.options.get("sampling", {})}
        own: Any = {**request.options, "sampling": sampling, "tools": request.conversation.tools}
        yield ChatRequest(request.conversation.messages, own)


def _refusal(request: BatchRequest, error: MlxqwenError) -> _Answer:
    return request, {"error": error.problem, **({"hint": error.hint} if error.hint else {})}, 0


def _fields(done: Done) -> dict[str, Any]:
    from mlxqwen.engine.events import assistant_message

    return {
        "reasoning": done.reply.reasoning,
        "content": done.reply.content,
        "tool_calls": assistant_message(done.reply).get("tool_calls", []),
        "finish_reason": done.finish_reason,
        "usage": asdict(done.usage),
        **yarn_field(done),
    }


class BatchProgress:
    """One line on a terminal: how many lines are answered, how fast, and how long it will take; nothing elsewhere."""

    def __init__(self, stream: TextIO, total: int) -> None:
        self._line = StatusLine(stream)
        self._done, self._total, self._tokens = 0, total, 0
        self._began = time.monotonic()
        self._draw()

    def advance(self, tokens: int) -> None:
        """Count one more line, of `tokens` tokens."""
        self._done += 1
        self._tokens += tokens
        self._draw()

    def wipe(self) -> None:
        """Leave an empty line to whatever is written next."""
        self._line.wipe()

    def _draw(self) -> None:
        self._line.draw(*batch_lines(self._done, self._total, self._tokens, time.monotonic() - self._began))


def batch_lines(done: int, total: int, tokens: int, seconds: float) -> list[str]:
    """For example `42 of 100 lines  |########            |  310 tokens/s  0:12 left`, and shorter versions."""
    count = f"{done:,} of {total:,} lines"
    filled = 20 * done // total
    bar = f"  |{'#' * filled}{' ' * (20 - filled)}|"
    rate = left = ""
    if done and seconds > 0:
        seconds_left = round(seconds / done * (total - done))
        rate = f"  {tokens / seconds:.0f} tokens/s"
        left = f"  {seconds_left // 60}:{seconds_left % 60:02d} left"
    return [count + bar + rate + left, count + rate + left, count + left, count]
