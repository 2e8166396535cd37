"""Properties that GPU workers rely on and that hold on any device: shared models, a busy device, limited memory."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from captionlib.data.images.loading import LoadedImage
from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import FetchError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork, ImageState
from captionlib.models.checkpoints.checkpoint import save_captioner, save_ranker
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.devices import copy_to_host_async, halve_on_out_of_memory
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.families import encoder as encoder_family
from captionlib.models.families.captioner import open_captioner
from captionlib.models.inference.captioning import CaptionGeneration, GenerationConfig
from captionlib.models.inference.embedding import EmbeddingConfig, ImageEmbedding
from captionlib.models.inference.extraction import encode_images, load_shared_encoder
from captionlib.models.inference.shared_models import CheckpointCache, CheckpointVersion
from captionlib.models.rankers.ranker import RankerConfig, RankerNetwork
from tests.models.checkpoint_loads import count_checkpoint_loads
from tests.models.tiny_captioners import CONFIGS, build, features

VOCABULARY = Vocabulary.from_captions(["a dog runs", "a cat sleeps"], min_count=1)
BUNDLES = 6


def write_captioner(folder: Path, seed: int) -> CheckpointVersion:
    torch.manual_seed(seed)
    model = CaptionerNetwork(CaptionerConfig(hidden_size=4, embedding_size=4), 3, len(VOCABULARY))
    fingerprint = save_captioner(folder, model, VOCABULARY, {"shape": [3]}, provenance={}, training={})
    return CheckpointVersion(str(folder), fingerprint)


def open_concurrently(open_stage: Callable[[], Any]) -> None:
    """Opens a stage in one thread per bundle, all at the same moment."""
    barrier = Barrier(BUNDLES)

    def open_one(_number: int) -> None:
        barrier.wait()
        with ExitStack() as stack:
            stack.enter_context(open_stage())

    with ThreadPoolExecutor(BUNDLES) as threads:
        list(threads.map(open_one, range(BUNDLES)))


def test_concurrent_bundles_share_one_captioner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [write_captioner(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    description = open_captioner(tmp_path / "first").describe_generation(GenerationConfig())
    loads = count_checkpoint_loads(monkeypatch)
    for checkpoint in versions:
        open_concurrently(CaptionGeneration(GenerationConfig(), checkpoint, description, device="cpu").open)
    assert loads == ["first", "second"]


def test_concurrent_bundles_share_one_ranker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RankerNetwork(RankerConfig(hidden_size=4, embedding_size=4, joint_embedding_size=4), 3, len(VOCABULARY))
    fingerprint = save_ranker(tmp_path, model, VOCABULARY, {"shape": [3]}, provenance={}, training={})
    stage = ImageEmbedding(EmbeddingConfig(), CheckpointVersion(str(tmp_path), fingerprint))
    loads = count_checkpoint_loads(monkeypatch)
    open_concurrently(stage.open)
    assert len(loads) == 1


def test_cached_model_is_moved_to_a_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_captioner(tmp_path / "captioner", 0)
    cache = CheckpointCache(open_captioner)
    model = cache.get(checkpoint, "cpu")
    moves: list[torch.device] = []
    monkeypatch.setattr(model, "to", moves.append, raising=False)
    assert cache.get(checkpoint, "cpu") is model
    assert moves == []  # a parameter that is replaced while another thread copies the model breaks the copy


def test_threads_share_one_encoder_and_load_it_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[EncoderConfig] = []

    def load(config: EncoderConfig, _device: str) -> object:
        loads.append(config)
        time.sleep(0.05)
        if len(loads) == 1:
            raise ConnectionError
        return object()

    monkeypatch.setattr(encoder_family, "load_encoder", load)
    config = EncoderConfig(weights="random:77")
    with pytest.raises(ConnectionError):
        load_shared_encoder(config, "cpu", None)
    with ThreadPoolExecutor(BUNDLES) as threads:
        encoders = list(threads.map(lambda _: load_shared_encoder(config, "cpu", None), range(BUNDLES)))
    assert len(set(encoders)) == 1
    assert len(loads) == 2


class RecordingEncoder:
    """An encoder that records when batches are started and waited for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def encode_async(self, images: Sequence[npt.NDArray[np.uint8]]) -> Callable[[], Sequence[npt.NDArray[np.uint8]]]:
        name = f"{images[0][0]}-{images[-1][0]}"
        self.calls.append(f"start {name}")

        def wait() -> Sequence[npt.NDArray[np.uint8]]:
            self.calls.append(f"wait {name}")
            return images

        return wait


def test_the_next_batch_starts_before_waiting_for_the_previous_one() -> None:
    encoder = RecordingEncoder()
    failed: list[str] = []
    loaded = [
        (
            {"image_id": str(n), "uri": ""},
            FetchError("Gone", "") if n == 3 else LoadedImage(np.full(1, n, np.uint8), 1, 1, n),
        )
        for n in range(6)
    ]
    encoded = encode_images([encoder], iter(loaded), 2, lambda row, _: failed.append(row["image_id"]))  # type: ignore[list-item]
    batches = [
        ([row["image_id"] for row in rows], [pixels.item() for pixels in features]) for rows, (features,) in encoded
    ]
    assert batches == [(["0", "1"], [0, 1]), (["2", "4"], [2, 4]), (["5"], [5])]
    assert failed == ["3"]
    assert encoder.calls == ["start 0-1", "start 2-4", "wait 0-1", "start 5-5", "wait 2-4", "wait 5-5"]


@pytest.mark.parametrize(
    "decoding",
    [DecodingConfig(beam_width=3, n_best=2), DecodingConfig("sample", n_best=2, top_k=5)],
    ids=["beam", "sample"],
)
@pytest.mark.parametrize(
    "image_ids", [None, [f"image{number}" for number in range(7)]], ids=["no image_ids", "image_ids"]
)
def test_decoding_in_halves_yields_the_same_captions(
    decoding: DecodingConfig, image_ids: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(build(CONFIGS[0], seed=1), decoding)
    images = features(7, seed=1)
    expected = decoder.decode(images, image_ids)
    encode, sizes = decoder._captioner.encode_images, []

    def run_out_of_memory(images: torch.Tensor) -> ImageState:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("too much")
        return encode(images)

    monkeypatch.setattr(decoder._captioner, "encode_images", run_out_of_memory)
    halved = decoder.decode(images, image_ids)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    for candidates, expected_candidates in zip(halved, expected, strict=True):
        assert [candidate.token_ids for candidate in candidates] == [
            candidate.token_ids for candidate in expected_candidates
        ]
        log_probs = [candidate.log_prob for candidate in expected_candidates]
        assert [candidate.log_prob for candidate in candidates] == pytest.approx(log_probs, rel=1e-5)


def test_a_single_item_that_exceeds_the_memory_is_an_error() -> None:
    def compute(part: slice) -> None:
        raise torch.OutOfMemoryError(f"{part}")

    with pytest.raises(torch.OutOfMemoryError, match=r"slice\(0, 1"):
        halve_on_out_of_memory(compute, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copy_to_host_async_waits_for_the_whole_tensor() -> None:
    numbers = torch.arange(1 << 20, device="cuda").float()
    host, wait = copy_to_host_async(numbers * 2)
    wait()
    assert torch.equal(host, 2 * torch.arange(1 << 20).float())
