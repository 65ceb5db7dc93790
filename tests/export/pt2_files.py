"""A small saved program, taken apart and put together again."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Members = dict[str, bytes]
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.second(torch.relu(self.first(x))) + self.offset
        return {"hidden": hidden, "pooled": hidden.mean(1)}


@functools.lru_cache(maxsize=1)
def saved_program() -> bytes:
    """``Small``, as ``torch.export.save`` writes it."""
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Small().eval(), (torch.ones(2, 3, 4),)), buffer)
    return buffer.getvalue()


def saved_members() -> Members:
    """Its members by their names below the root folder."""
    with zipfile.ZipFile(io.BytesIO(saved_program())) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: Members, *, root: str = "archive", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{root}/{name}", data)
    return path


def edit(members: Members, name: str, change: Callable[[Any], None]) -> Members:
    document = json.loads(members[name])
    change(document)
    return {**members, name: json.dumps(document).encode()}
