"""The tokenizer: text to token ids and back, streaming UTF-8, and the chat templates of a checkpoint.

The byte-level BPE that Qwen3 uses works on UTF-8 bytes, spelled as printable characters by GPT-2's table
(https://github.com/openai/gpt-2, `bytes_to_unicode`). A token may end in the middle of a character, so decoding maps
tokens to bytes and decodes those. Both ways stand in one file, as they share these tables.
"""

from __future__ import annotations

import codecs
import logging
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import tokenizers

from mlxqwen.errors import OptionError, TemplateError, TokenizerError, one_line
from mlxqwen.files.json_file import find_lone_surrogate, read_json_object, read_text
from mlxqwen.text.messages import check_unicode, prepare_messages, prepare_tools, to_plain_json
from mlxqwen.text.safe_text import SafeChatEncoder
from mlxqwen.text.tokenizer_file import guard, read_tokenizer

__all__ = ["Detokenizer", "Tokenizer"]

logger = logging.getLogger("mlxqwen")

MAX_TEXT_FILE_BYTES = 16 * 2**20
MAX_NAMED_TEMPLATES = 64
_SHORT_TEXT_BYTES = 8 * 1024
_PIECE = 32_768  # characters that are encoded in one call, if cutting a text there changes no id

# Arguments that transformers' method of the same name takes and this one has no use for.
_TRANSFORMERS_ARGUMENTS = frozenset(
    {"max_length", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "truncation"}
)

_WITHOUT_TEMPLATE = (
    "Continue plain text: mlxqwen generate --raw, or generate() in Python; "
    "or give a template: apply_chat_template(…, chat_template=…)."
)

_Rendered = TypeVar("_Rendered", str, list[int])


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for its own byte, the other bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + n): byte for n, byte in enumerate(others)})
    return table


class Tokenizer:
    """The tokenizer and the chat templates of one checkpoint folder; see `from_folder`.

    Args:
        backend: a byte-level tokenizer of the `tokenizers` library; its truncation and padding are switched off.
        config: what `tokenizer_config.json` holds.
        chat_templates: template sources by name; `"default"` is the one used when nothing else is asked for.
        source: the file that errors name.

    Raises:
        TokenizerError: the tokenizer is not byte-level, or the config has values of the wrong type.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        *,
        source: str = "tokenizer.json",
    ) -> None:
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            found = "no decoder" if backend.decoder is None else f"decoder {type(backend.decoder).__name__}"
            raise TokenizerError(
                f"{source}: found {found}, expected ByteLevel",
                hint="Only the byte-level tokenizers of the Qwen family are supported.",
            )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._source = source
        self.chat_templates = dict(chat_templates or {})
        self._added_tokens: Mapping[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in self._added_tokens.items() if token.special)
        self._bytes_of_id: dict[int, bytes] = {}
        config = config or {}
        self.bos_token = _token_string(config, "bos_token")
        self.eos_token = _token_string(config, "eos_token")
        self.pad_token = _token_string(config, "pad_token")
        self.unk_token = _token_string(config, "unk_token")

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat templates of a checkpoint folder.

        Templates come from `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else
        `chat_template.json`, else `tokenizer_config.json`. Nothing is executed, `auto_map` is ignored.

        Raises:
            TokenizerError: a file is missing, damaged, too large, or of another kind of tokenizer; see
                `mlxqwen.text.tokenizer_file`.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{path}: no such file",
                hint="Download tokenizer.json from the model's page; vocab.json and merges.txt are not read.",
            )
        backend = read_tokenizer(path)
        config = _read_json_object(folder / "tokenizer_config.json")
        return cls(backend, config, _read_templates(folder, config), source=str(path))

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template; None if the checkpoint has none."""
        return self.chat_templates.get("default")

    @cached_property
    def vocab_size(self) -> int:
        """The number of token ids, added tokens included: one more than the largest id."""
        return max(self._backend.get_vocab_size(), max(self._added_tokens, default=-1) + 1)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self._source!r}, {self.vocab_size:,} tokens)"

    def __call__(self, text: str | Sequence[str]) -> dict[str, Any]:
        """The ids of a text, or of each in a list, as `{"input_ids": …, "attention_mask": …}`; see `encode`."""
        if isinstance(text, str):
            ids = self.encode(text)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = [self.encode(one) for one in text]
        return {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}

    def get_vocab(self) -> dict[str, int]:
        """Every token as `tokenizer.json` spells it, added tokens included, with its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether each id stands for the same token in both."""
        ids = range(max(self.vocab_size, other.vocab_size))
        return all(self._backend.id_to_token(n) == other._backend.id_to_token(n) for n in ids)

    def check_fits(self, vocab_size: int) -> None:
        """Compare the ids with those of a model.

        A fine-tuner may have added tokens without embeddings for them: a warning names these, for only text that holds
        them cannot be read.

        Args:
            vocab_size: of the model's config.

        Raises:
            TokenizerError: the token that ends a turn, or one that text is made of, has no embedding.
        """
        file = self._folder / "tokenizer.json"
        end, size = self.eos_token_id, self._backend.get_vocab_size(with_added_tokens=False)
        beyond = [token_id for token_id in range(vocab_size, size) if token_id not in self._added_tokens][:1]
        if end is not None and end >= vocab_size:
            beyond = [end]
        for token_id in beyond:
            raise TokenizerError(
                f"{file}: {self._backend.id_to_token(token_id)!r} has id {token_id}, expected ids below {vocab_size}, "
                "the model's vocab_size",
                hint="It belongs to another model: download tokenizer.json and tokenizer_config.json of this one.",
            )
        added = [token.content for token_id, token in sorted(self._added_tokens.items()) if token_id >= vocab_size]
        if added:
            names = one_line(", ".join(added[:3]), 200) + (", …" if len(added) > 3 else "")
            logger.warning(
                "%s: %d added tokens have ids beyond the model's vocab_size, %d: %s; text with one of them cannot be "
                "read",
                *(file, len(added), vocab_size, names),
            )

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._id_or_none(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`: the one that ends a chat turn."""
        return self._id_or_none(self.eos_token)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """`eos_token_id` as a set; a model's configuration may name further tokens that end a reply."""
        return frozenset() if self.eos_token_id is None else frozenset((self.eos_token_id,))

    @property
    def pad_token_id(self) -> int | None:
        """The id of `pad_token`."""
        return self._id_or_none(self.pad_token)

    def token_to_id(self, token: str) -> int | None:
        """The id of the token spelled `token` in `tokenizer.json`; None if there is none."""
        if not isinstance(token, str) or find_lone_surrogate(token) is not None:
            return None
        found: int | None = self._backend.token_to_id(token)
        return found

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """`token_to_id` of a token, or of each in a list."""
        return self.token_to_id(tokens) if isinstance(tokens, str) else [self.token_to_id(token) for token in tokens]

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; added tokens such as `<|im_end|>` or `<think>` in it become their one id.

        Raises:
            OptionError: `text` is not a string, or holds half of a surrogate pair.
        """
        return self._encode(self._backend, text, add_special_tokens=True)

    def encode_plain(self, text: str) -> list[int]:
        """The token ids of untrusted text: no added token is recognised in it.

        Raises:
            OptionError: `text` is not a string, or holds half of a surrogate pair.
        """
        return self._encode(self._plain_backend, text)

    @property
    def added_token_ids(self) -> frozenset[int]:
        """The ids of the added tokens, such as `<|im_end|>` and `<think>`, which plain text never becomes."""
        return frozenset(self._added_tokens)

    def plain_encoder(self) -> Callable[[str], list[int]]:
        """What encodes text that is known to be Unicode as `encode_plain` does, without holding the tokenizer."""
        backend = self._plain_backend
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without encoding it.

        Its bytes divided by those of the longest token; for a short text only 1, as searching a large vocabulary takes
        longer than encoding 8 KiB.
        """
        size = len(unicodedata.normalize("NFC", text).encode())
        return -(-size // self._longest_token) if size > _SHORT_TEXT_BYTES else min(size, 1)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; they are no UTF-8 alone where a character spans tokens.

        Nothing for an id that no token has: models' vocabularies are padded, so that they can draw ids without a token.

        Raises:
            TokenizerError: no 32-bit id.
        """
        token_id = operator.index(token_id)
        found = self._bytes_of_id.get(token_id)
        if found is None:
            found = self._bytes_of_id[token_id] = self._spell(token_id)
        return found

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids, any integers in a sequence.
            skip_special_tokens: leave out added tokens marked special, such as `<|im_end|>` (not `<think>`).

        Raises:
            TokenizerError: no 32-bit ids.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        pieces = (self.token_bytes(token_id) for token_id in ids if int(token_id) not in skipped)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def batch_decode(self, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of each row of ids."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in rows]

    def detokenizer(self, *, skip_special_tokens: bool = False) -> Detokenizer:
        """A streaming decoder: what it returns, joined, is exactly what `decode` gives for all the ids."""
        return Detokenizer(self.token_bytes, self._special_ids if skip_special_tokens else frozenset())

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: Literal[True] = True,
        enable_thinking: bool | None = None,
        continue_final_message: bool = False,
        *,
        chat_template: str | None = None,
        trust_special_tokens: bool = True,
        **kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        *,
        tokenize: Literal[False],
        enable_thinking: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        trust_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        enable_thinking: bool | None = None,
        continue_final_message: bool = False,
        *,
        chat_template: str | None = None,
        trust_special_tokens: bool = True,
        **kwargs: Any,
    ) -> list[int] | str:
        """Render a conversation as the checkpoint's chat template says, as Hugging Face transformers does.

        As there, an added token spelled in a message, such as `<|im_end|>`, becomes that token, and a template may
        act on it. With `trust_special_tokens=False` only the template can say such tokens: in messages, tools and
        variables they are plain text; other text keeps its ids. A think block that opens an assistant's content is
        then taken for its reasoning.

        Args:
            messages: dicts with `role` and `content`; content is a string or a list of parts
                `{"type": "text", "text": …}`, which are joined. None as content becomes "" where the
                message has tool calls or reasoning, and is the template's to show elsewhere. Reasoning may be
                called `reasoning_content`, `reasoning` or `thinking`. Never modified.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: end with the header of an assistant turn.
            tokenize: return ids instead of text.
            enable_thinking: passed to the template; None leaves it undefined, as the template's own default.
            continue_final_message: leave the last message open, so that the model goes on with it.
            chat_template: the name of one of `chat_templates`, or a template's source. By
                default `tool_use` if there are tools and such a template, else `default`.
            trust_special_tokens: whether added tokens spelled in the conversation become those tokens. False gives
                ids only, as text cannot tell one from the other.
            **kwargs: further variables of the template.

        Raises:
            MessagesError: messages or tools that no template could render.
            OptionError: arguments that contradict each other.
            TemplateError: no template, or one that is broken, forbidden, too expensive, or renders no text; or, with
                `trust_special_tokens=False`, one that puts special tokens together from pieces.
        """
        from mlxqwen.text.chat_template import render_chat

        for name in _TRANSFORMERS_ARGUMENTS & kwargs.keys():
            if kwargs.pop(name):
                raise OptionError(
                    f"apply_chat_template: {name} is not supported",
                    hint="Use tokenize=True for a list of ids or tokenize=False for text.",
                )
        if continue_final_message and add_generation_prompt:
            raise OptionError(
                "apply_chat_template: continue_final_message and add_generation_prompt exclude each other",
                hint="Use the one to go on with the last message, the other to begin a new one.",
            )
        if not (tokenize or trust_special_tokens):
            raise OptionError(
                "apply_chat_template: trust_special_tokens=False and tokenize=False exclude each other",
                hint="Text cannot tell forged tokens from real ones: take ids, or text with trust_special_tokens=True.",
            )
        variables = {name: to_plain_json(value, name) for name, value in kwargs.items()}
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        source = self._choose_template(chat_template, tools)
        conversation = prepare_messages(messages)
        schemas = prepare_tools(tools)
        if not trust_special_tokens:
            ids = self._safe_chat.encode(
                source,
                conversation,
                tools=schemas,
                special_tokens=self._special_tokens,
                variables=variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            return self._not_empty(ids)
        text = render_chat(
            source,
            [dict(message) for message in conversation],
            tools=schemas,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._special_tokens, **variables},
        )
        return self._encode_trusted(self._not_empty(text)) if tokenize else self._not_empty(text)

    def _not_empty(self, rendered: _Rendered) -> _Rendered:
        if not rendered:
            raise TemplateError(f"{self._folder}: the chat template renders no text", hint=_WITHOUT_TEMPLATE)
        return rendered

    @property
    def _special_tokens(self) -> dict[str, str]:
        """The variables of chat templates that the checkpoint itself fills."""
        tokens = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
        }
        return {name: token for name, token in tokens.items() if token is not None}

    @cached_property
    def _safe_chat(self) -> SafeChatEncoder:
        return SafeChatEncoder(self._added_tokens, self._encode_trusted, self.encode_plain)

    def _encode_trusted(self, text: str) -> list[int]:
        return self._encode(self._backend, text)

    @property
    def _folder(self) -> Path:
        return Path(self._source).parent

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same model behind the same normalizer and pre-tokenizer, without added tokens."""
        plain = tokenizers.Tokenizer(self._backend.model)
        if self._backend.normalizer is not None:
            plain.normalizer = self._backend.normalizer
        if self._backend.pre_tokenizer is not None:
            plain.pre_tokenizer = self._backend.pre_tokenizer
        return plain

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the longest token, at least 1: in the alphabet of byte-level tokens each character is one."""
        added = (len(token.content.encode()) for token in self._added_tokens.values())
        return max(1, *map(len, self._backend.get_vocab(with_added_tokens=False)), *added)

    def _encode(self, backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise OptionError(f"encode: found {type(text).__name__}, expected a string")
        check_unicode(text, "encode")
        ids: list[int] = []
        for piece in self._pieces(backend, text):
            encoding = guard(
                partial(backend.encode, piece, add_special_tokens=add_special_tokens),
                f"{self._source}: could not encode the text",
                "Use the tokenizer.json that Qwen publishes for this model.",
            )
            ids += encoding.ids
        return ids

    def _pieces(self, backend: tokenizers.Tokenizer, text: str) -> Iterable[str]:
        """A long text in pieces, between which Ctrl-C is heard, if that changes no id."""
        if len(text) <= _PIECE:
            return (text,)
        from mlxqwen.text.pieces import pieces, splits_alike

        return pieces(text, _PIECE) if splits_alike(backend) else (text,)

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < 2**32:
            raise TokenizerError(
                f"token id: found {token_id}, expected an id below {self.vocab_size}",
                hint="The ids come from another tokenizer.",
            )
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        table = _byte_of_character()
        try:
            return bytes(table[character] for character in token)
        except KeyError:
            return bytes(token, "utf-8")

    def _id_or_none(self, token: str | None) -> int | None:
        return None if token is None else self.token_to_id(token)

    def _choose_template(self, asked: str | None, tools: object) -> str:
        if asked is not None:
            return self.chat_templates.get(asked, asked)
        if tools is not None and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if self.chat_template is not None:
            return self.chat_template
        if self.chat_templates:
            raise TemplateError(
                f"{self._folder}: no chat template is the default, found {sorted(self.chat_templates)}",
                hint="Name one of them: chat_template=….",
            )
        raise TemplateError(
            f"{self._folder}: no chat template, neither in chat_template.jinja nor in tokenizer_config.json",
            hint=_WITHOUT_TEMPLATE,
        )


class Detokenizer:
    """Turns token ids into whole characters, at a constant cost per token; from `Tokenizer.detokenizer`.

    Args:
        token_bytes: gives the bytes of a token.
        skipped: ids that leave no text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int] = frozenset()) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes; "" in the middle of one.

        Raises:
            TokenizerError: no 32-bit id.
        """
        if int(token_id) in self._skipped:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    @property
    def is_inside_character(self) -> bool:
        """Whether the ids so far end in the middle of a character."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """End the text → U+FFFD for an unfinished character, or "". The next id begins a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _token_string(config: Mapping[str, Any], key: str) -> str | None:
    """A special token of `tokenizer_config.json`: a string, an object with `content`, or null."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"tokenizer_config.json: {key}: found {type(value).__name__}, expected a string",
            hint=f"Give {key} as text, or as an object with its content.",
        )
    return value


def _read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no file."""
    return read_json_object(path, error=TokenizerError, max_bytes=MAX_TEXT_FILE_BYTES) if path.is_file() else {}


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    named = sorted((folder / "additional_chat_templates").glob("*.jinja"))[:MAX_NAMED_TEMPLATES]
    for path in named:
        templates[path.name.removesuffix(".jinja")] = read_text(
            path, error=TokenizerError, max_bytes=MAX_TEXT_FILE_BYTES
        )
    default = folder / "chat_template.jinja"
    if default.is_file():
        templates["default"] = read_text(default, error=TokenizerError, max_bytes=MAX_TEXT_FILE_BYTES)
    if templates:
        return templates
    legacy = folder / "chat_template.json"
    if legacy.is_file():
        return _templates_of(_read_json_object(legacy).get("chat_template"), str(legacy))
    return _templates_of(config.get("chat_template"), str(folder / "tokenizer_config.json"))


def _templates_of(value: object, source: str) -> dict[str, str]:
    """A template as JSON files give it: a string, a list of {"name", "template"}, or name → template."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair):
        return value
    raise TokenizerError(
        f'{source}: chat_template: expected a string or a list of {{"name", "template"}} objects',
        hint="Correct it, or put the template into chat_template.jinja.",
    )
