"""How mlxqwen was installed, and so the command that adds one of its extras: pip, uv and pipx each have their own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

__all__ = ["install_command"]


def install_command(extra: str, *, prefix: Path | None = None) -> str:
    """The command that adds an extra of mlxqwen, such as `server`, to the Python that runs.

    Environments of uv's and pipx's have no pip. Those of `uvx` and `pipx run` are made for one run: there it is the
    beginning of the command that has the extra.

    Args:
        extra: its name in `pyproject.toml`.
        prefix: the folder of the environment; that of this process by default.
    """
    prefix = Path(sys.prefix) if prefix is None else prefix
    wanted = f'"mlxqwen[{extra}]"'
    python = shlex.quote(sys.executable or "python3")
    if (prefix / "pipx_metadata.json").is_file():
        is_lasting = prefix.parent.name == "venvs"
        name = shlex.quote(prefix.name)
        return f"pipx runpip {name} install {wanted}" if is_lasting else f"pipx run --spec {wanted} mlxqwen …"
    if _is_made_by_uv(prefix):
        is_lasting = not any(part.startswith("archive-v") for part in prefix.parts)
        return f"uv pip install --python {python} {wanted}" if is_lasting else f"uvx --from {wanted} mlxqwen …"
    return f"{python} -m pip install {wanted}"


def _is_made_by_uv(prefix: Path) -> bool:
    """Whether uv has written its version into the environment's configuration."""
    try:
        lines = (prefix / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.partition("=")[0].strip() == "uv" for line in lines)
