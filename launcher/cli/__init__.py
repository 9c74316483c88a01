"""The command line: `python -m launcher` and the console script `launcher`."""

from launcher.cli.entry import main

__all__ = ["main"]
