"""The report: one JSON document about a run, and the same as a page that needs no network.

Sections: verdict, source, stages, structure, passes, verify, compute, engines, files. ``depthwire verify`` and
``depthwire build`` replace their own sections and leave the others.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

from depthwire.artifact import MANIFEST, REPORT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from depthwire.artifact import Artifact
    from depthwire.errors import DepthwireError
    from depthwire.stages import Stages

REPORT_HTML = "report.html"
SCHEMA_VERSION = 1


def verdict_of(verify: Mapping[str, Any] | None, failure: DepthwireError | None) -> str:
    """Return ``pass``, ``fail`` or ``not verified``."""
    if failure is not None:
        return "fail"
    if verify is None:
        return "not verified"
    return "pass" if verify["passed"] else "fail"


def make_report(
    artifact: Artifact,
    stages: Stages,
    *,
    structure: Mapping[str, Any] | None = None,
    verify: Mapping[str, Any] | None = None,
    quality: Mapping[str, Any] | None = None,
    failure: DepthwireError | None = None,
) -> dict[str, Any]:
    """Return the report of an artefact; sections that are not given are taken over from the report on disk.

    Args:
        artifact: The artefact; source, recipe, passes, engines and files come from its manifest.
        stages: Stages of this run; the last one replaces that of the same name in a report that is there already, where
            the stages are those of the conversion.
        structure: ``ResidualStream.as_dict()``.
        verify: ``VerifyReport.as_dict()``.
        quality: What a rewrite that changes the function costs (``depthwire._quality``).
        failure: The error that ended the run, if one did.
    """
    manifest = artifact.manifest
    before = read_report(artifact) or {}
    verify = verify if verify is not None else before.get("verify")
    compute = before.get("compute")
    if compute is None and manifest.route is not None:
        from depthwire.runtime.accounting import account_graphs

        compute = account_graphs(artifact)
    return {
        "schema_version": SCHEMA_VERSION,
        "depthwire": manifest.depthwire,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "verdict": verdict_of(verify, failure),
        "failure": None if failure is None else failure.as_dict(),
        "source": manifest.source.model_dump(mode="json"),
        "recipe": manifest.recipe,
        "stages": _merge(before.get("stages", []), stages.as_list()),
        "structure": structure if structure is not None else before.get("structure"),
        "passes": [info.model_dump(mode="json") for info in manifest.passes],
        "verify": verify,
        "quality": quality if quality is not None else before.get("quality"),
        "compute": compute,
        "engines": {name: info.model_dump(mode="json") for name, info in manifest.engines.items()},
        "kernels": None if manifest.kernels is None else manifest.kernels.model_dump(mode="json"),
        "custom_ops": {name: op.model_dump(mode="json") for name, op in manifest.custom_ops.items()},
        "opsets": manifest.opsets,
        "tools": manifest.tools,
        "files": {
            name: entry.model_dump(mode="json")
            for name, entry in sorted(manifest.files.items())
            if name not in {REPORT, REPORT_HTML}
        },
    }


def _merge(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not before:
        return now
    last = now[-1]
    merged = [last if stage["name"] == last["name"] else stage for stage in before]
    return merged if last in merged else [*merged, last]


def read_report(artifact: Artifact) -> dict[str, Any] | None:
    """Return the report that an artefact holds, ``None`` when it has none."""
    path = artifact.path(REPORT)
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def write_report(artifact: Artifact, report: Mapping[str, Any]) -> None:
    """Write ``report.json`` and ``report.html`` into the artefact and list both in the manifest."""
    for name, text in ((REPORT, json.dumps(report, indent=2) + "\n"), (REPORT_HTML, render_html(report))):
        path = artifact.path(name)
        temporary = path.with_name(f".{name}.partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        artifact.add_file(name)
    artifact.write_manifest()


def render_html(report: Mapping[str, Any]) -> str:
    """Return the report as one self-contained page; everything from the model is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("depthwire", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mb"] = lambda count: f"{count / 1e6:,.1f}"
    environment.filters["cell"] = _cell
    return environment.get_template("report.html.j2").render(report=report, manifest=MANIFEST)


def _cell(value: object) -> str:
    """Return a value as the text of a table cell: numbers short, nothing as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return str(value)
