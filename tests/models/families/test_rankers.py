"""What every family of rankers has to do: one suite for those of captionlib and of Hugging Face Transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from captionlib.data.images.decoding import Preprocessing
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError, FingerprintError
from captionlib.models.checkpoints.checkpoint import save_ranker
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.families.encoder import open_encoder
from captionlib.models.families.ranker import RankingModel, open_ranker
from captionlib.models.inference.embedding import EmbeddingConfig
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork
from pipelines.embed_images import embed_images
from pipelines.run import RunConfig
from tests.models.families import tiny_models
from tests.models.families.conformance import (
    assert_pixels_equal_those_of_the_processor,
    assert_unsafe_files_are_refused,
    change_model,
    draw_inputs,
    draw_pixels,
    remove_tensors,
)
from tests.pipelines.conftest import write_images, write_manifest

WRITERS: dict[str, Callable[[Path], Path]] = {"clip": tiny_models.write_clip, "siglip": tiny_models.write_siglip}
SENTENCES = [
    "a red ring",
    "a blue square on a table next to a small dog",
    "dog",
    "a green circle",
    "a red ring on a table",
]


def write_own(folder: Path) -> Path:
    encoder = open_encoder(EncoderConfig("squeezenet1_1", "features.4.cat", "random:0", pooling="mean"), "cpu")
    vocabulary = Vocabulary.from_captions(tiny_models.SENTENCES, 1)
    torch.manual_seed(0)
    config = RankerConfig(hidden_size=8, embedding_size=8, joint_embedding_size=16)
    model = RankerNetwork(config, encoder.shape[0], len(vocabulary))
    save_ranker(folder, model, vocabulary, encoder.description, provenance={}, training={})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models. Tests must not change them."""
    folder = tmp_path_factory.mktemp("rankers")
    return {"own": write_own(folder / "own"), **{name: write(folder / name) for name, write in WRITERS.items()}}


@pytest.fixture(scope="module", params=["own", *WRITERS])
def address(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    return str(folders["own"]) if request.param == "own" else f"hf:{folders[request.param]}"


@pytest.fixture(scope="module")
def ranker(address: str) -> RankingModel:
    return open_ranker(address)


@pytest.fixture(scope="module", params=WRITERS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(ranker: RankingModel) -> None:
    for encode, inputs in ((ranker.encode_images, draw_inputs(ranker.encoder)), (ranker.encode_sentences, SENTENCES)):
        together = encode(inputs)  # type: ignore[arg-type]
        assert together.shape == (5, ranker.size)
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        assert np.array_equal(encode(inputs), together)  # type: ignore[arg-type]
        np.testing.assert_allclose(encode(inputs[::-1])[::-1], together, atol=1e-5)  # type: ignore[arg-type]
        alone = np.concatenate([encode(inputs[index : index + 1]) for index in range(5)])  # type: ignore[arg-type]
        np.testing.assert_allclose(alone, together, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-3
        assert encode(inputs[:0]).shape == (0, ranker.size) if inputs is SENTENCES else True  # type: ignore[arg-type]


def test_many_and_long_sentences_are_embedded_in_batches(ranker: RankingModel) -> None:
    sentences = [f"{SENTENCES[index % 5]}{' dog' * (index % 40)}" for index in range(600)]
    vectors = ranker.encode_sentences(sentences)
    for index in (0, 123, 599):
        np.testing.assert_allclose(vectors[index], ranker.encode_sentences([sentences[index]])[0], atol=1e-5)


def test_known_words_are_recognized(ranker: RankingModel) -> None:
    assert ranker.has_known_word("dog")
    assert not ranker.has_known_word("")


def test_features_of_another_encoder_are_refused(ranker: RankingModel) -> None:
    with pytest.raises(CheckpointError, match=r"got features|different encoder"):
        ranker.require_encoder({"model": "vgg16", "shape": [4096], "weights": "file"})
    ranker.require_encoder(ranker.encoder)


def test_a_run_resumes_and_refuses_another_ranker(address: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest", write_images(tmp_path / "images"))
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    arguments = (tmp_path / "manifest", address, tmp_path / "embeddings", EmbeddingConfig(encoder_batch_size=3))
    assert embed_images(*arguments, device="cpu", run=run).failures == 2
    dataset = open_dataset(tmp_path / "embeddings").require_complete()
    content = Path(dataset.get_part_path(1)).read_bytes()
    dataset.remove_marker(1)
    embed_images(*arguments, device="cpu", run=run)
    assert Path(dataset.get_part_path(1)).read_bytes() == content
    other = f"hf:{folders['siglip' if 'clip' in address and 'siglip' not in address else 'clip']}"
    with pytest.raises(FingerprintError):
        embed_images(tmp_path / "manifest", other, tmp_path / "embeddings", device="cpu", run=run)


def test_embeddings_equal_those_of_transformers(folder: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    ranker = open_ranker(f"hf:{folder}")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    images = draw_pixels(32)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, do_resize=False, return_tensors="pt")
    padding = {"padding": "max_length", "max_length": 24} if folder.name == "siglip" else {"padding": True}
    names = ["input_ids"] if folder.name == "siglip" else ["input_ids", "attention_mask"]
    tokens = tokenizer(SENTENCES, return_tensors="pt", **padding)
    with torch.inference_mode():
        output = model(pixel_values=pixels["pixel_values"], **{name: tokens[name] for name in names})
    np.testing.assert_allclose(ranker.encode_images(images), output.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(ranker.encode_sentences(SENTENCES), output.text_embeds.numpy(), atol=1e-4)


def test_pixels_equal_those_of_the_processor(folder: Path) -> None:
    source = open_ranker(f"hf:{folder}").find_input_transform(None)
    assert isinstance(source, Preprocessing)  # decoder processes prepare the images
    assert_pixels_equal_those_of_the_processor(folder, source)


def test_files_that_can_run_code_are_refused(address: str, tmp_path: Path) -> None:
    assert_unsafe_files_are_refused(address, tmp_path, open_ranker)


def test_changed_files_change_the_fingerprint(address: str, ranker: RankingModel, tmp_path: Path) -> None:
    assert open_ranker(address).fingerprint == ranker.fingerprint
    assert open_ranker(change_model(address, tmp_path / "copy")).fingerprint != ranker.fingerprint


def test_random_weights_do_not_pass_for_trained_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    address = remove_tensors(folders["clip"], tmp_path / "copy", "text_projection.weight")
    with pytest.raises(CheckpointError, match=r"the weights lack 1 tensors, among them text_projection.weight"):
        open_ranker(address)


def test_models_of_images_alone_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_vit(tmp_path / "vit")
    with pytest.raises(CheckpointError, match=r"expected a dual encoder of images and text, .* got ViTModel"):
        open_ranker(f"hf:{folder}")


def test_a_template_embeds_sentences_in_a_text(folder: Path) -> None:
    plain, templated = open_ranker(f"hf:{folder}"), open_ranker(f"hf:{folder}?template=a {{}} on a table")
    np.testing.assert_allclose(
        templated.encode_sentences(["red ring"]), plain.encode_sentences(["a red ring on a table"]), atol=1e-6
    )
    assert (templated.sentence_template, plain.sentence_template) == ("a {} on a table", None)
    assert templated.fingerprint == plain.fingerprint  # the embeddings of images are the same
    for option in ("template=a photo", "templat={}", ""):
        with pytest.raises(ConfigError, match=r"expected \?template= and a text with one \{\}"):
            open_ranker(f"hf:{folder}?{option}")


def test_batches_that_exceed_the_memory_are_halved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker: Any = open_ranker(f"hf:{folder}")
    images = draw_pixels(32)
    expected = ranker.encode_images(images), ranker.encode_sentences(SENTENCES)
    sizes: list[int] = []

    def run_out_of_memory(run: Any, **inputs: Any) -> Any:
        sizes.append(len(next(iter(inputs.values()))))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return run(**inputs)

    for name in ("get_image_features", "get_text_features"):
        run = getattr(ranker._model, name)
        monkeypatch.setattr(ranker._model, name, lambda run=run, **inputs: run_out_of_memory(run, **inputs))
    np.testing.assert_allclose(ranker.encode_images(images), expected[0], atol=1e-5)
    np.testing.assert_allclose(ranker.encode_sentences(SENTENCES), expected[1], atol=1e-5)
    assert sizes == [5, 2, 3, 1, 2] * 2
