"""A project of a few images, with the arguments of every command. Benchmarks and tests disturb these commands."""

import hashlib
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io

from benchmarks.synthetic_images import write_images
from captionlib.search.index_folder import read_description
from captionlib.storage.folders import Folder
from jobs.cli import main

__all__ = ["COMMANDS", "IMAGES", "Command", "call", "create_project", "read_output", "run_command", "set_up"]

IMAGES = 8
_SHARD_SIZE = 4
_WORDS = ("red", "green", "blue", "gray")
_TINY_MODEL = ("hidden_size=8", "embedding_size=8")
_TRAINING = ("training.epochs=1", "min_count=1", "batch_images=4")


@dataclass(frozen=True)
class Command:
    """The arguments of a command. `{project}` and `{output}` stand for the project and for a new folder.

    Attributes:
        dataset: whether the command writes datasets, so that their Parquet files are the same in every run.
        setup: the arguments of a command that writes the folder that this command changes.
    """

    arguments: str
    dataset: bool = False
    setup: str = ""

    @property
    def name(self) -> str:
        return self.arguments.split()[0]


def _set(*settings: str) -> str:
    return " ".join(f"--set {setting}" for setting in settings)


_ENCODER = _set(
    *("encoder.model=squeezenet1_1", "encoder.node=features.4.cat", "encoder.weights=random:0", "batch_size=3"),
    *("encoder.pooling=mean", "encoder.dtype=float32", "loading.decode.processes=1"),
)
_CAPTIONER = _set(*_TRAINING, *(f"captioner.{setting}" for setting in _TINY_MODEL))
_RANKER = _set(*_TRAINING, *(f"ranker.{setting}" for setting in (*_TINY_MODEL, "joint_embedding_size=8")))
_LANGUAGE_MODEL = _set("training.epochs=1", "min_count=1", *(f"model.{setting}" for setting in _TINY_MODEL))
_QUIET = "--device cpu --no-progress"
_PREPARE = f"prepare {{project}}/dataset.json -o {{output}}/manifest --shard-size {_SHARD_SIZE} --no-progress"
_EXPORT_CHECKPOINT = "export-checkpoint {project}/captioner -o {output}/shared --license cc-by-4.0"
_INIT = "init {output}/collection --source {project}/images -c {project}/captioner -r {project}/ranker"

COMMANDS = [
    Command(_PREPARE, True),
    Command("prepare {project}/subset.json -o {output}/manifest --no-progress --allow-removal", True, _PREPARE),
    Command(f"extract-features {{project}}/manifest -o {{output}}/features {_ENCODER} {_QUIET}", True),
    Command(
        "import-features {project}/dataset.json {project}/feats.mat -o {output}/features --no-progress "
        f"--set shard_size={_SHARD_SIZE}",
        True,
    ),
    Command(f"train-captioner {{project}}/features -o {{output}}/captioner {_CAPTIONER} {_QUIET}"),
    Command(f"train-ranker {{project}}/features -o {{output}}/ranker {_RANKER} {_QUIET}"),
    Command(f"train-language-model {{project}}/manifest -o {{output}}/model {_LANGUAGE_MODEL} {_QUIET}"),
    Command("build-datastore {project}/features -c {output}/shared --no-progress", setup=_EXPORT_CHECKPOINT),
    Command(
        "generate-captions {project}/features -c {project}/captioner -o {output}/captions --ranker {project}/ranker "
        f"--embeddings {{output}}/embeddings {_QUIET}",
        True,
    ),
    Command(f"embed {{project}}/features -r {{project}}/ranker -o {{output}}/embeddings {_QUIET}", True),
    Command("caption {project}/images/000000.jpg -c {project}/captioner --device cpu --report {output}/page"),
    Command("sample {project}/model --length 5 --device cpu"),
    Command(_EXPORT_CHECKPOINT),
    Command("export {project}/captions --to coco -o {output}/results.json"),
    Command("export {project}/captions --to metadata -o {output}/export --no-progress"),
    Command("evaluate {project}/captions -m {project}/manifest -o {output}/scores --bootstrap-samples 0"),
    Command("report {project}/captions -o {output}/report -m {project}/manifest -c {project}/captioner --no-progress"),
    Command(
        "activations {project}/images/000000.jpg -o {output}/maps.html --device cpu --weights random:0 "
        "--set model=squeezenet1_1"
    ),
    Command("build-index {project}/captions -e {project}/embeddings -o {output}/index"),
    Command("deduplicate {project}/embeddings -o {output}/duplicates --threshold 0.5 --no-progress", True),
    Command(_INIT),
    Command(f"update {{output}}/collection {_QUIET}", True, _INIT),
    Command("remove {output}/manifest --id 1 --thumbnails {output}/thumbnails", True, _PREPARE),
    Command("compact {output}/manifest --shard-size 3 --no-progress", True, _PREPARE),
    Command("status {project}/collection"),
    Command("query {project}/index --text red"),
    Command("query {project}/captions --top 3"),
    Command("inspect {project}/captions"),
    Command("inspect {project}/captioner"),
    Command("recipes"),
]

# The commands whose outputs the other commands read.
_WRITERS = (
    *("prepare", "extract-features", "train-captioner", "train-ranker", "train-language-model"),
    *("generate-captions", "build-index", "init"),
)


def create_project(folder: Path) -> Path:
    """Writes the images, trains the models and runs the stages that the commands need. Returns the folder."""
    paths = write_images(folder / "images", IMAGES, size=64)
    entries = []
    for number, path in enumerate(paths):
        sentences = [{"raw": f"a {_WORDS[number % 4]} image of {word}"} for word in _WORDS[:2]]
        split = ("train", "train", "val", "test")[number % 4]
        image = {"imgid": number, "filepath": path.parent.name, "filename": path.name}
        entries.append({**image, "split": split, "sentences": sentences})
    document = {"dataset": "tiny", "images": entries}
    (folder / "dataset.json").write_text(json.dumps(document))
    (folder / "subset.json").write_text(json.dumps({**document, "images": entries[1:]}))
    features = np.random.default_rng(0).random((4, IMAGES))
    scipy.io.savemat(folder / "feats.mat", {"feats": features})
    for command in COMMANDS:
        if command.name in _WRITERS and not command.setup:
            run_command(*_fill_in(command.arguments, folder, folder))
    return folder


def set_up(command: Command, project: Path, output: Path) -> None:
    output.mkdir(parents=True)
    if command.setup:
        run_command(*_fill_in(command.setup, project, output))


def call(command: Command, project: Path, output: Path) -> int:
    """Runs a command in this process and returns its exit code."""
    return _call(_fill_in(command.arguments, project, output))


def read_output(command: Command, output: Path) -> dict[str, str]:
    """Returns hashes of the files that a command wrote and that are the same in every run, and the content of an index.

    Of a dataset, these are the Parquet files that readers see.
    """
    if command.name == "build-index":
        index = read_description(Folder(output / "index"))
        return {} if index is None else {"index": f"{index.captions_count} {index.vectors_count} {index.fingerprint}"}
    patterns = ("*/model.safetensors", "shared/*.parquet", "*.json", "export/part-*/*")
    files = [file for pattern in patterns for file in output.glob(pattern)]
    folders = [file.parent for file in output.rglob("_dataset.json")]
    files += [file for folder in folders for file in folder.glob("*.parquet")]
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_command(*words: str | Path) -> None:
    """Runs a command in this process, which loads the libraries once, and hides its output.

    Raises:
        RuntimeError: the command failed. The message contains its output.
    """
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = _call([str(word) for word in words])
    if code != 0:
        raise RuntimeError(f"captionlib {' '.join(map(str, words))} failed: {output.getvalue()}")


def _call(words: list[str]) -> int:
    try:
        main(words)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    return 0


def _fill_in(arguments: str, project: Path, output: Path) -> list[str]:
    return [word.format(project=project, output=output) for word in arguments.split()]
