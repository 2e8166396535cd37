"""`captionlib activations`."""

import click

from captionlib.config import load_config
from captionlib.evaluation.activation_page import write_activation_page
from captionlib.models.encoders.activations import ActivationConfig, compute_activations
from jobs.options import config_options, device_option

__all__ = ["command"]


@click.command()
@click.argument("image")
@click.option(
    "--output", "-o", default="activations.html", show_default=True, metavar="FILE.html", help="The page to write."
)
@click.option("--weights", metavar="NAME|FILE|random:SEED", help="Short for --set weights=...")
@click.option("--node", "nodes", multiple=True, metavar="NAME", help="Show this node of the network. Repeatable.")
@config_options
@device_option
def command(
    image: str,
    output: str,
    weights: str | None,
    nodes: tuple[str, ...],
    config: str | None,
    overrides: tuple[str, ...],
    device: str,
) -> None:
    """Show what the convolution layers of a network see in IMAGE, a path or an address, as a page of channel maps.

    The network is VGG-16 with ImageNet weights, unless configured otherwise: any model of torchvision. Where its
    weights are a classifier's, the page tells the most likely classes too.

    \b
    Examples:
      captionlib activations photo.jpg
      captionlib activations photo.jpg -o seen.html --weights vgg16.safetensors --node features.15 --node features.29
      captionlib activations photo.jpg --set model=resnet50 --set weights=IMAGENET1K_V2 --set max_layers=8
    """
    if weights is not None:
        overrides = (*overrides, f"weights={weights}")
    if nodes:
        overrides = (*overrides, f"nodes=[{', '.join(nodes)}]")
    settings = load_config(ActivationConfig, config, overrides)
    found = compute_activations(image, settings, device)
    name = image.rstrip("/").rsplit("/", 1)[-1]
    write_activation_page(output, name, found, f"{settings.model} with weights {settings.weights.rsplit('/', 1)[-1]}")
    if found.note:
        click.echo(f"Note: {found.note}", err=True)
    for label, probability in found.classes:
        click.echo(f"  {probability:7.2%}  {label}")
    click.echo(f"{output}: {sum(len(layer.maps) for layer in found.layers):,} maps of {len(found.layers)} layers")
