"""The chat page's files: who gets which, with which headers, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import mlxqwen.server
from mlxqwen.engine.engine import Engine
from mlxqwen.model.qwen3 import Qwen3ForCausalLM
from mlxqwen.server.page_files import PAGE_PATHS
from mlxqwen.text.tokenizer import Tokenizer
from tests.serving import Served, serving

FOLDER = Path(mlxqwen.server.__file__).parent / "page"
FILES = {path.name: path for path in sorted(FOLDER.iterdir())}
SCRIPTS = [name for name in FILES if name.endswith(".js")]
SHEETS = [name for name in FILES if name.endswith(".css")]
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PATHS = ["/", *(f"/page/{name}" for name in FILES if name != "index.html")]


@pytest.fixture(scope="module")
def served(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> Iterator[Served]:
    with serving(Engine(*small)) as made:
        yield made


class Elements(HTMLParser):
    """The start tags of a document, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    return Elements(FILES["index.html"].read_text()).found


def test_every_file_has_its_path() -> None:
    assert sorted(PAGE_PATHS) == sorted(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_files_are_served_as_they_are(served: Served, path: str) -> None:
    file = FILES[path.removeprefix("/page/") if path != "/" else "index.html"]
    response = served.client.get(path)
    assert response.status_code == 200
    assert response.content == file.read_bytes()
    kind = TYPES[file.suffix[1:]]
    assert response.headers["content-type"] == (f"{kind}; charset=utf-8" if kind.startswith("text") else kind)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", PATHS)
def test_the_policy_lets_nothing_else_in(served: Served, path: str) -> None:
    policy = served.client.get(path).headers["content-security-policy"]
    directives = {name: values for name, *values in (part.split() for part in policy.split(";"))}
    own = {name for name, values in directives.items() if values == ["'self'"]}
    assert own == {"script-src", "style-src", "img-src", "connect-src"}
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert directives[name] == ["'none'"]
    assert directives["require-trusted-types-for"] == ["'script'"]
    assert "unsafe" not in policy


def test_a_file_that_has_not_changed_is_not_sent_again(served: Served) -> None:
    whole = served.client.get("/page/app.js")
    tag = whole.headers["etag"]
    assert whole.headers["cache-control"] == "no-cache"
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = served.client.get("/page/app.js", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert again.headers["content-security-policy"] == whole.headers["content-security-policy"]
    assert served.client.get("/page/app.js", headers={"if-none-match": '"other"'}).status_code == 200
    assert served.client.get("/").headers["etag"] != tag


def test_head_tells_the_length_alone(served: Served) -> None:
    response = served.client.head("/")
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) == FILES["index.html"].stat().st_size
    assert served.client.post("/").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",
        "/index.html",
        "/page/App.js",
        "/page//app.js",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page/%2fetc%2fpasswd",
        "/page/app.js%00",
        "/page_files.py",
        "/app.js",
        "/favicon.ico",
    ],
)
def test_nothing_else_is_reachable(served: Served, path: str) -> None:
    response = served.client.get(path, follow_redirects=True)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_the_page_is_one_line_of_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mlxqwen.server")
    for path in (*PATHS, "/page/none", "/metrics"):
        served.client.get(path)
    assert [message.split(", ")[0] for message in caplog.messages] == [
        "testclient GET '/' 200",
        "testclient GET '/page/none' 404 (path_not_found)",
    ]


def test_the_page_alone_needs_no_key(small: tuple[Qwen3ForCausalLM, Tokenizer]) -> None:
    with serving(Engine(*small), api_keys=("sesame",)) as served:
        for path in PATHS:
            assert served.client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/version", "/page", "/page/", "/page/app.py"):
            assert served.client.get(path).status_code == 401


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_place(name: str) -> None:
    text = FILES[name].read_text()
    # What an SVG file is named by is no address that is asked.
    found = set(re.findall(r"[a-z+]+:(?=//)[^\s\"'<>)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not found
    assert not re.search(r"[\"'(=]//|@import|url\(|data:\w", text)


def test_what_the_page_loads_is_served(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    wanted = {given[name] for _, given in elements for name in ("src", "href") if name in given}
    assert {f"/{path}" for path in wanted} <= set(PAGE_PATHS)
    for script in SCRIPTS:
        for name in re.findall(r'from "([^"]*)"', FILES[script].read_text()):
            assert f"/page/{name.removeprefix('./')}" in PAGE_PATHS


def test_the_page_has_no_code_within(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    for tag, given in elements:
        assert tag != "style"
        assert tag != "script" or given.get("src")
        assert not [name for name in given if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_makes_text_html_or_code(script: str) -> None:
    text = FILES[script].read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|parseFromString|eval\(|Function\(", text)
    assert not re.search(r"setHTML|createContextualFragment|srcdoc|\.(?:src|href)\b", text)


def test_scripts_use_elements_that_are_there(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    given = [value for _, attributes in elements for name, value in attributes.items() if name == "id"]
    assert len(given) == len(set(given))
    used = {name for script in SCRIPTS for name in re.findall(r'byId\("([^"]*)"\)', FILES[script].read_text())}
    assert len(used) > 20
    assert used <= set(given)
    for _, attributes in elements:
        for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in given


def test_the_numbers_that_the_page_reads_are_told(served: Served) -> None:
    told = served.client.get("/metrics").text
    read = set(re.findall(r"mlxqwen_\w+", FILES["numbers.js"].read_text()))
    assert len(read) == 7
    for name in read:
        assert re.search(rf"^{name} [\d.]", told, re.MULTILINE), name


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_written_can_be_read(scheme: str) -> None:
    """WCAG 2.2, contrast of 4.5 : 1."""
    light, dark = re.findall(r":root \{(.*?)\}", FILES["base.css"].read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    pairs = [(text, ground) for text in ("text", "quiet") for ground in ("ground", "side", "raised", "bubble")]
    pairs += [("error", "ground"), ("error", "side"), ("error", "raised"), ("on-accent", "accent")]
    for text, ground in pairs:
        darker, lighter = sorted(luminance(colours[name]) for name in (text, ground))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ground)
