"""Scores captions against references: BLEU, METEOR, ROUGE-L and CIDEr, as pycocoevalcap computes them.

Captions and references are tokenized with Stanford's PTB tokenizer. The tokenizer and METEOR need Java. Without Java,
METEOR is omitted and captionlib's own tokenizer is used; the other scores are then not comparable with published ones.
Each character of Chinese and Japanese text is scored as a word.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa
from pycocoevalcap.cider.cider import Cider

from captionlib.data.text.vocabulary import tokenize
from captionlib.errors import DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig, Scores, compute_scores
from captionlib.evaluation.diversity import MEAN_LENGTH, NOVEL
from captionlib.evaluation.ideographs import separate_characters
from captionlib.evaluation.java import has_java, tokenize_ptb
from captionlib.evaluation.metrics import Metric, compute_bleu, compute_cider, compute_meteor, compute_rouge_l

__all__ = ["WITHOUT_JAVA", "CiderScorer", "build_scores_table", "score_captions"]

WITHOUT_JAVA = (
    "`java` is not on the PATH: METEOR is omitted, and BLEU, ROUGE-L and CIDEr use captionlib's own tokenizer, so "
    "they are not comparable with published scores; install a Java runtime (version 8 or later) for the standard scores"
)

# Column name and type of each score whose values for single captions are integers or booleans.
_NON_FLOAT_COLUMNS = {MEAN_LENGTH: ("length", pa.int32()), NOVEL: (NOVEL, pa.bool_())}


def score_captions(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    extra_metrics: Sequence[Metric] = (),
    bootstrap: BootstrapConfig = BootstrapConfig(),
) -> Scores:
    """Scores one caption per image.

    Captions and references are keyed by image id. Each of `extra_metrics` has one row per caption, in the order of
    `captions`. CIDEr weights n-grams by their rarity in these references. It is unreliable for few images and 0 for a
    single image.

    Returns:
        BLEU-1 to BLEU-4, METEOR and ROUGE-L (0 to 1), CIDEr (0 to 10; papers report it times 100), and the scores of
        the extra metrics.

    Raises:
        DatasetError: there are no captions, or one of them has no references.
        SubprocessError: Java fails.
    """
    if not captions:
        raise DatasetError("expected at least one caption to score, got none")
    if missing := [image_id for image_id in captions if not references.get(image_id)]:
        raise DatasetError(
            f"{len(missing)} of {len(captions)} captions have no references, such as that of image {missing[0]}; "
            "pass the manifest that lists these images, and a split that has references"
        )
    ids = list(captions)
    sets = [{i: [captions[i]] for i in ids}, {i: list(references[i]) for i in ids}]
    tokenized_captions, tokenized_references = _tokenize(sets)
    if not any(text for texts in tokenized_references.values() for text in texts):
        raise DatasetError(f"the references of all {len(ids)} captions are empty; pass references that contain words")
    functions = [compute_bleu, compute_meteor, compute_rouge_l, compute_cider]
    if not has_java():
        functions.remove(compute_meteor)
    metrics = [*(function(tokenized_captions, tokenized_references) for function in functions), *extra_metrics]
    return compute_scores(metrics, ids, bootstrap)


def build_scores_table(scores: Scores, captions: Mapping[str, str]) -> pa.Table:
    """Returns one row per image: `image_id`, `caption`, and a column for each score, such as `bleu_4` and `cider`."""
    columns: dict[str, pa.Array] = {
        "image_id": pa.array(list(captions), pa.string()),
        "caption": pa.array(list(captions.values()), pa.string()),
    }
    for score, per_image in scores.per_image.items():
        name, data_type = _NON_FLOAT_COLUMNS.get(score, (score.lower().replace("-", "_"), pa.float64()))
        values = pa.array([per_image[image_id] for image_id in captions], pa.float64(), from_pandas=True)  # NaN -> null
        columns[name] = values.cast(data_type)
    return pa.table(columns)


def _tokenize(sets: Sequence[Mapping[str, Sequence[str]]]) -> list[dict[str, list[str]]]:
    """Tokenizes all captions and references in one run of the tokenizer, which is slow to start."""
    texts = [
        separate_characters(text) for by_image in sets for image_texts in by_image.values() for text in image_texts
    ]
    tokenized = iter(tokenize_ptb(texts) if has_java() else [" ".join(tokenize(text)) for text in texts])
    return [{i: [next(tokenized) for _ in image_texts] for i, image_texts in by_image.items()} for by_image in sets]


class CiderScorer:
    """Computes CIDEr repeatedly for new captions of the same images, for example during training.

    `references` has one or more references per image; they are tokenized once. Scores equal those of `score_captions`.

    Raises:
        ConfigError: Java is not installed.
        DatasetError: there are fewer than two images. CIDEr is always 0 for a single image.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        if len(references) < 2:
            raise DatasetError(
                "CIDEr weights n-grams by the number of images whose references contain them; expected several images, "
                f"got {len(references)}; validate by perplexity instead"
            )
        tokenized = iter(
            tokenize_ptb([separate_characters(text) for image_texts in references for text in image_texts])
        )
        self._references = {row: [next(tokenized) for _ in image_texts] for row, image_texts in enumerate(references)}

    def score(self, captions: Sequence[str]) -> float:
        """Returns CIDEr (0 to 10) for one caption per image, in the order of `references`."""
        tokenized = tokenize_ptb([separate_characters(caption) for caption in captions])
        hypotheses = {row: [caption] for row, caption in enumerate(tokenized)}
        score, _ = Cider().compute_score(self._references, hypotheses)
        return float(score)
