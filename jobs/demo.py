"""The command `captionlib demo`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from captionlib.recipes import find_recipe
from jobs.options import progress_option

if TYPE_CHECKING:
    from captionlib.evaluation.evaluate import Evaluation
    from pipelines.run import RunConfig

__all__ = ["command"]

_SHARD_SIZE = 100
_QUERY = "red ring"


@click.command()
@click.option("--output", "-o", default=".demo", show_default=True, metavar="FOLDER", help="The folder to write.")
@click.option(
    "--weights",
    default="random:0",
    show_default=True,
    metavar="NAME|FILE|random:SEED",
    help="The weights of VGG-16, such as IMAGENET1K_V1. Random weights need no download.",
)
@click.option("--train-images", default=1000, show_default=True, help="The number of training images.")
@click.option("--test-images", default=200, show_default=True, help="The number of test images.")
@click.option("--overwrite", is_flag=True, help="Start again instead of resuming an earlier run.")
@progress_option
def command(output: str, weights: str, train_images: int, test_images: int, overwrite: bool, progress: bool) -> None:
    """Run the whole workflow on synthetic images, each a scene with one shape and five captions.

    The demo prints a description, the equivalent command and the result of each stage. The last line is the path of a
    report that you can open in a browser.

    \b
    Examples:
      captionlib demo
      captionlib demo --weights IMAGENET1K_V1 --output pretrained
    """
    from captionlib.data.synthetic_scenes import write_scenes
    from captionlib.evaluation.evaluate import evaluate_captions
    from captionlib.search.sql.queries import find_captions
    from captionlib.search.sql.session import open_sql
    from pipelines.run import RunConfig

    folder = Path(output)
    if overwrite and (folder / "scenes" / "dataset.json").exists():
        shutil.rmtree(folder)
    with _stage(1, "Render scenes. Some combinations of shape, color, size and position occur only in the test split."):
        write_scenes(folder / "scenes", train_images, test_images // 2, test_images)
        _print(f"{train_images:,} training, {test_images // 2:,} validation and {test_images:,} test images")
    _build_captions(folder, weights, RunConfig(progress=progress))
    evaluate = f"captionlib evaluate {folder}/captions --manifest {folder}/manifest --split test"
    with _stage(6, "Score the captions against the references of the test images.", evaluate):
        evaluation = evaluate_captions(folder / "captions", folder / "manifest", splits=["test"])
        scores = _summarize(folder, evaluation)
        for name, value, _ in scores:
            _print(f"{name:<20} {value}")
        for note in evaluation.notes:
            click.echo(f"     Note: {note}", err=True)
    query = f'captionlib query {folder}/captions --contains "{_QUERY}" --limit 3'
    with _stage(7, "Search the captions.", query), open_sql(folder / "captions") as session:
        for row in find_captions(session, _QUERY, limit=3).read_all().to_pylist():
            _print(f"image {row['image_id']}: {row['caption']}")
    report = f"captionlib report {folder}/captions -o {folder}/report -m {folder}/manifest --split test"
    with _stage(8, "Write a report of images, captions and scores.", f"{report} -c {folder}/captioner"):
        page = _write_report(folder, evaluation, scores, progress)
    click.echo(f"\nOpen the report in a browser:\n{Path(page).resolve()}")


def _build_captions(folder: Path, weights: str, run: RunConfig) -> None:
    from captionlib.config import load_config
    from captionlib.data.ingestion.prepare import PrepareConfig, prepare
    from captionlib.models.inference.captioning import GenerationConfig
    from captionlib.models.inference.extraction import ExtractionConfig
    from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
    from pipelines.extract_features import extract_features
    from pipelines.generate_captions import generate_captions

    dataset = folder / "scenes" / "dataset.json"
    manifest, features, captioner, captions = (
        folder / name for name in ("manifest", "features", "captioner", "captions")
    )
    equivalent = f"captionlib prepare {dataset} -o {manifest} --shard-size {_SHARD_SIZE}"
    with _stage(2, "List the images with their splits and captions in a manifest.", equivalent):
        summary = prepare(dataset, manifest, PrepareConfig(shard_size=_SHARD_SIZE))
        _print(f"{summary.images:,} images and {summary.captions:,} captions in {summary.shards} shards")
    dtype = f"encoder.dtype={_choose_dtype()}"
    equivalent = f"captionlib extract-features {manifest} -o {features} --config demo --weights {weights} --set {dtype}"
    with _stage(3, "Encode each image as the 4,096 activations of VGG-16's layer fc7.", equivalent):
        recipe = find_recipe("demo", "extract-features")
        extraction = load_config(ExtractionConfig, recipe, [f"encoder.weights={weights}", dtype])
        totals = extract_features(manifest, features, extraction, run=run)
        _print(f"{totals.rows:,} feature vectors, {totals.bytes / 1e6:.1f} MB")
    equivalent = f"captionlib train-captioner {features} -o {captioner} --config demo"
    with _stage(4, "Train an LSTM to generate the captions from the features.", equivalent):
        training = load_config(CaptionerTrainingConfig, find_recipe("demo", "train-captioner"))
        history = train_captioner(features, captioner, training, progress=run.progress)
        _print(f"validation perplexity {min(row['perplexity'] for row in history):.2f} after {len(history)} epochs")
    equivalent = f"captionlib generate-captions {features} -c {captioner} -o {captions} --set decoding.n_best=3"
    with _stage(5, "Caption all images with beam search.", equivalent):
        generation = load_config(GenerationConfig, None, ["decoding.n_best=3"])
        totals = generate_captions(features, captioner, captions, generation, run=run)
        _print(f"{totals.rows:,} captions, each with its 3 most probable candidates")


def _summarize(folder: Path, evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Returns the scores of the report, each with its name, value and (empty) detail."""
    from captionlib.data.synthetic_scenes import read_scenes, score_attributes

    scenes = read_scenes(folder / "scenes")
    captions = evaluation.captions
    fractions = score_attributes([scenes[image_id] for image_id in captions], list(captions.values()))
    scores = [(f"{name} correct", f"{fraction:.1%}", "") for name, fraction in fractions.items()]
    return scores + [(name, f"{evaluation.scores.overall[name]:.3f}", "") for name in ("BLEU-4", "CIDEr")]


def _write_report(folder: Path, evaluation: Evaluation, scores: list[tuple[str, str, str]], progress: bool) -> str:
    from captionlib.data.synthetic_scenes import parse_attributes, read_scenes
    from captionlib.evaluation.report import write_report
    from captionlib.models.checkpoints.checkpoint import load_captioner

    scenes = read_scenes(folder / "scenes")
    attributes = {
        image_id: {name: value == getattr(scenes[image_id], name) for name, value in parse_attributes(caption).items()}
        for image_id, caption in evaluation.captions.items()
    }
    return write_report(
        folder / "report",
        "Captions of synthetic scenes",
        evaluation.predictions,
        note=f"{len(attributes):,} test images, whose combinations of attributes do not occur in the training images.",
        scores=scores,
        cider=evaluation.scores.per_image["CIDEr"],
        attributes=attributes,
        history=load_captioner(folder / "captioner").training["history"],
        progress=progress,
    )


def _choose_dtype() -> Literal["float32", "bfloat16"]:
    """Returns bfloat16 if the GPU, or the CPU if there is no GPU, supports it natively, else float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


@contextmanager
def _stage(number: int, description: str, equivalent: str = "") -> Iterator[None]:
    click.echo(f"\n{click.style(f'{number}/8', bold=True)}  {description}")
    if equivalent:
        _print(click.style(f"$ {equivalent}", dim=True))
    start = time.monotonic()
    yield
    sys.stderr.flush()
    _print(f"({time.monotonic() - start:.0f} s)")


def _print(line: str) -> None:
    click.echo(f"     {line}")
