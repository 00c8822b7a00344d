"""The command line: one file per command, each of them parse, call, print."""

from paredown.cli.main import main

__all__ = ["main"]
