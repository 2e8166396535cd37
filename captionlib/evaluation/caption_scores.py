"""Scores of captions against the sentences of people: BLEU, METEOR, ROUGE-L and CIDEr, as pycocoevalcap computes them.

Both sides are tokenised alike, by Stanford's PTB tokenizer. It and METEOR need Java. Where there is none METEOR is left
out, and captionlib's own tokens are scored: near to the same numbers, but not those that papers print.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from captionlib.data.text.vocabulary import tokenize
from captionlib.errors import DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig, summarize
from captionlib.evaluation.diversity import IN_TRAINING, MEAN_LENGTH
from captionlib.evaluation.java import has_java
from captionlib.evaluation.metrics import Metric, bleu, cider, meteor, rouge_l
from captionlib.evaluation.tokenizer import tokenize_ptb

__all__ = ["WITHOUT_JAVA", "CaptionScores", "score_captions", "scores_table"]

WITHOUT_JAVA = (
    "there is no `java` on the PATH: METEOR is left out, and BLEU, ROUGE-L and CIDEr are of captionlib's own tokens: "
    "not to be compared with published ones; install a Java runtime (version 8 or later) for all of them"
)

Sentences = dict[str, list[str]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        images: how many images were scored.
        scores: of all of them, by name: BLEU-1 to BLEU-4, METEOR and ROUGE-L (0 to 1), CIDEr (0 to 10, usually told
            times 100), and what else was asked for.
        of_images: the same names, and for each the score of every image by its id. BLEU, METEOR and the perplexity of
            the whole set are no means of these.
        intervals: the same names, and for each the ends of the confidence interval.
        tokenizer: whose tokens are scored: `ptb`, or `captionlib` where there is no Java.
    """

    images: int
    scores: Mapping[str, float]
    of_images: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tokenizer: str = "ptb"


def score_captions(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    more: Sequence[Metric] = (),
    bootstrap: BootstrapConfig | None = None,
) -> CaptionScores:
    """Scores one caption an image.

    CIDEr weighs words by how many of the scored images' references have them, so it means little for few images, and
    is 0 for a single one.

    Args:
        captions: by image id.
        references: by image id, at least one sentence each; images without a caption are left out.
        more: further metrics, with a row for each of `captions` in that order.
        bootstrap: of the confidence intervals.

    Raises:
        ConfigError: Java fails.
        DatasetError: there are no captions, or one has no references.
    """
    if not captions:
        raise DatasetError("expected at least one caption to score, got none")
    if missing := [image_id for image_id in captions if not references.get(image_id)]:
        raise DatasetError(
            f"{len(missing)} of {len(captions)} captions have no reference sentences, the first is image {missing[0]}; "
            "give the manifest that the captions were made from, and a split that has sentences"
        )
    ids = list(captions)
    said, expected = _tokenize([{i: [captions[i]] for i in ids}, {i: list(references[i]) for i in ids}])
    if not any(word for texts in expected.values() for word in texts):
        raise DatasetError(f"the references of {len(ids)} captions have no words; give the sentences of people")
    functions = [bleu, meteor, rouge_l, cider] if has_java() else [bleu, rouge_l, cider]
    metrics = [*(function(said, expected) for function in functions), *more]
    summary = summarize(metrics, ids, bootstrap or BootstrapConfig())
    tokenizer = "ptb" if has_java() else "captionlib"
    return CaptionScores(len(ids), summary.scores, summary.of_images, summary.intervals, tokenizer)


def scores_table(scores: CaptionScores, captions: Mapping[str, str]) -> pa.Table:
    """The scores of every image as a row: `image_id`, `caption`, and a column a score such as `bleu_4` and `cider`."""
    columns: dict[str, pa.Array] = {
        "image_id": pa.array(list(captions), pa.string()),
        "caption": pa.array(list(captions.values()), pa.string()),
    }
    of_a_caption = {
        MEAN_LENGTH: ("length", pa.int32()),
        IN_TRAINING: (IN_TRAINING, pa.bool_()),
    }
    for score, of_images in scores.of_images.items():
        name, kind = of_a_caption.get(score, (score.lower().replace("-", "_"), pa.float64()))
        values = pa.array([of_images[image_id] for image_id in captions], pa.float64(), from_pandas=True)  # NaN is null
        columns[name] = values.cast(kind)
    return pa.table(columns)


def _tokenize(sets: Sequence[Sentences]) -> list[Sentences]:
    """All sentences in one run of the tokenizer, whose start takes longest."""
    texts = [text for sentences in sets for some in sentences.values() for text in some]
    tokenized = iter(tokenize_ptb(texts) if has_java() else [" ".join(tokenize(text)) for text in texts])
    return [{i: [next(tokenized) for _ in some] for i, some in sentences.items()} for sentences in sets]
