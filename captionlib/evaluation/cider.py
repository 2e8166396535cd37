"""CIDEr of captions that are written again and again for the same images, as while a captioner is trained."""

from collections.abc import Sequence

from pycocoevalcap.cider.cider import Cider

from captionlib.errors import DatasetError
from captionlib.evaluation.tokenizer import tokenize_ptb

__all__ = ["CiderScorer"]


class CiderScorer:
    """Scores captions against references that are tokenised once; `score_captions` gives the same figure.

    Args:
        references: the sentences of people for each image, at least one.

    Raises:
        ConfigError: there is no Java.
        DatasetError: there are fewer than two images, for which CIDEr means nothing.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        if len(references) < 2:
            raise DatasetError(
                f"CIDEr weighs words by how many images' references have them; expected several images, "
                f"got {len(references)}; take perplexity to validate by"
            )
        tokenized = iter(tokenize_ptb([sentence for sentences in references for sentence in sentences]))
        self._references = {number: [next(tokenized) for _ in sentences] for number, sentences in enumerate(references)}

    def score(self, captions: Sequence[str]) -> float:
        """CIDEr (0 to 10, usually told times 100) of a caption an image, in the images' order."""
        said = {number: [caption] for number, caption in enumerate(tokenize_ptb(captions))}
        score, _ = Cider().compute_score(self._references, said)
        return float(score)
