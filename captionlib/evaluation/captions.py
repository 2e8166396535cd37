"""Scores of captions against the sentences of people: BLEU-1..4 and CIDEr, as pycocoevalcap computes them.

Both sides are tokenised alike, by Stanford's PTB tokenizer, which needs Java.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from captionlib.data.shards import ShardedDataset
from captionlib.errors import DatasetError
from captionlib.evaluation.tokenizer import tokenize_ptb

__all__ = ["CaptionScores", "read_captions_and_references", "score_captions"]

Sentences = dict[str, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        images: how many images were scored.
        scores: of all of them, by name: BLEU-1 to BLEU-4 (0 to 1) and CIDEr (0 to 10, usually told times 100).
        of_images: the same names, and for each the score of every image by its id. A BLEU of the whole set is no mean
            of these.
    """

    images: int
    scores: Mapping[str, float]
    of_images: Mapping[str, Mapping[str, float]]


def score_captions(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
    """Scores one caption an image.

    CIDEr weighs words by how many of the scored images' references have them, so it means little for few images, and
    is 0 for a single one.

    Args:
        captions: by image id.
        references: by image id, at least one sentence each; images without a caption are left out.

    Raises:
        ConfigError: there is no Java.
        DatasetError: there are no captions, or one has no references.
    """
    if not captions:
        raise DatasetError("expected at least one caption to score, got none")
    if missing := [image_id for image_id in captions if not references.get(image_id)]:
        raise DatasetError(
            f"{len(missing)} of {len(captions)} captions have no reference sentences, the first is image {missing[0]}; "
            "give the manifest that the captions were made from, and a split that has sentences"
        )
    ids = sorted(captions)
    said, expected = _tokenize([{i: [captions[i]] for i in ids}, {i: list(references[i]) for i in ids}])
    if not any(word for texts in expected.values() for word in texts):
        raise DatasetError(f"the references of {len(ids)} captions have no words; give the sentences of people")
    scores: dict[str, float] = {}
    of_images: dict[str, dict[str, float]] = {}
    with redirect_stdout(io.StringIO()):
        bleu, bleu_of_images = Bleu(4).compute_score(expected, said, verbose=0)
        cider, cider_of_images = Cider().compute_score(expected, said)
    named = [(f"BLEU-{n}", *both) for n, both in enumerate(zip(bleu, bleu_of_images, strict=True), 1)]
    for name, score, of_each in [*named, ("CIDEr", cider, cider_of_images)]:
        scores[name] = float(score)
        of_images[name] = dict(zip(ids, map(float, of_each), strict=True))
    return CaptionScores(len(ids), scores, of_images)


def read_captions_and_references(
    captions: ShardedDataset, manifest: ShardedDataset, splits: Sequence[str] = ()
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The captions of these splits (of all, if none is given) and the sentences of people, by image id.

    Raises:
        DatasetError: there is no caption in these splits.
    """
    said: dict[str, str] = {}
    seen: set[str] = set()
    for shard in range(captions.shards):
        for row in captions.read(shard, ["image_id", "split", "caption"]).to_pylist():
            seen.add(row["split"])
            if not splits or row["split"] in splits:
                said[row["image_id"]] = row["caption"]
    if not said:
        raise DatasetError(
            f"{captions.folder.uri}: no captions in split {' or '.join(splits) or '(any)'}; "
            f"its splits are {', '.join(sorted(seen)) or 'none'}"
        )
    references = {
        row["image_id"]: row["captions"]
        for shard in range(manifest.shards)
        for row in manifest.read(shard, ["image_id", "captions"]).to_pylist()
        if row["image_id"] in said
    }
    return said, references


def _tokenize(sets: Sequence[Sentences]) -> list[Sentences]:
    """All sentences in one run of the tokenizer, whose start takes longest."""
    tokenized = iter(tokenize_ptb([text for sentences in sets for texts in sentences.values() for text in texts]))
    return [{i: [next(tokenized) for _ in texts] for i, texts in sentences.items()} for sentences in sets]
