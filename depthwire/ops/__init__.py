"""The custom operators, one a file: torch reference, fake shapes and gradient.

Importing this package registers the operators with torch under the namespace ``depthwire``.
"""

from __future__ import annotations

from depthwire.ops.attn_res_read import attn_res_read, attn_res_read_reference

__all__ = ["attn_res_read", "attn_res_read_reference"]
