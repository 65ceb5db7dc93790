"""The tokenizer that belongs to a program's source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthwire.errors import CaptureError
from depthwire.export._hf_files import cached_snapshot
from depthwire.export._transformers import quiet, require_transformers

if TYPE_CHECKING:
    from depthwire.program import Source


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a Hugging Face directory, cached hub id or GGUF file.

    Raises:
        CaptureError: ``capture.no-tokenizer``.
    """
    reference = source.tokenizer_reference()
    if reference is None:
        raise _no_tokenizer(source, f"a {source.kind} source, which has none")
    path, options = Path(reference).expanduser(), dict[str, str]()
    is_gguf = path.suffix.lower() == ".gguf"
    require_transformers(source.reference, *(("gguf",) if is_gguf else ()))
    from transformers import AutoTokenizer

    if is_gguf:
        path, options = path.parent, {"gguf_file": path.name}
    elif not path.is_dir():
        path, _ = cached_snapshot(reference, source.revision)
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False, **options)
        except Exception as error:
            lines = str(error).splitlines()
            raise _no_tokenizer(source, f"{type(error).__name__}: {lines[0] if lines else ''}") from error


def _no_tokenizer(source: Source, got: str) -> CaptureError:
    return CaptureError(
        "capture.no-tokenizer",
        "the source has no tokenizer, so text cannot become its inputs",
        at=source.reference,
        want="tokenizer files beside the model",
        got=got,
        todo="Save the tokenizer into the model's directory (tokenizer.save_pretrained), or give the inputs as a file.",
    )
