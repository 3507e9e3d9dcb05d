"""Compiled tokenizers give what the `tokenizers` library gives; and how they are kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxqwen.errors import TokenizerError
from mlxqwen.files.hub import DEMO_FOLDER
from mlxqwen.text.tokenizer import Tokenizer
from mlxqwen.text.tokenizer_backend import LibraryBackend, background, compiled, compiler, opening, store
from mlxqwen.text.tokenizer_backend.background import compile_file
from mlxqwen.text.tokenizer_backend.compiled import CompiledBackend
from mlxqwen.text.tokenizer_backend.compiler import UnsuitableError, compile_tokenizer
from mlxqwen.text.tokenizer_backend.tables import NO_MERGE, DamagedTablesError, Tables
from tests.command_line import run
from tests.test_tokenizer import ADDED, IDS, QWEN, REAL, REFERENCE, small_tokenizer

CASES = json.loads((Path(__file__).parent / "golden" / "chat_template.json").read_text())["cases"]
ROOT = Path(__file__).parent.parent


def refuse() -> NoReturn:
    raise AssertionError("the whole tokenizer was read")


LIBRARY = LibraryBackend(tokenizers.Tokenizer.from_file(str(REAL / "tokenizer.json")), "tokenizer.json")
TABLES = Tables.unpack(compile_tokenizer(LIBRARY, {"source": "tokenizer.json"}).pack())
CONFIG = json.loads((REAL / "tokenizer_config.json").read_text())


def compiled_qwen(load: Callable[[], LibraryBackend] = refuse) -> Tokenizer:
    """Qwen's tokenizer from tables; with nothing encoded yet, so that no test can use up what may be."""
    return Tokenizer(CompiledBackend(TABLES, load), CONFIG, {"default": CONFIG["chat_template"]})


SCRIPTS = [
    "Latin ",
    "ёлка",
    "Ελλάς",
    "العربية",
    "עברית",
    "हिन्दी",
    "ไทย",
    "中文字符",
    "かな",
    "한국어",
    "ᚠᚢ",
    "𒀀𐍈",
    "\U0010fffd",
]
PIECES = [
    *SCRIPTS,
    "e\u0301",
    "\u1112\u1161\u11ab",
    " ",
    "\n",
    "\t\r\n",
    "\u00a0",
    "'ll",
    "'RE",
    "123",
    "def f(x):",
    "=>",
    "👩‍👩‍👧",
    "\0",
]
TEXT = st.lists(st.text(max_size=12) | st.sampled_from(PIECES) | st.sampled_from(sorted(ADDED))).map("".join)


# --- the same ids, spellings and texts ------------------------------------------------------------------


@settings(deadline=None)
@given(TEXT)
def test_texts_have_the_library_s_ids(text: str) -> None:
    tokenizer = compiled_qwen()
    assert tokenizer.encode(text) == REFERENCE.encode(text).ids
    assert tokenizer.encode_plain(text) == QWEN.encode_plain(text)


@settings(deadline=None)
@given(st.text("etaoin shrdlu", max_size=200))
def test_words_of_many_merges_have_the_library_s_ids(text: str) -> None:
    assert compiled_qwen().encode(text) == REFERENCE.encode(text).ids


@pytest.mark.parametrize("path", ["mlxqwen/device.py", "docs/conversion.md", "LICENSE", "scripts/demo_phrases.json"])
def test_files_have_the_library_s_ids(path: str) -> None:
    text = (ROOT / path).read_text()
    assert compiled_qwen().encode(text) == REFERENCE.encode(text).ids


@pytest.mark.parametrize("character", ["a", " ", "x1", "ab", "的", "=", "\n", "-", "é"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 127, 128, 129, 1000])
def test_repetition_has_the_library_s_ids(character: str, count: int) -> None:
    text = character * count
    assert compiled_qwen().encode(text) == REFERENCE.encode(text).ids


def test_every_character_of_the_first_planes_has_the_library_s_ids() -> None:
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        text = " ".join(characters[start : start + 4096])
        assert compiled_qwen().encode(text) == REFERENCE.encode(text).ids


def test_every_token_has_the_library_s_spelling_and_id() -> None:
    backend = compiled_qwen()._backend
    for token_id in range(152_000):
        token = REFERENCE.id_to_token(token_id)
        assert backend.id_to_token(token_id) == token
        if token is not None and token_id % 101 == 0:
            assert backend.token_to_id(token) == token_id
    assert backend.vocab_size == QWEN._backend.vocab_size
    assert backend.longest_token == QWEN._backend.longest_token
    assert compiled_qwen().vocab_size == QWEN.vocab_size


@pytest.mark.parametrize(
    "token", ["", "no such token", "\n", "\ud800", "Ġthe\nĠof", " the", "Ġ", "ĠĠ", "!", "Ā", "<think>"]
)
def test_tokens_are_looked_up_as_the_library_does(token: str) -> None:
    assert compiled_qwen().token_to_id(token) == QWEN.token_to_id(token)


def test_added_tokens_have_the_library_s_ids_and_rules() -> None:
    found, expected = (tokenizer._backend.added_tokens for tokenizer in (compiled_qwen(), QWEN))
    assert {i: repr(token) for i, token in found.items()} == {i: repr(token) for i, token in expected.items()}
    tokenizer = compiled_qwen()
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(tokenizer, f"{name}_id") == getattr(QWEN, f"{name}_id")


@settings(deadline=None)
@given(IDS, st.booleans())
def test_ids_have_the_library_s_text_whole_and_streamed(ids: list[int], skip: bool) -> None:
    tokenizer = compiled_qwen()
    text = REFERENCE.decode(ids, skip_special_tokens=skip)
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == text
    assert "".join(map(stream.add, ids)) + stream.finish() == text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_conversations(case: dict[str, Any]) -> None:
    arguments = {key: value for key, value in case.items() if key not in ("name", "text", "ids")}
    assert compiled_qwen().apply_chat_template(**arguments) == case["ids"]
    safe = compiled_qwen().apply_chat_template(**arguments, trust_special_tokens=False)
    assert safe == QWEN.apply_chat_template(**arguments, trust_special_tokens=False)


@settings(deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=20), st.text("abc ", max_size=60))
def test_any_merges_are_applied_in_the_library_s_order(corpus: list[str], text: str) -> None:
    """Few letters and merges learned from chance: pairs compete at every place."""
    library = LibraryBackend(trained(corpus), "tokenizer.json")
    tables = Tables.unpack(compile_tokenizer(library, {}).pack())
    assert CompiledBackend(tables, refuse).encode(text, add_special_tokens=True) == library.encode(
        text, add_special_tokens=True
    )


def trained(corpus: list[str], **settings: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**settings))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def test_what_a_post_processor_adds() -> None:
    small = small_tokenizer()
    small.add_tokens([tokenizers.AddedToken(" mid ", lstrip=True), tokenizers.AddedToken("é", normalized=True)])
    small.normalizer = tokenizers.normalizers.NFC()
    small.post_processor = tokenizers.processors.TemplateProcessing("<end> $A <end>", special_tokens=[("<end>", 0)])
    library = LibraryBackend(small, "tokenizer.json")
    backend = CompiledBackend(Tables.unpack(compile_tokenizer(library, {}).pack()), refuse)
    for text in ("", "hello", "hello mid  mid world<end>e\u0301<end><end>é"):
        for special in (False, True):
            assert backend.encode(text, add_special_tokens=special) == library.encode(text, add_special_tokens=special)
        assert backend.encode_plain(text) == library.encode_plain(text)


# --- what is not compiled -------------------------------------------------------------------------------


def without_bytes(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()


def without_an_alphabet(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])


def with_gaps(tokenizer: tokenizers.Tokenizer) -> None:
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.model = tokenizers.models.BPE({letter: 2 * place for place, letter in enumerate(letters)}, [])


def as_words(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.model = tokenizers.models.WordLevel({"a": 0, "?": 1}, "?")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_bytes, "not spelled in bytes"),
        (without_an_alphabet, "bytes without a token"),
        (with_gaps, "ids with gaps"),
        (as_words, "WordLevel"),
    ],
)
def test_unsuitable_tokenizers(change: Callable[[tokenizers.Tokenizer], None], reason: str) -> None:
    small = small_tokenizer()
    change(small)
    with pytest.raises(UnsuitableError, match=reason):
        compile_tokenizer(LibraryBackend(small, "tokenizer.json"), {})


@pytest.mark.parametrize("settings", [{"ignore_merges": True}, {"dropout": 0.5}, {"unk_token": "<end>"}])
def test_other_rules_of_merging_are_unsuitable(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsuitableError, match=next(iter(settings))):
        compile_tokenizer(LibraryBackend(trained(["hello hello"], **settings), "tokenizer.json"), {})


@pytest.mark.parametrize("merge", ["_merge_short", "_merge_long"])
def test_tables_that_give_other_ids_are_refused(monkeypatch: pytest.MonkeyPatch, merge: str) -> None:
    monkeypatch.setattr(compiled, "_SHORT", 0 if merge == "_merge_long" else 64)
    monkeypatch.setattr(CompiledBackend, merge, lambda self, word: list(word))
    with pytest.raises(UnsuitableError, match="other ids for the token"):
        compile_tokenizer(LibraryBackend(small_tokenizer(), "tokenizer.json"), {})


@pytest.mark.parametrize("place", [0, 151_384])
def test_a_single_wrong_merge_is_found(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Two ranks change places, and nothing else."""
    real = Tables.make

    def make(facts: Any, tokens: Any = (), merges: Any = ()) -> Tables:
        made, other = real(facts, tokens, merges), place + 1
        products = made.products[:]
        products[place], products[other] = products[other], products[place]  # type: ignore[index]
        return replace(made, products=products)

    monkeypatch.setattr(Tables, "make", make)
    with pytest.raises(UnsuitableError, match="other ids for the token"):
        compile_tokenizer(LIBRARY, {})


@settings(deadline=None)
@given(st.text("etaoin shrdlu的", max_size=400), st.sampled_from([0, 10**9]))
def test_both_ways_of_merging_give_the_library_s_ids(text: str, short: int) -> None:
    with patch.object(compiled, "_SHORT", short):
        assert compiled_qwen().encode(text) == REFERENCE.encode(text).ids


@settings(deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=20), st.text("abc ", max_size=60))
def test_any_merges_are_applied_in_order_by_the_heap(corpus: list[str], text: str) -> None:
    library = LibraryBackend(trained(corpus), "tokenizer.json")
    with patch.object(compiled, "_SHORT", 0):
        backend = CompiledBackend(compile_tokenizer(library, {}), refuse)
        assert backend.encode_plain(text) == library.encode_plain(text)


# --- the whole tokenizer, when it is worth its price ----------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [["word " * compiled.MAX_WORK], ["的" * 30_000], [f"{chr(number)} a" for number in range(0x3400, 0x9E00)]],
    ids=["a long text", "a long word", "many texts"],
)
def test_the_whole_tokenizer_is_read_once_when_much_is_encoded(texts: list[str]) -> None:
    reads = []

    def load() -> LibraryBackend:
        reads.append(1)
        return LIBRARY

    tokenizer = compiled_qwen(load)
    for text in texts:
        assert tokenizer.encode(text) == LIBRARY.encode(text, add_special_tokens=True)
    assert tokenizer.encode_plain(texts[0]) == LIBRARY.encode_plain(texts[0])
    assert len(reads) == 1


def test_words_that_were_seen_cost_nothing_again() -> None:
    tokenizer = compiled_qwen()
    for _ in range(compiled.MAX_WORK // 1000):
        tokenizer.encode("a text of few words " * 100)


# --- tables as bytes ------------------------------------------------------------------------------------


def test_tables_come_back_from_their_bytes() -> None:
    tables = Tables.unpack(Tables.make({"key": "ü"}, ["a", "b", "ab", "é"], [(0, 1, 2), (1, 0, 3)]).pack())
    assert tables.facts == {"key": "ü"}
    assert [tables.spelling(i) for i in range(-1, 5)] == [None, "a", "b", "ab", "é", None]
    assert [tables.find(token) for token in ("a", "b", "ab", "é", "", "c", "b\nab")] == [0, 1, 2, 3, None, None, None]
    assert [tables.rank(*pair) for pair in ((0, 1), (1, 0), (1, 1), (2, 0))] == [0, 1, NO_MERGE, NO_MERGE]
    assert list(tables.products) == [2, 3]


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    whole = Tables.make({"key": 1}, ["a", "b", "ab"], [(0, 1, 2)]).pack()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(changed), whole[:place], whole + b"\0"):
        with pytest.raises(DamagedTablesError):
            Tables.unpack(damaged)


@pytest.mark.parametrize("facts", [b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_facts_that_are_no_object_are_damage(facts: bytes) -> None:
    body = struct.pack("=III", len(facts), 0, 0) + facts + struct.pack("=I", 1) + b"\n"
    with pytest.raises(DamagedTablesError):
        Tables.unpack(struct.pack("=8sI", b"mlxqtok1", zlib.crc32(body)) + body)


# --- files of the cache ---------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLXQWEN_TOKENIZER_CACHE", raising=False)
    return tmp_path / "cache" / "tokenizers"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were to be compiled in the background; nothing is."""
    files: list[Path] = []
    monkeypatch.setattr(background, "start", lambda path, digest, entry: files.append(path))
    return files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tokenizer that counts as a large one."""
    monkeypatch.setattr(opening, "MIN_COMPILED_BYTES", 0)
    (tmp_path / "model").mkdir()
    small_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def compile_now(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    digest = store.digest(path.read_bytes())
    entry = entry_of(folder)
    compile_file(path, digest, entry)
    return entry


def entry_of(folder: Path) -> Path:
    entry = store.entry_path(store.digest((folder / "tokenizer.json").read_bytes()))
    assert entry is not None
    return entry


def is_compiled(folder: Path) -> bool:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("hello world<end>") == small_tokenizer().encode("hello world<end>").ids
    return isinstance(tokenizer._backend, CompiledBackend)


def test_a_tokenizer_is_compiled_when_it_is_first_read(folder: Path, cache: Path, started: list[Path]) -> None:
    assert not is_compiled(folder)
    assert started == [folder / "tokenizer.json"]
    compile_now(folder)
    assert is_compiled(folder)
    assert len(started) == 1


def test_the_background_process(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    Tokenizer.from_folder(folder)
    deadline = time.monotonic() + 60
    while not is_compiled(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_compiled(folder)
    assert {path.name for path in cache.iterdir()} == {entry_of(folder).name, "lock"}
    assert entry_of(folder).stat().st_mode & 0o022 == 0


def test_applications_with_an_interpreter_inside_start_nothing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_spawn", lambda *args, **options: refuse())
    for executable in ("/opt/app/browser", "", None):
        monkeypatch.setattr(sys, "executable", executable)
        assert not is_compiled(folder)


def test_small_tokenizers_are_not_compiled(folder: Path, cache: Path, started: list[Path], monkeypatch: Any) -> None:
    monkeypatch.undo()
    Tokenizer.from_folder(folder)
    assert (started, cache.exists()) == ([], False)


def test_vast_tokenizers_are_not_compiled(
    folder: Path, cache: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "MAX_COMPILED_BYTES", 1000)
    assert not is_compiled(folder)
    assert (started, cache.exists()) == ([], False)


def test_the_command_answers_the_same(cache: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "MIN_COMPILED_BYTES", 0)
    command = ("generate", "How many r's in <think> strawberry?", "--temperature", "0", "--max-tokens", "60", "--json")
    first = json.loads(run(*command).out)
    assert started == [DEMO_FOLDER / "tokenizer.json"]
    compile_now(DEMO_FOLDER)
    second = json.loads(run(*command).out)
    assert len(started) == 1
    answers = [{key: reply[key] for key in ("reasoning", "content", "usage")} for reply in (first, second)]
    assert answers[0] == answers[1]
    assert answers[0]["reasoning"]


@pytest.mark.parametrize("word", ["off", "0", "no"])
def test_it_can_be_switched_off(
    folder: Path, cache: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    compile_now(folder)
    monkeypatch.setenv("MLXQWEN_TOKENIZER_CACHE", word)
    assert not is_compiled(folder)
    assert started == []


def test_an_unknown_word_means_on_and_is_told_once(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_now(folder)
    for word in ("banana", "banana", "on", "1"):
        monkeypatch.setenv("MLXQWEN_TOKENIZER_CACHE", word)
        assert is_compiled(folder)
    assert [record.getMessage() for record in caplog.records] == [
        "MLXQWEN_TOKENIZER_CACHE: found 'banana', expected on or off; it is taken for on"
    ]


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "a folder", "a link"])
def test_a_damaged_file_is_made_anew(folder: Path, cache: Path, started: list[Path], damage: str) -> None:
    entry = compile_now(folder)
    whole = entry.read_bytes()
    if damage == "changed":
        entry.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    elif damage == "a folder":
        entry.unlink()
        entry.mkdir()
    elif damage == "a link":
        entry.rename(cache / "elsewhere")
        entry.symlink_to(cache / "elsewhere")
    else:
        entry.write_bytes(whole[:1000] if damage == "cut" else b"")
    assert not is_compiled(folder)
    assert len(started) == 1
    if damage != "a folder":
        assert compile_now(folder).read_bytes() == whole
        assert is_compiled(folder)


def test_an_old_file_never_hides_a_damaged_tokenizer(folder: Path, cache: Path, started: list[Path]) -> None:
    compile_now(folder)
    path = folder / "tokenizer.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.from_folder(folder)
    assert started == []
    path.write_bytes(whole)
    assert is_compiled(folder)


@pytest.mark.parametrize(("becomes", "problem"), [("{}", "changed since"), (None, "no such file")])
def test_a_tokenizer_that_changes_while_it_is_in_use(
    folder: Path,
    cache: Path,
    started: list[Path],
    caplog: pytest.LogCaptureFixture,
    becomes: str | None,
    problem: str,
) -> None:
    compile_now(folder)
    tokenizer = Tokenizer.from_folder(folder)
    path = folder / "tokenizer.json"
    path.unlink() if becomes is None else path.write_text(becomes)
    for text in ("hello", "hello " * compiled.MAX_WORK, "hello" * compiled.MAX_WORK, "world"):
        assert tokenizer.encode(text) == small_tokenizer().encode(text).ids
        assert tokenizer.encode_plain(text) == tokenizer.encode(text)
    [record] = caplog.records
    assert re.search(rf"tokenizer\.json: {problem}.*; its compiled tables go on alone", record.getMessage())


def test_an_unsuitable_tokenizer_is_tried_once(folder: Path, cache: Path, started: list[Path]) -> None:
    small = small_tokenizer()
    without_an_alphabet(small)
    small.save(str(folder / "tokenizer.json"))
    Tokenizer.from_folder(folder)
    compile_now(folder)
    assert not isinstance(Tokenizer.from_folder(folder)._backend, CompiledBackend)
    assert len(started) == 1
    assert [found.state for found in store.cached_tokenizers()] == ["not compilable"]
    assert store.prune_tokenizers() == []


def test_a_compiler_that_fails_is_tried_once(
    folder: Path, cache: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise KeyError("merges")

    monkeypatch.setattr(compiler, "compile_tokenizer", fail)
    compile_now(folder)
    assert not is_compiled(folder)
    assert started == []
    assert [found.state for found in store.cached_tokenizers()] == ["not compilable"]


@pytest.mark.parametrize("obstacle", ["a file", "a link", "no home", "read-only"])
def test_a_cache_that_cannot_be_written_to(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, obstacle: str
) -> None:
    if obstacle == "a file":
        cache.parent.write_text("")
    elif obstacle == "a link":
        cache.parent.mkdir()
        cache.symlink_to(tmp_path)
    elif obstacle == "no home":
        monkeypatch.setenv("MLXQWEN_CACHE", "~no-such-user-at-all/cache")
    else:
        refused = PermissionError(13, "Permission denied")
        monkeypatch.setattr(Path, "mkdir", lambda *args, **options: (_ for _ in ()).throw(refused))
    monkeypatch.setattr(os, "posix_spawn", lambda *args, **options: refuse())
    assert not is_compiled(folder)
    assert store.cached_tokenizers() == []


def test_two_processes_write_at_once(folder: Path, cache: Path) -> None:
    path = folder / "tokenizer.json"
    program = (
        "import sys; from pathlib import Path; from mlxqwen.text.tokenizer_backend.background import compile_file; "
    )
    program += "compile_file(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))"
    command = [sys.executable, "-c", program, str(path), store.digest(path.read_bytes()), str(entry_of(folder))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert list(cache.iterdir()) == [entry_of(folder)]
    assert is_compiled(folder)


def test_a_file_is_compiled_only_if_it_is_still_the_same(folder: Path, cache: Path) -> None:
    compile_file(folder / "tokenizer.json", "0" * 64, cache / "entry")
    compile_file(folder / "no such file", "0" * 64, cache / "entry")
    assert not cache.exists()


# --- begun, and never ended -----------------------------------------------------------------------------


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that were to be started; each is the process 0, which nobody waits for."""
    commands: list[list[str]] = []

    def spawn(program: str, arguments: list[str], environment: object, **options: object) -> int:
        commands.append(arguments)
        return 0

    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(background, "_forget", lambda process: None)
    return commands


def test_a_compiler_that_was_killed_is_not_tried_at_each_start(
    folder: Path, cache: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        assert not is_compiled(folder)
    assert len(spawned) == 1
    assert [found.state for found in store.cached_tokenizers()] == ["compiling"]
    assert store.prune_tokenizers(everything=True) == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + store.MAX_SECONDS)
    assert not is_compiled(folder)
    assert [(gone.reason) for gone in store.prune_tokenizers(dry_run=True)] == ["given up"]
    assert len(spawned) == 1
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    for _ in range(3):
        assert not is_compiled(folder)
    assert len(spawned) == 2
    compile_now(folder)
    assert is_compiled(folder)


def test_a_compiler_short_of_memory_leaves_no_lasting_note(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.claim(entry_of(folder), folder / "tokenizer.json")

    def fail(*arguments: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(compiler, "compile_tokenizer", fail)
    with pytest.raises(MemoryError):
        compile_now(folder)
    assert [found.state for found in store.cached_tokenizers()] == ["compiling"]


class Panic(BaseException):
    """As the library's Rust code raises them."""


def test_a_compiler_that_panics_is_noted(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> NoReturn:
        raise Panic("index out of bounds")

    monkeypatch.setattr(compiler, "compile_tokenizer", fail)
    compile_now(folder)
    assert [found.state for found in store.cached_tokenizers()] == ["not compilable"]


def test_of_many_starts_one_compiles(folder: Path, cache: Path) -> None:
    """Sixteen at once; a claim is held from the first on."""
    entry, path = entry_of(folder), folder / "tokenizer.json"
    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(lambda _: store.claim(entry, path), range(64))) == 1


def test_a_process_that_cannot_be_started_leaves_nothing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> NoReturn:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "posix_spawn", fail)
    assert not is_compiled(folder)
    assert store.cached_tokenizers() == []


# --- the process itself ---------------------------------------------------------------------------------


def test_what_the_process_is_told(
    folder: Path, cache: Path, spawned: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXQWEN_CACHE", "relative")
    monkeypatch.chdir(cache.parent.parent)
    monkeypatch.setattr(sys, "path", ["", "some/where", b"odd", None])
    assert not is_compiled(folder)
    here = os.getcwd()
    [[_, *flags, _, program, path, digest, entry, first, second]] = spawned
    assert flags == ["-I", "-B"]
    assert program.startswith("# mlxqwen: compiles a tokenizer")
    assert (path, digest) == (str(folder / "tokenizer.json"), store.digest((folder / "tokenizer.json").read_bytes()))
    assert entry == f"{here}/relative/tokenizers/{entry_of(folder).name}"
    assert (first, second) == (here, f"{here}/some/where")


def test_the_process_holds_nothing_of_its_caller_s(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for the compiler tells how it finds itself: a caller that ignores alarms and leaves a pipe open."""
    stand_in = tmp_path / "modules" / "mlxqwen" / "text" / "tokenizer_backend"
    stand_in.mkdir(parents=True)
    for package in (stand_in.parent, stand_in):
        (package / "__init__.py").write_text("")
    (stand_in / "background.py").write_text(
        "import json, os, signal, sys\n"
        "def run(path, digest, entry):\n"
        "    found = {\n"
        "        'folder': os.getcwd(), 'leads': os.getsid(0) == os.getpid(), 'flags': [sys.flags.isolated],\n"
        "        'terminals': [os.isatty(number) for number in range(3)],\n"
        "        'alarm': signal.getsignal(signal.SIGALRM) == signal.SIG_DFL, 'seconds': signal.alarm(0),\n"
        "        'blocked': [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],\n"
        "    }\n"
        "    try:\n"
        "        os.fstat(50)\n"
        "        found['pipe'] = 'open'\n"
        "    except OSError:\n"
        "        found['pipe'] = 'closed'\n"
        "    with open(entry + '.told', 'w') as file:\n"
        "        json.dump(found, file)\n"
        "    os.rename(entry + '.told', entry)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    ends = os.pipe()
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        os.dup2(ends[1], 50, inheritable=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))
        entry = cache / "entry"
        background.start(folder / "tokenizer.json", "0" * 64, entry)
        begun, deadline = entry.read_bytes(), time.monotonic() + 60
        while (told := entry.read_bytes()) == begun and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
        signal.signal(signal.SIGALRM, handler)
        for descriptor in (*ends, 50):
            os.close(descriptor)
    found = json.loads(told)
    assert 0 < found.pop("seconds") <= store.MAX_SECONDS
    assert found == {
        "folder": "/",
        "leads": True,
        "flags": [1],
        "terminals": [False] * 3,
        "alarm": True,
        "blocked": [],
        "pipe": "closed",
    }


# --- whose files are read -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_files_that_others_may_write_to_are_not_read(folder: Path, cache: Path, started: list[Path], mode: int) -> None:
    entry = compile_now(folder)
    assert is_compiled(folder)
    entry.chmod(mode)
    assert not is_compiled(folder)


def test_files_of_others_are_not_read(
    folder: Path, cache: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = compile_now(folder)
    real = os.fstat

    def owned_by(owner: int) -> Callable[[int], os.stat_result]:
        def status(descriptor: int) -> os.stat_result:
            fields = [*real(descriptor)]
            fields[4] = owner
            return os.stat_result(fields)

        return status

    for owner, is_read in ((os.getuid() + 1, False), (0, True), (os.getuid(), True)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", owned_by(owner))
            assert (store.read_tables(entry, folder / "tokenizer.json") is not None) == is_read


def test_tables_without_a_tokenizer_in_them_are_made_anew(folder: Path, cache: Path, started: list[Path]) -> None:
    entry = compile_now(folder)
    whole = Tables.unpack(entry.read_bytes())
    for change in ({"skeleton": "{}"}, {"skeleton": 3}, {"vocab_size": "many"}, {"longest_token": None}):
        store.write_tables(entry, replace(whole, facts={**whole.facts, **change}))
        assert not is_compiled(folder)
        assert not entry.exists()
    assert len(started) == 4


def test_models_with_one_tokenizer_share_its_tables(folder: Path, cache: Path, started: list[Path]) -> None:
    other = folder.parent / "other"
    compile_now(folder)
    shutil.copytree(folder, other)
    assert is_compiled(other)
    (folder / "tokenizer.json").unlink()
    [found] = store.cached_tokenizers()
    assert (found.source, found.state) == (str(other / "tokenizer.json"), "ready")
    assert store.prune_tokenizers() == []
    (other / "tokenizer.json").unlink()
    assert [gone.reason for gone in store.prune_tokenizers()] == ["source gone"]


# --- list and prune -------------------------------------------------------------------------------------


def test_list_and_prune(folder: Path, cache: Path, started: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = compile_now(folder)
    shutil.copy(entry, cache / entry.name.replace(f"-{store.FORMAT}-", "-0-"))
    (cache / f"{entry.name}.0123abcd.new").write_bytes(b"half")
    os.utime(cache / f"{entry.name}.0123abcd.new", (1, 1))
    (cache / "notes.txt").write_text("mine")
    found = {tokenizer.state: tokenizer for tokenizer in store.cached_tokenizers()}
    assert found.keys() == {"ready", "other version", "unfinished"}
    assert found["ready"].source == str(folder / "tokenizer.json")
    assert found["ready"].nbytes > 0
    removed = store.prune_tokenizers(dry_run=True)
    assert {removal.reason for removal in removed} == {"other version", "unfinished"}
    assert len(store.cached_tokenizers()) == 3
    assert store.prune_tokenizers() == removed
    assert store.prune_tokenizers(unused_days=1) == []
    os.utime(entry, (1, 1))
    [removal] = store.prune_tokenizers(unused_days=1, dry_run=True)
    assert re.fullmatch(r"unused for \d+ days", removal.reason)
    assert is_compiled(folder)  # which is a use
    assert store.prune_tokenizers(unused_days=1) == []
    (folder / "tokenizer.json").unlink()
    assert [removal.reason for removal in store.prune_tokenizers()] == ["source gone"]
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


def test_everything_is_pruned_but_what_is_just_being_written(folder: Path, cache: Path) -> None:
    entry = compile_now(folder)
    new = cache / f"{entry.name}.0123abcd.new"
    new.write_bytes(b"half")
    assert [removal.reason for removal in store.prune_tokenizers(everything=True)] == ["all"]
    assert list(cache.iterdir()) == [new]


def test_a_file_that_cannot_be_removed_is_named(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = compile_now(folder)

    def fail(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(TokenizerError, match="cannot be removed: Permission denied") as caught:
        store.prune_tokenizers(everything=True)
    assert entry.name[:32] in caught.value.problem
