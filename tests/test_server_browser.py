"""The chat page in headless Chromium, on a server of the demo model.

Needs `apt install chromium chromium-driver` and the extra `browser`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import Process, process

pytest.importorskip("selenium", reason="selenium is not installed (the extra `browser`)")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("Chromium or its driver is not installed (apt: chromium, chromium-driver)", allow_module_level=True)

KEY = "sesame-7"
QUESTION = "How many r's in strawberry?"
ATTACK = '<img src=x onerror="window.hit = 1"><script>window.hit = 2</script>'
OPTIONS = [
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--disable-dev-shm-usage",  # containers have little of it
    "--window-size=1180,800",
]
# Answers for the server, or changes what it is asked.
FAKE = """
const [events, changes, isOpen] = arguments;
window.realFetch ??= window.fetch;
window.fetch = (path, options) => {
  if (path !== 'v1/chat/completions') return window.realFetch(path, options);
  window.asked = JSON.parse(options.body);
  if (events === null) {
    return window.realFetch(path, {...options, body: JSON.stringify({...window.asked, ...changes})});
  }
  const start = (stream) => {
    window.push = (event) => stream.enqueue(new TextEncoder().encode(`data: ${event}\\n\\n`));
    events.forEach(window.push);
    if (!isOpen) stream.close();
    options.signal.addEventListener('abort', () => stream.error(options.signal.reason));
  };
  const body = new ReadableStream({start});
  return Promise.resolve(new Response(body, {headers: {'content-type': 'text/event-stream'}}));
};
"""


class Browser:
    """A tab of Chromium with the page in it."""

    def __init__(self, folder: Path, server: Process) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for option in (*OPTIONS, f"--user-data-dir={folder}"):
            options.add_argument(option)
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
        self.driver.set_script_timeout(30)
        self.url = f"http://127.0.0.1:{server.port}/"

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, `await` allowed."""
        code = (
            "const done = arguments[arguments.length - 1];"
            f"(async function () {{ {script} }}).apply(null, arguments).then(done, (error) => done(String(error)));"
        )
        return self.driver.execute_async_script(code, *arguments)

    def text(self, selector: str) -> str:
        """The text of the last element that fits."""
        return str(self.run("return [...document.querySelectorAll(arguments[0])].at(-1).innerText", selector))

    def has(self, selector: str) -> bool:
        """Whether an element that fits is seen."""
        script = """
        const isSeen = (one) => one.checkVisibility({visibilityProperty: true});
        return [...document.querySelectorAll(arguments[0])].some(isSeen);
        """
        return bool(self.run(script, selector))

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        actions = ActionChains(self.driver, duration=0)
        for key in keys:
            actions.send_keys(key)
        actions.perform()

    def until(self, holds: Callable[[], Any]) -> None:
        """Wait until it holds. Raises `TimeoutException`."""
        WebDriverWait(self.driver, 60, poll_frequency=0.02).until(lambda _: holds())

    def open(self) -> None:
        """The page anew, without conversations."""
        self.driver.get(self.url)
        self.run("localStorage.clear()")
        self.driver.get(self.url)
        self.until(lambda: self.text("#connection") == "Connected")

    def fake(self, events: list[Any] | None = None, *, is_open: bool = False, **changes: Any) -> None:
        """Answer with these events, an end or none, or let the server answer a body with these changes."""
        encoded = None if events is None else [one if isinstance(one, str) else json.dumps(one) for one in events]
        self.run(FAKE, encoded, changes, is_open)

    def push(self, event: Any) -> None:
        """One more event of an answer that is open."""
        self.run("window.push(arguments[0])", event if isinstance(event, str) else json.dumps(event))

    def say(self, text: str) -> None:
        """Send a message by keyboard, and wait until its reply is over."""
        self.press(text, Keys.ENTER)
        self.until(lambda: not self.has("#stop"))

    def focused(self) -> str:
        """What has the focus: an id, or a class and a name."""
        script = "const one = document.activeElement; return one.id || one.className || one.tagName"
        return str(self.run(script))


def piece(**delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def end(**ended: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **ended}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 1744, "completion_tokens": 61, "prompt_tokens_details": {"cached_tokens": 1728}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with process(MLXQWEN_API_KEY=KEY) as made:
        yield made


@pytest.fixture(scope="module")
def tab(server: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"), server)
    # The key is asked for once, until it is right, and kept for the tab alone.
    browser.driver.get(browser.url)
    browser.until(lambda: browser.has("#key-dialog"))
    assert browser.focused() == "key"
    browser.press("wrong", Keys.ENTER)
    browser.until(lambda: browser.has("#key-problem"))
    browser.press(KEY, Keys.ENTER)
    browser.until(lambda: browser.text("#connection") == "Connected")
    assert not browser.has("#key-dialog")
    assert browser.run("return [sessionStorage['mlxqwen.key'], JSON.stringify(localStorage)]") == [KEY, "{}"]
    yield browser
    requests = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = {one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"}
    browser.driver.quit()
    assert f"{browser.url}page/app.js" in asked
    # Chromium begins with a page of its own, from within itself.
    assert not [url for url in asked if not url.startswith((browser.url, "chrome://", "data:"))]


@pytest.fixture
def page(tab: Browser) -> Browser:
    tab.open()
    return tab


def test_a_question_by_keyboard(page: Browser) -> None:
    assert page.focused() == "question"
    page.say(QUESTION)
    assert page.run("return [...document.querySelectorAll('.thought')].map((one) => [one.open, one.hidden])") == [
        [False, False]
    ]
    assert re.fullmatch(r"Thought( for [\d.]+ s)?", page.text(".thought summary"))
    assert "strawberry" in page.text(".assistant .text")
    assert "</think>" not in page.text(".assistant")
    figures = r"\d+ tokens · [\d.,]+ tokens/s · first after [\d.]+ m?s · prompt \d+(, \d+ cached)?"
    assert re.fullmatch(figures, page.text(".figures"))
    assert page.focused() == "question"
    assert page.text("#status") == "The reply is complete."

    said = page.run("return [...document.querySelectorAll('.message')].map((one) => one.textContent)")
    page.driver.refresh()
    page.until(lambda: page.has("#conversations button"))
    assert not page.has(".message")
    page.run("document.querySelector('#conversations button').focus()")
    page.press(Keys.ENTER)
    assert page.run("return [...document.querySelectorAll('.message')].map((one) => one.textContent)") == said
    assert page.focused() == "BUTTON"
    assert page.run("return document.activeElement.getAttribute('aria-current')") == "true"


def test_thought_and_answer_are_shown_as_they_come(page: Browser) -> None:
    def state() -> list[Any]:
        script = """
        const reply = document.querySelector('.assistant');
        const thought = reply.querySelector('.thought');
        return [thought.open, thought.querySelector('summary').textContent.replace(/ for [\\d.]+ s/, ''),
                thought.querySelector('p').textContent, reply.querySelector('.text').textContent,
                reply.getAttribute('aria-busy'), document.getElementById('status').textContent];
        """
        return list(page.run(script))

    page.fake([], is_open=True)
    page.press("Go", Keys.ENTER)
    page.until(lambda: page.has(".assistant.begins"))
    page.push(piece(reasoning_content="One "))
    page.until(lambda: state() == [True, "Thinking …", "One", "", "true", "Thinking"])
    page.push(piece(reasoning_content="two"))
    page.until(lambda: state() == [True, "Thinking …", "One two", "", "true", "Thinking"])
    page.push(piece(content="Yes"))
    page.until(lambda: state() == [False, "Thought", "One two", "Yes", "true", "Answering"])
    page.run("document.querySelector('summary').click()")  # who opens the thought finds it open
    page.push(piece(content=" **no"))
    page.until(lambda: state()[:4] == [True, "Thought", "One two", "Yes **no"])
    page.push(piece(content="**"))
    page.push(end())
    page.push("[DONE]")
    page.until(lambda: state() == [True, "Thought", "One two", "Yes no", "false", "The reply is complete."])


def test_a_reply_is_stopped(page: Browser, server: Process) -> None:
    def metric(name: str) -> float:
        script = "return (await (await import('/page/api.js')).metrics())[arguments[0]]"
        return float(page.run(script, name))

    before = metric("mlxqwen_aborted_replies_total")
    for keys in ([Keys.ESCAPE], [Keys.TAB, Keys.ENTER]):
        page.fake(None, ignore_eos=True)
        page.press(QUESTION, Keys.ENTER)
        page.until(lambda: page.text(".assistant .text") or page.text(".thought-text"))
        page.press(*keys)
        page.until(lambda: not page.has("#stop"))
        assert page.text(".message .note") == "Stopped."
        assert page.text(".figures").startswith("about ")
        assert page.focused() == "question"
    page.until(lambda: metric("mlxqwen_running_replies") == 0)
    assert metric("mlxqwen_aborted_replies_total") == before + 2
    page.fake(None)
    page.run("document.querySelector('.assistant:last-child .again').click()")
    page.until(lambda: not page.has("#stop"))
    assert page.run("return document.querySelectorAll('.message').length") == 4
    assert not page.has(".assistant:last-child .note")


def test_thinking_is_switched_off_and_bounded(page: Browser) -> None:
    page.run("document.getElementById('budget').focus()")
    page.press("4", Keys.TAB)
    page.run("document.getElementById('question').focus()")
    page.fake(None)
    page.say(QUESTION)
    asked = page.run("return window.asked")
    assert (asked["model"], asked["thinking_budget"]) == ("demo", 4)
    assert page.has(".assistant:last-child .thought")
    page.run("document.getElementById('thinking').focus()")
    page.press(Keys.SPACE)
    page.run("document.getElementById('question').focus()")
    page.say(QUESTION)
    asked = page.run("return window.asked")
    assert asked["thinking_budget"] == 0
    assert [one["role"] for one in asked["messages"]] == ["user", "assistant", "user"]
    assert all(set(one) == {"role", "content"} for one in asked["messages"])
    assert not page.has(".assistant:last-child .thought")
    assert page.text(".assistant .text")
    page.driver.refresh()
    assert page.run(
        "return [document.getElementById('thinking').checked, document.getElementById('budget').value]"
    ) == [
        False,
        "4",
    ]


def test_a_reply_goes_on_beside_another_conversation_until_the_page_is_left(page: Browser) -> None:
    page.fake([piece(reasoning_content="Hm"), piece(content="So far")], is_open=True)
    page.press("First", Keys.ENTER)
    page.until(lambda: page.text(".assistant .text") == "So far")
    page.run("document.getElementById('new').click()")
    assert not page.has("#stop")
    page.fake([piece(content="At once"), end(), "[DONE]"])
    page.say("Second")
    titles = "return [...document.querySelectorAll('#conversations button')].map((one) => one.textContent)"
    assert page.run(titles) == ["Second", "First"]
    page.run("document.querySelectorAll('#conversations button')[1].click()")
    assert page.text("#title") == "First"
    assert page.has("#stop")
    page.press(QUESTION, Keys.ENTER)  # nothing is sent before the reply is over
    assert page.run("return document.getElementById('question').value") == QUESTION
    page.driver.refresh()
    page.until(lambda: page.has("#conversations button"))
    page.run("document.querySelectorAll('#conversations button')[1].click()")
    assert page.text(".assistant .text") == "So far"
    assert page.text(".message .note") == "Incomplete: the page was closed before the reply ended."
    assert not page.has("#stop")


def test_tabs_follow_each_other(page: Browser) -> None:
    page.fake([piece(content="Yes"), end(), "[DONE]"])
    page.say("First")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        page.driver.get(f"{page.url}health")
        key, kept = page.run("return Object.entries(localStorage).find(([name]) => name.includes('.conversation.'))")
        changed = {**json.loads(kept), "title": "From there"}
        page.run("localStorage[arguments[0]] = arguments[1]", key, json.dumps(changed))
        page.driver.switch_to.window(first)
        page.until(lambda: page.text("#title") == "From there")
        page.driver.switch_to.window(page.driver.window_handles[-1])
        page.run("localStorage.removeItem(arguments[0])", key)
        page.driver.switch_to.window(first)
        page.until(lambda: not page.has(".message"))
        assert not page.has("#conversations button")
    finally:
        page.driver.switch_to.window(page.driver.window_handles[-1])
        page.driver.close()
        page.driver.switch_to.window(first)


def test_replies_and_code_are_copied(page: Browser) -> None:
    page.fake([piece(content="*a*\n\n```\nb <i>\n```"), end(), "[DONE]"])
    page.say("Go")

    def pasted() -> str:
        page.run("document.getElementById('question').value = ''; document.getElementById('question').focus()")
        ActionChains(page.driver).key_down(Keys.CONTROL).send_keys("v").key_up(Keys.CONTROL).perform()
        return str(page.run("return document.getElementById('question').value"))

    page.run("document.querySelector('.assistant footer .copy').focus()")
    page.press(Keys.ENTER)
    page.until(lambda: pasted() == "*a*\n\n```\nb <i>\n```")
    page.run("document.querySelector('.code .bar button').focus()")
    page.press(Keys.ENTER)
    page.until(lambda: pasted() == "b <i>")


def test_what_models_write_is_text(page: Browser) -> None:
    page.fake([piece(reasoning_content=ATTACK), piece(content=ATTACK), piece(content=f"\n\n```{ATTACK}\n{ATTACK}")])
    page.say(f"# {ATTACK}")
    page.fake([{"error": {"message": ATTACK}}])
    page.say(ATTACK)
    assert page.text(".assistant:last-child .error") == ATTACK
    page.driver.refresh()
    page.until(lambda: page.has("#conversations button"))
    page.run("document.querySelector('#conversations button').click()")
    assert page.run("return document.querySelectorAll('#chat img, #chat script, #sidebar img').length") == 0
    shown = page.run("return document.body.textContent")
    assert shown.count(ATTACK) >= 6
    assert page.run("return window.hit ?? null") is None
    refused = page.run("document.getElementById('title').innerHTML = arguments[0]", ATTACK)
    assert str(refused).startswith("TypeError")  # not even a mistake in the page's own code could


def test_what_goes_wrong_is_told(page: Browser) -> None:
    page.fake(None, temperature=1000)
    page.say(QUESTION)
    assert page.text(".message .error").startswith("temperature: found 1000")
    page.fake([piece(content="Half a")])
    page.say("Go on")
    assert page.text(".assistant .text") == "Half a"
    assert page.text(".message .error") == "The connection was lost before the reply was complete."
    page.fake([piece(reasoning_content="Hm"), end(ended_in_thought=True), USAGE, "[DONE]"])
    page.say("Think")
    assert page.text(".message .note") == "The reply ended inside its thought, without an answer."
    assert "61 tokens" in page.text(".figures")
    assert page.text(".figures").endswith("prompt 1,744, 1,728 cached")
    page.fake([piece(content="Cut"), end(finish_reason="length"), "[DONE]"])
    page.say("Write")
    assert page.text(".message .note") == "Cut off: there was no room for more tokens."
    page.fake(None)
    page.driver.set_network_conditions(offline=True, latency=0, throughput=-1)
    try:
        page.say("Are you there?")
        assert page.text(".message .error") == "The server cannot be reached. Is it still running?"
        page.until(lambda: page.text("#connection") == "No connection to the server")
    finally:
        page.driver.delete_network_conditions()


def test_the_keyboard_reaches_everything(page: Browser) -> None:
    page.fake([piece(reasoning_content="Hm"), piece(content="Yes"), end(), "[DONE]"])
    page.press("One")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.press("Two")
    assert page.run("return document.getElementById('question').value") == "One\nTwo"
    page.press(Keys.ENTER)
    page.until(lambda: page.has(".assistant .copy"))
    page.run("document.activeElement.blur(); document.getElementById('new').focus()")
    order = [page.focused()]
    while order[-1] != "thinking" and len(order) < 20:
        page.press(Keys.TAB)
        order.append(page.focused())
    expected = ["new", "BUTTON", "rename", "delete", "scroller", "SUMMARY", "copy", "again", "question", "thinking"]
    assert order == expected

    page.run("document.getElementById('rename').focus()")
    page.press(Keys.ENTER)
    page.until(lambda: page.focused() == "name")
    page.press("A better name", Keys.ENTER)
    page.until(lambda: page.text("#title") == "A better name")
    assert page.text("#conversations button") == "A better name"
    assert page.focused() == "rename"
    for keys, left in (([Keys.ESCAPE], 1), ([Keys.TAB, Keys.ENTER], 0)):
        page.run("document.getElementById('delete').focus()")
        page.press(Keys.ENTER)
        page.until(lambda: page.has("#delete-dialog"))
        page.press(*keys)
        page.until(lambda: not page.has("#delete-dialog"))
        assert page.run("return document.querySelectorAll('#conversations button').length") == left
        assert (
            page.run("return Object.keys(localStorage).filter((key) => key.includes('.conversation.')).length") == left
        )
    assert page.focused() == "question"


WIDE = "\n\n".join(
    ["x" * 300, f"`{'y' * 300}`", f"```\n{'z ' * 200}\n```", f"|{'a|' * 40}\n|{'---|' * 40}\n|{'bbbb|' * 40}"]
)


def test_a_narrow_window_and_a_dark_one(page: Browser) -> None:
    def width() -> int:
        return int(page.run("return Math.max(document.documentElement.scrollWidth, innerWidth)"))

    def grounds() -> list[str]:
        return list(
            page.run(
                "return ['body', '#sidebar'].map((one) => getComputedStyle(document.querySelector(one))"
                ".backgroundColor)"
            )
        )

    def brightness(colour: str) -> int:
        return max(int(part) for part in re.findall(r"\d+", colour)[:3])

    try:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        )
        page.fake([piece(content=WIDE), end(), USAGE, "[DONE]"])
        page.say("w" * 200)
        assert width() == 360
        assert not page.has("#new")
        page.run("document.getElementById('menu').focus()")
        page.press(Keys.ENTER)
        page.until(lambda: page.has("#new"))
        assert page.focused() == "new"
        assert width() == 360
        page.press(Keys.ESCAPE)
        page.until(lambda: not page.has("#new"))
        assert page.focused() == "menu"
        box = page.run(
            "const box = document.getElementById('composer').getBoundingClientRect();"
            "return [box.left, box.right, box.bottom]"
        )
        assert box[0] >= 0
        assert box[1] <= 360
        assert box[2] <= 740
        assert all(brightness(one) > 200 for one in grounds())
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        assert all(brightness(one) < 60 for one in grounds())
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


OUTLINE = """
const { markdownView } = await import('/page/markdown.js');
const outline = (node) => node.nodeType === 3 ? node.data
  : `<${node.localName}${node.start > 1 ? ` ${node.start}` : ''}>${[...node.childNodes].map(outline).join('')}</>`;
const shown = (text) => {
  const target = document.createElement('div');
  markdownView(target)(text);
  return [...target.childNodes].map(outline).join('');
};
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a *b* **c** _d_ `e`", "<p>a <em>b</> <strong>c</> <em>d</> <code>e</></>"),
        ("***a*** **b *c* d**", "<p><strong><em>a</></> <strong>b <em>c</> d</></>"),
        ("2 * 3 * 4, snake_case_name, ** a **", "<p>2 * 3 * 4, snake_case_name, ** a **</>"),
        (r"\*a\* ``b`c``", "<p>*a* <code>b`c</></>"),
        ("a\nb\n\nc", "<p>a\nb</><p>c</>"),
        ("# A\n### B", "<h2>A</><h4>B</>"),
        ("- a\n- b\n  - c\n    d\n- e", "<ul><li>a</><li>b<ul><li>c\nd</></></><li>e</></>"),
        ("3. a\n4. b\n\n5. c\nd", "<ol 3><li>a</><li>b</><li>c\nd</></>"),
        ("- a\n1. b", "<ul><li>a</></><ol><li>b</></>"),
        ("- a\n\n  b", "<ul><li>a<p>b</></></>"),
        ("> a\n> - b\n\nc", "<blockquote><p>a</><ul><li>b</></></><p>c</>"),
        ("a\n\n---\n\nb", "<p>a</><hr></><p>b</>"),
        ("a <b>b</b> &amp; ![c](d) [e](f)", "<p>a <b>b</b> &amp; ![c](d) [e](f)</>"),
        (
            "|a|b|\n|-|:-:|\n|*c*|d|",
            "<div><table><thead><tr><th>a</><th>b</></></><tbody><tr><td><em>c</></><td>d</></></></></>",
        ),
        ("```py\n*a*\n\n# b\n```\nc", "<div><div><span>py</><button>Copy</></><pre><code>*a*\n\n# b</></></><p>c</>"),
        ("~~~\n```\n", "<div><div><span></><button>Copy</></><pre><code>```\n</></></>"),
    ],
)
def test_markdown(tab: Browser, text: str, expected: str) -> None:
    assert tab.run(f"{OUTLINE} return shown(arguments[0])", text) == expected


def test_markdown_that_grows_ends_as_it_would_at_once(tab: Browser) -> None:
    text = "# A\n\nb *c*\nd\n\n- e\n  - f\n\n1. g\n\n```\nh\n\ni\n```\n\n|a|b|\n|-|-|\n|c|d|\n\n> j\n\nk **l**"
    script = """
    const target = document.createElement('div');
    const show = markdownView(target);
    const text = arguments[0];
    let first = null, isKept = true;
    for (let length = 0; length <= text.length; length += 1) {
      show(text.slice(0, length));
      if (length === 5) first = target.firstChild;
      isKept &&= first === null || target.firstChild === first;
    }
    return [[...target.childNodes].map(outline).join('') === shown(text), isKept];
    """
    assert tab.run(OUTLINE + script, text) == [True, True]


def test_hostile_markdown_ends(tab: Browser) -> None:
    """Backtracking would be beyond the script's limit of time, recursion beyond the stack."""
    pieces = [*"*_`|~\\ ", "**", "***", "``", "*a ", "**a ", "_a ", "`a", "> ", "- ", "  - ", "# ", "|-"]
    script = """
    for (const piece of arguments[0]) {
      for (const end of ['', 'a', '\\n']) shown((piece + end).repeat(4000));
    }
    shown(`a|\\n|-\\n${'b|\\n'.repeat(130000)}`);
    return true;
    """
    assert tab.run(OUTLINE + script, pieces) is True


def test_conversations_are_bounded(tab: Browser) -> None:
    script = """
    const { Conversations } = await import('/page/conversations.js');
    const entries = new Map();
    let most = Infinity;
    const storage = {
      get length() { return entries.size; },
      key: (place) => [...entries.keys()][place],
      getItem: (key) => entries.get(key) ?? null,
      removeItem: (key) => entries.delete(key),
      setItem: (key, text) => {
        const others = [...entries].filter(([name]) => name !== key);
        if (others.reduce((sum, [, value]) => sum + value.length, text.length) > most) throw new Error('full');
        entries.set(key, text);
      },
    };
    storage.setItem('another', 'page');
    const all = new Conversations(storage, { most: 3, characters: 1000 });
    const told = [];
    let now = 0;
    const add = (length) => {
      const made = all.add();
      made.title = String(now);
      made.changed = now++;
      made.messages.push({ role: 'user', content: 'x'.repeat(length) });
      const isKept = all.keep(made);
      told.push([isKept, new Conversations(storage).list().map((one) => one.title).join(' ')]);
      return made;
    };
    for (const length of [10, 10, 10, 10, 500, 5000]) add(length);
    most = 500;
    add(100);
    add(450);
    entries.set('mlxqwen.conversation.bad', '{"title": 3}');
    entries.set('mlxqwen.conversation.worse', '{"title": "a", "changed": 1, "messages": [{"role": "system"}]}');
    told.push(new Conversations(storage).list().length, entries.get('another'));
    return told;
    """
    told = tab.run(script)
    assert told == [
        [True, "0"],
        [True, "1 0"],
        [True, "2 1 0"],
        [True, "3 2 1"],
        [True, "4 3 2"],
        [False, "4 3 2"],  # too long for any room
        [True, "6"],  # the browser's own bound
        [False, ""],
        0,
        "page",
    ]
