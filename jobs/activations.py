"""The command `captionlib activations`."""

import click

from jobs.options import config_options, device_option

__all__ = ["command"]


@click.command()
@click.argument("image")
@click.option("--output", "-o", default="activations.html", show_default=True, metavar="FILE.html", help="Output page.")
@click.option("--weights", metavar="NAME|FILE|random:SEED", help="Short for --set weights=...")
@click.option("--node", "nodes", multiple=True, metavar="NAME", help="Name of a layer (node) to show. Repeatable.")
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
    """Show the activations of a network's convolutional layers for one image.

    Reads IMAGE, a path or URL, and runs a torchvision network on it (by default VGG-16 with ImageNet weights). Writes a
    self-contained HTML page with the activation map of each channel. If the weights include a classifier, the command
    also prints the most probable classes.

    \b
    Examples:
      captionlib activations image.jpg
      captionlib activations image.jpg -o maps.html --weights vgg16.safetensors --node features.15 --node features.29
      captionlib activations image.jpg --set model=resnet50 --set weights=IMAGENET1K_V2 --set max_layers=8
    """
    from captionlib.config import load_config
    from captionlib.evaluation.activation_page import write_activation_page
    from captionlib.models.encoders.activations import ActivationConfig, compute_activations

    if weights is not None:
        overrides = (*overrides, f"weights={weights}")
    if nodes:
        overrides = (*overrides, f"nodes=[{', '.join(nodes)}]")
    settings = load_config(ActivationConfig, config, overrides)
    activations = compute_activations(image, settings, device)
    name = image.rstrip("/").rsplit("/", 1)[-1]
    network = f"{settings.model} with weights {settings.weights.rsplit('/', 1)[-1]}"
    write_activation_page(output, name, activations, network)
    if activations.note:
        click.echo(f"Note: {activations.note}", err=True)
    for label, probability in activations.classes:
        click.echo(f"  {probability:7.2%}  {label}")
    maps = sum(len(layer.maps) for layer in activations.layers)
    click.echo(f"{output}: {maps:,} maps of {len(activations.layers)} layers")
