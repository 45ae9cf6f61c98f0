"""Every error a user can cause or meet, each with the exit code a script can rely on.

    FastlthError                 1   (never raised itself)
    ├── RecipeError              2   a setting, name or combination that is not allowed
    ├── DeviceError              2   a device that is not there
    ├── OutputError              2   an output folder that cannot be written
    ├── RegressionFound          3   bench --check or compare: something got slower or larger
    ├── DataError                4   data missing or damaged
    ├── TicketError              4   a ticket or saved state that is damaged or not one
    ├── DivergedError            5   the loss became NaN or infinite
    ├── EnvironmentFailure       6   disk full, GPU lost: state saved as far as possible
    │   └── RunLockedError       6   the run is held by another process
    ├── SomeFailed         1-6   of many tasks some failed; the code is the first one's
    └── Stopped          130/143/138 stopped by SIGINT, SIGTERM or SIGUSR1, and saved

A message is one sentence: the value, what is allowed, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastlthError(Exception):
    """Base class; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class RecipeError(FastlthError):
    exit_code = 2


class DeviceError(FastlthError):
    exit_code = 2


class OutputError(FastlthError):
    exit_code = 2


class RegressionFound(FastlthError):
    exit_code = 3


class DataError(FastlthError):
    exit_code = 4


class TicketError(FastlthError):
    exit_code = 4


class DivergedError(FastlthError):
    exit_code = 5


class EnvironmentFailure(FastlthError):
    exit_code = 6


class RunLockedError(EnvironmentFailure):
    pass


class SomeFailed(FastlthError):
    """Of many tasks some failed; the others are done."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(FastlthError):
    """A signal asked the run to end; everything up to now is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def unknown(kind: str, value: object, allowed: Iterable[str]) -> str:
    """One sentence for a name that does not exist: the value, a guess, and what is allowed."""
    names = list(allowed)
    close = difflib.get_close_matches(str(value), names, n=1)
    guess = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown {kind} '{value}'{guess}; choose one of: {', '.join(names)}"
