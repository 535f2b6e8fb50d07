"""Standard output that is closed, full, or that nobody reads any more."""

import os
import sys


def open_closed_streams() -> None:
    """Give streams that were closed by whoever started us to nobody.

    Otherwise the next file that is opened takes the number of standard output.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def is_output_stuck() -> bool:
    """Whether standard output takes nothing; tried with a line end, for where it has no buffer."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def forget_output() -> None:
    """Send what waits in the buffer of standard output, and all that follows, to nobody."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, sys.stdout.fileno())
    os.close(nobody)
