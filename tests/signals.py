"""What tests that send signals share."""

from __future__ import annotations

import signal

import pytest


def skip_if_ignored(number: signal.Signals) -> None:
    """Skip the test where a signal would not arrive: a shell's background jobs ignore it, and all that they start."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored by whoever started the tests (a background job), and what they start")
