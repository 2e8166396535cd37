"""Options that several commands share, so that they are spelled and explained alike."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from captionlib.recipes import find_recipe

__all__ = ["config_options", "device_option", "pipeline_options", "training_options"]

Command = TypeVar("Command", bound=Callable[..., Any])


# Commands that use the recipes of another one.
_RECIPES_OF = {"caption": "generate-captions"}


def config_options(command: Command) -> Command:
    """Adds `--config` and `--set`."""
    options = [
        click.option(
            "--config",
            metavar="RECIPE|FILE",
            callback=_find_recipe,
            help="A recipe by name, or a YAML file, with values that replace the defaults; `captionlib recipes` lists "
            "the recipes.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Replace one value, such as --set encoder.dtype=bfloat16. Repeatable.",
        ),
    ]
    return _apply(command, options)


def _find_recipe(context: click.Context, _parameter: click.Parameter, name: str | None) -> str | None:
    if name is None:
        return None
    command = context.info_name or ""
    return str(find_recipe(name, _RECIPES_OF.get(command, command)))


def device_option(command: Command) -> Command:
    """`--device`."""
    option = click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one.",
    )
    return _apply(command, [option])


def training_options(command: Command) -> Command:
    """Where a run is written, how its values are set, where it computes, and whether it replaces and shows."""
    command = _apply(
        command,
        [
            click.option("--overwrite", is_flag=True, help="Replace a run of another configuration."),
            click.option("--progress/--no-progress", default=True, help="Show a progress bar."),
        ],
    )
    output = click.option(
        "--output", "-o", required=True, metavar="FOLDER", help="The run: checkpoint, metrics, curves, state."
    )
    return _apply(config_options(device_option(command)), [output])


def pipeline_options(command: Command) -> Command:
    """How a pipeline is run; the command's last argument takes Beam's own options after `--`."""
    options = [
        click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Local processes."),
        click.option("--overwrite", is_flag=True, help="Replace an output that another configuration wrote."),
        click.option("--retry-failures", is_flag=True, help="Also try the failed images of finished shards again."),
        click.option(
            "--max-failure-ratio",
            type=click.FloatRange(0, 1),
            default=0.05,
            show_default=True,
            help="Fail when more of the images could not be read; all that could is written all the same.",
        ),
        click.option("--progress/--no-progress", default=True, help="Show a progress bar."),
        click.option(
            "--accelerator",
            metavar="SPEC",
            help="A GPU for each of Dataflow's workers, such as 'type:nvidia-l4;count:1;install-nvidia-driver': one "
            "process and two shards at a time on each, and a worker that finds no GPU fails.",
        ),
        click.argument("beam_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- BEAM OPTIONS]"),
    ]
    return _apply(command, options)


def _apply(command: Command, options: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
