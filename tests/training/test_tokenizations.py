"""Training of captioners and rankers whose tokens are characters or subwords."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from captionlib.data.batches.captions import make_caption_tokenizer, read_references
from captionlib.data.shards.dataset import ShardedDataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import ConfigError
from captionlib.evaluation import caption_scores
from captionlib.evaluation.bootstrap import BootstrapConfig
from captionlib.models.captioners.captioner import CaptionerConfig
from captionlib.models.checkpoints.checkpoint import load_captioner, load_ranker
from captionlib.models.checkpoints.folder import describe_checkpoint
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import Candidate
from captionlib.models.rankers.ranker import RankerConfig
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.loop import TrainingConfig
from captionlib.training.ranking import RankerTrainingConfig, train_ranker
from tests.training.conftest import WORDS, write_features

Tokenization = Literal["words", "characters", "bpe", "unigram"]
CONFIG = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=32, embedding_size=32, dropout=0.0, image_input="every_step"),
    training=TrainingConfig(epochs=8, optimizer="adam", learning_rate=0.03, schedule="cosine"),
    min_count=1,
    vocabulary_size=40,
    batch_images=8,
)
KINDS = 5 * np.eye(4, dtype=np.float32)
CHINESE = [
    ["一只棕色的狗在草地上奔跑。", "一只狗在草地上跑。"],
    ["两个孩子在公园里踢足球。", "孩子们在踢球。"],
    ["一个男人骑着自行车下山。", "男人在山上骑车。"],
    ["一位女士在海边看日落。", "女士站在海边\uff0c看着太阳。"],
]


def train(features: ShardedDataset, output: Path, config: CaptionerTrainingConfig) -> list[dict[str, float]]:
    return train_captioner(features.folder.uri, output, config, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("tokenization", "description"),
    [("characters", "characters"), ("bpe", "subwords (bpe)"), ("unigram", "subwords (unigram)")],
)
def test_captioner_spells_the_words(
    features: ShardedDataset, tmp_path: Path, tokenization: Tokenization, description: str
) -> None:
    train(features, tmp_path / "captioner", replace(CONFIG, tokenization=tokenization))
    captioner = load_captioner(tmp_path / "captioner")
    assert captioner.vocabulary.tokenization == tokenization
    assert str(describe_checkpoint(tmp_path / "captioner")["vocabulary"]).endswith(f" {description}")
    decoder = Decoder(captioner.model, DecodingConfig(n_best=5), vocabulary=captioner.vocabulary)
    for word, candidates in zip(WORDS, decoder.decode(KINDS), strict=True):
        texts = [captioner.vocabulary.decode(candidate.token_ids) for candidate in candidates]
        assert texts[0] in (f"this is {word}", f"it is a {word} again")
        assert len(set(texts)) == len(texts)


def test_chinese_captioner_trains_and_is_scored_by_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_features(tmp_path / "features", 5 * np.eye(4), CHINESE.__getitem__)
    train(dataset, tmp_path / "captioner", replace(CONFIG, tokenization="characters"))
    captioner = load_captioner(tmp_path / "captioner")
    assert {"狗", "。"} < set(captioner.vocabulary.words)
    decoder = Decoder(captioner.model, vocabulary=captioner.vocabulary)
    written = [captioner.vocabulary.decode(candidates[0].token_ids) for candidates in decoder.decode(KINDS)]
    assert all(text in captions for text, captions in zip(written, CHINESE, strict=True))
    monkeypatch.setattr(caption_scores, "has_java", lambda: False)
    references = {str(number): captions for number, captions in enumerate(read_references(dataset, ["val"]))}
    captions = {number: written[CHINESE.index(texts)][:-3] for number, texts in references.items()}
    scores = caption_scores.score_captions(captions, references, bootstrap=BootstrapConfig(samples=0)).overall
    assert scores["BLEU-1"] > 0.7  # the last words are missing
    assert 0.5 < scores["BLEU-4"] < 1
    assert scores["CIDEr"] > 1


@pytest.mark.parametrize("tokenization", ["bpe", "unigram"])
def test_ranker_finds_images_by_subwords(features: ShardedDataset, tmp_path: Path, tokenization: Tokenization) -> None:
    config = RankerTrainingConfig(
        ranker=RankerConfig(hidden_size=16, embedding_size=16, joint_embedding_size=16, feature_dropout=0, dropout=0),
        training=TrainingConfig(epochs=12, optimizer="adam", learning_rate=0.02),
        tokenization=tokenization,
        min_count=1,
        vocabulary_size=30,
        batch_images=8,
    )
    train_ranker(features.folder.uri, tmp_path / "ranker", config, device="cpu", progress=False)
    ranker = load_ranker(tmp_path / "ranker")
    assert ranker.has_known_word("oneself")
    scores = ranker.encode_sentences([f"this is {word}" for word in WORDS]) @ ranker.encode_images(KINDS).T
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]


def test_subwords_spell_a_caption_once_and_refuse_word_options(features: ShardedDataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="word_vectors: expected tokenization words, got bpe"):
        replace(CONFIG, tokenization="bpe", word_vectors="glove.txt")
    train(features, tmp_path / "captioner", replace(CONFIG, tokenization="bpe", training=TrainingConfig(epochs=1)))
    captioner = load_captioner(tmp_path / "captioner")
    decoder = Decoder(captioner.model, DecodingConfig(n_best=2), vocabulary=captioner.vocabulary)
    one = captioner.vocabulary.encode("one")
    letters = [captioner.vocabulary.words.index(letter) + 2 for letter in "\u2581one"]
    spellings = [Candidate(ids, log_prob, len(ids) + 1) for ids, log_prob in ((letters, -9.0), (one, -1.0))]
    assert captioner.vocabulary.decode(letters) == "one"
    assert decoder._select_pool(spellings) == [spellings[1]]
    with pytest.raises(ConfigError, match=r"need a model of whole words, got one of subwords \(bpe\)"):
        Decoder(captioner.model, DecodingConfig(forbidden_words=("one",)), vocabulary=captioner.vocabulary)


@pytest.mark.parametrize(("tokenization", "max_tokens"), [("words", 20), ("characters", 100), ("bpe", 40)])
def test_lengths_depend_on_the_tokenization(tokenization: Tokenization, max_tokens: int) -> None:
    vocabulary = Vocabulary.from_captions(["a dog runs"] * 2, 1, tokenization, 30)
    assert DecodingConfig().find_max_tokens(vocabulary.unit) == max_tokens
    assert DecodingConfig(min_words=101).find_max_tokens(vocabulary.unit) == 101
    assert DecodingConfig(max_tokens=3).find_max_tokens(vocabulary.unit) == 3
    text = " ".join(["dog"] * 99)
    kept = vocabulary.decode(make_caption_tokenizer(vocabulary)(text))
    assert kept == (text[:200] if tokenization == "characters" else " ".join(["dog"] * 30))
    assert vocabulary.decode(make_caption_tokenizer(vocabulary, 2)(text)) == (
        "do" if tokenization == "characters" else "dog dog"
    )
