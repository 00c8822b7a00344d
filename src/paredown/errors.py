"""Every exception that paredown raises, and the exit code the command line gives it.

ParedownError                     (1, never raised itself)
├── UsageError                    2   recipe, option or pattern is wrong
├── RejectedError                 3   model, weights or data cannot be accepted
│   └── CaptureError              3   torch.export could not capture the model
├── InfeasibleError               4   the target cannot be met; carries the nearest plan
│   └── NothingToDo               4   nothing is free to change; carries the reasons
├── GateError                     5   the quality bound does not hold
├── VerificationError             6   a proof or a parity check failed
├── ResourceError                 7   out of memory, disk or time
└── MissingError                  8   a runtime, library or device is missing
Interrupted (KeyboardInterrupt)   130 stopped by the user; the run can be resumed

Message template: "{what} must be {rule}. Got {value!r} at {where}. {fix}."
"""

from __future__ import annotations

from typing import Any


class ParedownError(Exception):
    """Base of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(ParedownError, ValueError):
    """A recipe, an option or a pattern is wrong."""

    exit_code = 2


class RejectedError(ParedownError, ValueError):
    """The model, its weights or the data cannot be accepted."""

    exit_code = 3


class CaptureError(RejectedError):
    """torch.export could not capture the model."""


class InfeasibleError(ParedownError):
    """The target cannot be met. `nearest` is the nearest plan that can, where there is one.

    The message is `reason` and `advice`, what to do about it: a search that tries several ways tells reasons, and advises once.

    >>> error = InfeasibleError("macs must be at most 5. Got 7.", advice="Ask for more.")
    >>> str(error), error.reason
    ('macs must be at most 5. Got 7. Ask for more.', 'macs must be at most 5. Got 7.')
    """

    exit_code = 4

    def __init__(self, reason: str, nearest: Any = None, *, advice: str = "") -> None:
        super().__init__(f"{reason} {advice}" if advice else reason)
        self.reason, self.advice, self.nearest = reason, advice, nearest


class NothingToDo(InfeasibleError):
    """Nothing is free to change; the message lists the reasons."""


class GateError(ParedownError):
    """The quality bound does not hold."""

    exit_code = 5


class VerificationError(ParedownError):
    """A proof or a parity check failed. `proof` or `check` holds the numbers."""

    exit_code = 6

    def __init__(self, message: str, evidence: Any = None) -> None:
        super().__init__(message)
        self.evidence = evidence


class ResourceError(ParedownError):
    """Out of memory, disk or time."""

    exit_code = 7


class MissingError(ParedownError, ImportError):
    """A runtime, library or device is missing; the message says what to install."""

    exit_code = 8


class Interrupted(KeyboardInterrupt):
    """Stopped by the user at a safe point; the same command resumes."""

    exit_code = 130


def must_be(name: str, value: object, *kinds: type, fix: str = "") -> None:
    """Raises UsageError where a value is of none of these types: what a verb was given in a noun's place.

    >>> must_be("budget", 0.5, dict)
    Traceback (most recent call last):
    paredown.errors.UsageError: budget must be a dict. Got float.
    """
    if not isinstance(value, kinds):
        msg = f"{name} must be a {' or a '.join(k.__name__ for k in kinds)}. Got {type(value).__name__}. {fix}".rstrip()
        raise UsageError(msg)
