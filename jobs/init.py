"""The command `captionlib init`."""

from typing import Any

import click

from jobs.options import captioner_option, serve_option, serve_when_done, weights_option

__all__ = ["command"]


@click.command()
@click.argument("collection")
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    metavar="[NAME=]ADDRESS",
    help="Path, URL or glob of images or of a table; see `captionlib prepare`. Repeatable.",
)
@captioner_option(
    "--captioner",
    example_arguments="init {collection} --source {sources}",
    help_text="Folder that train-captioner wrote, or hf:MODEL, a captioner from Hugging Face (name or folder).",
)
@click.option("--ranker", "-r", metavar="FOLDER", help="Ranker (dual encoder), for search by sentence and image.")
@weights_option
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a value of collection.yaml, such as generation.decoding.beam_width=5. Repeatable.",
)
@serve_option
def command(
    collection: str,
    sources: tuple[str, ...],
    captioner: str,
    ranker: str | None,
    weights: str | None,
    overrides: tuple[str, ...],
    serve: int | None,
) -> None:
    """Create the folder COLLECTION with a configuration, collection.yaml.

    `captionlib update COLLECTION` then captions and indexes the images. Run `update` again whenever images change. With
    --serve, `init` also runs `update` and `serve`, by default on port 8000. Addresses with the same NAME belong to one
    source. The default NAME is images. To change how a source is read, such as the column of the captions, edit
    collection.yaml.

    \b
    Examples:
      captionlib init holidays --source images/ -c hf:Salesforce/blip-image-captioning-large@main --serve
      captionlib init holidays --source images/ -c captioner
      captionlib init archive --source s3://bucket/2025 --source web=pages.csv -c captioner -r ranker
      captionlib update archive
      captionlib serve archive
    """
    from captionlib.collection import CollectionConfig, create_collection
    from captionlib.config import apply_overrides, build_config
    from captionlib.models.inference.captioning import GenerationConfig

    addresses: dict[str, list[str]] = {}
    for source in sources:
        name, equals, address = source.partition("=")
        if not equals or "/" in name or "?" in name:  # the = is part of a path or of the query of a URL
            name, address = "images", source
        addresses.setdefault(name, []).append(address)
    values: dict[str, Any] = {
        "sources": [{"name": name, "addresses": paths} for name, paths in addresses.items()],
        "captioner": captioner,
        "ranker": ranker,
        "weights": weights,
    }
    apply_overrides(values, overrides)
    config = build_config(CollectionConfig, values, "options")
    # Raises an error now, rather than in `update`, if `generation` is invalid.
    build_config(GenerationConfig, config.generation, "options")
    created = create_collection(collection, config)
    click.echo(f"{created.folder.address('collection.yaml')}: created. Next: captionlib update {collection}")
    serve_when_done(collection, serve, "update")
