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
from captionlib.models.families.huggingface import ModelFolder, find_preprocessing, prepare_pixels, require_pixels
from captionlib.models.families.model import Arrays, describe_pixel_input

__all__ = ["HuggingFaceRanker", "load"]

_BATCH_SIZE = 256
_TEMPLATE_OPTION = "template="


class HuggingFaceRanker:
    """A dual encoder from Transformers; implements `RankingModel`."""

    def __init__(self, location: str) -> None:
        location, self.sentence_template = _split_template(location)
        folder = ModelFolder(location)
        self._location = location
        self._model, missing = folder.load_model(AutoModel)
        if not all(hasattr(self._model, f"get_{part}_features") for part in ("image", "text")):
            raise CheckpointError(
                f"hf:{location}: expected a dual encoder of images and text, such as CLIP or SigLIP, got "
                f"{type(self._model).__name__}"
            )
        folder.require_weights(missing)
        self._processor = folder.load(AutoImageProcessor)
        self._preprocessing = find_preprocessing(self._processor)
        self._tokenizer = folder.load(AutoTokenizer)
        self.fingerprint = folder.compute_fingerprint()
        self.encoder = describe_pixel_input(self._preprocessing)
        self.size = self._encode_texts([""], slice(1)).shape[1]

    def find_input_transform(self, weights: str | None) -> Preprocessing | SizeLimit:
        return self._preprocessing

    def require_encoder(self, description: Any) -> None:
        require_pixels(f"hf:{self._location}", self.encoder, description)

    def to(self, device: torch.device) -> None:
        self._model.to(device)

    def has_known_word(self, sentence: str) -> bool:
        ids = self._tokenizer(sentence, add_special_tokens=False).input_ids
        return any(token != self._tokenizer.unk_token_id for token in ids)

    @torch.inference_mode()
    def encode_images(self, images: Arrays) -> npt.NDArray[np.float32]:

        def encode(part: slice) -> Tensor:
            pixels = prepare_pixels(images[part], self._preprocessing, self._processor).to(self._model.device)
            return _normalize(self._model.get_image_features(pixel_values=pixels))

        return torch.cat(halve_on_out_of_memory(encode, len(images))).numpy()

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Inserts sentences into the template and embeds them, truncated to the model's maximum."""
        template = self.sentence_template or "{}"
        texts = [template.replace("{}", sentence) for sentence in sentences]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # similar lengths need little padding
        embeddings = np.empty((len(texts), self.size), np.float32)
        for start in range(0, len(texts), _BATCH_SIZE):
            rows = order[start : start + _BATCH_SIZE]
            parts = halve_on_out_of_memory(partial(self._encode_texts, [texts[row] for row in rows]), len(rows))
            embeddings[rows] = torch.cat(parts).numpy()
        return embeddings

    @torch.inference_mode()
    def _encode_texts(self, texts: list[str], part: slice) -> Tensor:
        config = self._model.config
        is_siglip = config.model_type.startswith("siglip")
        inputs = self._tokenizer(
            texts[part],
            # SigLIP is trained on sentences padded to the maximum length, without a mask for the padding.
            padding="max_length" if is_siglip else True,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        names = ("input_ids",) if is_siglip else ("input_ids", "attention_mask")
        arguments = {name: inputs[name].to(self._model.device) for name in names}
        return _normalize(self._model.get_text_features(**arguments))


def load(location: str) -> HuggingFaceRanker:
    """Loads a ranker. If `?template=a photo of {}` follows the location, every sentence is inserted at `{}`."""
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


def _normalize(output: Any) -> Tensor:
    """Returns unit vectors on the CPU, `[batch, size] float32`."""
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(vectors.float(), dim=1).cpu()
