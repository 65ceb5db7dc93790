"""Depthwire: a compiler from trained PyTorch transformers to engines that read their depth by attention.

The verbs of the command line are functions of the same names: ``depthwire.convert(...)``, ``depthwire.verify(...)``.
Importing this package imports no torch; the first verb does.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthwire._plan import Plan
    from depthwire.api import (
        DryRun,
        Explanation,
        Inspection,
        Result,
        VerificationError,
        build,
        bundle,
        capture,
        convert,
        doctor,
        dry_run,
        explain,
        export,
        inspect,
        kernels,
        plan,
        rewrite,
        run_bundle,
        targets,
        verify,
        verify_result,
    )
    from depthwire.artifact import Artifact
    from depthwire.errors import DepthwireError
    from depthwire.program import Program
    from depthwire.recipe import Recipe
    from depthwire.route import RouteSpec
    from depthwire.route_parts import RouteParts, draw_parts
    from depthwire.runtime.native import custom_ops_library
    from depthwire.stages import Stages

__version__ = version("depthwire")

__all__ = [
    "Artifact",
    "DepthwireError",
    "DryRun",
    "Explanation",
    "Inspection",
    "Plan",
    "Program",
    "Recipe",
    "Result",
    "RouteParts",
    "RouteSpec",
    "Stages",
    "VerificationError",
    "__version__",
    "build",
    "bundle",
    "capture",
    "convert",
    "custom_ops_library",
    "doctor",
    "draw_parts",
    "dry_run",
    "explain",
    "export",
    "inspect",
    "kernels",
    "plan",
    "rewrite",
    "run_bundle",
    "targets",
    "verify",
    "verify_result",
]

_HOMES = {
    "Artifact": "depthwire.artifact",
    "DepthwireError": "depthwire.errors",
    "Plan": "depthwire._plan",
    "Program": "depthwire.program",
    "Recipe": "depthwire.recipe",
    "RouteParts": "depthwire.route_parts",
    "RouteSpec": "depthwire.route",
    "Stages": "depthwire.stages",
    "draw_parts": "depthwire.route_parts",
    "custom_ops_library": "depthwire.runtime.native",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'depthwire' has no attribute '{name}'")
    if name == "export":
        # The package of this name is callable and forwards to the verb, so that both meanings of the name hold.
        return importlib.import_module("depthwire.export")
    value = getattr(importlib.import_module(_HOMES.get(name, "depthwire.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
