"""The documentation's transcripts: what its examples print, today."""

from __future__ import annotations

from pathlib import Path

import make_transcripts
import mlx.core as mx
import pytest
from make_transcripts import PAGES, ROOT, ExampleError, commands, updated

PAGE = """# A page

```console
$ echo one; echo two >&2
something old
$ echo a \\
  b | tr a c
$ echo kept > file
$ cat file
```

```python
number = 20
```

```text
```

```python
print(f"{number + 1} ")
print()
print("end")
```

```text
something old

more
```

```python
import no_such_module
```

```sh
exit 1
```
"""
UPDATED = PAGE.replace(
    "something old\n$ echo a \\\n  b | tr a c\n", "one\ntwo\n$ echo a \\\n  b | tr a c\nc b\n", 1
).replace("$ cat file\n", "$ cat file\nkept\n")
UPDATED = UPDATED.replace("something old\n\nmore\n", "21\n\nend\n")


def test_examples_are_run_and_what_they_print_is_written_behind_them() -> None:
    assert updated(PAGE) == UPDATED
    assert updated(UPDATED) == UPDATED


def test_commands_may_go_on_in_the_next_line() -> None:
    assert commands("$ a \\\n  b\nprinted\n$ c\n") == ["a \\\n  b", "c"]


def test_mlxqwen_is_the_one_that_stands_here() -> None:
    assert "mlxqwen" in updated("```console\n$ mlxqwen --version\n```\n").splitlines()[2]


@pytest.mark.parametrize(
    "example", ["```console\n$ echo no >&2; exit 3\n```\n", "```python\nraise ValueError('no')\n```\n\n```text\n```\n"]
)
def test_a_failing_example_is_told_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], example: str
) -> None:
    with pytest.raises(ExampleError, match="no"):
        updated(example)
    page = tmp_path / "page.md"
    page.write_text(example)
    monkeypatch.setattr("sys.argv", ["make_transcripts.py", str(page)])
    assert make_transcripts.main() == 1
    assert page.read_text() == example
    assert "no" in capsys.readouterr().err


def test_a_check_fails_on_an_old_transcript_and_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for arguments, status, text in ((["--check"], 1, PAGE), ([], 0, UPDATED), (["--check"], 0, UPDATED)):
        monkeypatch.setattr("sys.argv", ["make_transcripts.py", *arguments, str(page)])
        assert make_transcripts.main() == status
        assert page.read_text() == text


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="other devices round, and draw, otherwise")
@pytest.mark.parametrize("page", PAGES)
def test_the_transcripts_are_those_of_today(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert updated(text) == text
