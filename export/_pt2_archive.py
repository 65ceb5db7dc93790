"""The container of a ``.pt2`` file: which members it may have, and one stable view of its bytes.

``torch.export.load`` unpickles several kinds of member with no restriction, so nothing is handed to torch before
every member is known and checked. A program saved by ``torch.export.save`` needs only these::

    models/<name>.json                      the graph                    checked by _pt2_graph
    data/weights/<name>_weights_config.json which payload is which       checked by _pt2_graph
    data/constants/<name>_constants_config.json
    data/weights/weight_<i>                 raw bytes of a storage       never interpreted
    data/constants/tensor_<i>
    data/sample_inputs/<name>.pt            a pickle                     must load under weights_only=True
    extra/…                                 text of the user's           never interpreted
    archive_format, archive_version, byteorder, .data/…

Everything else is refused: pickled weights and constants of older releases, TorchScript and opaque objects, compiled
libraries, ExecuTorch files, and whatever a later release may add.
"""

from __future__ import annotations

import itertools
import re
import zipfile
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

import torch

from depthwire.errors import CaptureError
from depthwire.export._stable_file import StableFile

if TYPE_CHECKING:
    from pathlib import Path

_MAX_PARSED = 1 << 30
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_\-]*"
_PAYLOAD = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_SAFE = re.compile(
    rf"models/{_NAME}\.json|data/weights/{_NAME}_weights_config\.json|data/constants/{_NAME}_constants_config\.json|"
    rf"data/sample_inputs/{_NAME}\.pt|extra/[\w.\- /]+|"
    r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|"
    r"\.data/version|\.data/serialization_id"
)
_KNOWN_UNSAFE = (
    (r"data/weights/.*\.pt", "pickled weights, as older releases of torch wrote them"),
    (r"data/constants/custom_obj_.*", "a TorchScript object"),
    (r"data/constants/opaque_obj_.*", "a pickled Python object"),
    (r"data/constants/.*\.pt", "pickled constants, as older releases of torch wrote them"),
    (r"data/aotinductor/.*", "a compiled library, which would run as it is loaded"),
    (r"executorch/.*|data/executorch/.*", "an ExecuTorch program"),
    (r"code/.*|data\.pkl|constants\.pkl", "part of a TorchScript archive or pickle"),
    (r"serialized_.*|version", "part of the older format, which torch loads by unpickling"),
)


class Archive:
    """A ``.pt2`` file whose container has been checked.

    Attributes:
        path: The file, for messages.
        file: Its bytes; hand this, and nothing else, to torch.
        sizes: Bytes of every member.
    """

    def __init__(self, path: Path, opened: BinaryIO) -> None:
        """Check the container.

        Raises:
            CaptureError: ``capture.pt2-invalid`` or ``capture.pt2-unsafe``.
        """
        self.path = path
        self.file = StableFile(opened)
        self.sizes = _members(path, self.file)
        for name in sorted(self.sizes):
            _check_name(path, name)
        try:
            # torch's own reader decides what a member holds: another zip reader might see other bytes.
            self.file.seek(0)
            self._reader = cast("Any", torch._C.PyTorchFileReader(cast("IO[bytes]", self.file)))  # noqa: SLF001
            seen = sorted(self._reader.get_all_records())
        except RuntimeError as error:
            raise invalid(path, f"torch cannot read the archive: {str(error).splitlines()[0]}") from error
        if seen != sorted(self.sizes):
            odd = sorted(set(seen) ^ set(self.sizes)) or ["a name that occurs twice"]
            raise unsafe(path, odd[0], "two zip readers disagree on it")
        self._release_payloads()

    @property
    def payloads(self) -> list[str]:
        """Names of the members that are raw weights."""
        return [name for name in self.sizes if _PAYLOAD.fullmatch(name)]

    def _release_payloads(self) -> None:
        ranges = []
        for name in self.sizes:
            start = self._reader.get_record_offset(name)
            ranges.append((start, start + self._reader.get_record_size(name), name))
        ranges.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(ranges):
            if start < end:
                raise unsafe(self.path, other, f"it overlaps {name}")
        for start, end, name in ranges:
            if _PAYLOAD.fullmatch(name):
                self.file.release(start, end - start)

    def read(self, name: str) -> bytes:
        """Return the bytes of a member as torch will see them.

        Raises:
            CaptureError: There is no such member, or it is larger than 1 GiB.
        """
        if name not in self.sizes:
            raise invalid(self.path, f"no member {name!r}")
        if self.sizes[name] > _MAX_PARSED:
            raise unsafe(self.path, name, f"it has {self.sizes[name]} bytes; at most {_MAX_PARSED} are parsed")
        return bytes(self._reader.get_record(name))


def _members(path: Path, file: Any) -> dict[str, int]:
    """Return name (below the root folder) and size of every member of a plain, stored zip file."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            comment = archive.comment
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise invalid(path, f"not a zip archive: {error}") from error
    if not infos or comment:
        raise invalid(path, "an empty archive" if not infos else "a zip comment, which torch never writes")
    root = infos[0].filename.split("/")[0]
    sizes: dict[str, int] = {}
    folded: set[str] = set()
    for info in infos:
        _check_entry(path, info, root)
        name = info.filename[len(root) + 1 :]
        if name.casefold() in folded:  # torch's reader looks names up regardless of case
            raise unsafe(path, info.filename, "the name occurs twice")
        folded.add(name.casefold())
        sizes[name] = info.file_size
    if sum(sizes.values()) > file.size:
        raise unsafe(path, "the archive", f"its members claim {sum(sizes.values())} bytes in a file of {file.size}")
    return sizes


def _check_entry(path: Path, info: zipfile.ZipInfo, root: str) -> None:
    """Refuse what torch never writes: folders, traversal, compression (a zip bomb needs it), encryption."""
    parts = info.orig_filename.split("/")
    if "\0" in info.orig_filename or "\\" in info.orig_filename or any(part in ("", ".", "..") for part in parts):
        raise unsafe(path, repr(info.orig_filename), "its name is not a plain relative path")
    if parts[0] != root or len(parts) < 2:
        raise unsafe(path, info.filename, f"it lies outside the folder {root!r}")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise unsafe(path, info.filename, "it is compressed, which torch never does")
    if info.flag_bits & 0x1:
        raise unsafe(path, info.filename, "it is encrypted")


def _check_name(path: Path, name: str) -> None:
    if _SAFE.fullmatch(name) or _PAYLOAD.fullmatch(name):
        return
    reason = next((why for pattern, why in _KNOWN_UNSAFE if re.fullmatch(pattern, name)), "an unknown kind of member")
    raise unsafe(path, name, reason)


def unsafe(path: Path, member: str, why: str) -> CaptureError:
    """Say which part of the file could run code or deceive a reader."""
    return CaptureError(
        "capture.pt2-unsafe",
        "the .pt2 file holds something that could run code when it is loaded; it was not loaded",
        at=f"{path}: {member}",
        want="what torch.export.save writes for a program of tensors: JSON, raw weights, plain sample inputs",
        got=why,
        todo="If you made the file, export the program again with the installed torch and plain tensor inputs.",
    )


def invalid(path: Path, got: str) -> CaptureError:
    """Say why the file is no program of this torch release."""
    return CaptureError(
        "capture.pt2-invalid",
        "the .pt2 file is not a program that torch.export.save wrote",
        at=str(path),
        want=f"a .pt2 archive of torch {torch.__version__.split('+')[0]}",
        got=got,
        todo="Save the program again with torch.export.save under the installed torch.",
    )
