"""The command `captionlib extract-features`."""

from typing import Any

import click

from jobs.options import config_options, device_option, limit_option, pipeline_options
from jobs.summaries import print_remaining_cost, print_totals

__all__ = ["command"]


@click.command()
@click.argument("manifest")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The features dataset to write.")
@click.option("--weights", metavar="NAME|FILE|random:SEED", help="Short for --set encoder.weights=...")
@limit_option
@config_options
@device_option
@pipeline_options
def command(
    manifest: str,
    output: str,
    weights: str | None,
    limit: int | None,
    config: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Encode the images of MANIFEST as feature vectors or feature maps.

    MANIFEST is a list of images written by `prepare`. The output is a features dataset. By default, the
    encoder is VGG-16 up to layer fc7 with ImageNet weights. It can be any torchvision model up to any node (layer), or
    a model of Transformers or timm. Images that cannot be read are recorded as failures; `captionlib inspect` shows the
    reasons. With --limit, the output contains only a sample. To encode all images later, choose a different folder.

    \b
    Examples:
      captionlib extract-features manifest -o features
      captionlib extract-features manifest -o features --config vgg16-conv5 --workers 2
      captionlib extract-features manifest -o sample --limit 500
      captionlib extract-features s3://b/manifest -o s3://b/features -- --runner=FlinkRunner --flink_master=HOST:8081
    """
    from captionlib.config import load_config
    from captionlib.models.inference.extraction import ExtractionConfig
    from pipelines.extract_features import extract_features

    if weights is not None:
        overrides = (*overrides, f"encoder.weights={weights}")
    settings = load_config(ExtractionConfig, config, overrides)
    print_totals(output, extract_features(manifest, output, settings, limit=limit, **options))
    if limit is not None:
        print_remaining_cost(manifest, [output], options["run"].workers)
