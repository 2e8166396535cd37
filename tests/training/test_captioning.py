import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from captionlib.config import load_config
from captionlib.data.batches.captions import CaptionBatches, read_captions, read_features, read_references
from captionlib.data.shards.dataset import ShardedDataset, create_dataset
from captionlib.data.shards.schemas import features_schema
from captionlib.data.shards.writer import write_shard
from captionlib.data.text.vocabulary import END, Vocabulary
from captionlib.errors import CheckpointError, ConfigError, DatasetError
from captionlib.evaluation.perplexity import measure_perplexity
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import load_captioner, save_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.recipes import find_recipe
from captionlib.training.caption_objective import CaptioningObjective, CiderValidation
from captionlib.training.captioning import CaptionerTrainingConfig, train_captioner
from captionlib.training.initialization import build_captioner
from captionlib.training.loop import TrainingConfig
from jobs.cli import main
from tests.training.conftest import WORDS, write_features

CONFIG = CaptionerTrainingConfig(
    captioner=CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.1),
    training=TrainingConfig(epochs=30, optimizer="adam", learning_rate=0.03, seed=3),
    min_count=1,
    batch_images=8,
)


def train(
    features: ShardedDataset, output: Path, config: CaptionerTrainingConfig = CONFIG, **options: Any
) -> list[dict[str, float]]:
    return train_captioner(features.folder.uri, output, config, device="cpu", progress=False, **options)


def test_learns_to_describe_images(features: ShardedDataset, tmp_path: Path) -> None:
    history = train(features, tmp_path / "captioner")
    # An image has two captions with ten tokens in total, ENDs included. All tokens but the first of each caption are
    # certain, and the first has probability 1 / 2, so the lowest possible perplexity is 2^(2 / 10).
    assert 2**0.2 <= history[-1]["perplexity"] < 1.25
    assert history[0]["perplexity"] > 2 * history[-1]["perplexity"]
    captioner = load_captioner(tmp_path / "captioner")
    decoder = Decoder(captioner.model, DecodingConfig(beam_width=3))
    for kind, word in enumerate(WORDS):
        best = decoder.decode(5 * torch.eye(4)[kind : kind + 1])[0][0]
        assert word in captioner.vocabulary.decode(best.token_ids)
    assert captioner.encoder == {"model": "none", "shape": [4]}
    assert (tmp_path / "captioner" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "captioner" / "metrics.jsonl").read_text().count("\n") == len(history)


@pytest.mark.parametrize("image_input", ["first_step", "initial_input"])
def test_rnn_with_wide_features_beats_the_word_frequencies(tmp_path: Path, image_input: Any) -> None:
    wide = write_features(tmp_path / "wide", np.random.default_rng(1).normal(size=(4, 1024)))
    overrides = ["training.epochs=2", "captioner.hidden_size=128", f"captioner.image_input={image_input}"]
    config = load_config(CaptionerTrainingConfig, find_recipe("talk-rnn", "train-captioner"), overrides)
    history = train(wide, tmp_path / "captioner", replace(config, min_count=1, batch_images=8))
    vocabulary = load_captioner(tmp_path / "captioner").vocabulary
    unigram = vocabulary.unigram_perplexity([*vocabulary.encode(text), END] for text in read_captions(wide, ["val"]))
    assert history[-1]["perplexity"] < 0.9 * unigram


def test_diverging_run_ends_with_one_line_and_keeps_its_best_checkpoint(
    features: ShardedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["min_count=1", "batch_images=8", "captioner.hidden_size=16", "captioner.embedding_size=16"]
    values += ["training.learning_rate=50", "training.warmup_steps=4000", "training.patience=null"]
    options = [word for value in values for word in ("--set", value)]
    output = tmp_path / "captioner"
    with pytest.raises(SystemExit) as exit_:
        main(["train-captioner", features.folder.uri, "-o", str(output), "--config", "talk-rnn", "-q", *options])
    assert exit_.value.code == 1
    scores = [json.loads(line)["perplexity"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    best = scores.index(min(scores)) + 1
    error = capsys.readouterr().err
    assert error.startswith("Error: training stopped: expected a")
    assert f"the checkpoint of epoch {best} is kept in {output}" in error
    assert error.count("\n") == 1
    assert best < len(scores)
    load_captioner(output)


def test_validation_perplexity_is_that_of_whole_captions(features: ShardedDataset, tmp_path: Path) -> None:
    training = replace(CONFIG.training, epochs=2, unigram_patience=None)
    history = train(features, tmp_path / "captioner", replace(CONFIG, max_words=1, training=training))
    references = {
        row["image_id"]: row["captions"]
        for shard in range(features.shards)
        for row in features.read(shard).to_pylist()
        if row["split"] == "val"
    }
    metric = measure_perplexity(tmp_path / "captioner", features.folder.uri, references, "cpu")
    assert min(row["perplexity"] for row in history) == pytest.approx(metric.formula(metric.rows.sum(0))[0], rel=1e-3)


def test_vocabulary_is_counted_on_the_training_splits(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, train_splits=("val",), validation_splits=("train",), training=TrainingConfig(epochs=1))
    train(features, tmp_path / "captioner", config)
    vocabulary = load_captioner(tmp_path / "captioner").vocabulary
    assert vocabulary.sentence_count == 2 * 16


def test_same_seed_gives_same_weights(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(epochs=2))
    states = []
    for name in ("one", "two"):
        train(features, tmp_path / name, config)
        states.append(load_captioner(tmp_path / name).model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rejects_split_without_captions_before_training(features: ShardedDataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected captions in split test, got none"):
        train(features, tmp_path / "captioner", replace(CONFIG, validation_splits=("test",)))
    assert not (tmp_path / "captioner" / "config.json").exists()


def test_another_configuration_needs_overwrite(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(epochs=1))
    train(features, tmp_path / "captioner", config)
    other = replace(config, captioner=replace(config.captioner, hidden_size=8))
    with pytest.raises(DatasetError, match=r"captioner\.hidden_size: was 16, now 8"):
        train(features, tmp_path / "captioner", other)
    with pytest.raises(ConfigError, match=r"missing\.txt"):
        train(features, tmp_path / "captioner", replace(other, word_vectors="missing.txt"), overwrite=True)
    assert load_captioner(tmp_path / "captioner").config.hidden_size == 16  # nothing is deleted for a run that fails
    train(features, tmp_path / "captioner", other, overwrite=True)
    assert load_captioner(tmp_path / "captioner").config.hidden_size == 8


@pytest.mark.parametrize(
    "shape", [{}, {"cell": "rnn", "image_input": "every_step"}, {"image_input": "initial_state", "layers": 2}]
)
def test_bfloat16_learns_as_well_as_float32(features: ShardedDataset, tmp_path: Path, shape: dict[str, Any]) -> None:
    training = replace(CONFIG.training, precision="bfloat16", learning_rate=0.01, epochs=15)
    config = replace(CONFIG, captioner=replace(CONFIG.captioner, **shape), training=training)
    bfloat16 = train(features, tmp_path / "rough", config)[-1]["perplexity"]
    float32 = train(features, tmp_path / "exact", replace(config, training=replace(training, precision="float32")))
    assert bfloat16 == pytest.approx(float32[-1]["perplexity"], rel=0.05)


def test_word_vectors_are_initialized_from_a_file(features: ShardedDataset, tmp_path: Path) -> None:
    vectors = {word: np.random.default_rng(number).normal(size=16).round(3) for number, word in enumerate(WORDS)}
    lines = [f"{word} {' '.join(map(str, vector))}\n" for word, vector in vectors.items()]
    (tmp_path / "glove.txt").write_text("".join(lines))
    still = replace(CONFIG.training, epochs=1, learning_rate=1e-9)
    config = replace(CONFIG, word_vectors=str(tmp_path / "glove.txt"), training=still)
    train(features, tmp_path / "captioner", config)
    captioner = load_captioner(tmp_path / "captioner")
    for word, vector in vectors.items():
        (number,) = captioner.vocabulary.encode(word)
        np.testing.assert_allclose(captioner.model.word_vectors.weight[number].detach(), vector, atol=1e-6)
    report = captioner.provenance["word_vectors"]
    missing = {"this", "is", "it", "a", "again"}
    assert (report["found"], report["missing"], set(report["examples"])) == (len(WORDS), len(missing), missing)


def test_rejects_word_vectors_of_another_size(features: ShardedDataset, tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("one 1 2 3\n")
    with pytest.raises(ConfigError, match="embedding size 16, got size 3"):
        train(features, tmp_path / "captioner", replace(CONFIG, word_vectors=str(tmp_path / "glove.txt")))


def test_label_smoothing_keeps_predictions_uncertain(features: ShardedDataset, tmp_path: Path) -> None:
    sharp = train(features, tmp_path / "sharp")[-1]
    smooth = train(features, tmp_path / "smooth", replace(CONFIG, label_smoothing=0.2))[-1]
    assert 1.1 * sharp["perplexity"] < smooth["perplexity"]
    assert smooth["loss"] == pytest.approx(np.log(smooth["perplexity"]), abs=0.2)  # the reported loss is not smoothed


def test_smoothed_loss_is_cross_entropy_with_smoothed_targets(features: ShardedDataset) -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary.from_captions([f"this is {word}" for word in WORDS], 1)
    model = CaptionerNetwork(CONFIG.captioner, 4, len(vocabulary)).eval()
    batches = CaptionBatches(features, ["train"], vocabulary.encode, 8)
    (batch, *_) = batches.in_order()
    plain, smooth = (
        CaptioningObjective(model, batches, batches, lambda *_: None, smoothing).loss(batch) for smoothing in (0.0, 0.1)
    )
    assert plain[1:] == smooth[1:]
    uniform = -model(
        torch.from_numpy(batch.features),
        pad_sentences(batch.sentences),
        torch.from_numpy(batch.image_of_caption),
        True,
    ).mean_log_probs.mean()
    assert smooth[0].item() == pytest.approx((0.9 * plain[0] + 0.1 * uniform).item(), rel=1e-6)


@pytest.mark.skipif(shutil.which("java") is None, reason="CIDEr's tokenizer needs Java")
def test_epoch_with_best_cider_is_saved(features: ShardedDataset, tmp_path: Path) -> None:
    training = replace(CONFIG.training, epochs=12, patience=None)
    config = replace(CONFIG, best_by="cider", decoding=DecodingConfig(beam_width=1), training=training)
    history = train(features, tmp_path / "captioner", config)
    scores = [row["CIDEr"] for row in history]
    assert scores[0] < max(scores)
    kept = load_captioner(tmp_path / "captioner")
    assert kept.training["history"][-1]["CIDEr"] == max(scores)
    batches = CaptionBatches(features, ["val"], kept.vocabulary.encode, 7)
    references = list(read_references(features, ["val"]))
    validation = CiderValidation(batches, references, kept.vocabulary, config.decoding)
    assert validation.score(kept.model) == pytest.approx(max(scores))


def test_statistics_follow_the_feature_power(features: ShardedDataset) -> None:
    vocabulary = Vocabulary.from_captions(read_captions(features, ["train"]), 1)
    model = build_captioner(replace(CONFIG.captioner, feature_power=0.5), features, ["train"], vocabulary)
    seen = torch.cat([model.transform_features(torch.from_numpy(rows).float()) for rows in train_rows(features)])
    torch.testing.assert_close(seen.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.ones(4), atol=0.02, rtol=0)


def train_rows(features: ShardedDataset) -> list[np.ndarray]:
    return [
        rows for shard in range(features.shards) for rows, _ in read_features(features, shard, frozenset(["train"]))
    ]


def test_attention_needs_maps(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, captioner=replace(CONFIG.captioner, attention_size=8))
    with pytest.raises(DatasetError, match="got one vector per image; extract features with pooling none"):
        train(features, tmp_path / "captioner", config)


def test_attention_distinguishes_positions(tmp_path: Path) -> None:
    maps = write_maps(tmp_path / "maps")
    with_attention = replace(CONFIG, captioner=replace(CONFIG.captioner, attention_size=16))
    pooled = train(maps, tmp_path / "pooled")[-1]["perplexity"]
    attention = train(maps, tmp_path / "attention", with_attention)[-1]["perplexity"]
    # Without attention, "one" and "two" are equally probable. Captions have four tokens with END, so the lowest
    # possible perplexity is 2^(1 / 4).
    assert pooled > 2**0.25 - 0.02
    assert attention < 1.05


def test_random_crop_needs_maps(features: ShardedDataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"random_crop .* need feature maps .*, got one vector per image; extract"):
        train(features, tmp_path / "captioner", replace(CONFIG, random_crop=0.5))


@pytest.mark.parametrize("attention_size", [0, 16])
def test_random_crops_change_training_reproducibly(tmp_path: Path, attention_size: int) -> None:
    maps = write_maps(tmp_path / "maps")
    captioner = replace(CONFIG.captioner, attention_size=attention_size)
    config = replace(CONFIG, captioner=captioner, training=replace(CONFIG.training, epochs=3))
    whole, cropped, again = (
        [epoch["loss"] for epoch in train(maps, tmp_path / name, replace(config, random_crop=crop))]
        for name, crop in (("whole", 0.0), ("cropped", 0.3), ("again", 0.3))
    )
    assert cropped == again
    assert cropped != whole


def write_maps(folder: Path) -> ShardedDataset:
    """Writes maps of two objects at the same position or at two positions, which only attention can distinguish."""
    generator = np.random.default_rng(0)
    config = {"encoder": {"model": "none", "shape": [4, 2]}}
    dataset = create_dataset(folder, "features", features_schema(8, "float16"), config=config, shards=1)
    rows = []
    for number in range(96):
        together = number % 2
        first, second = generator.permutation(4)[:2]
        feature_map = np.zeros((4, 2), np.float16)
        feature_map[first, 0] = feature_map[first if together else second, 1] = 5
        split, captions = "val" if number % 6 < 2 else "train", ["it is one" if together else "it is two"]
        rows.append(
            {"image_id": str(number), "uri": "", "split": split, "captions": captions, "features": feature_map.ravel()}
        )
    with write_shard(dataset, 0, len(rows)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=dataset.schema))
    dataset.finish()
    return dataset


def test_init_from_keeps_weights_and_vocabulary(features: ShardedDataset, tmp_path: Path) -> None:
    first = train(features, tmp_path / "first", replace(CONFIG, training=replace(CONFIG.training, epochs=4)))
    still = replace(CONFIG.training, epochs=1, learning_rate=1e-9)
    config = replace(
        CONFIG, captioner=CaptionerConfig(), training=still, min_count=99, init_from=str(tmp_path / "first")
    )
    second = train(features, tmp_path / "second", config)
    best = min(row["perplexity"] for row in first)
    assert second[0]["perplexity"] == pytest.approx(best, rel=1e-5)
    before, after = load_captioner(tmp_path / "first"), load_captioner(tmp_path / "second")
    assert (after.vocabulary, after.config) == (before.vocabulary, before.config)
    assert torch.equal(after.model.standardization.std, before.model.standardization.std)
    assert after.provenance["init_from"]["fingerprint"] == before.fingerprint
    resolved = json.loads((tmp_path / "second" / "resolved.json").read_text())
    assert resolved["init_from_fingerprint"] == before.fingerprint
    assert resolved["captioner"]["hidden_size"] == 16


def test_run_with_another_initial_checkpoint_is_not_resumed(features: ShardedDataset, tmp_path: Path) -> None:
    config = replace(CONFIG, training=TrainingConfig(epochs=1))
    for seed in (1, 2):
        train(
            features, tmp_path / "first", replace(config, training=TrainingConfig(epochs=1, seed=seed)), overwrite=True
        )
        second = replace(config, init_from=str(tmp_path / "first"))
        if seed == 1:
            train(features, tmp_path / "second", second)
    with pytest.raises(DatasetError, match="init_from_fingerprint: was"):
        train(features, tmp_path / "second", second)


def test_rejects_unsuitable_init_from(features: ShardedDataset, tmp_path: Path) -> None:
    first = tmp_path / "first"
    config = replace(CONFIG, training=TrainingConfig(epochs=1), init_from=str(first))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        train(features, tmp_path / "second", config)
    train(features, first, replace(config, init_from=None))
    other = replace(config, captioner=replace(CONFIG.captioner, cell="rnn", hidden_size=8))
    with pytest.raises(ConfigError, match=r"cell: was 'lstm', now 'rnn'; hidden_size: was 16, now 8\); leave"):
        train(features, tmp_path / "second", other)
    with pytest.raises(ConfigError, match="is also the output of this run"):
        train(features, first, config, overwrite=True)
    saved = load_captioner(first)
    save_captioner(first, saved.model, saved.vocabulary, {"model": "vgg16", "shape": [4]}, provenance={}, training={})
    with pytest.raises(CheckpointError, match="model: expected 'vgg16', got 'none'"):
        train(features, tmp_path / "second", config)
    with pytest.raises(ConfigError, match="word_vectors: expected none with init_from"):
        replace(config, word_vectors="glove.txt")
