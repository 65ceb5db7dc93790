"""Options that several verbs share, in groups; their names are those of ``depthwire.recipe.OPTIONS``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from depthwire.recipe import Recipe

F = TypeVar("F", bound="Callable[..., Any]")
FILE = click.Path(path_type=Path)


def _group(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def source_argument(*, required: bool) -> Callable[[F], F]:
    """Return the SOURCE argument."""
    return click.argument("source", required=required)


def source_options(function: F) -> F:
    """Add what decides how a model is captured."""
    return _group(
        [
            click.option("--task", type=click.Choice(["causal-lm", "encoder", "vision"]), help="Detected when absent."),
            click.option("--batch", type=int, help="Sequences or images per run (default 1)."),
            click.option("--seq-len", type=int, help="Tokens per sequence."),
            click.option("--image-size", type=int, help="Pixels per side of a vision model's input."),
            click.option(
                "--padding",
                is_flag=True,
                default=None,
                help="Give a causal language model an attention_mask input.",
            ),
            click.option(
                "--checkpoint-map",
                metavar="kimi-k3|fla|paper|FILE",
                help="Load AttnRes weights by their names into the reference decoder.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["fp32", "bf16", "fp16"]),
                help="Cast the weights; as stored when absent.",
            ),
            click.option("--revision", help="Commit of a cached hub snapshot."),
            click.option(
                "--trust-remote-code",
                is_flag=True,
                default=None,
                help="Run Python code that lies in the model's directory.",
            ),
        ]
    )(function)


def lift_options(function: F) -> F:
    """Add what decides the rewrite."""
    return _group(
        [
            click.option("--attn-res", metavar="full|block:N|block-layers:K", help="Lift the residual stream."),
            click.option("--queries", type=FILE, help="Trained depth queries (.safetensors); zero when absent."),
            click.option(
                "--correction",
                type=click.Choice(["eps", "scale"]),
                help="Keep the norms exact by eps/n² (default) or by scaling the read.",
            ),
            click.option(
                "--collapse-zero-queries",
                is_flag=True,
                default=None,
                help="Turn reads whose query is zero back into a plain residual stream.",
            ),
        ]
    )(function)


def route_options(function: F) -> F:
    """Add what decides which layers compute which tokens."""

    def choice(name: str, values: Sequence[str], text: str) -> Callable[[Any], Any]:
        return click.option(f"--route-{name}", type=click.Choice(list(values)), help=text)

    options: list[Callable[[F], F]] = [
        click.option("--route", type=FILE, help="Fitted routers, priors and thresholds (.safetensors)."),
        click.option("--route-seed", type=int, help="Draw untrained routers instead, to measure speed with."),
        click.option("--route-layers", metavar="LIST", help="Routed layers: 9,11,13 or 8-20:2, every:2, all."),
        click.option("--capacity", metavar="SHARE", help="Tokens that a routed layer computes: 0.5 or 50%."),
        click.option("--capacities", metavar="LIST", help="A graph for each of these too, such as 12.5%,25%,50%,100%."),
        click.option("--route-carry", is_flag=True, default=None, help="Return the counts for the next chunk."),
        choice("unit", ("block", "attention", "mlp"), "What an unselected token skips (default block)."),
        choice("keys-values", ("selected", "all"), "Keys and values of a routed attention (default selected)."),
        choice("rule", ("budget", "top-k"), "budget is causal (default for causal LMs); top-k looks ahead."),
        choice("score", ("linear", "mod", "surprise", "timescale"), "What ranks the tokens (default linear)."),
        choice("gate", ("one", "score", "sigmoid", "surprise"), "Factor on a selected update (default one)."),
        choice("fallback", ("identity", "linear", "swiglu"), "Update of an unselected token (default identity)."),
        click.option("--route-margin", type=int, help="Tokens that a budget grants at once (default 1)."),
        click.option("--route-window", type=int, help="Tokens per window that top-k selects from apart."),
    ]
    return _group(options)(function)


def schedule_options(function: F) -> F:
    """Add what decides how reads are executed."""
    return _group(
        [
            click.option(
                "--schedule",
                type=click.Choice(["auto", "single"]),
                help="Two-phase reads where they move fewer bytes (default), or each read by itself.",
            ),
        ]
    )(function)


def precision_options(function: F) -> F:
    """Add what decides the dtypes of the graph."""
    kinds = ["fp32", "fp16", "bf16", "int8", "int4-weights"]
    return _group(
        [
            click.option("--precision", type=click.Choice(kinds), help="Dtypes of the graph (default fp32)."),
            click.option(
                "--precision-rest",
                type=click.Choice(kinds[:3]),
                help="What int8 and int4-weights leave (default fp32 for ONNX Runtime, else fp16).",
            ),
            click.option("--logits", type=click.Choice(["same", "fp32"]), help="fp32 keeps the last product in fp32."),
            click.option("--calibration", type=FILE, help="Text to measure ranges on; more of --text when absent."),
            click.option("--calibration-windows", type=int, help="Windows to measure ranges on (default 8)."),
        ]
    )(function)


def window_options(function: F) -> F:
    """Add what decides the inputs that models are compared on."""
    return _group(
        [
            click.option("--text", type=FILE, help="Text to compare on; random inputs when absent."),
            click.option("--inputs", type=FILE, help="Inputs to compare on (.safetensors or .npz)."),
            click.option("--windows", type=int, help="Windows to compare on (default 4)."),
        ]
    )(function)


def quality_options(function: F) -> F:
    """Add what routing and another precision may lose."""
    return _group(
        [
            click.option(
                "--max-perplexity-increase",
                type=float,
                metavar="SHARE",
                help="Fail if the windows' perplexity rises by more (0.05: 5 %).",
            ),
            click.option(
                "--min-top1-agreement",
                type=float,
                metavar="SHARE",
                help="Fail if fewer positions keep their most likely token (0.995: 99.5 %).",
            ),
        ]
    )(function)


def engine_options(function: F) -> F:
    """Add what decides the engine."""
    return _group(
        [
            click.option(
                "--cc",
                "compute_capabilities",
                multiple=True,
                metavar="SM86",
                help="Compute capability to build for; repeat for several.",
            ),
            click.option("--workspace", metavar="SIZE", help="Most scratch memory of the engine, such as 4GiB."),
            click.option("--optimization-level", type=int, help="Builder effort, 0 to 5."),
            click.option(
                "--force-build",
                "check_memory",
                flag_value=False,
                default=None,
                help="Build even if the memory is predicted not to suffice.",
            ),
            click.option(
                "--route-inputs",
                is_flag=True,
                default=None,
                help="Let the engine's caller give the thresholds, budgets and counts of a routed model.",
            ),
            click.option("--all-capacities", is_flag=True, default=None, help="One engine for every capacity."),
            click.option("--strip-weights", is_flag=True, default=None, help="Leave weights out; needs a GPU here."),
            click.option("--max-batch", type=int, metavar="N", help="One engine for batches of 1 to N."),
        ]
    )(function)


def target_options(function: F) -> F:
    """Add the target and the opset."""
    return _group(
        [
            click.option(
                "--target", metavar="NAME", help="What to build for (default ort-cpu); see 'depthwire targets'."
            ),
            click.option("--opset", type=int, help="ONNX opset; the target's when absent."),
        ]
    )(function)


def recipe_options(function: F) -> F:
    """Add the recipe file in and out."""
    return _group(
        [
            click.option("--recipe", type=FILE, help="Start from this YAML recipe; options win over it."),
            click.option("--save-recipe", type=FILE, help="Write the resolved recipe here."),
        ]
    )(function)


def resolve(options: Mapping[str, object], *, recipe: Path | None, save_recipe: Path | None = None) -> Recipe:
    """Combine the options with the recipe file, and save the result when asked to."""
    from depthwire.recipe import dump_recipe, make_recipe

    given = {name: list(value) or None if isinstance(value, tuple) else value for name, value in options.items()}
    resolved = make_recipe(given, file=recipe, flags=True)
    if save_recipe is not None:
        dump_recipe(resolved, save_recipe)
    return resolved
