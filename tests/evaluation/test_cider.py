import shutil

import pytest

from captionlib.errors import DatasetError
from captionlib.evaluation.captions import score_captions
from captionlib.evaluation.cider import CiderScorer

REFERENCES = [["A dog runs.", "The dog is running fast!"], ["Two men, on bikes", "men ride"], ["a red shirt"]]


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs Java")
def test_the_score_is_that_of_the_evaluation() -> None:
    scorer = CiderScorer(REFERENCES)
    for captions in (["a dog runs fast", "two men ride", "a shirt"], ["a red shirt", "a dog", ""]):
        ids = [str(number) for number in range(3)]
        scores = score_captions(dict(zip(ids, captions, strict=True)), dict(zip(ids, REFERENCES, strict=True))).scores
        assert scorer.score(captions) == pytest.approx(scores["CIDEr"], abs=1e-9)


def test_one_image_alone_is_refused() -> None:
    with pytest.raises(DatasetError, match="expected several images, got 1"):
        CiderScorer([["a dog"]])
