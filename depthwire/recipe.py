"""Reading and writing recipes; the fields themselves are in ``depthwire._recipe_model``.

Every mistake is one ``UsageError`` that gives the line of the offending key (or the option that set it), the value
found, and the nearest known key.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from depthwire._recipe_model import (
    BuildOptions,
    GoldenOptions,
    PrecisionOptions,
    QualityOptions,
    Recipe,
    RouteOptions,
    SourceOptions,
    VerifyOptions,
)
from depthwire.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

__all__ = [
    "OPTIONS",
    "BuildOptions",
    "GoldenOptions",
    "PrecisionOptions",
    "QualityOptions",
    "Recipe",
    "RouteOptions",
    "SourceOptions",
    "VerifyOptions",
    "dump_recipe",
    "load_recipe",
    "make_recipe",
]

Key = tuple[str | int, ...]

OPTIONS: dict[str, Key] = {
    "source": ("source", "reference"),
    "task": ("source", "task"),
    "dtype": ("source", "dtype"),
    "revision": ("source", "revision"),
    "trust_remote_code": ("source", "trust_remote_code"),
    "batch": ("source", "batch"),
    "seq_len": ("source", "seq_len"),
    "image_size": ("source", "image_size"),
    "padding": ("source", "padding"),
    "checkpoint_map": ("source", "checkpoint_map"),
    "attn_res": ("attn_res",),
    "correction": ("correction",),
    "queries": ("queries",),
    "collapse_zero_queries": ("collapse_zero_queries",),
    "schedule": ("schedule",),
    "route": ("route", "parts"),
    "route_seed": ("route", "seed"),
    "route_layers": ("route", "layers"),
    "capacity": ("route", "capacity"),
    "capacities": ("route", "capacities"),
    "route_carry": ("route", "carry"),
    "route_unit": ("route", "unit"),
    "route_keys_values": ("route", "keys_values"),
    "route_rule": ("route", "rule"),
    "route_score": ("route", "score"),
    "route_gate": ("route", "gate"),
    "route_fallback": ("route", "fallback"),
    "route_margin": ("route", "margin"),
    "route_window": ("route", "window"),
    "precision": ("precision", "kind"),
    "precision_rest": ("precision", "rest"),
    "logits": ("precision", "logits"),
    "calibration": ("precision", "calibration"),
    "calibration_windows": ("precision", "calibration_windows"),
    "target": ("target",),
    "opset": ("opset",),
    "goldens": ("goldens", "count"),
    "text": ("goldens", "text"),
    "inputs": ("goldens", "inputs"),
    "seed": ("goldens", "seed"),
    "verify": ("verify", "enabled"),
    "windows": ("verify", "windows"),
    "max_perplexity_increase": ("quality", "max_perplexity_increase"),
    "min_top1_agreement": ("quality", "min_top1_agreement"),
    "build": ("build", "enabled"),
    "compute_capabilities": ("build", "compute_capabilities"),
    "workspace": ("build", "workspace"),
    "optimization_level": ("build", "optimization_level"),
    "check_memory": ("build", "check_memory"),
    "route_inputs": ("build", "route_inputs"),
    "all_capacities": ("build", "all_capacities"),
    "max_batch": ("build", "max_batch"),
    "strip_weights": ("build", "strip_weights"),
    "out": ("out",),
}
"""Python argument (and, with dashes, command-line option) -> key in the recipe."""


@dataclass
class _Raw:
    """Values before validation, and where each of them was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    name: str = "the options"

    def place(self, key: Key) -> str:
        """Return where a key, or the nearest mapping around it, was written."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        return self.name

    def set(self, key: Key, value: object, place: str) -> None:
        """Set one value, over what was there."""
        values = self.values
        for part in key[:-1]:
            inner = values.get(str(part))
            if not isinstance(inner, dict):
                inner = values[str(part)] = {}
            values = inner
        values[str(key[-1])] = value
        self.places = {k: v for k, v in self.places.items() if k[: len(key)] != key}
        self.places[key] = place


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a YAML recipe.

    Args:
        path: The file.

    Raises:
        UsageError: ``recipe.not-found``, ``recipe.syntax``, ``recipe.duplicate-key``, ``recipe.unknown-key``,
            ``recipe.bad-value`` or ``recipe.attn-res``; ``at`` gives file and line.
    """
    return _validate(_read(Path(path)))


def make_recipe(
    options: Mapping[str, object], *, file: str | Path | None = None, base: Recipe | None = None, flags: bool = False
) -> Recipe:
    """Combine a recipe (a file or a value) with options; an option wins over the recipe.

    Args:
        options: Names of ``OPTIONS`` with their values; ``None`` means that the option was not given.
        file: A YAML recipe to start from.
        base: A recipe to start from instead.
        flags: Name the options in errors as the command line does (``--attn-res``).

    Raises:
        UsageError: As ``load_recipe``; ``recipe.unknown-option`` for a name that is not in ``OPTIONS``.
    """
    raw = _Raw() if file is None else _read(Path(file))
    if base is not None:
        raw.values = base.resolved()
    for name, value in options.items():
        if name not in OPTIONS:
            raise UsageError(
                "recipe.unknown-option",
                f"There is no option '{name}'",
                at=name,
                want="one of " + ", ".join(OPTIONS),
                got=name,
                todo=_nearest(name, OPTIONS) or "Use one of the names above.",
            )
        if value is not None:
            shown = value if not isinstance(value, Path) else str(value)
            raw.set(OPTIONS[name], shown, f"--{name.replace('_', '-')}" if flags else f"argument '{name}'")
    return _validate(raw)


def dump_recipe(recipe: Recipe, path: str | Path | None = None) -> str:
    """Return a recipe as YAML, every default filled in, and write it when a path is given."""
    text = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _read(path: Path) -> _Raw:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "recipe.not-found",
            "The recipe cannot be read",
            at=str(path),
            want="a YAML file in UTF-8",
            got=error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__,
            todo="Check the path given with --recipe; --save-recipe writes one to start from.",
        ) from error
    raw = _Raw(name=str(path))
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None:
            _note_lines(node, (), raw)
            raw.values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UsageError(
            "recipe.syntax",
            "The recipe is not valid YAML",
            at=str(path) if mark is None else f"{path}:{mark.line + 1}",
            want="plain YAML: keys, values, lists",
            got=str(getattr(error, "problem", None) or error),
            todo="Correct that line.",
        ) from error
    finally:
        loader.dispose()
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UsageError(
            "recipe.syntax",
            "The recipe is not a mapping",
            at=f"{path}:1",
            want="keys such as 'source:' and 'attn_res:' at the top",
            got="a list" if isinstance(node, yaml.SequenceNode) else "a single value",
            todo="Start from a file that --save-recipe wrote.",
        )
    return raw


def _note_lines(node: yaml.Node, key: Key, raw: _Raw) -> None:
    """Record the line of every key; refuse a key that is given twice (YAML would silently take the last)."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            place = (*key, index)
            raw.places[place] = f"{raw.name}:{item.start_mark.line + 1}"
            _note_lines(item, place, raw)
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        inner = (*key, str(name.value))
        line = f"{raw.name}:{name.start_mark.line + 1}"
        if inner in raw.places:
            raise UsageError(
                "recipe.duplicate-key",
                f"The recipe gives '{name.value}' twice",
                at=line,
                want="each key once",
                got=f"also at {raw.places[inner]}",
                todo="Keep one of the two.",
            )
        raw.places[inner] = line
        _note_lines(value, inner, raw)


def _validate(raw: _Raw) -> Recipe:
    try:
        return Recipe.model_validate(raw.values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        found = _error(details[0], raw)
        if len(details) > 1:
            more = ", ".join(f"{raw.place(d['loc'])} ({_dotted(d['loc'])})" for d in details[1:])
            found.todo = f"{found.todo} Then see to: {more}."
        raise found from error


def _error(detail: ErrorDetails, raw: _Raw) -> UsageError:
    key = detail["loc"]
    if detail["type"] == "extra_forbidden":
        known = list(_model_at(key[:-1]).model_fields)
        return UsageError(
            "recipe.unknown-key",
            f"The recipe has an unknown key '{_dotted(key)}'",
            at=raw.place(key),
            want="one of " + ", ".join(known),
            got=str(key[-1]),
            todo=_nearest(str(key[-1]), known) or "Remove it.",
        )
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return UsageError(
        "recipe.attn-res" if detail["type"] == "attn_res" else "recipe.bad-value",
        f"The value of '{_dotted(key)}' cannot be used" if key else "The recipe contradicts itself",
        at=raw.place(key),
        want=message,
        got=repr(detail["input"]) if not isinstance(detail["input"], BaseModel | dict) else "see 'wanted'",
        todo="Correct it; docs/recipe.md describes every key.",
    )


def _model_at(key: Key) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in key:
        inner = model.model_fields[str(part)].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _nearest(name: str, known: Mapping[str, object] | list[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'?" if close else None
