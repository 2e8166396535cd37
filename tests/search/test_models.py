import io
from pathlib import Path

import pytest
from PIL import Image

from captionlib.errors import CheckpointError
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.encoders.encoder import EncoderConfig, load_encoder
from captionlib.models.inference.captioning import GenerationConfig, caption_images
from captionlib.search.models import ImageQueryModels
from tests.models.attention_captioner import write_captioner


def test_uploaded_images_are_captioned_as_configured_by_one_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(EncoderConfig("squeezenet1_1", "features.7.cat", "random:0"), "cpu").description
    write_captioner(tmp_path / "captioner", encoder, attention_size=0)
    buffer = io.BytesIO()
    Image.new("RGB", (90, 70), "teal").save(buffer, "PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    config = GenerationConfig(DecodingConfig(beam_width=3, n_best=2, max_tokens=3))
    decoders = []

    class CountedDecoder(Decoder):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            decoders.append(self)

    monkeypatch.setattr("captionlib.models.families.checkpoint_captioner.Decoder", CountedDecoder)
    folder = str(tmp_path / "captioner")
    with ImageQueryModels(captioner=folder, device="cpu", generation=config) as models:
        captions = [models.caption(buffer.getvalue()).to_pylist() for _ in range(2)]
    assert len(decoders) == 1
    (row,), failures = caption_images([str(tmp_path / "image.png")], folder, config, device="cpu")
    assert not failures
    assert [row["caption"] for row in captions[0]] == [candidate["caption"] for candidate in row["candidates"]]
    assert len(captions[0]) == 2
    assert captions[0] == captions[1]


def test_encoder_that_differs_from_that_of_the_model_is_refused(tmp_path: Path) -> None:
    encoder = load_encoder(EncoderConfig("squeezenet1_1", "features.7.cat", "random:0"), "cpu").description
    write_captioner(tmp_path / "captioner", {**encoder, "weights_sha256": "0" * 64}, attention_size=0)
    with pytest.raises(CheckpointError, match="weights_sha256"):
        ImageQueryModels(captioner=str(tmp_path / "captioner"), device="cpu")
