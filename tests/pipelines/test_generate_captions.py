import dataclasses
import json
from pathlib import Path

import pytest
import torch

from captionlib.data.shards.dataset import ShardedDataset, open_dataset
from captionlib.errors import CheckpointError, ConfigError, DatasetError, FetchError, FingerprintError
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.models.inference.extraction import ExtractionConfig
from captionlib.training.finetuning import EncoderFinetuningConfig, FinetuningConfig, finetune_captioner
from captionlib.training.loop import TrainingConfig
from pipelines.extract_features import extract_features
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.pipelines.conftest import write_manifest

QUIET = RunConfig(max_failure_ratio=0.5, progress=False)
GENERATION = GenerationConfig(DecodingConfig(beam_width=3, n_best=2), batch_size=3, encoder_batch_size=3)


def caption(source: Path | str, captioner: Path, output: Path, run: RunConfig = QUIET) -> ShardedDataset:
    generate_captions(source, captioner, output, GENERATION, device="cpu", run=run)
    return open_dataset(output, "captions").require_complete()


def rows(dataset: ShardedDataset) -> list[dict[str, object]]:
    return [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]


def test_rows_contain_the_best_caption_and_the_n_best_list(features: Path, captioner: Path, tmp_path: Path) -> None:
    captions = rows(caption(features, captioner, tmp_path / "captions"))
    assert [row["image_id"] for row in captions] == [row["image_id"] for row in rows(open_dataset(features))]
    for row in captions:
        candidates = row["candidates"]
        assert isinstance(candidates, list)
        assert len(candidates) == 2
        assert (candidates[0]["caption"], candidates[0]["log_prob"]) == (row["caption"], row["log_prob"])
        assert candidates[0]["caption"] != candidates[1]["caption"]


def test_log_probabilities_equal_those_of_the_model(features: Path, captioner: Path, tmp_path: Path) -> None:
    dataset = caption(features, captioner, tmp_path / "captions")
    loaded = load_captioner(captioner)
    for row, source in zip(rows(dataset), rows(open_dataset(features)), strict=True):
        ids = torch.tensor([loaded.vocabulary.encode(str(row["caption"]))], dtype=torch.int64)
        vector = torch.tensor([source["features"]])
        with torch.inference_mode():
            scores = loaded.model(vector, ids, torch.zeros(1, dtype=torch.int64))
        if row["tokens"] == len(ids[0]) + 1:  # else max_tokens truncated it
            assert row["log_prob"] == pytest.approx(scores.log_probs.sum().item(), abs=1e-3)


def test_images_and_features_give_the_same_captions(
    manifest: ShardedDataset, features: Path, captioner: Path, tmp_path: Path
) -> None:
    from_features = caption(features, captioner, tmp_path / "captions")
    from_images = caption(manifest.folder.uri, captioner, tmp_path / "captions-from-images")
    assert rows(from_features) == rows(from_images)
    assert from_images.compute_totals().failures == 2


def test_repeated_bundles_write_identical_files(features: Path, captioner: Path, tmp_path: Path) -> None:
    once = caption(features, captioner, tmp_path / "once")
    twice = dataclasses.replace(QUIET, beam_options=("--direct_runner_bundle_repeat=1",))
    again = caption(features, captioner, tmp_path / "twice", twice)
    for shard in range(once.shards):
        assert Path(once.get_part_path(shard)).read_bytes() == Path(again.get_part_path(shard)).read_bytes()


def test_samples_do_not_depend_on_the_batch(features: Path, captioner: Path, tmp_path: Path) -> None:
    sampled = []
    for batch_size in (2, 5):
        config = GenerationConfig(DecodingConfig(strategy="sample", n_best=3), batch_size=batch_size)
        generate_captions(features, captioner, tmp_path / f"{batch_size}", config, device="cpu", run=QUIET)
        sampled.append([row["candidates"] for row in rows(open_dataset(tmp_path / f"{batch_size}"))])
    texts = [[[candidate["caption"] for candidate in candidates] for candidates in run] for run in sampled]  # type: ignore[attr-defined]
    assert texts[0] == texts[1]
    assert len({candidates[0] for candidates in texts[0]}) > 1


def test_forbidden_words_appear_in_no_caption(features: Path, captioner: Path, tmp_path: Path) -> None:
    def write(forbidden: tuple[str, ...], output: Path) -> list[list[str]]:
        decoding = dataclasses.replace(GENERATION.decoding, forbidden_words=forbidden, min_words=3)
        config = dataclasses.replace(GENERATION, decoding=decoding)
        generate_captions(features, captioner, output, config, device="cpu", run=QUIET)
        return [str(row["caption"]).split() for row in rows(open_dataset(output))]

    word = write((), tmp_path / "free")[0][0]
    constrained = write((word.upper(),), tmp_path / "constrained")
    assert not any(word in words for words in constrained)
    assert all(len(words) >= 3 for words in constrained)


def test_different_decoding_into_the_same_folder_is_rejected(features: Path, captioner: Path, tmp_path: Path) -> None:
    caption(features, captioner, tmp_path / "captions")
    other = dataclasses.replace(GENERATION, decoding=dataclasses.replace(GENERATION.decoding, beam_width=2))
    with pytest.raises(FingerprintError, match=r"decoding.beam_width: was 3, now 2"):
        generate_captions(features, captioner, tmp_path / "captions", other, run=QUIET)


def test_features_of_another_encoder_are_rejected(
    manifest: ShardedDataset, captioner: Path, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    encoder = dataclasses.replace(small_encoder.encoder, weights="random:7")
    other = dataclasses.replace(small_encoder, encoder=encoder)
    extract_features(manifest.folder.uri, tmp_path / "other", other, run=QUIET)
    with pytest.raises(CheckpointError, match="weights"):
        caption(tmp_path / "other", captioner, tmp_path / "captions")
    assert not (tmp_path / "captions").exists()


def test_damaged_and_missing_checkpoints_are_rejected(features: Path, captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        caption(features, tmp_path / "missing", tmp_path / "captions")
    config = json.loads((captioner / "config.json").read_text())
    (captioner / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(CheckpointError, match="captioner"):
        caption(features, captioner, tmp_path / "captions")


def test_a_captions_dataset_is_not_a_source(features: Path, captioner: Path, tmp_path: Path) -> None:
    caption(features, captioner, tmp_path / "captions")
    with pytest.raises(DatasetError, match="expected a dataset of kind features or manifest, got captions"):
        caption(tmp_path / "captions", captioner, tmp_path / "more")


def test_embeddings_need_a_folder_of_their_own(features: Path, captioner: Path, tmp_path: Path) -> None:
    for embeddings in (tmp_path / "captions", f"{tmp_path}/captions/"):
        with pytest.raises(ConfigError, match="--output and --embeddings: expected different folders"):
            generate_captions(features, captioner, tmp_path / "captions", ranker="x", embeddings=embeddings)


def test_weights_are_rejected_if_nothing_is_encoded(features: Path, captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights is for encoding images"):
        generate_captions(features, captioner, tmp_path / "captions", GENERATION, weights="w.pth", run=QUIET)


def test_single_images_get_the_same_captions_as_in_a_dataset(
    features: Path, captioner: Path, tmp_path: Path, images: list[str]
) -> None:
    captions = {row["uri"]: row for row in rows(caption(features, captioner, tmp_path / "captions"))}
    got, failures = caption_images([images[4], images[0], images[9]], str(captioner), GENERATION, device="cpu")
    assert [row["uri"] for row in got] == [images[4], images[0]]
    for row in got:
        assert row["caption"] == captions[row["uri"]]["caption"]
    assert [(uri, type(error)) for uri, error in failures] == [(images[9], FetchError)]


def test_a_finetuned_captioner_contains_its_encoder(
    manifest: ShardedDataset, features: Path, captioner: Path, tmp_path: Path, small_encoder: ExtractionConfig
) -> None:
    training = TrainingConfig(epochs=1, optimizer="adam", learning_rate=0.01)
    tuning = FinetuningConfig(str(captioner), EncoderFinetuningConfig(1e-3), training, max_failure_ratio=0.5)
    finetune_captioner(manifest.folder.uri, tmp_path / "finetuned", tuning, device="cpu", progress=False)
    from_images = rows(caption(manifest.folder.uri, tmp_path / "finetuned", tmp_path / "captions-from-images"))
    alone, _ = caption_images([str(from_images[0]["uri"])], str(tmp_path / "finetuned"), GENERATION, device="cpu")
    for candidate, expected in zip(alone[0]["candidates"], from_images[0]["candidates"], strict=True):
        assert candidate["caption"] == expected["caption"]
        assert candidate["log_prob"] == pytest.approx(expected["log_prob"], rel=1e-6)  # batch sizes differ

    encoder = dataclasses.replace(small_encoder.encoder, weights=str(tmp_path / "finetuned" / "encoder.safetensors"))
    extraction = dataclasses.replace(small_encoder, encoder=encoder)
    extract_features(manifest.folder.uri, tmp_path / "features-finetuned", extraction, run=QUIET)
    assert rows(caption(tmp_path / "features-finetuned", tmp_path / "finetuned", tmp_path / "captions")) == from_images
    with pytest.raises(CheckpointError, match="weights_sha256"):
        caption(features, tmp_path / "finetuned", tmp_path / "captions-original")


def test_captions_do_not_depend_on_the_other_images(
    features: Path, captioner: Path, tmp_path: Path, small_encoder: ExtractionConfig, images: list[str]
) -> None:
    together = {row["image_id"]: row["caption"] for row in rows(caption(features, captioner, tmp_path / "captions"))}
    write_manifest(tmp_path / "alone", images[:1])
    alone = rows(caption(str(tmp_path / "alone"), captioner, tmp_path / "captions-alone"))
    assert [row["caption"] for row in alone] == [together["red.png"]]
