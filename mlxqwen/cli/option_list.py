"""The options of `mlxqwen generate`, in the groups of its help, everyday ones first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import click

from mlxqwen.cli.completion import complete_folder
from mlxqwen.cli.spellings import DtypeChoice, ExistingFile, spelled_option

__all__ = ["DEFAULT_KV_KEEP", "generate_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = ExistingFile(exists=True, dir_okay=False, allow_dash=True)

DEFAULT_KV_KEEP = 4


def _explain_prompt_cache_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise click.UsageError(
            "--prompt-cache-file is mlx-lm's, whose cache is a file. Here it is a folder that serves all models and "
            "prompts: --prompt-cache FOLDER.",
            ctx,
        )


_input, _thinking, _sampling, _memory, _speed, _output = (
    partial(spelled_option, group) for group in ("Input", "Thinking", "Sampling", "Memory", "Speed", "Output")
)

_INPUT = (
    click.argument("prompt", nargs=-1, metavar="[PROMPT]"),
    _input(
        "-m",
        "--model",
        metavar="MODEL",
        shell_complete=complete_folder,
        help="Folder, hub id, alias such as qwen3:4b, or modelscope:ID for ModelScope; the demo model by default.",
    ),
    _input(
        "-s",
        "--system",
        metavar="TEXT",
        help="System message.",
        also=("--system-prompt",),
    ),
    _input(
        "--prompt-file",
        type=click.Path(exists=True, dir_okay=False),
        help="Read the prompt from a file.",
    ),
    _input(
        "--messages",
        type=_FILE,
        metavar="FILE.json",
        help='Go on with a conversation: a list of messages, {"messages": […], "tools": […]}, or what /save in the '
        'chat has written, without its options; "-" reads standard input. A prompt given besides is the '
        "user's next message.",
    ),
    _input(
        "--tools",
        type=_FILE,
        metavar="FILE.json",
        help="Functions that the model may call: a list of their schemas. Calls are printed behind the answer, a JSON "
        "line each.",
    ),
    _input(
        "--batch",
        type=_FILE,
        metavar="FILE.jsonl",
        help='Answer many prompts: {"prompt": …} or {"messages": […]} a line, if wanted with "id", "tools", '
        '"max_tokens", "thinking", "thinking_budget", "seed", "sampling" and "response_format" of its own. Needs '
        "--output.",
    ),
    _input(
        "--revision",
        help="Branch, tag or commit of a hub id.",
    ),
    _input(
        "--drop-oldest",
        is_flag=True,
        help="Leave out the oldest turns of a conversation that is too long; system messages stay.",
    ),
    _input(
        "--raw",
        is_flag=True,
        help="Continue the prompt as it is, without a chat template: <|im_end|> and the like in it are tokens, "
        "and all of the reply is content. With --json-schema a thought before the JSON is told apart.",
        also=("--ignore-chat-template",),
    ),
    _input(
        "--trust-special-tokens",
        is_flag=True,
        help="Read <|im_end|>, <think> and the like in messages as tokens; by default they are text.",
    ),
    _input(
        "--ignore-adapter",
        is_flag=True,
        help="Leave out an adapter that lies beside the weights.",
    ),
    _input("-p", "--prompt", "prompt_option", metavar="TEXT", hidden=True),
)
_THINKING = (
    _thinking(
        "--thinking/--no-thinking",
        default=None,
        help="Think first, or not: the last one counts. By default the chat template decides (Qwen3's thinks).",
        also=("--think", "--enable-thinking"),
        also_off=("--no-think",),
    ),
    _thinking(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="End the thought after N tokens; 0 is no thought.",
    ),
    _thinking(
        "--early-stop-text",
        metavar="TEXT",
        help="The sentence that ends it then; Qwen's by default.",
    ),
)
_SAMPLING = (
    _sampling(
        "--max-tokens",
        type=int,
        help="Longest answer; 32768 by default, bounded by the context.",
        also=("--max-new-tokens", "--num-predict"),
    ),
    _sampling(
        "--temperature",
        type=float,
        help="0 is greedy. By default the model card's profile.",
        also=("--temp",),
    ),
    _sampling(
        "--top-p",
        type=float,
        help="Keep the likeliest tokens up to this mass.",
    ),
    _sampling(
        "--top-k",
        type=int,
        help="Keep this many likeliest tokens; 0 keeps all.",
    ),
    _sampling(
        "--seed",
        type=int,
        help="The same seed draws the same answer.",
    ),
    _sampling(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="End the answer before this text; may be repeated, up to 64 times.",
    ),
    _sampling(
        "--json-schema",
        type=_FILE,
        metavar="FILE.json",
        help="Answer with JSON that fits this schema, behind a free thought.",
    ),
    _sampling(
        "--min-p",
        type=float,
        help="Keep tokens at least this likely relative to the likeliest.",
    ),
    _sampling(
        "--presence-penalty",
        type=float,
        help="Against tokens that the reply has; -2 to 2.",
    ),
    _sampling(
        "--frequency-penalty",
        type=float,
        help="The same, times how often; -2 to 2.",
    ),
    _sampling(
        "--repetition-penalty",
        type=float,
        help="Against tokens of prompt and reply; 1 is off.",
    ),
    _sampling(
        "--stop-on-loop",
        is_flag=True,
        help="End a reply that goes round in circles.",
    ),
)
_MEMORY = (
    _memory(
        "--max-kv-size",
        type=int,
        help="Keep at most this many tokens in the cache (a sliding window).",
    ),
    _memory(
        "--kv-keep",
        type=int,
        help=f"First tokens that the window of --max-kv-size never drops; {DEFAULT_KV_KEEP} by default.",
    ),
    _memory(
        "--kv-bits",
        type=click.Choice(["8", "4"]),
        help="Quantize the cache.",
    ),
    _memory(
        "--yarn",
        type=click.Choice(["auto"]),
        help="Scale each prompt by its own length: not at all if it fits the trained context with its --max-tokens (or "
        "4,096 tokens, at most a quarter of that context), else by YaRN's factor 2 or 4.",
    ),
    _memory(
        "--yarn-factor",
        type=float,
        help="Extend the trained context this many times by YaRN.",
    ),
    _memory(
        "--rope-scaling",
        metavar="JSON",
        help="RoPE scaling as in config.json.",
    ),
    _memory(
        "--dtype",
        type=DtypeChoice(),
        help="Compute in this dtype.",
    ),
    _memory(
        "--force",
        is_flag=True,
        help="Load even what does not fit this machine's memory.",
    ),
)
_SPEED = (
    _speed(
        "--prompt-cache",
        type=click.Path(),
        metavar="FOLDER",
        help="Keep what was read of prompts and replies in this folder, and read only what is new in the next run. It "
        "takes at most a tenth of the disk; what was not used for longest goes first.",
    ),
    _speed(
        "--prefix-cache",
        metavar="SIZE",
        help='Memory for what was read, shared by all answers of a run, such as 2GB; "off" keeps nothing. By default '
        "an eighth of what the machine has for models.",
    ),
    _speed(
        "--draft",
        metavar="MODEL",
        shell_complete=complete_folder,
        help="Let a smaller model with the same tokenizer guess, folder or hub id; the reply is the same but for "
        "rounding. On a CPU it gets slower.",
        also=("--draft-model",),
    ),
    _speed(
        "--draft-tokens",
        type=int,
        help="The most tokens that are guessed at once, up to 64; 8 by default.",
        also=("--num-draft-tokens",),
    ),
    _speed(
        "--speculative",
        type=click.Choice(["lookup"]),
        help="Guess that the text goes on as it did before, several tokens at once: passes are saved where a reply "
        "repeats its prompt, and the reply is the same but for rounding. On a CPU all but tiny models get slower.",
    ),
    _speed(
        "--batch-size",
        type=int,
        help="Prompts that are answered at once; 8 by default.",
    ),
    _speed(
        "--prefill-chunk",
        type=int,
        help="Prompt tokens a step at most; 512 by default, fewer for wide models on a CPU.",
    ),
)
_OUTPUT = (
    _output(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object when done.",
    ),
    _output(
        "--verbose",
        is_flag=True,
        help="Tell on standard error what was used and how fast it was.",
    ),
    _output(
        "--output",
        type=click.Path(),
        metavar="FILE.jsonl",
        help="Where the answers to --batch go, as they are finished. If it has some already, the others are added.",
    ),
    _output("-q", "--quiet", is_flag=True, help="Show the answer alone: no reasoning, notes or progress."),
    _output("--prompt-cache-file", expose_value=False, hidden=True, callback=_explain_prompt_cache_file),
)


def generate_options(command: _Command) -> _Command:
    """Add all options to a command, in the order of the help."""
    for option in reversed((*_INPUT, *_THINKING, *_SAMPLING, *_MEMORY, *_SPEED, *_OUTPUT)):
        command = option(command)
    return command
