"""`captionlib import-features`."""

import click

from captionlib.config import load_config
from captionlib.data.ingestion.neuraltalk import ImportConfig, import_features
from jobs.options import config_options
from jobs.summaries import echo_totals

__all__ = ["command"]


@click.command()
@click.argument("dataset_json")
@click.argument("features_mat")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="The features dataset to write.")
@click.option("--images", metavar="FOLDER", help="Where the images are, if not beside DATASET_JSON.")
@config_options
@click.option("--overwrite", is_flag=True, help="Replace an output that other files were imported to.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar.")
def command(
    dataset_json: str,
    features_mat: str,
    output: str,
    images: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    progress: bool,
) -> None:
    """Turn NeuralTalk's DATASET_JSON and FEATURES_MAT into a features dataset.

    FEATURES_MAT is vgg_feats.mat of any MATLAB version: its variable feats has a column an image, whose number is the
    image's imgid. What the rest of the flow needs is there: train-captioner and generate-captions take the features.
    Single photos cannot be captioned with them, as the network that made them is not in the file.

    \b
    Examples:
      captionlib import-features flickr8k/dataset.json flickr8k/vgg_feats.mat -o features
      captionlib import-features dataset.json feats.mat -o features --images photos --set variable=feats
    """
    if images is not None:
        overrides = (*overrides, f"image_root={images}")
    settings = load_config(ImportConfig, config, overrides)
    totals = import_features(dataset_json, features_mat, output, settings, overwrite=overwrite, progress=progress)
    echo_totals(output, totals)
