"""From a source to a program, and from a program to an artefact.

The package is callable: ``depthwire.export(...)`` is the verb of that name (``depthwire.api.export``), whether or not a
module of this package was imported before.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthwire.artifact import Artifact


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Artifact:
        """Run ``depthwire.api.export``."""
        from depthwire.api import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
