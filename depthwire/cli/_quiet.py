"""Keep other projects' noise off the terminal; ``-v`` lets it through."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from depthwire._logs import logs_disabled

if TYPE_CHECKING:
    from collections.abc import Iterator

_VARIABLES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # also switches off the weight-loading bars of transformers
    "TOKENIZERS_PARALLELISM": "false",
}


# Without -v nothing of ours logs either, so everything below errors goes: "torchvision is not installed" (torch.onnx),
# hints about generation settings (transformers), guards on data (torch.fx). What matters in them comes as our errors.
_LEVEL = logging.WARNING


@contextmanager
def quiet_third_parties() -> Iterator[None]:
    """Silence warnings, log lines below errors and progress bars of other projects while the body runs."""
    added = [name for name in _VARIABLES if name not in os.environ]
    os.environ.update({name: _VARIABLES[name] for name in added})
    try:
        with logs_disabled(_LEVEL), warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
