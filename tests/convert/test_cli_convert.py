"""`mlxqwen convert` as a user meets it: what is printed where, exit codes, the bar on a terminal only."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from mlxqwen.cli.terminal import ConversionProgress, print_notes, progress_lines
from mlxqwen_convert import convert
from tests.command_line import Terminal, library_logging_kept, run
from tests.convert import checkpoints
from tests.convert.checkpoints import DENSE, MOE, Config, Source

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "convert")])}


def make_source(folder: Path, form: str, config: Config = DENSE) -> Source:
    """A checkpoint with a tokenizer's file, without which each conversion has a note."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    return checkpoints.make_source(folder, form, config)


def mlxqwen(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxqwen", *map(str, arguments)]
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def on_terminal(columns: int, *arguments: str | Path, **environment: str) -> str:
    """All that is written to a terminal."""
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mlxqwen", *map(str, arguments)],
        env={**ENVIRONMENT, **environment},
        encoding="utf-8",
        timeout=60,
        dimensions=(24, columns),
    )
    child.expect(pexpect.EOF)
    child.close()
    return str(child.before)


def test_a_table_and_nothing_else_in_a_pipe(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8", MOE).write()
    done = mlxqwen("convert", source.folder, tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "kind",
        "modules",
        "weights",
        "from",
        "to",
        "how",
        "before",
        "after",
        "bits/w",
        "error",
        "largest",
    ]
    assert [line.split()[0] for line in lines[1:-1]] == [
        "embeddings",
        "attention",
        "router",
        "experts",
        "lm_head",
        "norms",
    ]
    assert "verified" in lines[-1]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--dry-run", "--bits", "6")
    assert done.returncode == 0
    assert "6-bit g64" in done.stdout
    assert "expected peak memory" in done.stdout
    assert list(tmp_path.iterdir()) == [source.folder]


def test_json_for_scripts(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--json")
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert report["output"] == str(tmp_path / "out")
    kept = {row["kind"]: row["codes_kept"] for row in report["kinds"] if row["method"] == "repack"}
    assert kept == {"attention": 2 * 3 * 128 * 128, "mlp": 2 * 3 * 256 * 128}
    lasting = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert {key: report[key] for key in lasting} == lasting


def test_the_offer_for_heads_of_integer_checkpoints(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "awq").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--dry-run")
    # Two matrices of 192 × 128 weights, each of two bytes.
    assert done.stdout.startswith("note: 98.30 kB of embeddings and head stay unquantized, as in the source; ")
    assert "; --embed-bits 8 --lm-head-bits 8 halve them\n" in done.stdout
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--embed-bits", "8", "--lm-head-bits", "8")
    assert "note" not in done.stdout
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization"]
    assert section["lm_head"] == {"group_size": 64, "bits": 8}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits", "7"], 2, "--bits"),
        (["--keep", "down_proj"], 2, "'--keep': found 'down_proj', expected GLOB=BITS"),
        (["--keep", ""], 2, "'--keep': found ''"),
        (["--keep", "*.down_proj=many"], 2, "'--keep': found '*.down_proj=many'"),
        (["--keep", "*.down_proj=7"], 2, "'--keep': found '*.down_proj=7'"),
        (["--keep", f"*.down_proj={'8' * 5000}"], 2, "'--keep': found"),
        (["--keep", "*.no_such=8"], 1, "--keep: '*.no_such' matches no module"),
        (["--upload-repo", "nonsense"], 2, "'--upload-repo': found 'nonsense', expected organisation/model"),
        (["--quallity"], 2, "--quality"),
        (["--strict", "--group-size", "128"], 1, "do not divide"),
        (["--lm-head-bits", "1"], 2, "--lm-head-bits"),
    ],
)
def test_bad_options_end_in_a_line_or_two(tmp_path: Path, options: list[str], code: int, words: str) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "intermediate_size": 192}).write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", *options)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "prompt" not in done.stderr
    assert list(tmp_path.iterdir()) == [source.folder]
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") <= 2


def test_bits_for_a_head_that_is_not_there_in_the_commands_words(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16", {**DENSE, "tie_word_embeddings": True}).write()
    result = run("convert", str(source.folder), str(tmp_path / "out"), "--lm-head-bits", "8")
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines() == [
        f"error: --lm-head-bits: {source.folder} has no head of its own, its embeddings serve as one",
        "       Use --embed-bits instead.",
    ]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    arguments = ["-m", "mlxqwen", "convert", str(source.folder), str(tmp_path / "out")]
    output = pexpect.run(f"{sys.executable} {' '.join(arguments)}", env=ENVIRONMENT, timeout=60).decode()
    assert "converting" in output
    assert "verifying" in output
    assert "100 %" in output
    assert "verified, in " in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("converting", 0, 1000, 0, 0.0), "converting   0 %  |                    |"),
        (("converting", 500, 1000, 500, 0.1), "converting  50 %  |##########          |"),
        (
            ("verifying", 50_000_000, 200_000_000, 40_000_000, 2.0),
            "verifying   25 %  |#####               |  20 M weights/s  0:08 left",
        ),
        (
            ("converting", 10**9, 10**11, 10**9, 10.0),
            "converting   1 %  |                    |  100 M weights/s  16:30 left",
        ),
    ],
)
def test_the_bars_words(arguments: tuple[str, int, int, int, float], expected: str) -> None:
    assert progress_lines(*arguments)[0] == expected


def test_shorter_words_for_narrow_terminals() -> None:
    lines = progress_lines("converting", 10**10, 10**11, 10**10, 100.0)
    assert lines[1:] == [
        "converting  10 %  |#         |  100 M weights/s  15:00 left",
        "converting  10 %  |#         |  15:00 left",
        "converting  10 %  |      |  15:00 left",
        "converting  10 %  15:00 left",
        "converting  10 %",
    ]


@pytest.mark.parametrize("columns", [10, 40, 60, 80])
def test_nothing_wraps_on_a_narrow_terminal(tmp_path: Path, columns: int) -> None:
    source = make_source(tmp_path / "in", "fp8", MOE).write()
    output = on_terminal(columns, "convert", source.folder, tmp_path / "out", TERM="xterm")
    bars, _, result = output.rpartition("\r\x1b[K")
    assert "convertin" in bars
    assert all(len(bar.replace("\x1b[K", "")) < columns for bar in bars.split("\r"))
    *table, last = result.splitlines()
    assert "verified, in " in last
    if columns > 10:
        assert max(map(len, table)) <= columns
    assert {"kind", "to", "error"} <= set(table[0].split())


def test_a_dumb_terminal_gets_no_escapes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8", MOE).write()
    output = on_terminal(80, "convert", source.folder, tmp_path / "out", TERM="dumb")
    assert "\x1b" not in output
    *bars, blank, rest = output.partition("kind ")[0].split("\r")
    assert any("verifying" in bar for bar in bars)
    assert (blank.strip(), rest) == ("", "")


def test_a_note_takes_the_place_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with library_logging_kept():
        written = Terminal(io.BytesIO(), encoding="utf-8", newline="")
        monkeypatch.setattr(sys, "stderr", written)
        print_notes()
        bar = ConversionProgress(written)
        bar("verifying", 10, 10)
        logging.getLogger("mlxqwen").warning("mind the gap")
        bar.close()
        written.seek(0)
        assert written.read() == "\rverifying  100 %  |####################|\r\x1b[Knote: mind the gap\n"


def test_the_same_model_has_the_same_size_before_and_after(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    made = mlxqwen("convert", source.folder, tmp_path / "four").stdout.splitlines()[-1]
    again = mlxqwen("convert", tmp_path / "four", tmp_path / "eight", "--bits", "8", "--dry-run").stdout.splitlines()[
        -1
    ]
    assert made.partition(" → ")[2].partition(",")[0] == again.partition(" → ")[0]


def test_a_full_disk_behind_standard_output(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    command = [sys.executable, "-m", "mlxqwen", "convert", str(source.folder), str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: standard output: No space left on device",
        f"       The conversion itself is whole in {tmp_path / 'out'}.",
    ]
    assert (tmp_path / "out/config.json").exists()


def test_resume_says_when_there_is_nothing_to_resume(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--resume")
    assert done.returncode == 0
    assert done.stderr == f"note: nothing to resume beside {tmp_path / 'out'}: the conversion begins from the start\n"
    assert mlxqwen("convert", source.folder, tmp_path / "out", "--resume").stderr.startswith("error: ")
    stranger = run("convert", str(source.folder), "~nobody-of-this-name/out", "--resume")
    assert stranger.err.splitlines()[-2].startswith("error: ~nobody-of-this-name/out: its parent folder does not exist")


def test_a_dry_run_tells_of_an_unfinished_conversion(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write().folder
    other = make_source(tmp_path / "other", "fp8").write().folder
    partial = tmp_path / "out.partial"

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    def told(folder: Path, *options: str) -> list[str]:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        result = run("convert", str(folder), str(tmp_path / "out"), "--dry-run", *options)
        assert "Nothing was written." in result.out
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        assert result.status == (1 if result.err else 0)
        notes = [line for line in result.out.splitlines() if line.startswith("note: ")]
        return [*notes, *result.err.splitlines()]

    assert told(source) == told(source, "--resume") == []
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", quality=True, progress=stop)
    goes_on = f"note: {partial}: an unfinished conversion is there; --resume goes on with it"
    assert told(source, "--quality", "--resume") == [goes_on]
    refused = run("convert", str(source), str(tmp_path / "out"), "--quality").err.splitlines()
    assert told(source, "--quality") == refused
    assert refused[0] == f"error: {partial}: an unfinished conversion is there"
    begun, way_out = f"error: {partial}: the conversion there was begun", "Use what it was begun with, or remove the"
    for options, words in (([], "none"), (["--bits", "2"], "--bits 2"), (["--resume"], "none")):
        assert told(source, *options) == [
            f"{begun} with --quality, found {words}",
            f"       {way_out} folder to start anew.",
        ]
    elsewhere, _ = told(other, "--quality")
    assert elsewhere == f"{begun} from {source.resolve()}, found {other.resolve()}"
    (partial / "conversion.json").write_text("[")
    _, damaged = told(source, "--quality")
    assert damaged.endswith(f"Remove {partial} to start anew.")
    (partial / "conversion.json").unlink()
    foreign, _ = told(source)
    assert foreign == f"error: {partial}: is in the way and was not made by a conversion"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_dry_run_tells_of_an_output_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    source = make_source(tmp_path / "Little-FP8", "fp8").write().folder
    output = tmp_path / "Little-8bit"
    if kind == "folder":
        output.mkdir()
        for name in ("config.json", "conversion.lock"):  # as a crash may leave it
            (output / name).touch()
    elif kind == "file":
        output.touch()
    else:
        output.symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    refusal, hint = "Little-8bit: already exists", "Choose another output, or remove it first."
    for given in ([], ["Little-8bit"], ["--resume"]):
        result = run("convert", str(source), *given, "--dry-run")
        assert result.status == 1
        assert result.err.endswith(f"error: {refusal}\n       {hint}\n")
        assert "note: " not in result.out  # it is said once
        assert "Nothing was written." in result.out
    quiet = run("convert", str(source), "Little-8bit", "--dry-run", "-q")
    assert (quiet.status, quiet.out, quiet.err) == (1, "", f"error: {refusal}\n       {hint}\n")
    assert sorted(tmp_path.rglob("*")) == before
    report = json.loads(run("convert", str(source), "Little-8bit", "--dry-run", "--json").out)
    assert (report["refusal"], report["hint"], report["notes"]) == (refusal, hint, [refusal])
    assert json.loads(run("convert", str(source), "other", "--dry-run", "--json").out)["refusal"] is None
    real = run("convert", str(source), "Little-8bit")
    assert (real.status, real.err) == (1, quiet.err)


@pytest.mark.parametrize("command", [["generate", "Hello", "--model"], ["info"], ["convert"]])
def test_an_unfinished_conversion_is_no_model(tmp_path: Path, command: list[str]) -> None:
    partial = tmp_path / "my out.partial"
    partial.mkdir()
    (partial / "conversion.json").write_text("{}")
    result = run(*command, str(partial), *(["elsewhere"] if command == ["convert"] else []))
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines() == [
        f"error: {partial}: an unfinished conversion, expected a model's folder",
        f"       Finish it: mlxqwen convert SOURCE '{tmp_path / 'my out'}' --resume",
    ]


def test_an_output_without_a_name(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    done = mlxqwen("convert", source.folder, "")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Invalid value for 'OUTPUT': found no name")


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_no_token_for_the_upload_ends_it_first(tmp_path: Path, options: tuple[str, ...]) -> None:
    source = make_source(tmp_path / "in", "fp8").write()
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = mlxqwen("convert", source.folder, tmp_path / "out", "--upload-repo", "me/model", *options, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: me/model: cannot be uploaded to: found no token")
    assert "HF_TOKEN" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_last_glob_that_matches_counts(tmp_path: Path) -> None:
    source = make_source(tmp_path / "in", "bf16").write()
    keep = ["--keep", "*.down_proj=8", "--keep", "*.mlp.*=6"]
    done = mlxqwen("convert", source.folder, tmp_path / "out", *keep, "--dry-run", "--json")
    modules = json.loads(done.stdout)["modules"]
    assert modules["model.layers.0.mlp.down_proj"]["to"] == "6-bit g64"
    assert "the last counts" in " ".join(mlxqwen("convert", "--help").stdout.split())


def test_the_library_is_not_loaded_for_other_commands() -> None:
    code = "import sys, mlxqwen.cli.commands, mlxqwen.engine.engine; "
    code += "print([m for m in sys.modules if 'mlxqwen_convert' in m])"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_a_conversion_cannot_give_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from mlxqwen.files.hub import DEMO_FOLDER
    from tests.command_line import run

    four, eight, whole = (tmp_path / name for name in ("4", "8", "16"))
    shutil.copytree(DEMO_FOLDER, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").unlink()
    without = run("convert", str(tmp_path / "source"), str(four), "--no-verify")
    assert without.err == (
        f"note: {tmp_path / 'source'} has no tokenizer.json: the result has none either, "
        "and cannot be asked without one\n"
    )
    assert run("convert", str(DEMO_FOLDER), str(tmp_path / "same"), "--no-verify").err == ""
    monkeypatch.setattr("mlxqwen.cli.convert._chosen_output", lambda *arguments: "x")
    report = convert(tmp_path / "source", tmp_path / "dry", dry_run=True)
    gone = replace(report, source=str(tmp_path / "a preview that is gone"))
    monkeypatch.setattr("mlxqwen_convert.convert", lambda *arguments, **options: gone)
    assert run("convert", "organisation/model", "--dry-run").err == "note: no OUTPUT was given: x\n"
    monkeypatch.undo()
    for output, options, target in ((eight, ["--bits", "8"], "8-bit g64"), (whole, ["--bits", "16"], "BF16")):
        up = run("convert", str(tmp_path / "same"), str(output), *options, "--no-verify")
        assert f"from MLX 4-bit g64 to {target} takes more room, and nothing that was lost" in up.err
