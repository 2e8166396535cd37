import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from captionlib.data.batches.text import SentenceBatches
from captionlib.data.shards.dataset import create_dataset
from captionlib.data.shards.schemas import MANIFEST_SCHEMA
from captionlib.data.shards.writer import write_shard
from captionlib.errors import ConfigError, DatasetError
from captionlib.models.captioners.language_model import LanguageModelConfig, build_language_model
from captionlib.models.checkpoints.checkpoint import load_language_model
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.text_sampling import sample_texts
from captionlib.training.language_modeling import (
    LanguageModelObjective,
    LanguageModelTrainingConfig,
    train_language_model,
)
from captionlib.training.loop import TrainingConfig

CONFIG = LanguageModelTrainingConfig(
    model=LanguageModelConfig(hidden_size=16, embedding_size=16, dropout=0.0),
    training=TrainingConfig(epochs=12, optimizer="adam", learning_rate=0.03, patience=None),
    min_count=1,
    batch_size=20,
)
SENTENCES = [f"{subject} {verb} far" for subject in ("dogs", "cats") for verb in ("run", "jump")] * 50


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    return tmp_path / "sentences.txt"


def train(
    source: Path, output: Path, config: LanguageModelTrainingConfig = CONFIG, **options: Any
) -> list[dict[str, float]]:
    return train_language_model(source, output, config, device="cpu", progress=False, **options)


def test_learns_the_sentences_of_a_text_file(sentences: Path, tmp_path: Path) -> None:
    history = train(sentences, tmp_path / "model")
    # Two tokens of a sentence have probability 1 / 2, and two are certain: exp(2 ln 2 / 4) is the lowest perplexity.
    assert math.sqrt(2) - 0.01 < history[-1]["perplexity"] < 1.5
    loaded = load_language_model(tmp_path / "model")
    samples = sample_texts(loaded, DecodingConfig(strategy="sample"), 40)
    assert {sample.text for sample in samples} >= set(SENTENCES)
    assert sum(sample.text in SENTENCES for sample in samples) >= 36
    assert (tmp_path / "model" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "metrics.jsonl").read_text().count("\n") == len(history)


def test_learns_the_captions_of_a_dataset(tmp_path: Path) -> None:
    dataset = create_dataset(tmp_path / "manifest", "manifest", MANIFEST_SCHEMA, config={}, shards=1)
    rows = [
        {
            "image_id": f"{n}",
            "uri": "",
            "split": "val" if n % 5 == 0 else "train",
            "captions": SENTENCES[2 * n : 2 * n + 2],
        }
        for n in range(100)
    ]
    with write_shard(dataset, 0, 100) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=MANIFEST_SCHEMA))
    dataset.finish()
    history = train(tmp_path / "manifest", tmp_path / "model")
    assert history[-1]["perplexity"] < 1.5
    loaded = load_language_model(tmp_path / "model")
    assert loaded.vocabulary.sentence_count == 160
    assert loaded.provenance["source"] == dataset.compute_content_checksum()


def test_perplexity_is_that_of_whole_sentences(tmp_path: Path) -> None:
    (tmp_path / "sentences.txt").write_text("\n".join(["a b c d"] * 20))
    training = replace(CONFIG.training, unigram_patience=None)
    config = replace(CONFIG, max_tokens=1, validation_fraction=0.5, training=training)
    # In training, every sentence is `a`, so the model learns that END follows `a`.
    history = train(tmp_path / "sentences.txt", tmp_path / "model", config)
    model = load_language_model(tmp_path / "model")
    ids = torch.tensor([model.vocabulary.encode("a b c d")])
    with torch.no_grad():
        scores = model.model.cpu().eval()(torch.zeros(1, 0), ids, ids.new_zeros(1))
    assert len(scores.log_probs) == 5
    best = min(epoch["perplexity"] for epoch in history)
    assert best == pytest.approx(scores.log_probs.mean().neg().exp().item(), rel=1e-4)


def test_perplexity_with_a_long_line_is_that_of_single_sentences() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5000, *[4] * 30, 150, 2]
    sentences = [torch.randint(2, 9, (length,), generator=generator).tolist() for length in lengths]
    validation = SentenceBatches(sentences, batch_size=20, max_batch_tokens=400)
    shapes = [batch.shape for batch in validation.in_order()]
    assert shapes[:2] == [(1, 5000), (2, 150)]
    assert all(rows == 1 or rows * steps <= 400 for rows, steps in shapes)
    torch.manual_seed(0)
    model = build_language_model(CONFIG.model, 9).eval()
    with torch.no_grad():
        got = LanguageModelObjective(model, validation, validation, save=lambda *_: None).validate()["perplexity"]
        each = [
            model(torch.zeros(1, 0), torch.tensor([ids]), torch.zeros(1, dtype=torch.int64)).log_probs
            for ids in sentences
        ]
    assert got == pytest.approx(torch.cat(each).double().mean().neg().exp().item(), rel=1e-5)


def test_learns_continuous_text_by_characters(tmp_path: Path) -> None:
    (tmp_path / "author.txt").write_text("to be, or not to be.\n" * 200)
    config = replace(
        CONFIG,
        model=LanguageModelConfig(layers=2, hidden_size=24, embedding_size=12, dropout=0.0),
        tokenization="characters",
        layout="continuous",
        sequence_length=42,
        training=replace(CONFIG.training, epochs=20),
    )
    history = train(tmp_path / "author.txt", tmp_path / "model", config)
    # Everything is certain except for the position in the line where a sequence starts.
    assert history[-1]["perplexity"] < 1.25
    loaded = load_language_model(tmp_path / "model")
    (sample,) = sample_texts(loaded, DecodingConfig(strategy="sample", top_k=1, max_tokens=60), 1, prefix="to be, ")
    assert "\nto be, or not to be.\n" in sample.text
    assert len(sample.text) == 67


def test_end_of_a_sequence_is_not_an_end_token(tmp_path: Path) -> None:
    (tmp_path / "author.txt").write_text("ab" * 500)
    config = replace(
        CONFIG, tokenization="characters", layout="continuous", sequence_length=10, training=TrainingConfig(epochs=1)
    )
    train(tmp_path / "author.txt", tmp_path / "model", config)
    loaded = load_language_model(tmp_path / "model")
    model = loaded.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = torch.full((3, 10), 2).numpy()
    for ends, count in ((True, 33), (False, 30)):
        objective = LanguageModelObjective(model, *2 * [_Batches(ends)], save=lambda *_: None)
        loss, summed, tokens, *_ = objective.loss(batch)
        assert tokens == count
        assert loss.item() == pytest.approx(math.log(len(loaded.vocabulary)))
        assert summed == pytest.approx(count * math.log(len(loaded.vocabulary)), rel=1e-5)


class _Batches:
    def __init__(self, rows_are_sentences: bool) -> None:
        self.rows_are_sentences = rows_are_sentences

    count: Any = None
    shuffled: Any = None
    in_order: Any = None


@pytest.mark.parametrize("layout", ["sentences", "continuous"])
def test_crashed_run_resumes_bit_for_bit(
    layout: Any, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, dropout=0.5),
        training=TrainingConfig(epochs=2, checkpoint_interval_seconds=0),
        layout=layout,
        tokenization="characters",
        sequence_length=20,
    )
    train(sentences, tmp_path / "uninterrupted", config)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelObjective, "loss", _crash_at(13, LanguageModelObjective.loss))
        with pytest.raises(RuntimeError, match="crash"):
            train(sentences, tmp_path / "crashed", config)
    train(sentences, tmp_path / "crashed", config)
    expected, got = (load_language_model(tmp_path / name).model.state_dict() for name in ("uninterrupted", "crashed"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def _crash_at(wanted: int, loss: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1, wanted + 1))

    def crash(self: LanguageModelObjective, batch: Any) -> Any:
        if next(calls) == wanted:
            raise RuntimeError("crash")
        return loss(self, batch)

    return crash


def test_rejects_resuming_with_another_text(sentences: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(epochs=1))
    train(sentences, tmp_path / "model", config)
    sentences.write_text("\n".join(SENTENCES[::-1]))
    with pytest.raises(DatasetError, match="source: was"):
        train(sentences, tmp_path / "model", config)
    train(sentences, tmp_path / "model", config, overwrite=True)
    provenance = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert provenance["source"] != ""


def test_rejects_too_short_text_before_training(tmp_path: Path) -> None:
    (tmp_path / "author.txt").write_text("too short\n" * 30)
    with pytest.raises(DatasetError, match="at least two sequences of 128 tokens"):
        train(
            tmp_path / "author.txt", tmp_path / "model", replace(CONFIG, layout="continuous", tokenization="characters")
        )
    assert not (tmp_path / "model" / "config.json").exists()


def test_overwrite_deletes_nothing_if_the_new_run_cannot_start(sentences: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(epochs=1))
    train(sentences, tmp_path / "model", config)
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    sentences.write_text("too short\n" * 30)
    with pytest.raises(DatasetError, match="at least two sequences"):
        train(sentences, tmp_path / "model", replace(config, layout="continuous"), overwrite=True)
    assert {path: path.read_bytes() for path in before} == before


def test_rejects_several_processes(sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="trained by one process, got 2; start it without torchrun"):
        train(sentences, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_rejects_invalid_validation_fraction() -> None:
    with pytest.raises(ConfigError, match="validation_fraction: Input should be less than 1, got 1"):
        replace(CONFIG, validation_fraction=1.0)
