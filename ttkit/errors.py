"""The errors a user may meet: each is one sentence and has an exit status (see the README)."""

from __future__ import annotations


class TtkitError(Exception):
    """Base class; `str(error)` is one sentence: what is wrong, where, and what to do."""

    exit_status = 3


class UsageError(TtkitError):
    """The request cannot be carried out as it was written (exit status 2)."""

    exit_status = 2


class InfraError(TtkitError):
    """The machine or the harness failed, not the request and not the model (exit status 3)."""

    exit_status = 3
