"""Rankers from Hugging Face Transformers: dual encoders such as CLIP and SigLIP."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from captionlib.data.images.decoding import Preprocessing, SizeLimit
from captionlib.errors import CheckpointError, ConfigError
from captionlib.models.devices import halve_on_out_of_memory
from captionlib.models.families.huggingface import (
    find_preprocessing,
    fingerprint_files,
    load_pretrained,
    load_weights,
    open_model_folder,
    prepare_pixels,
    require_pixels,
    require_weights,
)
from captionlib.models.families.model import Arrays, describe_pixel_input

__all__ = ["HuggingFaceRanker", "load"]

_BATCH_SIZE = 256
_TEMPLATE_OPTION = "template="


class HuggingFaceRanker:
    """A dual encoder from Transformers; implements `RankingModel`."""

    def __init__(self, location: str) -> None:
        location, self.sentence_template = _split_template(location)
        folder = open_model_folder(location)
        self._location = location
        self._model, missing = load_weights(location, AutoModel.from_pretrained, folder)
        if not all(hasattr(self._model, f"get_{part}_features") for part in ("image", "text")):
            raise CheckpointError(
                f"hf:{location}: expected a dual encoder of images and text, such as CLIP or SigLIP, got "
                f"{type(self._model).__name__}"
            )
        require_weights(location, missing)
        self._processor: Any = load_pretrained(location, AutoImageProcessor.from_pretrained, folder)
        self._preprocessing = find_preprocessing(self._processor)
        self._tokenizer: Any = load_pretrained(location, AutoTokenizer.from_pretrained, folder)
        self.fingerprint = fingerprint_files(folder)
        self.encoder = describe_pixel_input(self._preprocessing)
        self.size = self.encode_sentences([""]).shape[1]

    def find_input_transform(self, weights: str | None) -> Preprocessing | SizeLimit:
        """Returns the preprocessing; see `ImageModel`."""
        return self._preprocessing

    def require_encoder(self, description: Any) -> None:
        """Requires that `description` describes pixels and not the features of an encoder; see `ImageModel`."""
        require_pixels(f"hf:{self._location}", self.encoder, description)

    def to(self, device: torch.device) -> None:
        self._model.to(device)

    def has_known_word(self, sentence: str) -> bool:
        """Returns whether any token of the sentence is in the tokenizer's vocabulary; see `RankingModel`."""
        ids = self._tokenizer(sentence, add_special_tokens=False).input_ids
        return any(token != self._tokenizer.unk_token_id for token in ids)

    @torch.inference_mode()
    def encode_images(self, images: Arrays) -> npt.NDArray[np.float32]:
        """Embeds images, `[height, width, 3] uint8` each; see `RankingModel`."""

        def encode(part: slice) -> Tensor:
            pixels = prepare_pixels(images[part], self._preprocessing, self._processor).to(self._model.device)
            return _normalize(self._model.get_image_features(pixel_values=pixels))

        return torch.cat(halve_on_out_of_memory(encode, len(images))).numpy()

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Inserts sentences into the template and embeds them, truncated to the model's maximum; see `RankingModel`."""
        texts = [_insert(sentence, self.sentence_template) for sentence in sentences]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # similar lengths need little padding
        sorted_texts = [texts[index] for index in order]
        parts = [torch.empty(0, getattr(self, "size", 0))]  # `size` is not set yet when `__init__` calls this method
        for start in range(0, len(texts), _BATCH_SIZE):
            batch = sorted_texts[start : start + _BATCH_SIZE]
            parts += halve_on_out_of_memory(partial(self._encode_texts, batch), len(batch))
        encoded = torch.cat([part for part in parts if part.shape[1]])
        embeddings = np.empty(encoded.shape, np.float32)
        embeddings[order] = encoded.numpy()
        return embeddings

    def _encode_texts(self, texts: list[str], part: slice) -> Tensor:
        config = self._model.config
        inputs = self._tokenizer(
            texts[part],
            # SigLIP is trained on sentences padded to the maximum length, without a mask for the padding.
            padding="max_length" if config.model_type.startswith("siglip") else True,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        names = ("input_ids",) if config.model_type.startswith("siglip") else ("input_ids", "attention_mask")
        return _normalize(
            self._model.get_text_features(**{name: inputs[name].to(self._model.device) for name in names})
        )


def load(location: str) -> HuggingFaceRanker:
    """Loads a ranker from a folder or from `ORGANIZATION/NAME@REVISION`; see `open_ranker` for errors.

    If `?template=a photo of {}` follows the location, every sentence is inserted into this template at `{}`.
    """
    return HuggingFaceRanker(location)


def _split_template(location: str) -> tuple[str, str | None]:
    folder, separator, option = location.partition("?")
    if not separator:
        return folder, None
    template = option.removeprefix(_TEMPLATE_OPTION)
    if not option.startswith(_TEMPLATE_OPTION) or template.count("{}") != 1:
        raise ConfigError(
            f"hf:{location}: expected ?template= and a text with one {{}} for the sentence, such as "
            f"hf:{folder}?template=a photo of {{}}, got ?{option}"
        )
    return folder, template


def _insert(sentence: str, template: str | None) -> str:
    return sentence if template is None else template.replace("{}", sentence)


def _normalize(output: Any) -> Tensor:
    """Returns unit vectors on the CPU, `[batch, size] float32`."""
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(vectors.float(), dim=1).cpu()
