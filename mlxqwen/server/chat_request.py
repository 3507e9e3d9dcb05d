"""A chat completion's fields → the engine's requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mlxqwen.chat.turns import prepare_conversation
from mlxqwen.checks import check_integer
from mlxqwen.engine.chat_request import ChatOptions
from mlxqwen.engine.options import ConstraintFactory
from mlxqwen.engine.request import Request, config_of, scaled_cache
from mlxqwen.engine.text_generation import end_token_ids
from mlxqwen.errors import ContextLengthError, OptionError
from mlxqwen.files.json_file import shown
from mlxqwen.sampling.forbidden import ForbiddenTokens
from mlxqwen.sampling.params import SamplingParams
from mlxqwen.server.bodies import unknown_fields
from mlxqwen.server.chat_fields import LONGEST_TEXT, ChatFields, ReplyFields
from mlxqwen.server.errors import ApiError
from mlxqwen.server.event_stream import to_json
from mlxqwen.server.histories import with_kept_instructions, with_whole_arguments, with_written_calls
from mlxqwen.server.models import ServedModel
from mlxqwen.server.settings import ServerSettings
from mlxqwen.server.structured import call_options, in_words_of, is_function, response_format

__all__ = [
    "EFFORT_BUDGETS",
    "Prepared",
    "bounded",
    "budget_of",
    "ending",
    "prepare_chat",
    "prompt_ids",
    "rows",
    "sampling_of",
    "thinking_of",
]

EFFORT_BUDGETS = {"minimal": 512, "low": 1024, "medium": 4096, "high": 16_384, "xhigh": 32_768, "max": None}
"""Tokens of thought by `reasoning_effort`; "none" switches thinking off."""

_ValueT = TypeVar("_ValueT", Request, SamplingParams)

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a request comes to.

    Args:
        model: answers.
        requests: one for each choice.
        notes: what was left out of it, for the header and the log.
        choices: how many of them each prompt has.
    """

    model: ServedModel
    requests: Sequence[Request]
    notes: Sequence[str]
    choices: int = 1


def prepare_chat(
    fields: ChatFields,
    model: ServedModel,
    settings: ServerSettings,
    *,
    notes: Sequence[str] = (),
    drop_oldest: bool = False,
    names: Mapping[str, str] | None = None,
) -> Prepared:
    """Check and render a chat completion. Called by a thread of its own: prompts may be long.

    Args:
        notes: what was left out of it already.
        drop_oldest: whether the oldest turns of one that is too long are left out.
        names: see `in_words_of`.

    Raises:
        ApiError, MlxqwenError: it cannot be answered.
    """
    refuse_what_is_not_done(fields)
    notes = [*notes, *unknown_fields(fields)]
    with in_words_of(fields, names):
        options = replace(
            _shown_options(fields, notes),
            sampling=sampling_of(fields),
            max_tokens=_most_tokens(fields),
            stop=fields.stop or (),
            skip_special_tokens=fields.skip_special_tokens is not False,
            priority=fields.priority or 0,
            salt=fields.cache_salt or "",
            constraints=ending(fields, model),
            logprobs=_logprobs(fields),
            drop_oldest=drop_oldest,
            **cache_options(settings),
            response_format=response_format(fields),
            **call_options(fields),
        )
        request, _ = model.responder.request(_messages(fields, notes), options)
    request = bounded(request, fields, model)
    return Prepared(model, rows(request, fields), notes, fields.n or 1)


def prompt_ids(fields: ChatFields, model: ServedModel, names: Mapping[str, str] | None = None) -> list[int]:
    """The prompt of a chat completion, however long: whether the context has room for it is not asked.

    Args:
        names: see `in_words_of`.

    Raises:
        MlxqwenError: it cannot be rendered, or would take too long to encode.
    """
    characters = len(to_json([fields.messages, fields.tools]))
    if characters > LONGEST_TEXT:
        raise OptionError(f"messages: found {characters:,} characters with tools, expected at most {LONGEST_TEXT:,}")
    with in_words_of(fields, names):
        return model.responder.render(prepare_conversation(_messages(fields, [])), _shown_options(fields, []))


def _shown_options(fields: ChatFields, notes: list[str]) -> ChatOptions:
    """The options that make the prompt; of tools that are left out a note is taken."""
    thinking, budget = thinking_of(fields)
    variables = dict(fields.chat_template_kwargs or {})
    variables.pop("enable_thinking", None)
    return ChatOptions(
        thinking=thinking,
        thinking_budget=budget,
        tools=_tools(fields, notes) or None,
        template_variables=variables,
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=fields.continue_final_message,
    )


def refuse_what_is_not_done(fields: ReplyFields) -> None:
    """Raise `ApiError` for fields that ask for what this server does not do."""
    given = {
        "audio": getattr(fields, "audio", None) is not None,
        "modalities": any(one != "text" for one in getattr(fields, "modalities", None) or ()),
        "functions": bool(getattr(fields, "functions", None)),
        "function_call": getattr(fields, "function_call", None) not in (None, "none", "auto"),
        "web_search_options": getattr(fields, "web_search_options", None) is not None,
        "moderation": getattr(fields, "moderation", None) is not None,
        "store": getattr(fields, "store", None) is True,
        "use_beam_search": fields.use_beam_search is True,
        "best_of": fields.best_of not in (None, 1),
        "prompt_logprobs": fields.prompt_logprobs is not None,
    }
    ways_out = {
        "functions": "Give tools.",
        "function_call": "Give tool_choice.",
        "store": "Chat completions are not kept; /v1/responses keeps them.",
    }
    for name, is_given in given.items():
        if is_given:
            way_out = f" {ways_out[name]}" if name in ways_out else ""
            raise ApiError(
                400,
                f"{name}: found {shown(getattr(fields, name))}, expected none: it is not done here.{way_out}",
                code="unsupported_parameter",
                param=name,
            )


def sampling_of(fields: ReplyFields) -> dict[str, Any]:
    """How tokens are drawn, as far as the request says; the card's profile says the rest."""
    return {name: value for name in _SAMPLING if (value := getattr(fields, name)) is not None}


def cache_options(settings: ServerSettings) -> dict[str, Any]:
    """The options of every reply's cache."""
    names = ("max_kv_size", "keep", "kv_bits", "prefill_chunk")
    return {name: getattr(settings, name) for name in names}


def end_tokens(fields: ReplyFields, request: Request, model: ServedModel) -> frozenset[int]:
    """The tokens that end the reply."""
    given = frozenset(fields.stop_token_ids or ())
    for token in given:
        if not 0 <= token < model.vocab_size:
            raise OptionError(f"stop_token_ids: found {token}, expected token ids from 0 to {model.vocab_size - 1}")
    return given if fields.ignore_eos else request.end_token_ids | given


def ending(fields: ReplyFields, model: ServedModel) -> Sequence[ConstraintFactory]:
    """What keeps a reply from ending too early."""
    if not fields.min_tokens:
        return ()
    ends = {*end_token_ids(model.engine.model, model.engine.tokenizer), *(fields.stop_token_ids or ())}
    return (forbidding(ends, model.vocab_size, until=fields.min_tokens),)


def forbidding(tokens: Sequence[int] | set[int], vocab_size: int, until: int | None = None) -> ConstraintFactory:
    """Makes the constraint that forbids some tokens."""
    return lambda pipeline: ForbiddenTokens(tokens, vocab_size, until=until)


def bounded(request: Request, fields: ReplyFields, model: ServedModel) -> Request:
    """The request with the tokens that end it, and no more than the server's context has room for.

    Raises:
        OptionError: `stop_token_ids` that do not exist.
        ContextLengthError: there is no room.
    """
    ends = end_tokens(fields, request, model)
    if model.context is None:
        return changed(request, end_token_ids=ends)
    room = model.context - len(request.prompt)
    if room < 1 and request.cache.max_kv_size is None:
        raise ContextLengthError(
            f"prompt: {len(request.prompt):,} tokens, but the {model.context:,} of this server have to hold prompt and "
            "answer",
            hint="Shorten it.",
        )
    qwen, cache, most = model.engine.model, request.cache, request.max_tokens
    if most is None or not model.limit_scales:  # the server's limit is none of the request, and decides no YaRN factor
        scaled = [scaled_cache(request, qwen, limit) for limit in {None, most}]
        cache = min(scaled, key=lambda one: config_of(one, qwen).context_length)
    if request.most_tokens > room:
        most = max(room, 1)
    return changed(request, end_token_ids=ends, cache=cache, max_tokens=most)


def changed(one: _ValueT, **values: Any) -> _ValueT:
    """`one` with these values: itself if it has them, as what is made anew is checked anew."""
    new = {name: value for name, value in values.items() if getattr(one, name) != value}
    return replace(one, **new) if new else one


def rows(request: Request, fields: ReplyFields) -> list[Request]:
    """One request for each choice: choice i draws with the seed + i."""
    seeds: list[int | None] = [None] * (fields.n or 1)
    if fields.seed is not None:
        seeds = [(fields.seed + i) % 2**64 for i in range(len(seeds))]
    samplings = [changed(request.sampling, seed=seed) for seed in seeds]
    return [changed(request, sampling=sampling) for sampling in samplings]


def _messages(fields: ChatFields, notes: list[str]) -> list[Mapping[str, Any]]:
    """The conversation; of what could not be read as it was meant a note is taken."""
    messages = with_kept_instructions(with_whole_arguments(fields.messages, notes))
    return messages if any(map(is_function, fields.tools or ())) else with_written_calls(messages)


def thinking_of(fields: ChatFields) -> tuple[bool | None, int | None]:
    """The hard switch and the budget that the request's fields make together."""
    switch = (fields.chat_template_kwargs or {}).get("enable_thinking")
    budget = budget_of(fields)
    effort = fields.reasoning_effort
    if effort == "none" and switch is None and budget is None:
        return False, None
    if effort is not None and effort != "none" and switch is not False and budget is None:
        budget = EFFORT_BUDGETS[effort]
    return switch, budget


def budget_of(fields: ReplyFields) -> int | None:
    """The most tokens of thought, by whichever of its names it is given."""
    budgets = [one for one in (fields.thinking_budget, fields.thinking_token_budget) if one is not None]
    if len(set(budgets)) > 1:
        raise OptionError(
            f"thinking_budget: found {budgets[0]} beside thinking_token_budget {budgets[1]}, expected one"
        )
    return budgets[0] if budgets else None


def _most_tokens(fields: ChatFields) -> int | None:
    """The most tokens of a reply, by OpenAI's newer name if both are given."""
    if fields.max_completion_tokens is None:
        return fields.max_tokens
    return int(check_integer("max_completion_tokens", fields.max_completion_tokens, 1))


def _logprobs(fields: ChatFields) -> int | None:
    """How many of the likeliest tokens are told with each; None without log-probabilities."""
    if fields.top_logprobs is not None and not fields.logprobs:
        raise OptionError(
            f"top_logprobs: found {fields.top_logprobs} without logprobs, expected logprobs: true beside it"
        )
    return (fields.top_logprobs or 0) if fields.logprobs else None


def _tools(fields: ChatFields, notes: list[str]) -> list[dict[str, Any]]:
    """The functions among the tools; of what is none a note is taken."""
    tools = fields.tools or []
    notes += [f"tools[{place}]" for place, tool in enumerate(tools) if not is_function(tool)]
    return [tool for tool in tools if is_function(tool)]
