"""What is wrong with the environment of the hub's client, looked for once a download has failed.

The client takes its settings unchecked, and its errors name none of them: a token with a byte order mark is a
`UnicodeEncodeError`. No error here shows a token, or the user's name and password for a hub.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mlxqwen.errors import OptionError

__all__ = ["TRUE", "can_be_imported", "faulty_setting", "is_true", "token_source"]

TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_SHOWN = 80


def is_true(variable: str) -> bool:
    """Whether an environment variable is set to true. Raises `OptionError` for what is neither true nor false."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in (*TRUE, *FALSE):
        raise OptionError(f"{variable}: found {value[:40]!r}, expected true or false")
    return value in TRUE


def can_be_imported() -> bool:
    """Whether the client can be imported: an address whose port is none ends that, with lines on stderr."""
    try:
        _ = urlsplit(os.environ.get("HF_ENDPOINT", "")).port
    except ValueError:
        return False
    return True


def faulty_setting() -> tuple[str, str] | None:
    """The first setting that cannot work: what was found and expected, and the way out. None if all may work."""
    return next(_faults(), None)


def token_source() -> str:
    """Where the client has its token from: a variable, or a file."""
    return next((name for name in _TOKENS if os.environ.get(name)), None) or str(_token_file())


def _faults() -> Iterator[tuple[str, str]]:
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not _is_address(endpoint):
        yield (
            f"HF_ENDPOINT: found {_shown(endpoint)}, expected an address such as https://huggingface.co",
            "Set HF_ENDPOINT to the address of a hub, or unset it.",
        )
    yield from _token_faults()
    for name in _CERTIFICATES:
        if (path := os.environ.get(name)) and not os.path.exists(path):
            yield f"{name}: found {_shown(path)}, which does not exist", f"Correct {name}, or unset it."
    for name in (form for upper in _PROXIES for form in (upper, upper.lower())):
        scheme, separator, _ = os.environ.get(name, "").partition("://")
        if separator and scheme not in _PROXY_SCHEMES:
            yield (
                f"{name}: found the scheme {_shown(scheme)}, expected {', '.join(_PROXY_SCHEMES)}",
                f"Correct {name}, or unset it.",
            )


def _token_faults() -> Iterator[tuple[str, str]]:
    name = next((name for name in _TOKENS if os.environ.get(name)), None)
    if name is not None:
        if wrong := _no_token(os.environ[name]):
            yield f"{name}: found {wrong}, expected letters, digits, - and _ alone", f"Set {name} anew, or unset it."
        return
    path = _token_file()
    try:
        text = path.read_bytes().decode() if path.exists() else ""
    except UnicodeDecodeError:
        yield f"{path}: found no UTF-8 text, expected a token", "Remove the file, or log in to the hub anew."
    except OSError as cause:
        yield f"{path}: cannot be read as the token's file: {cause.strerror}", "Check HF_TOKEN_PATH and HF_HOME."
    else:
        if wrong := _no_token(text.strip()):
            yield f"{path}: found {wrong}, expected a token", "Remove the file, or log in to the hub anew."


def _token_file() -> Path:
    try:
        from huggingface_hub import constants
    except ValueError:  # a number among its settings that is none
        return Path(os.environ.get("HF_TOKEN_PATH") or os.path.expanduser("~/.cache/huggingface/token"))
    return Path(constants.HF_TOKEN_PATH)


def _no_token(token: str) -> str | None:
    """The first character that no header can hold, in words; None if there is none."""
    for position, character in enumerate(token.strip("\r\n")):
        if character == "\ufeff":
            return "a byte order mark"
        if not character.isascii() or not (character.isprintable() or character in "\r\n\t"):
            name = unicodedata.name(character, "a control character")
            return f"U+{ord(character):04X} ({name}) at character {position}"
    return None


def _is_address(address: str) -> bool:
    """Whether the client can ask this address."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises for none
    except ValueError:
        return False
    is_plain = address.isascii() and address.isprintable() and " " not in address
    return is_plain and parts.scheme in ("http", "https") and bool(parts.hostname)


def _shown(value: str) -> str:
    return "one with a password" if "@" in value else ascii(value[:_SHOWN])
