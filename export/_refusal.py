"""Turns what ``torch.export`` throws into one error that names the module, the line of code and the remedy."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from depthwire.errors import CaptureError

if TYPE_CHECKING:
    from types import FrameType

_HERE = Path(__file__).resolve().parent
_TORCH = Path(torch.__file__).resolve().parent

_DATA_DEPENDENT = (
    "The graph may not depend on values: replace `if`, loops and `.item()` on tensors by torch.where or torch.cond, "
    "and operations whose output size depends on values by ones of static size."
)
_GENERAL = "Make forward exportable (torch.export.export(module, args) must succeed), or capture a part that is."


def export_refused(error: Exception, root: nn.Module | None) -> CaptureError:
    """Describe a failure of ``torch.export``.

    Args:
        error: What it raised, with its traceback.
        root: The exported module, to name the submodule in which it happened; ``None`` where there is none.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    text = str(error).lower()
    data_dependent = "data-dependent" in text or "data dependent" in text or "unbacked" in text
    path, line = _place(error, root)
    return CaptureError(
        "capture.export-refused",
        "torch.export refuses the model",
        at=" at ".join(part for part in (path, line) if part) or None,
        want="a forward that torch.export can trace with static shapes",
        got=f"{type(error).__name__}: {reason}",
        todo=_DATA_DEPENDENT if data_dependent else _GENERAL,
    )


def _place(error: Exception, root: nn.Module | None) -> tuple[str | None, str | None]:
    """Return the path of the innermost module that was running, and the innermost line that is not torch's."""
    paths = {} if root is None else {id(part): name or type(part).__name__ for name, part in root.named_modules()}
    path = line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if not _is_ours_or_torchs(frame):
            path = paths.get(id(frame.f_locals.get("self")), path)
            file = frame.f_code.co_filename
            line = f"{file}:{number}: {linecache.getline(file, number).strip()}"
    return path, line


def _is_ours_or_torchs(frame: FrameType) -> bool:
    file = Path(frame.f_code.co_filename).resolve()
    return file.is_relative_to(_TORCH) or file.is_relative_to(_HERE) or not file.exists()
