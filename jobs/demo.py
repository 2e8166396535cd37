"""`captionlib demo`: the whole flow on scenes that the project draws itself."""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click
import torch

from captionlib.config import load_config
from captionlib.data.ingestion.prepare import PrepareConfig, prepare
from captionlib.data.synthetic_scenes import Scene, parse_attributes, read_scenes, score_attributes, write_scenes
from captionlib.evaluation.evaluate import Evaluation, evaluate_captions
from captionlib.evaluation.report import write_report
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.captioning import GenerationConfig
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.search.sql.queries import find_captions
from captionlib.search.sql.session import open_sql
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig

__all__ = ["command"]

# What the demo needs and the defaults are not: few words, few minutes, and features of random weights, in which all
# pictures look alike but for small parts of their principal components.
TRAINING = [
    "captioner.image_input=initial_state",
    "captioner.principal_components=256",
    "captioner.hidden_size=256",
    "captioner.embedding_size=256",
    "captioner.dropout=0.3",
    "training.optimizer=adam",
    "training.learning_rate=0.002",
    "training.schedule=cosine",
    "training.epochs=8",
    "batch_images=5",
    "min_count=1",
]


@click.command()
@click.option(
    "--output", "-o", default=".demo", show_default=True, metavar="FOLDER", help="Everything is written here."
)
@click.option(
    "--weights",
    default="random:0",
    show_default=True,
    metavar="NAME|FILE|random:SEED",
    help="Of VGG-16. Random ones need no download; IMAGENET1K_V1, or a file, are learned ones.",
)
@click.option("--train", default=1000, show_default=True, help="Scenes to learn from.")
@click.option("--held-out", default=200, show_default=True, help="Scenes to caption.")
@click.option("--overwrite", is_flag=True, help="Start again, rather than go on where a former run stopped.")
@click.option("--progress/--no-progress", default=True, help="Show progress bars.")
def command(output: str, weights: str, train: int, held_out: int, overwrite: bool, progress: bool) -> None:
    """Run the whole flow on drawn scenes: a shape each, in five sentences each.

    Draws the scenes, prepares, extracts features with VGG-16 at fc7, trains, captions the held-out scenes, scores,
    queries, and writes a report, whose path is printed last. Each stage is what the command of its name does.

    \b
    Examples:
      captionlib demo
      captionlib demo --weights IMAGENET1K_V1 --output learned
    """
    folder = Path(output)
    if overwrite and (folder / "scenes" / "dataset.json").exists():
        shutil.rmtree(folder)
    run = RunConfig(progress=progress)
    with _stage("1/7 draw", f"{train} scenes to learn from, {held_out} others to caption"):
        dataset = write_scenes(folder / "scenes", train, held_out // 2, held_out)
    with _stage("2/7 prepare", "captionlib prepare"):
        prepare(dataset, folder / "manifest", PrepareConfig(shard_size=100))
    with _stage("3/7 extract-features", "captionlib extract-features: VGG-16 at fc7"):
        encoder = EncoderConfig(weights=weights, missing_weights="random:0", dtype=_fast_dtype(), resize_size=224)
        extract_features(folder / "manifest", folder / "features", ExtractionConfig(encoder), run=run)
    with _stage("4/7 train-captioner", "captionlib train-captioner: an LSTM"):
        settings = load_config(CaptionerTrainingConfig, None, TRAINING)
        train_captioner(folder / "features", folder / "captioner", settings, progress=progress)
    with _stage("5/7 generate-captions", "captionlib generate-captions: beam search"):
        config = load_config(GenerationConfig, None, ["decoding.n_best=3"])
        generate_captions(folder / "features", folder / "captioner", folder / "captions", config, run=run)
    with _stage("6/7 evaluate", "captionlib evaluate, on the held-out scenes"):
        figures, found = _evaluate(folder)
        for name, value, _ in figures:
            click.echo(f"  {name:<18} {value}")
    with _stage("7/7 query", 'captionlib query --contains "red ring"'):
        _query(folder)
    scenes = read_scenes(folder / "scenes")
    page = write_report(
        folder / "report",
        "Captions of held-out scenes",
        found.predictions,
        note=f"What the captioner says of {held_out} scenes whose combination of attributes it has never seen.",
        scores=figures,
        cider=found.scores.per_image["CIDEr"],
        attributes={image_id: _marks(scenes[image_id], caption) for image_id, caption in found.captions.items()},
        history=load_captioner(folder / "captioner").training["history"],
    )
    click.echo(f"\nThe report, to open in a browser:\n{Path(page).resolve()}")


def _evaluate(folder: Path) -> tuple[list[tuple[str, str, str]], Evaluation]:
    """Figures of the held-out scenes, and what they are taken from."""
    found = evaluate_captions(folder / "captions", folder / "manifest", splits=["test"])
    scenes = read_scenes(folder / "scenes")
    shares = score_attributes([scenes[image_id] for image_id in found.captions], list(found.captions.values()))
    figures = [(f"right in {name}", f"{share:.1%}", "") for name, share in shares.items()]
    figures += [(name, f"{found.scores.scores[name]:.3f}", "") for name in ("BLEU-4", "CIDEr")]
    for note in found.notes:
        click.echo(f"  Note: {note}", err=True)
    return figures, found


def _marks(scene: Scene, caption: str) -> dict[str, bool]:
    return {name: value == getattr(scene, name) for name, value in parse_attributes(caption).items()}


def _query(folder: Path) -> None:
    with open_sql(folder / "captions") as session:
        for row in find_captions(session, "red ring", limit=3).read_all().to_pylist():
            click.echo(f"  {row['image_id']}: {row['caption']}")


def _fast_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor or the GPU computes in it, else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


@contextmanager
def _stage(name: str, what: str) -> Iterator[None]:
    click.echo(f"\n{click.style(name, bold=True)}  {what}")
    began = time.monotonic()
    yield
    sys.stderr.flush()
    click.echo(f"  took {time.monotonic() - began:.0f} s")
