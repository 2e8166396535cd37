"""What workers with a GPU depend on, which holds on any device: one model, a busy GPU, memory that ends."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from captionlib.data.text.vocabulary import Vocabulary
from captionlib.errors import FetchError
from captionlib.models.captioners.captioner import Captioner, CaptionerConfig, ImageState
from captionlib.models.checkpoints.checkpoint import save_captioner, save_ranker
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.devices import copy_to_host_async, halve_on_out_of_memory
from captionlib.models.inference import captioning, embedding
from captionlib.models.inference.captioning import CaptionGeneration, GenerationConfig
from captionlib.models.inference.embedding import EmbeddingConfig, ImageEmbedding, PinnedRanker
from captionlib.models.inference.extraction import encode_images
from captionlib.models.inference.shared_models import cached_per_process
from captionlib.models.rankers.ranker import Ranker, RankerConfig
from tests.models.tiny_captioners import CONFIGS, build, features

VOCABULARY = Vocabulary.from_captions(["a dog runs", "a cat sleeps"], min_count=1)
BUNDLES = 6


def write_captioner(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = Captioner(CaptionerConfig(hidden_size=4, embedding_size=4), 3, len(VOCABULARY))
    return save_captioner(folder, model, VOCABULARY, {"shape": [3]}, provenance={}, training={})


def open_at_once(opens: Callable[[], Any]) -> None:
    """As many threads as there are bundles, all of them at the same moment."""
    together = Barrier(BUNDLES)

    def open_one(_number: int) -> None:
        together.wait()
        with ExitStack() as stack:
            stack.enter_context(opens())

    with ThreadPoolExecutor(BUNDLES) as threads:
        list(threads.map(open_one, range(BUNDLES)))


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: calls.append(arguments) or original(*arguments))
    return calls


def test_a_process_has_one_captioner_however_many_bundles_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [
        CaptionGeneration(GenerationConfig(), str(tmp_path / name), write_captioner(tmp_path / name, seed))
        for seed, name in enumerate(("first", "second"))
    ]
    loads = count_calls(monkeypatch, captioning, "load_captioner")
    for stage in stages:
        open_at_once(stage.open)
    assert [Path(checkpoint).name for checkpoint, _device in loads] == ["first", "second"]


def test_a_process_has_one_ranker_however_many_bundles_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ranker(RankerConfig(hidden_size=4, embedding_size=4, joint_embedding_size=4), 3, len(VOCABULARY))
    fingerprint = save_ranker(tmp_path, model, VOCABULARY, {"shape": [3]}, provenance={}, training={})
    stage = ImageEmbedding(EmbeddingConfig(), PinnedRanker(str(tmp_path), fingerprint))
    loads = count_calls(monkeypatch, embedding, "load_ranker")
    open_at_once(stage.open)
    assert len(loads) == 1


def test_a_model_is_loaded_once_and_one_that_failed_to_load_again() -> None:
    loads: Counter[str] = Counter()

    @cached_per_process
    def load(name: str) -> list[str]:
        loads[name] += 1
        time.sleep(0.05)
        if loads[name] == 1 and name == "flaky":
            raise ConnectionError
        return [name]

    with ThreadPoolExecutor(BUNDLES) as threads:
        models = list(threads.map(load, ["good"] * BUNDLES))
    assert all(model is models[0] for model in models)
    with pytest.raises(ConnectionError):
        load("flaky")
    assert load("flaky") is load("flaky")
    assert loads == {"good": 1, "flaky": 2}


class QueueingEncoder:
    """An encoder whose device computes on its own; notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def begin(self, images: npt.NDArray[np.uint8]) -> Callable[[], npt.NDArray[np.uint8]]:
        name = f"{images[0, 0]}-{images[-1, 0]}"
        self.asked.append(f"begin {name}")

        def finish() -> npt.NDArray[np.uint8]:
            self.asked.append(f"finish {name}")
            return images

        return finish


def test_the_next_batch_is_begun_before_the_features_of_this_one_are_waited_for() -> None:
    encoder = QueueingEncoder()
    failed: list[str] = []
    loaded = [
        ({"image_id": str(n), "uri": ""}, FetchError("Gone", "") if n == 3 else np.full(1, n, np.uint8))
        for n in range(6)
    ]
    encoded = encode_images(encoder, iter(loaded), 2, lambda image_id, *_: failed.append(image_id))  # type: ignore[arg-type]
    pieces = [([row["image_id"] for row in rows], features[:, 0].tolist()) for rows, features in encoded]
    assert pieces == [(["0", "1"], [0, 1]), (["2", "4"], [2, 4]), (["5"], [5])]
    assert failed == ["3"]
    assert encoder.asked == ["begin 0-1", "begin 2-4", "finish 0-1", "begin 5-5", "finish 2-4", "finish 5-5"]


@pytest.mark.parametrize(
    "decoding",
    [DecodingConfig(beam_width=3, n_best=2), DecodingConfig("sample", n_best=2, top_k=5)],
    ids=["beam", "draw"],
)
@pytest.mark.parametrize("keys", [None, [f"image{number}" for number in range(7)]], ids=["by features", "by id"])
def test_captions_that_do_not_fit_are_written_in_halves_and_are_the_same(
    decoding: DecodingConfig, keys: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(build(CONFIGS[0], seed=1), decoding)
    images = features(7, seed=1)
    expected = decoder.decode(images, keys)
    encode, sizes = decoder._incremental.encode_images, []

    def small_memory(images: torch.Tensor) -> ImageState:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("too much")
        return encode(images)

    monkeypatch.setattr(decoder._incremental, "encode_images", small_memory)
    found = decoder.decode(images, keys)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert [[one.token_ids for one in image] for image in found] == [
        [one.token_ids for one in image] for image in expected
    ]
    for image, others in zip(found, expected, strict=True):
        assert [one.log_prob for one in image] == pytest.approx([one.log_prob for one in others], rel=1e-5)


def test_an_item_that_does_not_fit_alone_is_an_error() -> None:
    def compute(part: slice) -> None:
        raise torch.OutOfMemoryError(f"{part}")

    with pytest.raises(torch.OutOfMemoryError, match=r"slice\(0, 1"):
        halve_on_out_of_memory(compute, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_features_come_from_a_gpu_whole() -> None:
    numbers = torch.arange(1 << 20, device="cuda").float()
    host, wait = copy_to_host_async(numbers * 2)
    wait()
    assert torch.equal(host, 2 * torch.arange(1 << 20).float())
