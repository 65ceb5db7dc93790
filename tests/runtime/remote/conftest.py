"""A device: this machine, behind a real SSH server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tests.runtime.sshd import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from depthwire.runtime.remote import Device
    from tests.runtime.sshd import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def device(server: Server) -> Device:
    return server.device(sys.executable)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder on the device, with what a shell would trip over in its name."""
    return tmp_path / "it's $HOME; there"
