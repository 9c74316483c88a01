"""Small files that say how a run is doing, for others to read: whole or not at all, and never needed.

What a run cannot do without is written by `autopar.text.atomic_file`, and fails loudly.
"""

import contextlib
import os
from pathlib import Path


def write_if_possible(path: Path, text: str) -> None:
    """Write a text file so that readers find all of it, or the old one; a full disk stops no run."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text)
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
