"""A decoder's configuration as JSON: written as its fields, read strictly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from depthwire.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

C = TypeVar("C")


def read_config(kind: type[C], fields: Mapping[str, Any], *, what: str, at: str) -> C:
    """Return a configuration from its fields; ``model_type`` is not one of them.

    Args:
        kind: The dataclass, which pydantic validates.
        fields: The parsed JSON.
        what: What the configuration describes, for the error.
        at: Where it came from, for the error.

    Raises:
        CaptureError: ``checkpoint.config``: a field is unknown, missing, of another type or out of range.
    """
    given = {name: value for name, value in fields.items() if name != "model_type"}
    try:
        # Through JSON, since strict validation of Python values would want dataclasses in place of mappings.
        return TypeAdapter(kind).validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = f"{'.'.join(map(str, first['loc'])) or 'the object'}: {first['msg']}"
    except UsageError as error:
        got = f"{error.at}: {error.got}, wanted {error.want}"
    raise CaptureError(
        "checkpoint.config",
        f"the configuration does not describe {what}",
        at=at,
        want=f"the fields of {kind.__module__}.{kind.__qualname__}",
        got=got,
        todo="Correct the field; docs/models.md lists them.",
    )
