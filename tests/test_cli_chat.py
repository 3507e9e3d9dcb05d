"""`mlxqwen chat` in a real terminal: every command, Ctrl-C, history, several lines, hostile text; and without one."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pexpect
import pytest

from mlxqwen.files.hub import DEMO_FOLDER
from tests.command_line import Result, run
from tests.terminal_screen import shown
from tests.test_cli import assert_error

ROOT = Path(__file__).parent.parent
# The line editor says by these that it begins and ends to read.
READS, HAS_READ = "\x1b[?2004h", "\x1b[?2004l"
PROMPT_ESCAPES = re.compile(r"\x1b\[\?\d+[a-z]|\x1b\[\d* q|\x1b\[\d*[BCDKG]|\x1b\[\d*;\d*H|\x1b\]\S*?\x07")
UP, LEFT, ALT_ENTER = "\x1b[A", "\x1b[D", "\x1b\r"
INTERRUPT, END = "\x03", "\x04"
LEAVES = "Ctrl-C again leaves, and so does Ctrl-D."
THOUGHT = re.compile(r"Thought for \d+\.\d s, ([\d,]+) tokens?")


class Chat:
    """`mlxqwen chat` on a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 100, program: tuple[str, ...] = ("-m", "mlxqwen"), **env: str):
        self.columns = columns
        self.child = pexpect.spawn(
            sys.executable,
            [*program, "chat", *arguments],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}",
                "TERM": "xterm",
                "LANG": "C.UTF-8",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"],
                "MLXQWEN_BLAS": os.environ["MLXQWEN_BLAS"],
                "MLXQWEN_CORES": os.environ["MLXQWEN_CORES"],
                **env,
            },
            encoding="utf-8",
            codec_errors="strict",
            timeout=60,
            dimensions=(24, columns),
            cwd=str(ROOT),
        )
        self.child.delaybeforesend = None
        self.greeting = self._until_prompt()

    def say(self, typed: str) -> list[str]:
        """Type a message or command and Enter → the lines that are shown until the next prompt."""
        self.send(f"{typed}\r")
        return self.answer()

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def answer(self) -> list[str]:
        """What is shown between the end of this prompt and the next."""
        self.child.expect_exact(HAS_READ)
        return self._until_prompt()

    def begin(self, typed: str) -> None:
        """Type a message, and wait until the first words of the answer are there."""
        self.send(f"{typed}\r")
        self.child.expect_exact(HAS_READ)
        self.child.expect(r"(^|\r\x1b\[K)(\x1b\[2m)?[^\x1b\r\n]")  # behind the progress of reading, if it is shown

    def rest(self) -> list[str]:
        """What is shown until the next prompt."""
        return self._until_prompt()

    def end(self, keys: str = END) -> int:
        """Leave → the exit status."""
        self.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert "Traceback" not in self.child.before
        return int(self.child.exitstatus)

    def _until_prompt(self) -> list[str]:
        self.child.expect_exact(READS)
        text = self.child.before
        assert "Traceback" not in text, text
        lines = shown(PROMPT_ESCAPES.sub("", text), self.columns)
        return [line for line in lines if line]


@pytest.fixture
def chat() -> Iterator[Callable[..., Chat]]:
    """Starts chats, and ends them at last."""
    chats: list[Chat] = []

    def start(*arguments: str, **options: object) -> Chat:
        chats.append(Chat(*arguments, **options))  # type: ignore[arg-type]
        return chats[-1]

    yield start
    for started in chats:
        if started.child.isalive():
            started.child.kill(signal.SIGKILL)
            started.child.wait()
        started.child.close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model without a token that ends its reply."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(DEMO_FOLDER, folder)
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, key: None}))
    (folder / "generation_config.json").unlink()
    return str(folder)


Start = Callable[..., Chat]


OPTIONS = """
    --model --revision --system --drop-oldest --trust-special-tokens --thinking --no-thinking --thinking-budget
    --early-stop-text --max-tokens --temperature --top-p --top-k --min-p --presence-penalty --frequency-penalty
    --repetition-penalty --seed --stop --stop-on-loop --speculative --draft --draft-tokens --max-kv-size
    --kv-keep --kv-bits --prefill-chunk --yarn-factor --yarn --rope-scaling --prompt-cache --prefix-cache
    --dtype --force --ignore-adapter --verbose --messages --tools --history --no-history -m -s
"""


def messages_of(path: Path) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(path.read_text())["messages"]
    return messages


def tokens_of(lines: list[str]) -> int:
    found = THOUGHT.search("\n".join(lines))
    assert found is not None, lines
    return int(found[1].replace(",", ""))


# Turns and commands


def test_a_conversation(chat: Start, tmp_path: Path) -> None:
    talk = chat("--seed", "1")
    assert "/help" in talk.greeting[0]
    first = talk.say("How many r's in strawberry?")
    assert THOUGHT.fullmatch(first[0])
    assert "3" in first[1]
    stats = "\n".join(talk.say("/stats"))
    assert f", {tokens_of(first)} of reasoning" in stats
    assert "Conversation: 2 messages" in stats
    assert "temperature 0.6" in stats
    second = talk.say("What is 12 + 39?")
    assert THOUGHT.fullmatch(second[0])
    assert not re.search(", 0 of them from the cache", "\n".join(talk.say("/stats")))
    file = tmp_path / "my chat.json"
    assert talk.say(f"/save '{file}'") == [f"Saved 4 messages to {file}."]
    asked = [message["content"] for message in messages_of(file) if message["role"] == "user"]
    assert asked == ["How many r's in strawberry?", "What is 12 + 39?"]
    assert "\n".join(second[1:]) == messages_of(file)[-1]["content"]
    assert talk.say("/undo") == ["Undone; 2 messages left."]
    assert "found" in talk.say(f"/save {tmp_path}")[0]
    assert talk.say(f'/save "{file}"') == [f"Saved 2 messages to {file}."]
    assert len(messages_of(file)) == 2
    assert talk.end("/quit\r") == 0


def test_load_goes_on_where_save_stopped(chat: Start, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    talk = chat("--seed", "3", "--no-thinking")
    talk.say("Hello")
    talk.say(f"/save {file}")
    talk.say("/clear")
    assert "Conversation: 0 messages." in talk.say("/stats")
    assert " ".join(talk.say(f"/load {file}")) == f"Loaded 2 messages from {file}."  # long paths wrap
    talk.say("What is 12 + 39?")
    assert " ".join(talk.say(f"/save {file}")) == f"Saved 4 messages to {file}."
    before = file.read_text()
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert talk.say(f"/save {other}")[0].startswith("error: /save: found")
    assert other.read_text() == "{}"
    assert talk.say(f"/load {other}")[0].startswith("error: ")
    assert talk.say(f"/load {tmp_path / 'none.json'}")[0].startswith("error: ")
    for name in (str(tmp_path / "no folder" / "x.json"), "x" * 5000, "~no-such-user/x"):
        assert talk.say(f"\x1b[200~/save {name}\x1b[201~")[0].startswith("error:")  # a long word has lines of its own
        assert talk.say(f"\x1b[200~/load {name}\x1b[201~")[0].startswith("error:")  # a long word has lines of its own
    assert "Conversation: 4 messages." in talk.say("/stats")
    assert file.read_text() == before


def test_retry_answers_anew(chat: Start, tmp_path: Path) -> None:
    talk = chat("--seed", "1", "--temperature", "3", "--top-k", "0", "--top-p", "1", "--max-tokens", "20")
    assert talk.say("/retry")[0].startswith("error: ")
    assert talk.say("/undo")[0].startswith("error: ")
    talk.say("Hello")
    talk.say(f"/save {tmp_path / 'a'}")
    talk.say("/retry")
    talk.say(f"/save {tmp_path / 'b'}")
    first, second = messages_of(tmp_path / "a"), messages_of(tmp_path / "b")
    assert [message["role"] for message in second] == ["user", "assistant"]
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_switches_and_budgets(chat: Start) -> None:
    talk = chat("--seed", "1")
    assert talk.say("/no_think") == ["The model does not think before it answers."]
    assert "temperature 0.7" in "\n".join(talk.say("/stats"))
    assert not any(map(THOUGHT.match, talk.say("How many r's in strawberry?")))
    assert talk.say("/think") == ["The model thinks as long as it likes before it answers."]
    assert any(map(THOUGHT.match, talk.say("How many r's in strawberry?")))
    assert not any(map(THOUGHT.match, talk.say("/no_think How many r's in strawberry?")))
    talk.say("/clear")
    assert talk.say("/budget 5") == ["The model thinks for at most 5 tokens before it answers."]
    cut_off = talk.say("How many r's in strawberry?")
    assert cut_off[0].endswith(" s, 5 tokens, its whole budget")
    assert "5 of reasoning, all that its budget allows" in " ".join(talk.say("/stats"))
    assert talk.say("/budget") == ["The model thinks for at most 5 tokens before it answers."]
    assert talk.say("/budget 0") == ["The model does not think before it answers."]
    assert not any(map(THOUGHT.match, talk.say("What is 2 + 3?")))
    assert talk.say("/think") == ["The model thinks as long as it likes before it answers."]
    assert "as long as it likes" in talk.say("/budget off")[0]
    talk.say("/no_think")
    assert "as long as it likes" in talk.say("/budget off")[0]
    assert any(map(THOUGHT.match, talk.say("What is 2 + 3?")))
    assert "expected at most 999,999,999 tokens" in " ".join(talk.say("/budget 99999999999999999"))
    for wrong in ("-1", "many", "1e3", "²"):
        assert talk.say(f"/budget {wrong}")[0].startswith("error: /budget: found")


def test_system_and_help(chat: Start, tmp_path: Path) -> None:
    talk = chat("--system", "Be brief.", "--no-thinking")
    assert talk.say("/system") == ["System message: Be brief."]
    talk.say("Hello")
    assert talk.say("/system Be [bold]verbose[/bold].") == ["System message: Be [bold]verbose[/bold]."]
    assert talk.say("/clear") == ["Cleared, but for the system message."]
    talk.say(f"/save {tmp_path / 'a'}")
    assert messages_of(tmp_path / "a") == [{"role": "system", "content": "Be [bold]verbose[/bold]."}]
    assert talk.say("/system -") == ["No system message."]
    text = "\n".join(talk.say("/help"))
    for command in ("/think", "/budget", "/save FILE", "/retry", "/quit", "Ctrl-C"):
        assert command in text


def test_mistyped_commands_never_reach_the_model(chat: Start, tmp_path: Path) -> None:
    talk = chat("--no-thinking")
    assert talk.say("/hlep")[:2] == [
        "error: /hlep: found no such command",
        "       Did you mean /help? To send it to the model, begin with //.",
    ]
    assert "Conversation: 0 messages." in talk.say("/stats")
    talk.say("//hlep")
    talk.say(f"/save {tmp_path / 'a'}")
    assert messages_of(tmp_path / "a")[0]["content"] == "/hlep"


def test_reasoning_shown_and_hidden(chat: Start) -> None:
    talk = chat("--seed", "1")
    assert talk.say("/reasoning")[0].startswith("There was no reasoning")
    folded = talk.say("How many r's in strawberry?")
    assert THOUGHT.fullmatch(folded[0])
    reasoning = talk.say("/reasoning")
    assert reasoning[0] != "There was no reasoning in the last answer."
    assert talk.say("/reasoning show") == ["Reasoning: shown."]
    whole = talk.say("/retry")
    assert not THOUGHT.fullmatch(whole[0])
    assert any(map(THOUGHT.fullmatch, whole))
    assert talk.say("/reasoning hide") == ["Reasoning: folded into a line."]
    assert talk.say("/reasoning loud")[0].startswith("error: ")


def test_the_oldest_turn_can_be_dropped(chat: Start) -> None:
    talk = chat("--no-thinking", "--max-tokens", "8")
    long = "How many r's in strawberry? " * 20
    talk.say("Hello")
    for _ in range(9):
        lines = talk.say(long)
        if lines[0].startswith("error: "):
            break
    assert "/drop" in "\n".join(lines)
    before = re.search(r"(\d+) messages", "\n".join(talk.say("/stats")))
    after = re.search(r"(\d+) messages", "\n".join(talk.say("/drop")))
    assert before is not None
    assert after is not None
    assert int(before[1]) - int(after[1]) == 2


# Keys


def test_ctrl_c_stops_the_answer_and_keeps_it(chat: Start, endless: str, tmp_path: Path) -> None:
    talk = chat("--no-thinking", "--max-kv-size", "64", "--model", endless)
    talk.begin("Hello")
    talk.send(INTERRUPT)
    assert talk.rest()[-1] == "Stopped; what is shown stays."
    talk.say(f"/save {tmp_path / 'a'}")
    user, assistant = messages_of(tmp_path / "a")
    assert user["content"] == "Hello"
    assert assistant["role"] == "assistant"
    assert assistant["content"]
    talk.begin("And now?")  # the chat goes on
    talk.send(INTERRUPT)
    talk.rest()
    talk.begin("/retry")
    talk.send(INTERRUPT)
    talk.rest()
    talk.say(f"/save {tmp_path / 'b'}")
    assert [message["role"] for message in messages_of(tmp_path / "b")] == ["user", "assistant"] * 2
    assert messages_of(tmp_path / "b")[:2] == [user, assistant]
    assert talk.end() == 0


def test_ctrl_c_while_thinking_and_while_reading(chat: Start, endless: str, tmp_path: Path) -> None:
    talk = chat("--stop", "</think>", "--max-kv-size", "64", "--model", endless, "--temperature", "2")
    talk.begin("Hello /think")
    talk.send(INTERRUPT)
    talk.rest()
    talk.say(f"/save {tmp_path / 'a'}")
    assert len(messages_of(tmp_path / "a")) == 2
    messages = [
        {"role": "user", "content": "How many r's in strawberry? " * 20_000},
        {"role": "assistant", "content": "3"},
    ]
    (tmp_path / "long").write_text(json.dumps({"format": "mlxqwen-conversation-1", "messages": messages}))
    talk.say(f"/load {tmp_path / 'long'}")
    talk.send("Hello\r")
    talk.child.expect("Reading the prompt: [0-9,]+ of [0-9,]+ tokens")
    talk.send(INTERRUPT)
    assert talk.rest()[-1] == "Stopped before the first word: nothing has changed."
    talk.say(f"/save {tmp_path / 'b'}")
    assert messages_of(tmp_path / "b") == messages


def test_ctrl_c_at_the_prompt(chat: Start) -> None:
    talk = chat("--no-thinking")
    talk.send("never sent")
    talk.child.expect_exact("sent")
    talk.send(INTERRUPT)
    assert "Conversation: 0 messages." in talk.say("/stats")  # nothing of the line is left before it
    talk.send(INTERRUPT)
    assert talk.answer() == [LEAVES]
    talk.send(f"x{INTERRUPT}{INTERRUPT}")  # typing begins anew
    assert talk.answer() == [LEAVES]
    talk.say("")
    talk.send(INTERRUPT)
    assert talk.answer() == [LEAVES]
    assert talk.end(INTERRUPT) == 0


def test_ctrl_c_right_behind_a_message_is_not_for_the_next_prompt(chat: Start) -> None:
    talk = chat("--no-thinking", "--max-tokens", "8")
    talk.send(f"Hello\r{INTERRUPT}{INTERRUPT}/stats")
    assert LEAVES not in talk.answer()
    assert "Conversation: 2 messages." in talk.say("")
    assert talk.end() == 0


def test_what_is_typed_during_a_reply_is_there_once(chat: Start, endless: str) -> None:
    talk = chat("--no-thinking", "--max-tokens", "60", "--max-kv-size", "64", "--model", endless)
    talk.begin("Hello")
    talk.child.logfile_read = seen = io.StringIO()
    talk.send(f"typed ahead\r{END}")
    talk.rest()
    talk.answer()
    assert talk.end("") == 0
    shown_at_all = seen.getvalue().count("typed ahead")
    assert shown_at_all == seen.getvalue().count("\x1b[0m> typed ahead") > 0  # by the prompt alone


def test_ctrl_d_leaves(chat: Start) -> None:
    assert chat().end() == 0


def test_history_and_line_editing(chat: Start, tmp_path: Path) -> None:
    talk = chat("--no-thinking", "--max-tokens", "2")
    talk.say("first")
    talk.say("second")
    talk.send(UP)
    talk.send(UP)
    talk.say(" again")
    talk.say(f"wo{LEFT}{LEFT}t")
    talk.say(f"/save {tmp_path / 'a'}")
    asked = [message["content"] for message in messages_of(tmp_path / "a") if message["role"] == "user"]
    assert asked == ["first", "second", "first again", "two"]


def test_several_lines_are_one_message(chat: Start, tmp_path: Path) -> None:
    talk = chat("--no-thinking", "--max-tokens", "2")
    talk.say(f"one{ALT_ENTER}two\\\rthree")
    talk.say("\x1b[200~/quit\nis a\r\n\tcommand\x1b[201~ pasted")
    talk.say("\x1b[200~four\n\nfive\x1b[201~")
    talk.say("")
    talk.say(f"/save {tmp_path / 'a'}")
    asked = [message["content"] for message in messages_of(tmp_path / "a") if message["role"] == "user"]
    assert asked == ["one\ntwo\nthree", "four\n\nfive"]


def test_tab_completes_commands(chat: Start) -> None:
    talk = chat()
    talk.send("/he\t")
    talk.child.expect_exact("lp")
    assert "/budget" in "\n".join(talk.say(""))


# What is shown

HOSTILE = """
import sys
from mlxqwen.engine.conversation import Conversation
from mlxqwen.engine.engine import Done
from mlxqwen.engine.events import Timings, Usage
from mlxqwen.chat.reply import Delta, Reply
from mlxqwen.cli import main

NASTY = "a\\x1b[2J\\x1b]0;title\\x07b\\x9b31m\\rc\\x00 [red]d[/red] [e](javascript:x) &#27;[5m\\x1b[?1049h"

def stream(self, message, **options):
    for piece in NASTY:
        yield Delta(reasoning=piece)
    for piece in NASTY:
        yield Delta(content=piece)
    yield Done(Reply(NASTY, NASTY), "stop", Usage(1, 2, 3), Timings(1, 1, 1, 1))

Conversation.stream = stream
sys.argv[0] = "mlxqwen"
main()
"""
DEFUSED = "a\\x1b[2J\\x1b]0;title\\x07b\\x9b31m\\x0dc\\x00 [red]d[/red] [e](javascript:x) &#27;[5m\\x1b[?1049h"


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_hostile_output_is_spelled_out(chat: Start, term: str) -> None:
    talk = chat("--system", "\x1b[31m", program=("-c", HOSTILE), TERM=term, columns=200)
    if term == "dumb":
        talk.send("Hello\r")
        talk.child.expect_exact(DEFUSED)
        return
    talk.say("/reasoning show")
    lines = talk.say("\x1b[200~\x1b[31m\x1b]0;x\x07\x1b[201~")
    assert lines == [DEFUSED, "Thought for 0.0 s, 3 tokens", DEFUSED]
    assert talk.say("/system") == ["System message: \\x1b[31m"]
    assert talk.say("/load \x1b[201~x")[0].isprintable()


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {}], ids=["plain", "styled"])
def test_a_narrow_window(chat: Start, env: dict[str, str]) -> None:
    talk = chat("--seed", "1", columns=20, **env)
    talk.send("How many r's?\r")
    talk.child.expect_exact(HAS_READ)
    talk.child.expect_exact(READS)
    text = talk.child.before
    assert ("\x1b[2mThought for" in text) == (not env)
    assert not env or not re.search(r"\x1b\[[\d;]+m", text.partition("Thought for")[2].partition("\x1b[?")[0])
    assert max(map(len, shown(PROMPT_ESCAPES.sub("", text), 20))) <= 20


def test_answers_go_to_a_file_while_somebody_types(chat: Start, tmp_path: Path) -> None:
    program = f"import os, sys; sys.argv[0] = 'mlxqwen'; os.dup2(os.open({str(tmp_path / 'a')!r}, 65), 1); "
    talk = chat("--seed", "1", program=("-c", f"{program}from mlxqwen.cli import main; main()"))
    assert "/help" in talk.greeting[0]
    assert THOUGHT.fullmatch(talk.say("How many r's in strawberry?")[0])
    talk.end()
    answer = (tmp_path / "a").read_text()
    assert answer.endswith("\n")
    assert answer.rstrip("\n").isprintable()


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_resizing_in_the_midst_of_an_answer(endless: str) -> None:
    server = ["tmux", "-L", f"mlxqwen-{os.getpid()}", "-f", "/dev/null"]
    command = f"'{sys.executable}' -m mlxqwen chat --no-thinking --max-kv-size 64 --temperature 2 --model '{endless}'"

    def tmux(*arguments: str) -> str:
        return subprocess.run([*server, *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    def wait_for(*words: str) -> str:
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            screen = tmux("capture-pane", "-p", "-S", "-200")
            if all(word in screen for word in words):
                return screen
            time.sleep(0.1)
        raise AssertionError(screen)

    tmux("new-session", "-d", "-x", "100", "-y", "40", command)
    try:
        wait_for("/help", "\n>")
        tmux("send-keys", "Hello", "Enter")
        for width in ("60", "30", "90"):
            time.sleep(0.5)
            tmux("resize-window", "-x", width)
        tmux("send-keys", "C-c")
        screen = wait_for("Stopped;")
        assert screen.count("> Hello") == 1
        assert "Traceback" not in screen
        tmux("send-keys", "/quit", "Enter")
    finally:
        subprocess.run([*server, "kill-server"], capture_output=True, check=False)


# Where standard input is no terminal


def piped(*lines: str, arguments: tuple[str, ...] = ()) -> Result:
    return run("chat", *arguments, stdin="".join(f"{line}\n" for line in lines).encode())


def test_the_oldest_turns_may_be_left_out() -> None:
    questions = ["How many r's in strawberry? " * 20] * 4
    result = piped(*questions, arguments=("--no-thinking", "--max-tokens", "4", "--drop-oldest"))
    assert (result.status, "error" in result.err) == (0, False)
    assert piped(*questions, arguments=("--no-thinking", "--max-tokens", "4")).status == 1


def test_a_first_message_that_is_too_long_is_to_be_shortened() -> None:
    for arguments in ([], ["--drop-oldest"]):
        result = piped("How many r's in strawberry? " * 200, arguments=tuple(arguments))
        assert result.status == 1
        assert "Shorten it." in result.err
        assert "/drop" not in result.err


@pytest.mark.parametrize(("words", "helps"), [(1_000, True), (5_000, False)])
def test_yarn_is_named_where_it_holds_the_message(words: int, helps: bool) -> None:
    assert ("--yarn auto" in piped("a " * words).err) == helps


def test_commands_are_no_options() -> None:
    result = run("chat", "--load", "x.json")
    assert_error(result, "No such option '--load'. In the chat it is /load FILE; --messages FILE begins", status=2)
    assert_error(run("chat", "--save=x"), "No such option '--save'. In the chat it is /save FILE.", status=2)
    assert_error(run("chat", "--exit"), "No such option '--exit'. In the chat it is /quit.", status=2)
    assert_error(run("chat", "--systen", "x"), "Did you mean '--system'?", status=2)


def test_files_are_named_as_in_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "a b.json"
    assert (
        piped(f'/save "{file}"', f"/load '{file}'").err
        == f"Saved 0 messages to {file}.\nLoaded 0 messages from {file}.\n"
    )
    for wrong in (str(file), f'"{file}', '""'):
        result = piped(f"/save {wrong}")
        assert (result.status, result.err[:20]) == (1, "error: /save: found ")
    assert list(tmp_path.iterdir()) == [file]


def test_plain_messages_are_loaded(tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    for content in ([{"role": "user", "content": "a"}], {"messages": [{"role": "user", "content": "a"}]}):
        file.write_text(json.dumps(content))
        said = piped(f"/load {file}").err
        assert said == f"Loaded 1 message from {file}. The last message has no answer yet: /retry answers it.\n"


def test_each_line_is_answered() -> None:
    result = piped("How many r's in strawberry?", "", "What is 12 + 39?", arguments=("--seed", "1"))
    assert result.status == 0
    assert len(result.out.splitlines()) == 2
    assert "\x1b" not in result.out + result.err
    assert result.err.strip()


def test_commands_work_in_pipes_too(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    result = piped("/no_think", "Hello", f"/save {file}", "/quit", "never read")
    assert (result.status, result.err) == (
        0,
        f"The model does not think before it answers.\nSaved 2 messages to {file}.\n",
    )
    assert [message["content"] for message in messages_of(file)] == ["Hello", result.out.removesuffix("\n")]


def test_errors_in_pipes_are_told_and_the_others_answered() -> None:
    result = piped("/hlep", "Hello", arguments=("--no-thinking",))
    assert (result.status, len(result.out.splitlines())) == (1, 1)
    assert result.err.startswith("error: /hlep")


def test_nothing_is_asked_nothing_is_answered() -> None:
    assert piped() == Result(0, "", "")


def test_bytes_that_are_no_text() -> None:
    result = run("chat", "--no-thinking", stdin=b"Hello\n\xff\nHello\n")
    assert (result.status, len(result.out.splitlines())) == (1, 1)
    assert "byte 0xff in line 2" in result.err


def test_verbose_tells_what_is_used() -> None:
    result = piped("Hello", arguments=("--verbose", "--no-thinking", "--max-kv-size", "64", "--kv-bits", "8"))
    assert result.err.startswith("context 512, window 64 with 4 kept, 8-bit cache, dtype float32\n")
    assert "ended by stop" in result.err


def test_a_cut_off_answer_is_told() -> None:
    assert "note: stopped after 3 tokens" in piped("Hello", arguments=("--max-tokens", "3")).err


def test_options_are_those_of_generate() -> None:
    from mlxqwen.cli.chat import chat as command

    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    assert {name for option in options for name in (*option.opts, *option.secondary_opts)} == {*OPTIONS.split()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["one", "two", "three"],
        ["--model", "one", "two", "three"],
        ["--messages", "-"],
        ["--raw"],
        ["--kv-keep", "2"],
        ["--no-thinking", "--thinking-budget", "3"],
        ["--json"],
        ["--batch", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = run("chat", *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--thinking-budget", "-1"], "--thinking-budget: found"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--system", "\udcff"], "system"),
        (["--stop", ""], "stop"),
    ],
)
def test_bad_values(arguments: list[str], word: str) -> None:
    result = run("chat", *arguments)
    assert (result.status, result.out) == (1, "")
    assert word in result.err


def test_other_commands_import_no_terminal_libraries() -> None:
    code = (
        "import sys\nfrom mlxqwen.cli import main\n"
        "for arguments in (['generate', 'Hello', '--no-thinking'], ['chat', '--help'], ['completion', 'zsh']):\n"
        "    sys.argv = ['mlxqwen', *arguments]\n"
        "    try:\n        main()\n    except SystemExit as ended:\n        assert not ended.code\n"
        "heavy = {'prompt_toolkit', 'rich', 'markdown_it', 'pygments', 'asyncio'}\n"
        "sys.exit(' '.join(heavy & {name.partition('.')[0] for name in sys.modules}) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
