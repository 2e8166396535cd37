"""The command `captionlib import-features`."""

import click

from jobs.options import config_options, progress_option
from jobs.summaries import print_totals

__all__ = ["command"]


@click.command()
@click.argument("dataset_json")
@click.argument("features_mat")
@click.option("--output", "-o", required=True, metavar="FOLDER", help="Folder to write the features dataset to.")
@click.option(
    "--images", metavar="FOLDER", help="Folder that image paths are relative to.  [default: the folder of DATASET_JSON]"
)
@config_options
@click.option("--overwrite", is_flag=True, help="Replace features imported from different files.")
@progress_option
def command(
    dataset_json: str,
    features_mat: str,
    output: str,
    images: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    **options: bool,
) -> None:
    """Convert image features published with NeuralTalk to a features dataset for train-captioner and generate-captions.

    DATASET_JSON is Karpathy's dataset.json. FEATURES_MAT is vgg_feats.mat in any MATLAB format: column N of its
    variable feats is the feature vector of the image with imgid N.

    A captioner trained on these features can caption only these images, because the files do not contain the network
    that computed the features.

    \b
    Examples:
      captionlib import-features flickr8k/dataset.json flickr8k/vgg_feats.mat -o features
      captionlib import-features dataset.json feats.mat -o features --images coco/ --set variable=feats
    """
    from captionlib.config import load_config
    from captionlib.data.ingestion.neuraltalk import ImportConfig, import_features

    if images is not None:
        overrides = (*overrides, f"image_root={images}")
    settings = load_config(ImportConfig, config, overrides)
    print_totals(output, import_features(dataset_json, features_mat, output, settings, **options))
