"""Short names and web addresses of models → ids of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from mlxqwen.errors import HubError, OptionError
from mlxqwen.files import hub_source
from mlxqwen.files.aliases import ALIASES, hub_id_of_address, hub_id_of_alias, naming_alias
from mlxqwen.files.hub import resolve_model
from mlxqwen.files.hub_source import Source
from tests.command_line import run

FOUR = "Qwen/Qwen3-4B-MLX-4bit"


@pytest.mark.parametrize(
    ("alias", "hub_id"),
    [
        ("qwen3:4b", "Qwen/Qwen3-4B-MLX-4bit"),
        ("qwen3:30b-a3b-fp8", "Qwen/Qwen3-30B-A3B-FP8"),
        ("qwen3:30b-fp8", "Qwen/Qwen3-30B-A3B-FP8"),
        ("qwen3:235b", "Qwen/Qwen3-235B-A22B-MLX-4bit"),
        ("qwen3:235b-a22b-gptq-int4", "Qwen/Qwen3-235B-A22B-GPTQ-Int4"),
        ("Qwen3:0.6B-bf16", "Qwen/Qwen3-0.6B"),
        ("qwen3:0.6b-gptq-int8", "Qwen/Qwen3-0.6B-GPTQ-Int8"),
        ("qwen3:14b-AWQ", "Qwen/Qwen3-14B-AWQ"),
        ("qwen3:1.7b-8bit", "Qwen/Qwen3-1.7B-MLX-8bit"),
        ("qwen3:1.7b-mlx-6bit", "Qwen/Qwen3-1.7B-MLX-6bit"),
        ("qwen3:32b-q4_K_M", "Qwen/Qwen3-32B-MLX-4bit"),
        ("qwen3:32b-q8_0", "Qwen/Qwen3-32B-MLX-8bit"),
        ("qwen3:8b-fp16", "Qwen/Qwen3-8B"),
        ("qwen3:latest", "Qwen/Qwen3-8B-MLX-4bit"),
    ],
)
def test_what_an_alias_is(alias: str, hub_id: str) -> None:
    assert hub_id_of_alias(alias) == hub_id


def test_every_alias_is_one_id() -> None:
    assert all(hub_id_of_alias(alias) == hub_id for alias, hub_id in ALIASES.items())
    assert len({*ALIASES.values()}) == 8 * 5 + 8  # BF16, FP8 and three of MLX's, one further form each
    assert all(hub_id == hub_id_of_address(f"https://huggingface.co/{hub_id}")[0] for hub_id in ALIASES.values())  # type: ignore[index]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B", "./qwen3", "qwen3", "qwen2.5:4b", "qwen3-4b", "", "llama3:8b"])
def test_other_names_are_no_aliases(name: str) -> None:
    assert hub_id_of_alias(name) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3:5b", ["qwen3:4b", "qwen3:235b-a22b"]),
        ("qwen3:4b-gptq-int4", ["qwen3:4b-awq", "qwen3:4b-fp8"]),
        ("qwen3:30b-awq", ["qwen3:30b-a3b-gptq-int4"]),
        ("qwen3:4", ["qwen3:4b"]),
    ],
)
def test_aliases_that_do_not_exist_are_told(name: str, words: list[str]) -> None:
    with pytest.raises(HubError) as caught:
        hub_id_of_alias(name)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("https://huggingface.co/Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", None)),
        ("http://hf.co/Qwen/Qwen3-4B/", ("Qwen/Qwen3-4B", None)),
        ("https://huggingface.co/Qwen/Qwen3-4B/tree/main", ("Qwen/Qwen3-4B", "main")),
        ("https://www.huggingface.co/Qwen/Qwen3-4B/blob/ab12/config.json?x=1#L3", ("Qwen/Qwen3-4B", "ab12")),
        ("https://huggingface.co/Qwen/Qwen3-4B/discussions/3", ("Qwen/Qwen3-4B", None)),
        ("http://mirror.example:8080/Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", None)),
        ("https://hf.co/Qwen/Qwen3-4B/tree/refs/pr/7/x", ("Qwen/Qwen3-4B", "refs/pr/7")),
        ("https://github.com/Qwen/Qwen3", None),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://huggingface.co/Qwen", None),
        ("https://huggingface.co/Qwen/%2e%2e%2fx", None),
        ("https://[huggingface.co/Qwen/Qwen3-4B", None),
        ("Qwen/Qwen3-4B", None),
    ],
)
def test_what_an_address_is(
    address: str, meant: tuple[str, str | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    assert hub_id_of_address(address) == meant


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """What is looked for on the hub, which has nothing."""
    asked: list[tuple[str, str | None]] = []

    def not_there(source: Source, *_: object) -> NoReturn:
        asked.append((source.place.repo_id, source.place.revision))
        raise HubError(f"{source.place.repo_id}: not there")

    for way in ("downloaded", "seen"):
        monkeypatch.setattr(hub_source, way, not_there)
    return asked


def test_every_command_takes_them(downloads: list[tuple[str, str | None]], tmp_path: Path) -> None:
    page = "https://huggingface.co/Qwen/Qwen3-4B/tree/v1"
    alias = "qwen3:4b-fp8"
    for name, meant in ((alias, ("Qwen/Qwen3-4B-FP8", None)), (page, ("Qwen/Qwen3-4B", "v1"))):
        for arguments in (
            ["generate", "Hello", "--model", name],
            ["generate", "Hello", "--draft", name],
            ["chat", name],
            ["info", name],
            ["bench", name],
            ["pull", name],
            ["serve", "--port", "0", name],
            ["convert", name, str(tmp_path / "out")],
            ["convert", name],
        ):
            result = run(*arguments)
            about = f"{name} (Qwen/Qwen3-4B-FP8)" if name == alias else "Qwen/Qwen3-4B"
            assert (result.status, f"{about}: not there" in result.err) == (1, True), result
            assert downloads.pop() == meant, arguments


def test_a_folder_comes_first_and_a_path_is_no_alias(
    downloads: list[tuple[str, str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3:4b").mkdir()
    assert resolve_model("qwen3:4b") == Path("qwen3:4b")
    with pytest.raises(HubError, match="no such folder"):
        resolve_model(Path("qwen3:8b"))
    with pytest.raises(OptionError, match="found 'v2', but 'v1' in the address"):
        resolve_model("https://hf.co/Qwen/Qwen3-4B/tree/v1", revision="v2")
    assert downloads == []
    for spelled in ("hf.co/Qwen/Qwen3-4B", "huggingface.co/Qwen/Qwen3-4B"):
        with pytest.raises(HubError, match="not there"):
            resolve_model(spelled)
        assert downloads.pop() == ("Qwen/Qwen3-4B", None)
    with pytest.raises(HubError, match="a web address that is no model's page"):
        resolve_model("hf.co/Qwen/Qwen3-4B-GGUF:Q4_K_M")
    with pytest.raises(HubError, match="neither an existing folder nor a hub id") as raised:
        resolve_model("qwen3")
    assert raised.value.hint.startswith("Say which size: qwen3:8b is Ollama's")
    for revision in (None, "v1"):
        with pytest.raises(HubError):
            resolve_model("https://hf.co/Qwen/Qwen3-4B/tree/v1", revision=revision)
        assert downloads.pop() == ("Qwen/Qwen3-4B", "v1")


@pytest.mark.parametrize(
    ("typed", "problem", "told"),
    [
        ("qwen3:4b", f"{FOUR}: gone", f"qwen3:4b ({FOUR}): gone"),
        ("Qwen3:4B", f"{FOUR}: gone", f"Qwen3:4B ({FOUR}): gone"),
        ("modelscope:qwen3:4b", f"modelscope:{FOUR}: gone", f"modelscope:qwen3:4b (modelscope:{FOUR}): gone"),
        ("qwen3:4b", f"{FOUR}/model.safetensors: short", f"qwen3:4b: {FOUR}/model.safetensors: short"),
        (
            "qwen3:4b",
            "/c/models--Qwen--Qwen3-4B-MLX-4bit/snapshots/a: short",
            "qwen3:4b: /c/models--Qwen--Qwen3-4B-MLX-4bit/snapshots/a: short",
        ),
        ("qwen3:4b", "yarn_factor: found 0", "yarn_factor: found 0"),
        ("qwen3:4b", f"draft model: qwen3:4b ({FOUR}): gone", f"draft model: qwen3:4b ({FOUR}): gone"),
        (FOUR, f"{FOUR}: gone", f"{FOUR}: gone"),
        ("qwen3:nothing", "qwen3:nothing: no alias", "qwen3:nothing: no alias"),
        (Path("qwen3:4b"), f"{FOUR}: gone", f"{FOUR}: gone"),
        (None, f"{FOUR}: gone", f"{FOUR}: gone"),
    ],
)
def test_errors_name_the_alias_beside_what_it_means(typed: str | Path | None, problem: str, told: str) -> None:
    with pytest.raises(HubError) as raised, naming_alias(typed):
        raise HubError(problem, hint="Wait.")
    assert (raised.value.problem, raised.value.hint) == (told, "Wait.")
    assert str(raised.value).startswith(told)


@pytest.mark.parametrize(("given", "alias"), [("Qwen3-4B:4bit", "qwen3:4b-4bit"), ("qwen3-0.6b", "qwen3:0.6b")])
def test_a_release_without_its_organisation_is_suggested(given: str, alias: str) -> None:
    with pytest.raises(HubError, match="neither an existing folder nor a hub id") as raised:
        resolve_model(given)
    assert raised.value.hint.startswith(f"Did you mean {alias}? Give a folder")


@pytest.mark.parametrize(
    ("given", "tag", "hint"),
    [
        ("Qwen/Qwen3-4B:4bit", "4bit", "Did you mean qwen3:4b-4bit? "),
        ("Qwen/Qwen3-30B-A3B:q8_0", "q8_0", "Did you mean qwen3:30b-a3b-8bit? "),
        ("other/qwen3-8b:latest", "latest", "Did you mean qwen3:8b? "),
        ("modelscope:Qwen/Qwen3-4B:fp8", "fp8", "Did you mean modelscope:qwen3:4b-fp8? "),
        ("Org/Model:4bit", "4bit", "The hub's models have no tags; "),
        ("Qwen/Qwen3-4B-Thinking-2507:q4_K_M", "q4_K_M", "The hub's models have no tags; "),
        ("Org/Model:", "", "The hub's models have no tags; "),
    ],
)
def test_a_tag_behind_a_hub_id_is_told(given: str, tag: str, hint: str) -> None:
    plain = given.removesuffix(f":{tag}")
    with pytest.raises(HubError) as raised:
        resolve_model(given)
    assert raised.value.problem == f"{given!r}: found the tag {tag!r} behind a hub id, expected {plain}"
    assert raised.value.hint.startswith(hint)
    assert "mlxqwen convert" in raised.value.hint
    if tag == "4bit":
        assert raised.value.hint.endswith(f"mlxqwen convert {plain} --bits 4")
