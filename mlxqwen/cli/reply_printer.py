"""Printing a reply: on standard output and standard error, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlxqwen.console import Output, counted
from mlxqwen.errors import one_line
from mlxqwen.files.json_file import parse_json

if TYPE_CHECKING:
    from mlxqwen.chat.reply import Delta, Reply, ToolCall
    from mlxqwen.engine.engine import Done, Engine, Event
    from mlxqwen.files.config import ModelConfig
    from mlxqwen.sampling.params import SamplingParams

__all__ = ["ReplyPrinter", "print_note", "print_request", "print_speed", "yarn_field"]


class ReplyPrinter:
    """Events → standard output and standard error, or one JSON object at the end.

    Args:
        as_json: print the object.
        hides_reasoning: print the answer alone.
        asked: what else the object tells, such as the model and the seed.
    """

    def __init__(self, *, as_json: bool, hides_reasoning: bool = False, asked: Mapping[str, Any] | None = None) -> None:
        self.done: Done | None = None
        self._as_json = as_json
        self._hides_reasoning = hides_reasoning
        self._asked = asked or {}
        self._deltas: list[Delta] = []
        self._stdout, self._stderr = Output(sys.stdout), Output(sys.stderr, dim=True)

    def print(self, event: Event) -> None:
        """Write a piece of reasoning or content; tool calls wait for the end."""
        from mlxqwen.engine.engine import Done

        if isinstance(event, Done):
            self.done = event
            return
        self._deltas.append(event)
        if self._as_json:
            return
        if event.reasoning is not None:
            if not self._hides_reasoning:
                self._stderr.write(event.reasoning)
        elif event.content is not None:
            self._stderr.end_line()
            self._stdout.write(event.content)

    def end(self, *, interrupted: bool = False) -> None:
        """Finish open lines and print the tool calls, or print the object."""
        if self._as_json:
            self._stdout.write(self._object(interrupted) + "\n")
        elif interrupted and not (self._stdout.is_terminal and self._stdout.line_is_open):
            self._stderr.line_is_open |= self._stderr.is_terminal  # the terminal itself wrote ^C there
        self.end_lines()
        if not self._as_json:
            for call in self._reply().tool_calls:
                self._stdout.write(self._dump(_printed_call(call)) + "\n")

    def end_lines(self) -> None:
        """Finish open lines, so that what comes next begins its own."""
        self._stdout.end_line()
        self._stderr.end_line()

    def _reply(self) -> Reply:
        from mlxqwen.chat.reply import join_deltas

        return join_deltas(self._deltas)

    def _object(self, interrupted: bool) -> str:
        from mlxqwen.engine.events import assistant_message

        done, reply = self.done, self._reply()
        return self._dump(
            {
                "reasoning": reply.reasoning,
                "content": reply.content,
                "tool_calls": assistant_message(reply).get("tool_calls", []),
                "finish_reason": "interrupted" if interrupted or done is None else done.finish_reason,
                "usage": None if done is None else asdict(done.usage),
                "timings": None if done is None else _rounded(asdict(done.timings)),
                "stop_string": None if done is None else done.stop_string,
                **self._asked,
                **yarn_field(done),
            }
        )

    def _dump(self, value: object) -> str:
        return json.dumps(value, ensure_ascii=not self._stdout.is_unicode)


def yarn_field(done: Done | None) -> dict[str, float]:
    """The YaRN factor of a reply as a field of its JSON; none where the model does not scale by request."""
    return {} if done is None or done.yarn_factor is None else {"yarn_factor": done.yarn_factor}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Measured values with the digits that mean something."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def _printed_call(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": parse_json(call.arguments), "id": call.id}


def print_request(
    engine: Engine,
    sampling: SamplingParams,
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> None:
    """Print the values that the options have come to."""
    from mlxqwen.engine.request import DEFAULT_MAX_TOKENS

    max_tokens = DEFAULT_MAX_TOKENS if options["max_tokens"] is None else options["max_tokens"]
    config, keep = engine.model.config, options["kv_keep"]
    window = ""
    if options["max_kv_size"] is not None:
        window = f", window {options['max_kv_size']:,} with {4 if keep is None else keep} kept"
    bits = "" if options["kv_bits"] is None else f", {options['kv_bits']}-bit cache"
    context = f"context {config.context_length:,}{window}{bits}"
    if config.rope_scaling is not None:
        context += f", YaRN factor {config.rope_scaling.factor:g}"
    if config.yarn_choices:
        context += f", YaRN by request from {config.yarn_choices[0].original_max_position_embeddings:,} tokens on"
    used = ", ".join(f"{name} {value}" for name, value in asdict(sampling).items() if value is not None)
    sys.stderr.write(f"{context}, dtype {str(engine.model.dtype).rpartition('.')[2]}\n")
    bounded = "" if window else " within the context"
    sys.stderr.write(f"sampling: {used}; at most {counted(max_tokens, 'token')}{bounded}\n")
    if _is_low_bits_penalty(engine, sampling, overrides):
        sys.stderr.write(
            f"presence_penalty {sampling.presence_penalty} is the profile of weights of 4 bits or fewer, which repeat "
            "themselves more; --presence-penalty sets another\n"
        )
    if options["thinking_budget"] is not None:
        sys.stderr.write(_budget_line(options["thinking_budget"], options["early_stop_text"]))


def _is_low_bits_penalty(engine: Engine, sampling: SamplingParams, overrides: Mapping[str, Any]) -> bool:
    """Whether the presence penalty comes from the low bits of the weights alone."""
    from mlxqwen.sampling.params import resolve_sampling

    values = engine.model.generation_config.values
    of_full_weights, _ = resolve_sampling(values, thinking=True, overrides=overrides)
    return of_full_weights.presence_penalty != sampling.presence_penalty


def _budget_line(budget: int, early_stop_text: str | None) -> str:
    from mlxqwen.chat.thinking import EARLY_STOP_TEXT

    if budget == 0:
        return "thinking budget: 0 tokens, so no thought\n"
    sentence = EARLY_STOP_TEXT if early_stop_text is None else early_stop_text
    return f"thinking budget: {budget:,} tokens, then {one_line(json.dumps(sentence, ensure_ascii=False))}\n"


def print_note(done: Done, max_tokens: int | None, config: ModelConfig) -> None:
    """Note that a reply did not end by itself: it looks like any other."""
    tokens = done.usage.completion_tokens
    if done.finish_reason == "loop":
        sys.stderr.write(f"note: stopped after {counted(tokens, 'token')}, for the reply went round in circles\n")
    elif done.finish_reason == "length":
        where = "in the middle of the answer" if done.reply.content or done.reply.tool_calls else "before the answer"
        way_out = "raise --max-tokens" if tokens == max_tokens else "the context is full; --max-kv-size slides over it"
        if tokens != max_tokens and config.yarn_choices and done.yarn_factor != config.yarn_choices[-1].factor:
            way_out = "its context is full; a larger --max-tokens lets YaRN extend it"
        sys.stderr.write(f"note: stopped after {counted(tokens, 'token')}, {where}: {way_out}\n")


def print_short_speed(done: Done) -> None:
    """Print tokens and speed in a dim last line, where the answer and all else stand on a terminal."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        speed = done.timings.decode_tokens_per_second
        Output(sys.stderr, dim=True).write(f"{counted(done.usage.completion_tokens, 'token')}, {speed:.1f} tokens/s\n")


def print_speed(done: Done) -> None:
    """Print tokens, speed and memory."""
    import mlx.core as mx

    from mlxqwen.engine.text_generation import drafts_line, yarn_line

    usage, timings = done.usage, done.timings
    ended = ", which the budget ended" if usage.budget_exhausted else ""
    cached = f", {usage.cached_tokens} of them from the cache" if usage.cached_tokens else ""
    sys.stderr.write(
        f"prompt: {counted(usage.prompt_tokens, 'token')}{cached}, {timings.prefill_tokens_per_second:.1f} tokens/s\n"
        f"answer: {counted(usage.completion_tokens, 'token')} ({usage.reasoning_tokens} of reasoning{ended}), "
        f"{timings.decode_tokens_per_second:.1f} tokens/s, ended by {done.finish_reason}\n"
        f"{drafts_line('drafts', usage.drafted_tokens, usage.accepted_tokens)}"
        f"{yarn_line('YaRN', done.yarn_factor)}"
        f"peak memory: {mx.get_peak_memory() / 1e9:.2f} GB\n"
    )
