"""Maps from a checkpoint's tensor names to the reference decoder's: three that ship, and a user's own in YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from depthwire.errors import CaptureError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

MAPS = ("kimi-k3", "fla", "paper")
_HOLE = re.compile(r"\{([a-z_]\w*)\}")


class Rule(BaseModel):
    """One line of a map: which tensors it takes, what they are called here, and how their values are laid out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    from_: Annotated[str | None, Field(alias="from")] = None
    """Name with holes for numbers: ``layers.{i}.attn.q_proj.weight``."""
    regex: str | None = None
    """Regular expression with named groups instead; it must match the whole name."""
    to: str | None = None
    """Name in the reference decoder, with the same holes or groups; that of ``from`` when absent."""
    transpose: bool = False
    """Swap the two axes of a matrix, for weights stored as ``[in, out]``."""
    reshape: list[int] | None = None
    """New shape, after the transposition; one size may be -1."""

    @model_validator(mode="after")
    def _whole(self) -> Rule:
        if (self.from_ is None) == (self.regex is None):
            raise ValueError("a rule has either 'from' or 'regex'")
        if self.regex is not None and self.to is None:
            raise ValueError("a rule with 'regex' needs 'to'")
        try:
            groups = self.pattern().groupindex
        except re.error as error:
            raise ValueError(f"'{self.regex or self.from_}' is no usable pattern: {error}") from error
        unknown = set(_HOLE.findall(self.target)) - set(groups)
        if unknown:
            raise ValueError(f"'to' uses {{{min(unknown)}}}, which the name does not bind")
        return self

    @property
    def target(self) -> str:
        """Name in the reference decoder, with holes."""
        return self.to if self.to is not None else str(self.from_)

    def pattern(self) -> re.Pattern[str]:
        """Return what matches whole names."""
        if self.regex is not None:
            return re.compile(self.regex)
        parts = _HOLE.split(str(self.from_))
        return re.compile("".join(f"(?P<{p}>[0-9]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))

    def lay_out(self, tensor: Tensor, name: str) -> Tensor:
        """Return the tensor as the reference decoder wants it.

        Raises:
            CaptureError: ``checkpoint.shape``.
        """
        try:
            tensor = tensor.t() if self.transpose else tensor
            return tensor if self.reshape is None else tensor.reshape(self.reshape)
        except RuntimeError as error:
            steps = ["transpose"] * self.transpose + [f"reshape {self.reshape}"] * (self.reshape is not None)
            raise CaptureError(
                "checkpoint.shape",
                "a tensor cannot be laid out as the map says",
                at=name,
                want=", then ".join(steps),
                got=f"{list(tensor.shape)}: {error}",
                todo="Correct the rule of the map that takes this tensor.",
            ) from error


class CheckpointMap(BaseModel):
    """A naming scheme."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rules: Annotated[list[Rule], Field(min_length=1)]
    """What is loaded; a tensor must match exactly one."""
    prefixes: list[str] = []
    """Taken off the front of a name, the first that fits, before the rules see it."""
    ignore: list[str] = []
    """Names with holes, or whole regular expressions, of tensors to leave out, such as rotary tables."""
    config_like: Literal["kimi-k3", "fla", "paper"] | None = None
    """Whose ``config.json`` the checkpoint has; without it, ``config`` gives every field."""
    config: dict[str, Any] = {}
    """Fields of ``AttnResConfig``, over what ``config.json`` says."""

    @model_validator(mode="after")
    def _patterns(self) -> CheckpointMap:
        try:
            self.ignored()
        except re.error as error:
            raise ValueError(f"'ignore' has a pattern that cannot be used: {error}") from error
        return self

    def ignored(self) -> list[re.Pattern[str]]:
        """Return what matches the names to leave out."""
        return [re.compile(_HOLE.sub("[0-9]+", pattern)) for pattern in self.ignore]


@dataclass(frozen=True)
class Placed:
    """Where one tensor of a checkpoint goes.

    Attributes:
        stored: Its name in the checkpoint.
        name: Its name in the reference decoder.
        rule: The rule that says so.
    """

    stored: str
    name: str
    rule: Rule


def read_map(scheme: str | Path) -> CheckpointMap:
    """Return a map by name, or read one from a YAML file.

    Raises:
        UsageError: ``checkpoint.map``: there is no such map, or the file cannot be read as one.
    """
    shipped = str(scheme) in MAPS
    path = Path(__file__).parent / "maps" / f"{scheme}.yaml" if shipped else Path(scheme).expanduser()
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return CheckpointMap.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        got = f"{place}: {first['msg']}" if place else first["msg"]
    except yaml.YAMLError as error:
        got = " ".join(str(error).split())
    except OSError as error:
        got = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        got = "a file that is not UTF-8"
    raise UsageError(
        "checkpoint.map",
        "the map of a checkpoint's names cannot be used",
        at=str(scheme),
        want=f"{', '.join(MAPS)}, or a YAML file with 'rules'",
        got=got,
        todo="docs/models.md describes the format; the shipped maps are in models/maps.",
    )


def place(scheme: CheckpointMap, stored: Iterable[str], *, at: str) -> list[Placed]:
    """Give every tensor of a checkpoint its place.

    Args:
        scheme: The map.
        stored: Names in the checkpoint.
        at: The checkpoint, for errors.

    Raises:
        CaptureError: ``checkpoint.left-over``: no rule takes a tensor, or two do; ``checkpoint.twice``: two tensors
            have one place.
    """
    rules = [(rule.pattern(), rule) for rule in scheme.rules]
    ignored = scheme.ignored()
    placed: dict[str, Placed] = {}
    for full in sorted(stored):
        name = full.removeprefix(next((prefix for prefix in scheme.prefixes if full.startswith(prefix)), ""))
        if any(pattern.fullmatch(text) for pattern in ignored for text in (full, name)):
            continue
        found = [(match, rule) for pattern, rule in rules if (match := pattern.fullmatch(name))]
        if len(found) != 1:
            raise _left_over(full, [rule.target for _, rule in found], at)
        match, rule = found[0]
        target = rule.target.format_map(match.groupdict())
        if target in placed:
            raise CaptureError(
                "checkpoint.twice",
                "two tensors of the checkpoint are the same weight",
                at=at,
                want=f"one tensor for {target}",
                got=f"{placed[target].stored} and {full}",
                todo="Leave one of them out with 'ignore' in a map of your own.",
            )
        placed[target] = Placed(full, target, rule)
    return list(placed.values())


def _left_over(name: str, targets: list[str], at: str) -> CaptureError:
    return CaptureError(
        "checkpoint.left-over",
        "a tensor of the checkpoint has no place in the reference decoder",
        at=f"{at}: {name}",
        want="exactly one rule of the map for every tensor",
        got="two rules: " + ", ".join(targets) if targets else "no rule",
        todo="The checkpoint has a part that the decoder lacks, or the map is another's: write a map of your own "
        "(docs/models.md), with 'ignore' for what inference does not need.",
    )
