"""Files written atomically: a reader sees the old content or the new, and a kill leaves no half file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_binary(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a binary file atomically; its folder is made if missing.

    Args:
        path: where to.
        write: writes the content to the open file it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_binary(path, lambda stream: stream.write(text.encode()))
