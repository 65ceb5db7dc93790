"""The routing operators as passes see them (``docs/routing_ops.md``)."""

from __future__ import annotations

import torch

import depthwire.ops  # noqa: F401 - registers the operators

_OPS = torch.ops.depthwire

SELECT = _OPS.select_tokens.default
SELECT_BUDGET = _OPS.select_tokens_budget.default
GATHER = _OPS.gather_tokens.default
SCATTER = _OPS.scatter_tokens.default
SURPRISE = _OPS.surprise_score.default
