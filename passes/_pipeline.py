"""A sequence of passes with the checks between them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthwire.errors import DepthwireError, InternalError
from depthwire.passes._verify import Fingerprint, verify_pass
from depthwire.program import PassRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from depthwire.passes._base import Pass
    from depthwire.program import Program

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. A value: comparable, printable, and written into the manifest.

    Attributes:
        passes: The passes.
        verify: Check every pass's result (``depthwire.passes._verify``); on by default.
    """

    passes: tuple[Pass, ...]
    verify: bool = True

    def run(self, program: Program, progress: Callable[[str], None] | None = None) -> Program:
        """Run every pass and record what it did in ``program.history``.

        Args:
            program: The program; not changed.
            progress: Called with a line per pass.

        Raises:
            PassError: A pass cannot do what it was asked to do on this model.
            InternalError: A pass broke its contract or raised something else.
        """
        fingerprint = Fingerprint.of(program) if self.verify and self.passes else None
        for step in self.passes:
            started = time.perf_counter()
            try:
                result = step.run(program)
                if fingerprint is not None:
                    fingerprint = verify_pass(step, program, result, fingerprint)
            except DepthwireError:
                raise
            except Exception as error:
                done = ", ".join(record.name for record in program.history) or "none"
                raise InternalError(
                    "pass.crashed",
                    f"The pass {step.name} failed",
                    at=step.name,
                    want="a rewrite or a decline",
                    got=f"{type(error).__name__}: {error} (passes before it: {done})",
                    todo="Report this with the model's configuration.",
                ) from error
            record = PassRecord(
                name=step.name,
                options=step.options(),
                rewrites=result.rewrites,
                declines=tuple(decline.as_dict() for decline in result.declines),
                notes=result.notes,
                seconds=time.perf_counter() - started,
            )
            logger.info("%s: %d rewrites, %d declines", step.name, result.rewrites, len(result.declines))
            if progress is not None:
                progress(f"{step.name}: {result.rewrites} rewrites, {len(result.declines)} declines")
            program = result.program.replace(history=(*program.history, record))
        return program
