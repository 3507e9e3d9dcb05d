"""`tokenizer.json` becomes what the `tokenizers` library reads of it, and hostile parts never reach the library."""

from __future__ import annotations

import copy
import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.errors import TokenizerError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.text import tokenizer_file
from mlxqwen.text.tokenizer import Tokenizer
from mlxqwen.text.tokenizer_file import SPLIT_PATTERNS, build_tokenizer, read_tokenizer
from tests.test_tokenizer import ADDED, IDS, QWEN, REAL, REFERENCE, small_tokenizer

CASES = json.loads((Path(__file__).parent / "golden" / "chat_template.json").read_text())["cases"]
ROOT = Path(__file__).parent.parent
SMALL = json.loads(small_tokenizer().to_str())
PIECES = [
    "Latin ",
    "ёлка",
    "العربية",
    "עברית",
    "हिन्दी",
    "ไทย",
    "中文字符",
    "かな",
    "한국어",
    "𒀀𐍈",
    "e\u0301",
    "'RE",
    "123",
    "\t\r\n",
]
TEXT = st.lists(st.text(max_size=12) | st.sampled_from(PIECES) | st.sampled_from(sorted(ADDED))).map("".join)


def changed(**parts: object) -> dict[str, Any]:
    """A small tokenizer.json with other parts."""
    return {**copy.deepcopy(SMALL), **parts}


def model(**options: object) -> dict[str, Any]:
    """A small tokenizer.json with another model."""
    return changed(model={**SMALL["model"], **options})


def added(content: str, **flags: object) -> dict[str, Any]:
    """An added token of tokenizer.json."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 0, "content": content, **plain, **flags}


def normal(description: dict[str, Any]) -> dict[str, Any]:
    """Without what is left out on purpose, and without null for what is none."""
    parts = {**description, "truncation": None, "padding": None}
    return {**parts, "model": {name: value for name, value in parts["model"].items() if value not in (None, "")}}


# --- the same as the library's ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [REAL, DEMO_FOLDER], ids=["Qwen3", "demo"])
def test_the_tokenizer_is_the_one_that_the_library_reads(folder: Path) -> None:
    path = folder / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    built = read_tokenizer(path)
    assert normal(json.loads(built.to_str())) == normal(json.loads(library.to_str()))
    assert built.get_added_tokens_decoder() == library.get_added_tokens_decoder()


@pytest.mark.parametrize(
    "description",
    [
        SMALL,
        changed(added_tokens=[added("<end>", special=True), added("<a>", lstrip=True), added("é", normalized=True)]),
        changed(added_tokens=[{**added("<far>"), "id": 900}, {**added("<near>", single_word=True), "id": 400}]),
        changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        changed(normalizer=None, added_tokens=[]),
        {part: value for part, value in SMALL.items() if part not in ("version", "truncation", "padding")},
        model(vocab={**SMALL["model"]["vocab"], "far": 2**32 - 1}),
        model(ignore_merges=True, unk_token="<end>", fuse_unk=True),
        model(continuing_subword_prefix="", end_of_word_suffix="", dropout=0.0),
        model(merges=["#version: 0.2", *(" ".join(merge) for merge in SMALL["model"]["merges"])]),
        changed(truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    ],
)
def test_other_descriptions_are_read_as_the_library_does(description: dict[str, Any]) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(description))
    built = build_tokenizer(description, "tokenizer.json")
    library.no_truncation()
    for text in ("hello world", " hello<end> <a>  e\u0301é", "<far><near>", "wor ld\n\nx"):
        assert built.encode(text).ids == library.encode(text).ids
    assert built.get_added_tokens_decoder() == library.get_added_tokens_decoder()


def test_what_a_post_processor_adds_is_added() -> None:
    tokenizer = small_tokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    built = build_tokenizer(json.loads(tokenizer.to_str()), "tokenizer.json")
    assert built.encode("hello").ids == tokenizer.encode("hello").ids
    assert built.encode("hello").ids[0] == 0


def test_every_token_has_the_librarys_spelling() -> None:
    for token_id in range(152_000):
        spelling = REFERENCE.id_to_token(token_id)
        assert QWEN._backend.id_to_token(token_id) == spelling
        assert spelling is None or QWEN.token_to_id(spelling) == token_id


@settings(deadline=None)
@given(TEXT)
def test_texts_have_the_librarys_ids(text: str) -> None:
    assert QWEN.encode(text) == REFERENCE.encode(text).ids


def test_every_character_of_the_first_planes_has_the_librarys_ids() -> None:
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        for glue in ("", " "):
            text = glue.join(characters[start : start + 4096])
            assert QWEN.encode(text) == REFERENCE.encode(text).ids


@pytest.mark.parametrize("path", ["mlxqwen/device.py", "docs/conversion.md", "LICENSE", "scripts/demo/phrases.json"])
def test_files_have_the_librarys_ids(path: str) -> None:
    text = (ROOT / path).read_text()
    assert QWEN.encode(text) == REFERENCE.encode(text).ids


@pytest.mark.parametrize("character", ["a", " ", "x1", "的", "=", "\n", "-", "é"])
@pytest.mark.parametrize("count", [1, 2, 3, 127, 128, 129, 1000])
def test_repetition_has_the_librarys_ids(character: str, count: int) -> None:
    assert QWEN.encode(character * count) == REFERENCE.encode(character * count).ids


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_conversations(case: dict[str, Any]) -> None:
    assert QWEN.encode(case["text"]) == case["ids"]


# --- hostile parts ------------------------------------------------------------------------------------------

REPLACE = {"type": "Replace", "pattern": {"String": "."}, "content": "a" * 300_000}
GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False}
SLOW = {"type": "Split", "pattern": {"Regex": ".*.*[^a-z]"}, "behavior": "Isolated", "invert": False}
TEXT_A = {"Sequence": {"id": "A", "type_id": 0}}


def sequence(name: str, steps: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: steps}


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        step = sequence("normalizers", [step])
    return step


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def template(single: object, tokens: object = None) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens or {}}


def token(count: int) -> dict[str, Any]:
    return {"<x>": {"id": "<x>", "ids": [0] * count, "tokens": ["<x>"] * count}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a long replacement": (changed(normalizer=REPLACE), "normalizer: found 'Replace', expected NFC"),
    "growth in steps": (changed(normalizer=sequence("normalizers", [GROWING] * 6)), "normalizer: found 'Replace'"),
    "a prefix": (changed(normalizer={"type": "Prepend", "prepend": "a" * 10**6}), "normalizer: found 'Prepend'"),
    "a binary table": (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "found 'Precompiled'"),
    "many steps": (changed(normalizer=sequence("normalizers", [{"type": "NFC"}] * 10**5)), "found more than 16 steps"),
    "deep steps": (changed(normalizer=nested(17)), "normalizer: found more than 16 steps, expected fewer"),
    "a step that is no object": (changed(normalizer=[]), "normalizer: found a list, expected NFC"),
    "a step that holds a deep value": (changed(normalizer={"type": "NFC", "x": deep(400)}), "not a readable tokenizer"),
    "a sequence of nothing": (changed(normalizer={"type": "Sequence"}), "normalizer: found 'Sequence'"),
    "a type of a megabyte": (changed(normalizer={"type": "N" * 2**20}), "normalizer: found 'NNN"),
    "metaspace": (changed(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "pre_tokenizer: found 'Metaspace'"),
    "bytes of bytes": (changed(pre_tokenizer=sequence("pretokenizers", [BYTES] * 3)), "found 3 times ByteLevel"),
    "a slow pattern": (changed(pre_tokenizer=SLOW), "Split: found the pattern '[.][*][.][*].*one of those of Qwen"),
    "a pattern in a sequence": (changed(pre_tokenizer=sequence("pretokenizers", [SLOW, BYTES])), "found the pattern"),
    "no pattern": (changed(pre_tokenizer={**SLOW, "pattern": None}), "Split: found no short pattern"),
    "a long pattern": (changed(pre_tokenizer={**SLOW, "pattern": {"String": "a" * 1025}}), "found no short pattern"),
    "a text many times": (changed(post_processor=template([TEXT_A] * 2)), "found the text 2 times, expected once"),
    "no text": (changed(post_processor=template([])), "found the text 0 times"),
    "a long template": (changed(post_processor=template([TEXT_A] * 10**5)), "at most 16 each"),
    "many ids": (changed(post_processor=template([TEXT_A], token(17))), "ids, at most 16"),
    "templates of templates": (
        changed(post_processor=sequence("processors", [template([TEXT_A])] * 2)),
        "found 2 times TemplateProcessing, expected at most one",
    ),
    "another post-processor": (changed(post_processor={"type": "BertProcessing"}), "post_processor: found 'Bert"),
    "another decoder": (changed(decoder={"type": "Metaspace"}), "decoder: found 'Metaspace', expected ByteLevel"),
    "many added tokens": (
        changed(added_tokens=[added(str(n)) for n in range(2_049)]),
        "added_tokens: found 2,049 tokens, expected at most 2,048",
    ),
    "a long added token": (
        changed(added_tokens=[added("x"), added("é" * 10**6)]),
        r"added_tokens\[1\]: found 'é+' of 2,000,000 bytes, expected at most 1,024",
    ),
    "long added tokens": (
        changed(added_tokens=[added(f"{n:01024}") for n in range(1025)]),
        "added_tokens: found 1,049,600 bytes, expected at most 1,048,576 in all",
    ),
    "added tokens that are none": (changed(added_tokens=["a"]), r"added_tokens\[0\]: found 'a', expected an object"),
    "an added token without flags": (changed(added_tokens=[{"content": "a"}]), r"added_tokens\[0\]: found an object"),
    "no list of added tokens": (changed(added_tokens={}), "added_tokens: found an object, expected a list"),
    "half a character in an added token": (changed(added_tokens=[added("\ud800")]), "not a readable tokenizer"),
    "no model": (changed(model=None), "model: found null, expected an object"),
    "another model": (model(type="WordPiece"), "model: found type 'WordPiece', expected BPE with"),
    "no merges": (model(merges=None), "expected BPE with vocab and merges"),
    "merges of three": (model(merges=[["a", "b", "c"]]), "not a readable tokenizer"),
    "merges that are numbers": (model(merges=[1]), "merges: found int, expected lists of two tokens"),
    "merges of two kinds": (model(merges=[["a", "b"], "a b"]), "merges: found list and str"),
    "a merge of unknown tokens": (model(merges=[["a", "no such token"]]), "not a readable tokenizer"),
    "ids that are none": (model(vocab={"a": -1}, merges=[]), "not a readable tokenizer"),
    "ids that are text": (model(vocab={"a": "1"}, merges=[]), "not a readable tokenizer"),
    "random merges": (model(dropout=0.5), "dropout: found a number, expected none"),
    "a long subword prefix": (model(continuing_subword_prefix="#" * 10**6), "prefix: found '#+', expected none"),
    "a suffix": (model(end_of_word_suffix="</w>"), "end_of_word_suffix: found '</w>', expected none"),
    "another version": (changed(version="9.0"), "not a readable tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_exhaust_time_or_memory_is_refused(name: str, tmp_path: Path) -> None:
    description, problem = REFUSED[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=problem) as caught:
        read_tokenizer(path)
    assert caught.value.problem.startswith(f"{path}: ")
    assert caught.value.hint


@pytest.mark.parametrize("name", [name for name in REFUSED if "readable" not in REFUSED[name][1]])
def test_the_library_sees_nothing_that_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "tokenizers", None)
    with pytest.raises(TokenizerError, match=REFUSED[name][1]):
        build_tokenizer(REFUSED[name][0], "tokenizer.json")


def test_as_much_as_is_allowed_is_read() -> None:
    names = [f"<{n:04}>" for n in range(tokenizer_file.MAX_ADDED_TOKENS - 1)]
    tokens = [added(name) for name in names] + [added("x" * tokenizer_file.MAX_ADDED_TOKEN_BYTES)]
    steps = sequence("normalizers", [{"type": "NFC"}] * (tokenizer_file.MAX_STEPS - 1))
    built = build_tokenizer(changed(added_tokens=tokens, normalizer=steps), "tokenizer.json")
    tokenizer = Tokenizer(built, {}, {"default": "{% for m in messages %}<0000>{{ m.content }}<0001>{% endfor %}"})
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "<0002>"}], trust_special_tokens=False)
    assert (ids[0], ids[-1]) == (built.token_to_id("<0000>"), built.token_to_id("<0001>"))
    assert built.token_to_id("<0002>") not in ids


BEHAVIORS = st.sampled_from(["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
PATTERNS = st.sampled_from([{"Regex": pattern} for pattern in SPLIT_PATTERNS] + [{"String": "l"}, {"String": ""}])
SPLITS = st.builds(
    lambda pattern, behavior, invert: {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert},
    *(PATTERNS, BEHAVIORS, st.booleans()),
)
PRE_TOKENIZERS = st.lists(
    SPLITS | st.sampled_from([BYTES, {**BYTES, "use_regex": True}, {"type": "Digits", "individual_digits": True}]),
    max_size=tokenizer_file.MAX_STEPS - 1,
)


@settings(deadline=None)
@given(PRE_TOKENIZERS, st.sampled_from(["NFC", None]), st.text(max_size=40), st.integers(0, tokenizer_file.MAX_STEPS))
def test_no_text_becomes_much_longer(steps: list[Any], normalizer: str | None, text: str, count: int) -> None:
    """Twice its bytes, where a blank is put before each piece, and the few tokens of a post-processor."""
    adds = {"SpecialToken": {"id": "<x>", "type_id": 0}}
    description = changed(
        normalizer=normalizer and {"type": normalizer},
        pre_tokenizer=sequence("pretokenizers", steps),
        post_processor=template([TEXT_A, *[adds] * (tokenizer_file.MAX_STEPS - 1)], token(count)),
    )
    try:
        built = build_tokenizer(description, "tokenizer.json")
    except TokenizerError as error:
        assert "times ByteLevel" in error.problem  # noqa: PT017
        assert sum(step["type"] == "ByteLevel" for step in steps) > 1
    else:
        assert len(built.encode(text).ids) <= 2 * 3 * len(text.encode()) + tokenizer_file.MAX_STEPS**2


@pytest.mark.parametrize("pattern", SPLIT_PATTERNS)
def test_each_known_pattern_is_one_that_the_library_takes(pattern: str) -> None:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    built = build_tokenizer(changed(pre_tokenizer=sequence("pretokenizers", [step, BYTES])), "tokenizer.json")
    pieces = built.pre_tokenizer.pre_tokenize_str("It's 1234\n\nx")
    assert "".join(piece for piece, _ in pieces).replace("Ġ", "").startswith("It's1234")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner)))
def test_any_value_in_any_place_is_an_error_or_a_tokenizer(value: object) -> None:
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens", "model", "version"):
        try:
            build_tokenizer(changed(**{part: value}), "tokenizer.json")
        except TokenizerError as error:
            assert error.problem.startswith("tokenizer.json: ")  # noqa: PT017


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 11422654\n", "a git-lfs pointer"),
        (b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "a web page"),
        (b"<html>", "a web page"),
        (b"", "the file is empty"),
        (b'{"a": ', "not valid JSON at line 1"),
        (b"[]", "found a list, expected an object"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b"1," * 4_000_001 + b"1]", "more than 4,000,000 values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_what_is_no_tokenizer_file_is_told(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=problem) as caught:
        read_tokenizer(path)
    assert caught.value.problem.startswith(f"{path}: ")
    assert caught.value.hint
    assert gc.isenabled()


def test_a_larger_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(tokenizer_file.MAX_FILE_BYTES + 1)
    with pytest.raises(TokenizerError, match=r"larger than 67,108,864 bytes"):
        read_tokenizer(path)


# --- a tokenizer and a model --------------------------------------------------------------------------------


def fitted(change: Callable[[dict[str, Any]], None] | None = None) -> Tokenizer:
    description = changed(added_tokens=[added("<end>", special=True), added("<new>"), added("<newer>")])
    if change:
        change(description)
    return Tokenizer(build_tokenizer(description, "tokenizer.json"), {"eos_token": "<end>"}, source="a/tokenizer.json")


def test_a_tokenizer_that_fits_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = fitted()
    tokenizer.check_fits(tokenizer.vocab_size)
    assert not caplog.records


def test_added_tokens_without_embeddings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = fitted()
    with caplog.at_level(logging.WARNING, "mlxqwen"):
        tokenizer.check_fits(tokenizer.vocab_size - 2)
    [record] = caplog.records
    size = tokenizer.vocab_size - 2
    assert record.getMessage() == (
        f"a/tokenizer.json: 2 added tokens have ids beyond the model's vocab_size, {size}: <new>, <newer>; "
        "text with one of them cannot be read"
    )


def test_tokens_of_text_without_embeddings_are_an_error() -> None:
    tokenizer = fitted()
    size = tokenizer.vocab_size - 3
    with pytest.raises(
        TokenizerError, match=rf"a/tokenizer\.json: '.+' has id {size}, expected ids below {size}, the "
    ):
        tokenizer.check_fits(size)


def test_an_end_token_without_an_embedding_is_an_error() -> None:
    tokenizer = Tokenizer(fitted()._backend, {"eos_token": "<newer>"}, source="a/tokenizer.json")
    last = tokenizer.vocab_size - 1
    with pytest.raises(
        TokenizerError, match=f"'<newer>' has id {last}, expected ids below {last}, the model's"
    ) as caught:
        tokenizer.check_fits(last)
    assert "another model" in caught.value.hint


def test_ids_of_a_whole_vocabulary_have_the_librarys_text() -> None:
    built = read_tokenizer(REAL / "tokenizer.json")

    @settings(deadline=None, max_examples=30)
    @given(IDS)
    def check(ids: list[int]) -> None:
        assert built.decode(ids, skip_special_tokens=False) == REFERENCE.decode(ids, skip_special_tokens=False)

    check()
