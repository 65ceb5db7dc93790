"""A file whose bytes cannot change between a check and the use that follows it."""

from __future__ import annotations

import bisect
import io
from typing import Any, BinaryIO

_PAGE = 4096


class StableFile(io.RawIOBase):
    """A file that reads the same twice: a byte that was read once is remembered.

    What the checks saw is what torch gets, even if someone writes to the file in between. The ranges given to
    ``release`` (raw weights, whose values decide nothing) are read from the disk each time instead, so that
    memory holds them once.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Take over reading from an open file; its size now is its size for good."""
        super().__init__()
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self._position = 0
        self._pages: dict[int, bytes] = {}
        self._released: list[tuple[int, int]] = []

    def release(self, start: int, size: int) -> None:
        """Stop remembering ``size`` bytes from ``start``; ranges may not overlap."""
        if size:
            bisect.insort(self._released, (start, start + size))

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the position on; returns the bytes read, 0 at the end."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._position))
        done = 0
        while done < wanted:
            done += self._copy(view[done:wanted])
        return done

    def _copy(self, view: memoryview) -> int:
        """Copy from the position what lies in one page or one released range."""
        position = self._position
        index = bisect.bisect_right(self._released, (position, self._size))
        if index and position < self._released[index - 1][1]:
            size = min(len(view), self._released[index - 1][1] - position)
            view[:size] = self._disk(position, size)
        else:
            page, offset = divmod(position, _PAGE)
            if page not in self._pages:
                first = page * _PAGE
                self._pages[page] = self._disk(first, min(_PAGE, self._size - first))
            size = min(len(view), len(self._pages[page]) - offset)
            if index < len(self._released):
                size = min(size, self._released[index][0] - position)
            view[:size] = self._pages[page][offset : offset + size]
        self._position += size
        return size

    def _disk(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(size)
        if len(data) != size:
            raise OSError(f"the file shrank while it was read: {size} bytes wanted at {start}, {len(data)} found")
        return data
