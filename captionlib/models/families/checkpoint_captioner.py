"""Implements `CaptionModel` for captioners that captionlib trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from captionlib.config import to_dict
from captionlib.errors import ConfigError
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.datastore import read_datastore, read_datastore_fingerprint
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.families.captioner import Caption, GenerateCaptions
from captionlib.models.families.model import Arrays
from captionlib.models.inference.attention_maps import compute_attention_maps, count_positions

if TYPE_CHECKING:
    from captionlib.models.inference.captioning import GenerationConfig

__all__ = ["CheckpointCaptioner"]


class CheckpointCaptioner:
    """The captioner of a checkpoint; implements `CaptionModel`."""

    def __init__(self, folder: str) -> None:
        self._loaded = load_captioner(folder)
        self.fingerprint = self._loaded.fingerprint
        self.encoder: Mapping[str, Any] = self._loaded.encoder
        self.attention_positions = count_positions(self._loaded)
        self.history: Sequence[Mapping[str, Any]] = self._loaded.training.get("history", [])

    def find_input_transform(self, weights: str | None) -> EncoderConfig:
        return self._loaded.find_input_transform(weights)

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        self._loaded.require_encoder(description)

    def to(self, device: torch.device) -> None:
        self._loaded.to(device)

    def describe_generation(self, config: "GenerationConfig") -> dict[str, Any]:
        _require_no_prompt(config)
        uses_datastore = config.decoding.rerank.neighbors > 0
        return {
            "decoding": to_dict(config.decoding),
            "dtype": config.dtype,
            "attention_maps": config.attention_maps,
            "datastore": read_datastore_fingerprint(self._loaded.folder, self._loaded) if uses_datastore else None,
        }

    def prepare(self, config: "GenerationConfig") -> GenerateCaptions:
        _require_no_prompt(config)
        datastore = read_datastore(self._loaded.folder, self._loaded) if config.decoding.rerank.neighbors else None
        model, vocabulary = self._loaded.model, self._loaded.vocabulary
        decoder = Decoder(model, config.decoding, getattr(torch, config.dtype), vocabulary, datastore)

        def generate(images: Arrays, image_ids: Sequence[str]) -> list[list[Caption]]:
            features = np.asarray(images, np.float32)
            per_image = decoder.decode(features, image_ids=image_ids)
            captions = [
                [Caption(vocabulary.decode(each.token_ids), each.log_prob, each.token_count) for each in candidates]
                for candidates in per_image
            ]
            if config.attention_maps:
                maps = compute_attention_maps(model, features, [candidates[0] for candidates in per_image])
                for image_captions, attention in zip(captions, maps, strict=True):
                    image_captions[0] = replace(image_captions[0], attention=attention)
            return captions

        return generate

    @torch.inference_mode()
    def score_sentences(self, images: Arrays, sentences: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """See `SentenceScorer`. Words that are not in the vocabulary count as UNKNOWN."""
        model, encode = self._loaded.model, self._loaded.vocabulary.encode
        ids = [[encode(text) for text in texts] for texts in sentences]
        nonempty = [each for per_image in ids for each in per_image if each]
        log_probs = np.zeros(len(nonempty))
        if nonempty:
            device = next(model.parameters()).device
            features = torch.from_numpy(np.array(images, np.float32)).to(device)  # a copy, which is writable
            image_indices = [index for index, per_image in enumerate(ids) for each in per_image if each]
            scores = model(features, pad_sentences(nonempty).to(device), torch.tensor(image_indices, device=device))
            np.add.at(log_probs, scores.sentences.cpu().numpy(), scores.log_probs.double().cpu().numpy())
        sums = iter(log_probs.tolist())
        return [[(next(sums), len(each) + 1) if each else (0.0, 0) for each in per_image] for per_image in ids]


def _require_no_prompt(config: "GenerationConfig") -> None:
    if config.prompt is not None:
        raise ConfigError("prompt: captioners that captionlib trained do not accept prompts; leave prompt out")
