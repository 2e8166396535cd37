import shutil

import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captionlib.errors import DatasetError
from captionlib.evaluation.cider import CiderScorer

REFERENCES = [["A dog runs.", "The dog is running fast!"], ["Two men, on bikes", "men ride"], ["a red shirt"]]


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs Java")
def test_the_score_is_pycocoevalcaps_own() -> None:
    scorer = CiderScorer(REFERENCES)
    expected = {number: [{"caption": text} for text in texts] for number, texts in enumerate(REFERENCES)}
    for captions in (["a dog runs fast", "two men ride", "a shirt"], ["a red shirt", "a dog", ""]):
        said = {number: [{"caption": text}] for number, text in enumerate(captions)}
        own, _ = Cider().compute_score(*map(PTBTokenizer().tokenize, (expected, said)))
        assert scorer.score(captions) == pytest.approx(own, abs=1e-9)


def test_one_image_alone_is_refused() -> None:
    with pytest.raises(DatasetError, match="expected several images, got 1"):
        CiderScorer([["a dog"]])
