"""Keeping logs still for a while."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def logs_disabled(level: int) -> Iterator[None]:
    """Disable all log records up to a level while the body runs; a stricter setting outside stays in force.

    It acts on every logger: some of torch's bring handlers of their own, made when first used.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, level))
    try:
        yield
    finally:
        logging.disable(before)
