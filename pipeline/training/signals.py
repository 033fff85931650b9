"""Leaving on a signal; imports nothing heavy, so that the command line listens before it loads torch and a model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

if not hasattr(signal, "SIGUSR1"):
    raise SystemExit("nuteprune: does not run on Windows itself: start it inside WSL")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What SLURM sends before it ends a job, and Ctrl-C."""


class Preempted(BaseException):
    """A signal asked the run to end; the same command goes on from the newest checkpoint.

    No `Exception`, as `KeyboardInterrupt` is none: while libraries load it must pass what they catch.
    """

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again."""


class Stop:
    """The handler of `SIGNALS`: ends a run that has nothing to save, and lets one in training finish its step.

    Attributes:
        received: name of the first signal that came, empty while none did.
        polled: whether a loop looks at `received` after each step; while none does, a signal raises `Preempted`.
    """

    def __init__(self) -> None:
        self.received, self.polled = "", False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        again, self.received = bool(self.received), self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            # The next Ctrl-C is the system's: it ends the process at once, whatever hangs in it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if again:
            return
        if not self.polled:
            raise Preempted(self.nothing)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            # Not through logging or sys.stderr, whose locks the interrupted code may hold.
            os.write(2, b"\nnuteprune: ending after this step; Ctrl-C again ends at once\n")

    @property
    def nothing(self) -> str:
        """The message of a run that ends where no step is taken."""
        return f"{self.name} outside of training: what was finished is kept, start again"

    @property
    def name(self) -> str:
        """The signal, for a message; where it came to other ranks only, they are named."""
        return self.received or "a signal to another rank"


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle `SIGNALS` by a `Stop` until the block ends; inside such a block, by that of the outer one."""
    outer = signal.getsignal(signal.SIGTERM)
    if isinstance(outer, Stop):
        yield outer
        return
    stop = Stop()
    before, unraisable = {s: signal.signal(s, stop) for s in SIGNALS}, sys.unraisablehook

    def quietly(found: sys.UnraisableHookArgs) -> None:
        """Say nothing of a `Preempted` that a finalizer swallowed: the loop finds the signal in `received`."""
        if not isinstance(found.exc_value, Preempted):
            unraisable(found)

    sys.unraisablehook = quietly
    try:
        yield stop
    except Exception as error:
        if stop.received and not stop.polled:  # a library made an error of its own of the interruption
            raise Preempted(stop.nothing) from error
        raise
    finally:
        sys.unraisablehook = unraisable
        for s, handler in before.items():
            signal.signal(s, handler)
