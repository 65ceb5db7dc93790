"""Access to the optional transformers package: present or one clear error, and silent while it works."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from depthwire.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def require_transformers(at: str, *packages: str) -> None:
    """Check that transformers, and further packages, can be imported.

    Raises:
        CaptureError: ``capture.missing-dependency``.
    """
    missing = [name for name in ("transformers", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        raise CaptureError(
            "capture.missing-dependency",
            f"this source needs {' and '.join(missing)}",
            at=at,
            want=", ".join(("transformers", *packages)),
            got=f"no {', '.join(missing)}",
            todo="pip install 'depthwire[hf]'",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing progress bars and notices to the terminal; what it was set to comes back.

    Its failures still raise. Missing weights, which it only logs, are judged by ``load_model``.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    def silent(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{**kwargs, "disable": True})

    verbosity, bars = logging.get_verbosity(), gguf_loader.tqdm
    hook = logging.set_tqdm_hook(silent)
    logging.set_verbosity(logging.CRITICAL)
    # The GGUF reader takes its bar from tqdm itself, past the hook.
    gguf_loader.tqdm = functools.partial(bars, disable=True)
    try:
        yield
    finally:
        gguf_loader.tqdm = bars
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)
