"""The command line: each command parses, calls one library function and prints.

Heavy imports stand inside the commands, so that `moemerge --help` answers at once.
"""

from moemerge.cli.app import main

__all__ = ["main"]
