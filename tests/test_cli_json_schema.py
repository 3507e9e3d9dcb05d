"""`mlxqwen generate --json-schema`: one answer, a raw text, and batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jsonschema import validate

from tests.command_line import run
from tests.structured_schemas import record

pytest.importorskip("llguidance")

SCHEMA = record(count={"type": "integer", "minimum": 0, "maximum": 99}, sure={"type": "boolean"})


def write(path: Path, value: object) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_an_answer_fits_the_schema(tmp_path: Path) -> None:
    schema = write(tmp_path / "schema.json", SCHEMA)
    found = run("generate", "How many r's in strawberry?", "--json-schema", schema, "--seed", "1", "--json")
    answer = json.loads(found.out)
    assert answer["reasoning"]
    validate(json.loads(answer["content"]), SCHEMA)
    piped = run("generate", "Hi", "--json-schema", "-", "--no-thinking", stdin=json.dumps(SCHEMA).encode())
    validate(json.loads(piped.out), SCHEMA)


@pytest.mark.parametrize("thought", ["", "<think>\n"])
def test_the_answer_to_raw_text_is_json_alone(tmp_path: Path, thought: str) -> None:
    schema = write(tmp_path / "schema.json", SCHEMA)
    prompt = f"<|im_start|>user\nHow many r's in strawberry?<|im_end|>\n<|im_start|>assistant\n{thought}"
    found = run("generate", prompt, "--raw", "--json-schema", schema, "--seed", "1")
    validate(json.loads(found.out), SCHEMA)
    answer = json.loads(run("generate", prompt, "--raw", "--json-schema", schema, "--seed", "1", "--json").out)
    assert answer["content"] == found.out.removesuffix("\n")
    assert answer["reasoning"]
    assert answer["reasoning"].strip() in found.err


def test_lines_of_a_batch_have_their_own(tmp_path: Path) -> None:
    schema, output = write(tmp_path / "schema.json", SCHEMA), tmp_path / "out.jsonl"
    lines = [
        {"prompt": "a cat?"},
        {"prompt": "b", "response_format": {"choice": ["yes", "no"]}},
        {"prompt": "c", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}},
        {"prompt": "d", "response_format": {"not": {}}},
    ]
    questions = write(tmp_path / "in.jsonl", "\n".join(map(json.dumps, lines)))
    command = ("generate", "--batch", questions, "--output", str(output), "--no-thinking", "--seed", "2")
    assert run(*command, "--json-schema", schema).status == 1
    answers = {answer["index"]: answer for answer in map(json.loads, output.read_text().splitlines())}
    validate(json.loads(answers[0]["content"]), SCHEMA)
    assert answers[1]["content"] in ("yes", "no")
    assert answers[2]["content"] in ("true", "false")
    assert '"not"' in answers[3]["error"]
    again = run(*command)
    assert again.status == 1
    assert "other options" in again.err or "options" in again.err


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type": ', "schema.json: not valid JSON at column 10"),
        (" \n", "schema.json: found no text, expected JSON"),
        ([1], "schema.json: found a list, expected a JSON schema"),
        ('"x"', "schema.json: found text, expected a JSON schema"),
        ("7", "schema.json: found a number, expected a JSON schema"),
        ({"uniqueItems": True}, '"uniqueItems"'),
        ({"type": "json_schema", "json_schema": {}}, "without a schema"),
    ],
)
def test_what_is_no_schema(tmp_path: Path, schema: object, message: str) -> None:
    found = run("generate", "Hi", "--json-schema", write(tmp_path / "schema.json", schema))
    assert found.status == 1
    assert message in found.err
    assert found.err.startswith(f"error: --json-schema: {tmp_path / 'schema.json'}: ")
    assert "response_format: " not in found.err
    assert found.out == ""


def test_the_form_of_openai_works(tmp_path: Path) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "record", "schema": SCHEMA}}
    schema = write(tmp_path / "schema.json", form)
    validate(json.loads(run("generate", "Hi", "--json-schema", schema, "--no-thinking").out), SCHEMA)


def test_a_line_that_asks_for_nothing_known(tmp_path: Path) -> None:
    questions = write(tmp_path / "in.jsonl", {"prompt": "a", "response_format": {"type": "xml"}})
    found = run("generate", "--batch", questions, "--output", str(tmp_path / "out.jsonl"))
    assert found.status == 1
    assert "line 1: response_format: found type 'xml'" in found.err
