"""What every family of captioners has to do: one suite for those of captionlib and of Hugging Face Transformers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from captionlib.data.images.decoding import Preprocessing
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.shards.markers import marker_file
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import CheckpointError, ConfigError, FingerprintError, StorageError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.rerank import RerankConfig
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.families.captioner import Caption, CaptionModel, SentenceScorer, open_captioner
from captionlib.models.families.registry import resolve_model_address
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from pipelines.generate_captions import generate_captions
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

BEAM = GenerationConfig(DecodingConfig(beam_width=4, n_best=3, max_tokens=8), batch_size=3)
GREEDY = dataclasses.replace(BEAM, decoding=DecodingConfig(beam_width=1, max_tokens=8))
SAMPLES = dataclasses.replace(BEAM, decoding=DecodingConfig(strategy="sample", n_best=3, max_tokens=8, temperature=0.7))
KEYS = ["a", "b", "c", "d", "e"]
WRITERS: dict[str, Callable[[Path], Path]] = {
    "blip": tiny_models.write_blip,
    "git": tiny_models.write_git,
    "vit_gpt2": tiny_models.write_vit_gpt2,
}


# The captioners that captionlib trains: the architecture, and the pooling of the features.
OWN: dict[str, tuple[CaptionerConfig, Literal["none", "mean"]]] = {
    "lstm": (CaptionerConfig("lstm", layers=2, hidden_size=6, embedding_size=5), "mean"),
    "transformer": (CaptionerConfig("transformer", layers=2, hidden_size=6, embedding_size=6, heads=2), "none"),
}


def write_own(folder: Path, architecture: CaptionerConfig, pooling: Literal["none", "mean"]) -> Path:
    vocabulary = Vocabulary.from_captions(["a dog on grass", "a red cat ring"], 1)
    encoder = load_encoder(EncoderConfig("squeezenet1_1", "features.7.cat", "random:0", pooling=pooling), "cpu")
    model = CaptionerNetwork(architecture, encoder.shape[-1], len(vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    save_captioner(folder, model, vocabulary, encoder.description, provenance={}, training={})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models. Tests must not change them."""
    folder = tmp_path_factory.mktemp("families")
    written = {name: write(folder / name) for name, write in WRITERS.items()}
    return written | {name: write_own(folder / name, *arguments) for name, arguments in OWN.items()}


@pytest.fixture(scope="module", params=[*WRITERS, *OWN])
def address(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    return str(folders[request.param]) if request.param in OWN else f"hf:{folders[request.param]}"


@pytest.fixture(scope="module")
def captioner(address: str) -> CaptionModel:
    return open_captioner(address)


@pytest.fixture(scope="module", params=WRITERS)
def transformers_folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def assert_same(some: list[list[Caption]], others: list[list[Caption]]) -> None:
    texts, expected = ([[caption.text for caption in captions] for captions in each] for each in (some, others))
    assert texts == expected
    log_probs, expected_log_probs = ([caption.log_prob for per in each for caption in per] for each in (some, others))
    np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-4)


def test_captions_are_distinct_and_ordered_by_normalized_probability(captioner: CaptionModel) -> None:
    for config in (BEAM, SAMPLES):
        for captions in captioner.prepare(config)(draw_inputs(captioner.encoder), KEYS):
            assert 1 <= len(captions) <= 3
            assert len({caption.text for caption in captions}) == len(captions)
            scores = [caption.log_prob / caption.token_count**0.7 for caption in captions]
            assert scores == sorted(scores, reverse=True)
            assert all(1 <= caption.token_count <= 8 and caption.log_prob < 0 for caption in captions)


@pytest.mark.parametrize("config", [BEAM, GREEDY, SAMPLES], ids=["beam", "greedy", "samples"])
def test_captions_do_not_depend_on_the_batch(captioner: CaptionModel, config: GenerationConfig) -> None:
    images, generate = draw_inputs(captioner.encoder), captioner.prepare(config)
    together = generate(images, KEYS)
    assert_same(together, generate(images, KEYS))
    assert_same(together, [generate(images[index : index + 1], [key])[0] for index, key in enumerate(KEYS)])
    assert_same(together, generate(images[::-1], KEYS[::-1])[::-1])


def test_samples_depend_on_the_seed(captioner: CaptionModel) -> None:
    other = dataclasses.replace(SAMPLES, decoding=dataclasses.replace(SAMPLES.decoding, seed=1))
    images = draw_inputs(captioner.encoder)
    assert captioner.prepare(SAMPLES)(images, KEYS) != captioner.prepare(other)(images, KEYS)


def test_batches_that_exceed_the_memory_are_halved(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = open_captioner(address)
    images = draw_inputs(captioner.encoder)
    expected = captioner.prepare(BEAM)(images, KEYS)
    loaded = getattr(captioner, "_model", None) or captioner._loaded.model  # type: ignore[attr-defined]
    run = (name := "generate" if hasattr(loaded, "generate") else "encode_images") and getattr(loaded, name)
    sizes: list[int] = []

    def run_out_of_memory(*arguments: Any, **options: Any) -> Any:
        sizes.append(len(options.get("pixel_values", arguments[0] if arguments else None)))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        return run(*arguments, **options)

    monkeypatch.setattr(loaded, name, run_out_of_memory)
    assert_same(captioner.prepare(BEAM)(images, KEYS), expected)
    assert sizes == [5, 2, 3, 1, 2]


def test_bfloat16_computes_about_the_same_probabilities(captioner: CaptionModel) -> None:
    images = draw_inputs(captioner.encoder)
    exact = captioner.prepare(GREEDY)(images, KEYS)
    rounded = captioner.prepare(dataclasses.replace(GREEDY, dtype="bfloat16"))(images, KEYS)
    same = [(a.log_prob, b.log_prob) for (a,), (b,) in zip(exact, rounded, strict=True) if a.text == b.text]
    assert same
    assert all(a == pytest.approx(b, rel=0.1, abs=0.1) and a != b for a, b in same)
    assert_same(captioner.prepare(GREEDY)(images, KEYS), exact)  # the float32 weights are still there


def test_a_run_resumes_and_refuses_other_settings(address: str, tmp_path: Path) -> None:
    uris = write_images(tmp_path / "images")
    write_manifest(tmp_path / "manifest", uris)
    run = RunConfig(max_failure_ratio=0.5, progress=False)
    arguments = (tmp_path / "manifest", address, tmp_path / "captions")
    assert generate_captions(*arguments, BEAM, device="cpu", run=run).failures == 2
    dataset = open_dataset(tmp_path / "captions").require_complete()
    files = [Path(dataset.get_part_path(shard)) for shard in range(dataset.shards)]
    contents = [file.read_bytes() for file in files]
    dataset.folder.remove(marker_file(1))
    times = [file.stat().st_mtime_ns for file in files]
    generate_captions(*arguments, BEAM, device="cpu", run=run)
    assert [file.read_bytes() for file in files] == contents
    assert [file.stat().st_mtime_ns == before for file, before in zip(files, times, strict=True)] == [True, False, True]
    with pytest.raises(FingerprintError, match=r"decoding.length_penalty"):
        other = dataclasses.replace(BEAM, decoding=dataclasses.replace(BEAM.decoding, length_penalty=1.0))
        generate_captions(*arguments, other, device="cpu", run=run)
    rows = [row for shard in range(dataset.shards) for row in dataset.read(shard).to_pylist()]
    alone, _ = caption_images([row["uri"] for row in rows[:2]], address, BEAM, device="cpu")
    assert [row["caption"] for row in alone] == [row["caption"] for row in rows[:2]]


def test_changed_files_change_the_fingerprint(address: str, captioner: CaptionModel, tmp_path: Path) -> None:
    assert open_captioner(address).fingerprint == captioner.fingerprint
    assert open_captioner(change_model(address, tmp_path / "copy")).fingerprint != captioner.fingerprint


def test_files_that_can_run_code_are_refused(address: str, tmp_path: Path) -> None:
    assert_unsafe_files_are_refused(address, tmp_path, open_captioner)


@pytest.mark.parametrize("name", OWN)
def test_probabilities_equal_those_of_a_pass_over_the_whole_sentence(folders: dict[str, Path], name: str) -> None:
    """The same test of the other families is in test_captioner_commands.py."""
    captioner = open_captioner(str(folders[name]))
    assert isinstance(captioner, SentenceScorer)
    images = draw_inputs(captioner.encoder)
    decoding = DecodingConfig(strategy="sample", n_best=4, max_tokens=30)
    captions = captioner.prepare(GenerationConfig(decoding))(images, KEYS)
    complete = [[each for each in per_image if each.text and each.token_count < 30] for per_image in captions]
    assert sum(map(len, complete)) >= 5
    scores = captioner.score_sentences(images, [[each.text for each in per_image] for per_image in complete])
    for per_image, expected in zip(complete, scores, strict=True):
        assert [each.token_count for each in per_image] == [count for _, count in expected]
        log_probs = [log_prob for log_prob, _ in expected]
        np.testing.assert_allclose([each.log_prob for each in per_image], log_probs, atol=1e-4)


def test_random_weights_do_not_pass_for_trained_ones(transformers_folder: Path, tmp_path: Path) -> None:
    removed = {
        "blip": "text_decoder.bert.encoder.layer.1.output.dense.weight",
        "git": "git.encoder.layer.1.output.dense.weight",
        "vit_gpt2": "decoder.transformer.h.1.mlp.c_fc.weight",
    }[transformers_folder.name]
    with pytest.raises(CheckpointError, match=rf"the weights lack 1 tensors, among them {removed}"):
        open_captioner(remove_tensors(transformers_folder, tmp_path / "copy", removed))


def test_captioners_do_not_need_a_pooled_vector(folders: dict[str, Path], tmp_path: Path) -> None:
    address = remove_tensors(folders["vit_gpt2"], tmp_path / "copy", "pooler")
    images = draw_pixels(tiny_models.SIDE)
    expected = open_captioner(f"hf:{folders['vit_gpt2']}").prepare(GREEDY)(images, KEYS)
    assert_same(open_captioner(address).prepare(GREEDY)(images, KEYS), expected)


@pytest.mark.parametrize(
    ("name", "decoding"),
    [
        ("min_words", DecodingConfig(min_words=3)),
        ("forbidden_words", DecodingConfig(forbidden_words=("dog",))),
        ("beam_groups", DecodingConfig(beam_groups=5)),
        ("rerank", DecodingConfig(rerank=RerankConfig("mbr"))),
    ],
)
def test_settings_without_an_equivalent_are_refused(
    folders: dict[str, Path], name: str, decoding: DecodingConfig
) -> None:
    captioner = open_captioner(f"hf:{folders['blip']}")
    with pytest.raises(ConfigError, match=rf"decoding\.{name}: models with the prefix hf: do not support it"):
        captioner.describe_generation(GenerationConfig(decoding))


def test_features_are_refused(folders: dict[str, Path]) -> None:
    encoder = {"model": "vgg16", "shape": [4096]}
    with pytest.raises(CheckpointError, match=r"expected images, .*, got features"):
        open_captioner(f"hf:{folders['git']}").require_encoder(encoder)


def test_unknown_families_and_addresses_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hff: expected the prefix .* \(did you mean hf\?\)"):
        open_captioner("hff:model")
    with pytest.raises(ConfigError, match="expected an existing folder, or ORGANIZATION/NAME@REVISION"):
        open_captioner(f"hf:{tmp_path / 'missing'}")
    with pytest.raises(ConfigError, match="expected an existing folder, or ORGANIZATION/NAME@REVISION"):
        open_captioner("hf:~")


def test_a_failure_of_the_storage_is_not_a_missing_model(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for use in (open_captioner, resolve_model_address):
        with pytest.raises(StorageError, match="loop cannot be accessed: Too many levels of symbolic links"):
            use(f"hf:{tmp_path}/loop")


def test_a_family_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fragile-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1.0\n")
    entries = {"raises": "fragile_family:load", "lacks": "fragile_family:none", "invalid": "fragile_syntax:load"}
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (package / "entry_points.txt").write_text("\n".join(["[captionlib.captioners]", *lines]))
    (tmp_path / "fragile_family.py").write_text("def load(location):\n    raise ValueError('odd weights\\nhere')\n")
    (tmp_path / "fragile_syntax.py").write_text("def load(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, reason in (
        ("raises", r"ValueError \(odd weights\)"),
        ("lacks", "AttributeError"),
        ("invalid", "SyntaxError"),
    ):
        with pytest.raises(CheckpointError, match=rf"^{name}.*the package fragile, .* failed with {reason}"):
            open_captioner(f"{name}:model")


def generate_with_transformers(folder: Path, images: list[Image.Image], **options: Any) -> tuple[Any, Any, Any]:
    """Returns the model, the pixel values of its own processor, and its output for five images."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    defaults = {"max_new_tokens": 8, "min_length": 0, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7}
    with torch.inference_mode():
        return model, pixels, model.generate(pixel_values=pixels, **{**defaults, **options})


def score_sequence(model: Any, pixels: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Returns the log-probability of each token after the first in one pass over the whole sentence."""
    ids = sequence[None]
    if model.config.model_type == "blip":
        embeddings = model.vision_model(pixel_values=pixels[None])[0]
        logits = model.text_decoder(input_ids=ids, encoder_hidden_states=embeddings).logits
    elif model.config.model_type == "git":
        logits = model(pixel_values=pixels[None], input_ids=ids).logits[:, -ids.shape[1] :]
    else:
        logits = model(pixel_values=pixels[None], decoder_input_ids=ids).logits
    return logits[0, :-1].log_softmax(1).gather(1, ids[0, 1:, None])[:, 0]


def test_sentences_and_probabilities_equal_those_of_transformers(transformers_folder: Path) -> None:
    from transformers import AutoTokenizer

    captioner = open_captioner(f"hf:{transformers_folder}")
    inputs = draw_inputs(captioner.encoder)
    model, pixels, sequences = generate_with_transformers(
        transformers_folder, [Image.fromarray(each) for each in inputs]
    )
    tokenizer = AutoTokenizer.from_pretrained(transformers_folder)
    texts = [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]
    captions = captioner.prepare(BEAM)(inputs, KEYS)
    checked = 0
    for image, per_image in enumerate(captions):
        expected = texts[3 * image : 3 * image + 3]
        assert [caption.text for caption in per_image] == list(dict.fromkeys(expected))
        for caption in per_image:
            sequence = sequences[3 * image + expected.index(caption.text)][: caption.token_count + 1]
            with torch.inference_mode():
                log_probs = score_sequence(model, pixels[image], sequence)
            assert caption.log_prob == pytest.approx(log_probs.sum().item(), abs=1e-4)
            checked += 1
    assert checked > 5


def test_pixels_equal_those_of_the_processor(transformers_folder: Path) -> None:
    source = open_captioner(f"hf:{transformers_folder}").find_input_transform(None)
    assert isinstance(source, Preprocessing)  # decoder processes prepare the images
    assert_pixels_equal_those_of_the_processor(transformers_folder, source)
