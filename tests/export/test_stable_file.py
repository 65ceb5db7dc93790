"""What a check saw is what the use that follows gets."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

import pytest

from depthwire.export._stable_file import StableFile

if TYPE_CHECKING:
    from pathlib import Path


def test_what_was_read_once_reads_the_same_again(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    first = bytes(range(256)) * 64
    file.write_bytes(first)
    with file.open("rb") as opened:
        stable = StableFile(opened)
        stable.release(5000, 100)
        assert stable.read() == first
        file.write_bytes(bytes(len(first)))
        stable.seek(0)
        again = stable.read()
    assert again[:5000] == first[:5000]
    assert again[5000:5100] == bytes(100)
    assert again[5100:] == first[5100:]


@pytest.mark.parametrize("size", [1, 7, 4096, 5000, 20000])
def test_pieces_of_any_size_are_the_files_bytes(tmp_path: Path, size: int) -> None:
    file = tmp_path / "bytes"
    data = random.Random(0).randbytes(16_500)  # noqa: S311
    file.write_bytes(data)
    with file.open("rb") as opened:
        stable = StableFile(opened)
        for start, length in ((9000, 4000), (100, 50), (150, 10), (0, 3), (16_499, 1), (500, 0)):
            stable.release(start, length)
        pieces = iter(lambda: stable.read(size), b"")
        assert b"".join(piece for piece in pieces if piece is not None) == data
        stable.seek(-5, io.SEEK_END)
        assert stable.read() == data[-5:]
        stable.seek(20_000)
        assert stable.read(4) == b""
