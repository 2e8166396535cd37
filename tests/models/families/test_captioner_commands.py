"""The commands that read captioners of Hugging Face Transformers: serve, evaluate and report."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import snapshot_download

from captionlib.errors import CheckpointError, ConfigError, DatasetError
from captionlib.evaluation.bootstrap import BootstrapConfig
from captionlib.evaluation.evaluate import evaluate_captions
from captionlib.evaluation.perplexity import measure_perplexity
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.families import huggingface
from captionlib.models.families.captioner import CaptionModel, SentenceScorer, open_captioner
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.search.models import ImageQueryModels
from jobs.cli import captionlib
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig
from tests.models.families import tiny_models
from tests.pipelines.conftest import images, write_manifest

__all__ = ["images"]

CONFIG = GenerationConfig(DecodingConfig(beam_width=2, n_best=2, max_tokens=6))
SENTENCES = ["a red circle on a table", "a small dog", "a dog next to a green ring"]


@pytest.fixture(scope="module", params=["blip", "git", "vit_gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = getattr(tiny_models, f"write_{request.param}")
    written: Path = write(tmp_path_factory.mktemp("models") / request.param)
    return written


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, images: list[str], blip: Path) -> Path:
    """A manifest and the captions of its images."""
    folder = tmp_path_factory.mktemp("captioned")
    write_manifest(folder / "manifest", images)
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    generate_captions(folder / "manifest", f"hf:{blip}", folder / "captions", CONFIG, device="cpu", run=run)
    return folder


def score(model: object, pixels: list[np.ndarray], sentences: list[list[str]]) -> list[list[tuple[float, int]]]:
    assert isinstance(model, SentenceScorer)
    return model.score_sentences(pixels, sentences)


def test_probabilities_of_sentences_equal_those_of_a_pass_over_the_whole_sentence(folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    from tests.models.families.test_captioners import score_sequence

    pixels = list(np.random.default_rng(0).integers(0, 256, (2, tiny_models.SIDE, tiny_models.SIDE, 3), np.uint8))
    scores = score(open_captioner(f"hf:{folder}"), pixels, [SENTENCES, SENTENCES[1:2]])
    assert [len(per_image) for per_image in scores] == [3, 1]
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    values = AutoImageProcessor.from_pretrained(folder)(images=pixels, return_tensors="pt")["pixel_values"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start, end = (0, 0) if "gpt2" in folder.name else (2, 3)
    for image, per_image in enumerate(scores):
        for text, (log_prob, count) in zip(SENTENCES if image == 0 else SENTENCES[1:2], per_image, strict=True):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            with torch.inference_mode():
                expected = score_sequence(model, values[image], torch.tensor([start, *ids, end]))
            assert count == len(ids) + 1 == len(expected)
            assert log_prob == pytest.approx(expected.sum().item(), abs=1e-4)
    assert scores[0][1][0] != scores[1][0][0], "the probability depends on the image"


def test_tokens_of_a_batch_of_sentences_are_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = open_captioner(f"hf:{folder}")
    pixels = [np.full((tiny_models.SIDE, tiny_models.SIDE, 3), value, np.uint8) for value in (0, 200)]
    sentences = [[*SENTENCES, "a dog"], [" ".join(["dog"] * 15), *SENTENCES]]
    expected = score(captioner, pixels, sentences)
    monkeypatch.setattr("captionlib.models.families.huggingface_scoring._MAX_TOKENS", 40)
    sizes: list[int] = []
    model = captioner._model  # type: ignore[attr-defined]
    decoder = model if folder.name == "git" else model.text_decoder if folder.name == "blip" else model.decoder
    decoder.get_output_embeddings().register_forward_pre_hook(
        lambda _module, arguments: sizes.append(arguments[0].shape[:2].numel())
    )
    for per_image, other in zip(score(captioner, pixels, sentences), expected, strict=True):
        assert per_image == [(pytest.approx(log_prob, abs=1e-4), count) for log_prob, count in other]
    assert len(sizes) > 1
    assert max(sizes) <= (80 if folder.name == "git" else 40)  # GIT also computes logits of the positions of the image


def test_references_without_words_are_not_scored(folder: Path) -> None:
    pixels = [np.zeros((tiny_models.SIDE, tiny_models.SIDE, 3), np.uint8)] * 2
    captioner = open_captioner(f"hf:{folder}")
    assert score(captioner, pixels, [[""], []]) == [[(0, 0)], []]
    (empty, dog), (alone,) = score(captioner, pixels, [["", "a dog"], ["a dog"]])
    assert empty == (0, 0)
    assert dog == (pytest.approx(alone[0], abs=1e-4), alone[1])


def test_a_reference_that_is_longer_than_the_model_supports_is_an_error(folder: Path) -> None:
    pixels = [np.zeros((tiny_models.SIDE, tiny_models.SIDE, 3), np.uint8)]
    captioner = open_captioner(f"hf:{folder}")
    with pytest.raises(DatasetError, match=r"expected references of at most 63 tokens, .* got one of "):
        score(captioner, pixels, [["a dog", "dog " * 100]])


def test_evaluate_computes_the_perplexity_from_the_images_of_the_manifest(
    captioned: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # hides Java, because METEOR takes seconds
    evaluation = evaluate_captions(
        captioned / "captions",
        captioned / "manifest",
        checkpoint=f"hf:{blip}",
        bootstrap=BootstrapConfig(samples=5),
        device="cpu",
    )
    references = {prediction.image_id: prediction.references for prediction in evaluation.predictions}
    metric = measure_perplexity(f"hf:{blip}", captioned / "manifest", references, "cpu")
    loss, count = metric.rows.sum(0)
    assert evaluation.scores.overall["perplexity"] == pytest.approx(math.exp(loss / count))
    assert len(metric.rows) == 8


def test_evaluate_explains_images_and_captioners_that_cannot_be_scored(
    captioned: Path, blip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match="1 of 1 images cannot be read, such as broken"):
        measure_perplexity(f"hf:{blip}", captioned / "manifest", {"broken.png": ["a dog"]}, "cpu")
    captioner = open_captioner(f"hf:{blip}")
    captioner._type = "qwen2_vl"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="answers prompts, and the perplexity of its answers is not supported"):
        score(captioner, [np.zeros((32, 32, 3), np.uint8)], [["a dog"]])
    monkeypatch.setattr("captionlib.evaluation.perplexity.open_captioner", lambda *_: object())
    with pytest.raises(CheckpointError, match="this captioner does not compute the probability"):
        measure_perplexity(f"hf:{blip}", captioned / "manifest", {"red.png": ["a dog"]}, "cpu")


def test_report_shows_captions_without_training_curves(captioned: Path, blip: Path, tmp_path: Path) -> None:
    arguments = ["report", captioned / "captions", "-o", tmp_path / "page", "-c", f"hf:{blip}", "--no-progress"]
    result = CliRunner().invoke(captionlib, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    assert f"Note: hf:{blip} has no training history, so the page shows no curves" in result.stderr
    assert result.stdout.endswith("index.html: 8 images\n")


def test_uploaded_images_get_the_captions_of_the_image_files(blip: Path, images: list[str]) -> None:
    address = f"hf:{blip}"
    (row,), _ = caption_images(images[:1], address, CONFIG, device="cpu")
    with ImageQueryModels(captioner=address, device="cpu", generation=CONFIG) as models:
        captions = models.caption(Path(images[0]).read_bytes()).to_pylist()
    assert [caption["caption"] for caption in captions] == [each["caption"] for each in row["candidates"]]


def test_attention_maps_and_default_settings(blip: Path, images: list[str]) -> None:
    with pytest.raises(ConfigError, match="attention_maps: models with the prefix hf: do not support it"):
        ImageQueryModels(captioner=f"hf:{blip}", device="cpu", generation=GenerationConfig(attention_maps=True))
    (row,), _ = caption_images(images[:1], f"hf:{blip}", device="cpu")
    assert 1 <= row["tokens"] <= 40


def test_a_revision_selects_the_files_and_so_the_fingerprint(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a cache as `huggingface_hub` writes it, with a branch, its commit, and an earlier commit."""
    repository = tmp_path / "models--organization--blip"
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        for path in blip.iterdir():
            content = path.read_bytes()
            if path.name == "generation_config.json":
                content = content.rstrip(b"}\n ") + f',\n "max_time": {100 + number}\n}}'.encode()
            (folder / path.name).write_bytes(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr(
        huggingface, "snapshot_download", partial(snapshot_download, cache_dir=tmp_path, local_files_only=True)
    )

    def fingerprint(revision: str) -> str:
        captioner: CaptionModel = open_captioner(f"hf:organization/blip@{revision}")
        return captioner.fingerprint

    assert fingerprint("main") == fingerprint("b" * 40) != fingerprint("a" * 40)
    with pytest.raises(ConfigError, match=r"hf:organization/blip@v2 cannot be downloaded .* check name, revision"):
        open_captioner("hf:organization/blip@v2")
