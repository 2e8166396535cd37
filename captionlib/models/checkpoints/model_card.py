"""Model cards: the `README.md` of a checkpoint, in the format of Hugging Face.

A card may be published, so it contains file names, but no paths.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from captionlib.models.checkpoints.encoder_file import ENCODER, ENCODER_ADDRESS, LOCAL_WEIGHTS

__all__ = ["CARD", "CardNotes", "describe_vocabulary", "render_card", "strip_paths"]

CARD = "README.md"

_PIPELINES = {"captioner": "image-to-text", "ranker": "feature-extraction", "language_model": "text-generation"}
_CELLS = {"lstm": "an LSTM", "rnn": "an RNN", "gru": "a GRU", "transformer": "a Transformer", "mean": "a bag of words"}
_COMMANDS = {
    "captioner": ("caption image.jpg -c FOLDER", "generate-captions manifest -c FOLDER -o captions"),
    "ranker": ("embed manifest -r FOLDER -o embeddings", 'query index --sentence "two dogs" --ranker FOLDER'),
    "language_model": ("sample FOLDER",),
}
_USES = {
    "captioner": "Captions for browsing and searching collections of images like those of the training data, and "
    "research on image captioning.",
    "ranker": "Searching collections of images like those of the training data by a sentence or by a similar image, "
    "and research on image-text retrieval.",
    "language_model": "Research on language models, and comparisons of the probability of sentences.",
}
_LIMITS = {
    "captioner": (
        "Captions can be wrong. Check them before people rely on them, as in alternative texts of a web site.",
        "The captions imitate the references, including their errors and their guesses about gender, age and origin.",
        "Objects and words that are rare in the training data are missing from captions or confused with others.",
        "Not suited for identifying people or for decisions about them.",
    ),
    "ranker": (
        "Scores order results; they are not probabilities that a sentence is true of an image.",
        "Words that are rare in the training data are ignored, and word order and counts matter little.",
        "Results repeat the associations of the training data, including those about people.",
        "Not suited for identifying people or for decisions about them.",
    ),
    "language_model": (
        "Generated sentences resemble the training text and do not state facts.",
        "Sentences can repeat parts of the training text and its prejudices.",
    ),
}
# Values in the training history that are not scores.
_NON_SCORES = {"epoch", "loss", "reward", "learning_rate", "total_seconds", "data_wait_fraction"}
# Keys whose values may be paths.
_PATH_KEYS = {"init_from", "word_vectors", "checkpoint", "file", ENCODER_ADDRESS}


@dataclass(frozen=True)
class CardNotes:
    """Information on a model card that is not in the checkpoint.

    Attributes:
        license: the license of the model, as an identifier such as `cc-by-4.0`.
        data: description of the training data.
        scores: contents of `scores.json` files that `captionlib evaluate` wrote.
    """

    license: str = "unknown"
    data: str = ""
    scores: Sequence[Mapping[str, Any]] = ()


def render_card(
    config: Mapping[str, Any], training: Mapping[str, Any], has_encoder: bool, notes: CardNotes = CardNotes()
) -> bytes:
    """Renders the card of a checkpoint with the content of its `config.json` and `training.json`.

    `has_encoder` is whether the checkpoint contains the weights of the encoder.
    """
    kind = str(config["kind"])
    header = {"license": notes.license, "library_name": "captionlib", "pipeline_tag": _PIPELINES[kind]}
    license_text = (
        "Not specified. To set it, run `captionlib export-checkpoint --license NAME`. The licenses of the training "
        "data and of the encoder's weights may restrict the choice."
        if notes.license == "unknown"
        else f"{notes.license}. The license of the encoder's weights may differ."
    )
    sections = {
        "Use": _render_use(kind, config, has_encoder),
        "Training data": _render_data(config, notes.data),
        "Recipe": ["```yaml", _to_yaml(_collect_recipe(config, training)), "```"],
        "Scores": [*_render_validation_scores(training), *_render_test_scores(notes.scores)],
        "Intended use": [_USES[kind]],
        "Limits": [f"- {limit}" for limit in _LIMITS[kind]],
        "License": [license_text],
    }
    lines = ["---", _to_yaml(header), "---", "", f"# {kind.replace('_', ' ').capitalize()}", "", _summarize(config)]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return ("\n".join(lines) + "\n").encode()


def describe_vocabulary(vocabulary: Mapping[str, Any]) -> str:
    """Returns the size of the vocabulary of a checkpoint and the kind of its tokens."""
    tokenization = vocabulary.get("tokenization", "words")
    unit = tokenization if tokenization in ("words", "characters") else f"subwords ({tokenization})"
    return f"{len(vocabulary.get('words', ())):,} {unit}"


def strip_paths(values: Any) -> Any:
    """Returns JSON values in which the paths of checkpoints and weights files are replaced by their last components."""
    if isinstance(values, Mapping):
        return {
            name: value.rstrip("/").rsplit("/", 1)[-1]
            if name in _PATH_KEYS and isinstance(value, str)
            else strip_paths(value)
            for name, value in values.items()
        }
    return [strip_paths(value) for value in values] if isinstance(values, list | tuple) else values


def _summarize(config: Mapping[str, Any]) -> str:
    architecture, provenance = config.get("architecture", {}), config.get("provenance", {})
    tasks = {
        "captioner": "generates captions of images",
        "ranker": "embeds images and sentences in one space, for retrieval",
        "language_model": "generates text",
    }
    cell = _CELLS.get(str(architecture.get("cell", architecture.get("sentence_encoder"))), "a network")
    attention = " with attention to a feature map" if architecture.get("attention_size") else ""
    written = f" on {provenance['written'][:10]}" if "written" in provenance else ""
    version = f" {provenance['captionlib']}" if "captionlib" in provenance else ""
    return f"This model {tasks[config['kind']]}. It is {cell}{attention}, trained with captionlib{version}{written}."


def _render_use(kind: str, config: Mapping[str, Any], has_encoder: bool) -> Iterator[str]:
    yield from ["```sh", *(f"captionlib {command}" for command in _COMMANDS[kind]), "```"]
    encoder = config.get("encoder", {})
    if not encoder:
        return
    network, digest = f"{encoder.get('model')} (output node {encoder.get('node')})", encoder.get("weights_sha256")
    weights, file = encoder.get("weights"), config.get("provenance", {}).get(ENCODER_ADDRESS, "")
    if has_encoder:
        text = f"The weights of the encoder, {network}, are in `{ENCODER}`."
    elif weights in LOCAL_WEIGHTS:
        name = f"`{file.rsplit('/', 1)[-1]}`" if file else f"a {weights}"
        text = (
            f"The weights of the encoder, {network}, are not in this folder. They come from {name}: put it into the "
            "folder, or pass it with `--weights`."
        )
    elif weights == "imported":
        text = "The features were computed by other software, so the model cannot encode images."
    elif weights == "hub":
        text = f"The encoder is {network}, which is downloaded."
    elif str(weights).startswith("random:"):
        text = f"The encoder is {network} with random weights (`{weights}`), which captionlib generates from the seed."
    else:
        text = f"The encoder is {network} with torchvision's weights `{weights}`, which are downloaded."
    yield from ["", text]
    if digest:
        yield f"captionlib verifies the SHA-256 of the encoder's tensors: `{digest}`."


def _render_data(config: Mapping[str, Any], description: str) -> Iterator[str]:
    yield description or "The source of the images and texts, and their licenses, are not described."
    provenance, vocabulary = config.get("provenance", {}), config.get("vocabulary", {})
    if counts := provenance.get("data"):
        yield from ["", "| Splits | Images | Captions |", "|---|---|---|"]
        for purpose, row in counts.items():
            yield f"| {purpose}: {', '.join(row['splits'])} | {row['images']:,} | {row['captions']:,} |"
    yield from ["", f"Vocabulary: {describe_vocabulary(vocabulary)}."]
    for name in ("features", "manifest", "source"):
        if name in provenance:
            yield f"Checksum of the {'training text' if name == 'source' else name}: `{provenance[name]}`."
    if "init_from" in provenance:
        yield f"Initialized from the checkpoint with the fingerprint `{provenance['init_from'].get('fingerprint')}`."


def _collect_recipe(config: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    resolved = dict(training.get("resolved", {}))
    for name in ("features", "manifest", "source", "init_from_fingerprint", "captioner", "ranker", "model"):
        resolved.pop(name, None)  # described in other sections, or part of the architecture
    return {"architecture": config.get("architecture", {}), **resolved}


def _render_validation_scores(training: Mapping[str, Any]) -> Iterator[str]:
    history = training.get("history", [])
    scores = {name: value for name, value in (history[-1] if history else {}).items() if name not in _NON_SCORES}
    if not scores:
        yield "No scores were recorded in training."
        return
    epoch = history[-1].get("epoch", len(history))
    yield f"On the validation splits, which were also used to select epoch {epoch}. There are no confidence intervals."
    yield from ["", "| Score | Value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in scores.items())]


def _render_test_scores(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for evaluation in evaluations:
        splits = " and ".join(evaluation.get("splits", ())) or "all splits"
        yield from ["", f"On {splits}, {evaluation.get('images', 0):,} images:", ""]
        if "scores" in evaluation:
            yield from ["| Score | Value | 95% interval |", "|---|---|---|"]
            for name, value in evaluation["scores"].items():
                bounds = evaluation.get("intervals", {}).get(name)
                interval = f"{bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else ""
                yield f"| {name} | {value:.4g} | {interval} |"
        else:  # the scores of a ranker
            yield from ["| Direction | R@1 | R@5 | R@10 | Median rank |", "|---|---|---|---|---|"]
            for direction in ("image_to_text", "text_to_image"):
                row = evaluation[direction]
                recalls = " | ".join(f"{row[f'recall_at_{k}']:.1%}" for k in (1, 5, 10))
                yield f"| {direction.replace('_', ' ')} | {recalls} | {row['median_rank']:g} |"


def _to_yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(strip_paths(values), sort_keys=False, allow_unicode=True, width=110)
    return text.rstrip("\n")
