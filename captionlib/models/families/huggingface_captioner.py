"""Captioners from Hugging Face Transformers: BLIP, GIT, ViT-GPT2, and vision-language models with a prompt."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from captionlib.config import to_dict
from captionlib.data.images.decoding import Preprocessing, SizeLimit
from captionlib.errors import ConfigError
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.devices import halve_on_out_of_memory
from captionlib.models.families.captioner import Caption, GenerateCaptions
from captionlib.models.families.huggingface import (
    WHOLE_IMAGE,
    find_preprocessing,
    fingerprint_files,
    load_pretrained,
    load_weights,
    open_model_folder,
    prepare_pixels,
    require_pixels,
    require_weights,
)
from captionlib.models.families.huggingface_scoring import score_sentences
from captionlib.models.families.model import Arrays, describe_pixel_input

if TYPE_CHECKING:
    from captionlib.models.inference.captioning import GenerationConfig

__all__ = ["HuggingFaceCaptioner", "load"]

# Types of models that need no prompt. BLIP and GIT accept a prompt, which the caption continues.
_PROMPT_OPTIONAL = {"blip", "git", "vision-encoder-decoder"}

# `generate` of Transformers has no equivalent of these settings.
_UNSUPPORTED = ("min_words", "forbidden_words", "beam_groups", "rerank")


class HuggingFaceCaptioner:
    """A captioner from Transformers; implements `CaptionModel`."""

    attention_positions = None
    history: Sequence[Mapping[str, Any]] = ()

    def __init__(self, location: str) -> None:
        folder = open_model_folder(location)
        self._location = location
        self._model, missing = load_weights(location, AutoModelForImageTextToText.from_pretrained, folder)
        # TrOCR and ViT-GPT2 files often lack the weights of the encoder's pooler, which captioners do not use.
        require_weights(location, [name for name in missing if "pooler" not in name])
        self._type = str(self._model.config.model_type)
        image_processor = load_pretrained(location, AutoImageProcessor.from_pretrained, folder)
        self._tokenizer = load_pretrained(location, AutoTokenizer.from_pretrained, folder)
        self._processor: Any = None
        self._preprocessing: Preprocessing | SizeLimit = find_preprocessing(image_processor)
        if self._type not in _PROMPT_OPTIONAL or isinstance(self._preprocessing, SizeLimit):
            self._processor = load_pretrained(location, AutoProcessor.from_pretrained, folder)
            if not isinstance(self._processor, ProcessorMixin):  # the model has no processor for images and text
                self._processor = image_processor
            self._preprocessing = WHOLE_IMAGE  # the processor resizes the images
        self.fingerprint = fingerprint_files(folder)
        self.encoder = describe_pixel_input(self._preprocessing)

    def find_input_transform(self, weights: str | None) -> Preprocessing | SizeLimit:
        """Returns the preprocessing; see `ImageModel`."""
        return self._preprocessing

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        """Rejects the features of an encoder, because the model takes pixels; see `ImageModel`."""
        require_pixels(f"hf:{self._location}", self.encoder, description)

    def to(self, device: torch.device) -> None:
        self._model.to(device)

    def describe_generation(self, config: "GenerationConfig") -> dict[str, Any]:
        """Describes decoding and the prompt; see `CaptionModel`."""
        self._check(config)
        decoding = {
            name: value
            for name, value in to_dict(config.decoding).items()
            if name not in (*_UNSUPPORTED, "diversity_penalty")
        }
        if config.decoding.rerank.method != "none":
            decoding["rerank"] = to_dict(config.decoding.rerank)
        return {"decoding": decoding, "dtype": config.dtype, "prompt": config.prompt}

    def prepare(self, config: "GenerationConfig") -> GenerateCaptions:
        """Converts the model to the configured dtype and prepares decoding; see `CaptionModel`."""
        self._check(config)
        dtype = getattr(torch, config.dtype)
        model = self._model if dtype == torch.float32 else copy.deepcopy(self._model).to(dtype)
        options = _map_decoding(config.decoding)
        # Transformers samples with a global generator. It is seeded for each image, so each batch contains one image.
        is_sampling = config.decoding.strategy == "sample"

        def generate_batch(images: Arrays, image_ids: Sequence[str]) -> list[list[Caption]]:
            inputs = {
                name: value.to(model.device, dtype if value.is_floating_point() else None)
                for name, value in self._prepare_inputs(images, config.prompt).items()
            }
            with torch.inference_mode(), torch.random.fork_rng(_cuda_devices(model.device), enabled=is_sampling):
                if is_sampling:
                    torch.manual_seed(_derive_seed(image_ids[0], config.decoding.seed))
                output = model.generate(**inputs, **options, return_dict_in_generate=True)
            return self._read_captions(output, len(images), config)

        def generate(images: Arrays, image_ids: Sequence[str]) -> list[list[Caption]]:
            if is_sampling:
                return [generate_batch(images[i : i + 1], [image_id])[0] for i, image_id in enumerate(image_ids)]
            parts = halve_on_out_of_memory(lambda part: generate_batch(images[part], image_ids[part]), len(images))
            return [captions for part in parts for captions in part]

        return generate

    def score_sentences(self, images: Arrays, sentences: Sequence[Sequence[str]]) -> list[list[tuple[float, int]]]:
        """Computes the probability of references; see `SentenceScorer`.

        Raises:
            ConfigError: the model answers prompts.
        """
        if self._type not in _PROMPT_OPTIONAL:
            raise ConfigError(
                f"hf:{self._location} answers prompts, and the perplexity of its answers is not supported; leave "
                "--checkpoint out"
            )

        def score(part: slice) -> list[list[tuple[float, int]]]:
            pixels = prepare_pixels(images[part], self._preprocessing, self._processor).to(self._model.device)
            return score_sentences(self._model, self._tokenizer, pixels, sentences[part])

        return [scores for part in halve_on_out_of_memory(score, len(images)) for scores in part]

    def _check(self, config: "GenerationConfig") -> None:
        """Raises ConfigError if the model does not support a setting."""
        default = DecodingConfig()
        for name in _UNSUPPORTED:
            if name == "rerank" and config.decoding.rerank.method == "image_text":
                continue
            if getattr(config.decoding, name) != getattr(default, name):
                raise ConfigError(f"decoding.{name}: models with the prefix hf: do not support it; leave it out")
        if config.attention_maps:
            raise ConfigError("attention_maps: models with the prefix hf: do not support it; leave it out")
        if config.prompt is None and getattr(self._processor, "chat_template", None):
            raise ConfigError(
                f"hf:{self._location}: expected a prompt, got none; add --set prompt='Describe the image.'"
            )
        if config.prompt is not None and self._type == "vision-encoder-decoder":
            raise ConfigError(f"prompt: hf:{self._location} does not accept prompts; leave prompt out")

    def _prepare_inputs(self, images: Arrays, prompt: str | None) -> dict[str, Tensor]:
        """Returns the arguments of `generate` for a batch of images."""
        if self._type in _PROMPT_OPTIONAL:
            inputs = {"pixel_values": prepare_pixels(images, self._preprocessing, self._processor)}
            if prompt is not None:
                ids = self._tokenizer(prompt, add_special_tokens=False).input_ids
                # GIT's prompts start with CLS. BLIP's `generate` replaces the first token and drops the last one.
                ids = [
                    self._tokenizer.cls_token_id,
                    *ids,
                    *([self._tokenizer.sep_token_id] if self._type == "blip" else []),
                ]
                inputs["input_ids"] = torch.tensor([ids] * len(images))
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            return inputs
        text = prompt or ""
        if self._processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        batch = self._processor(
            images=[[image] for image in images] if self._processor.chat_template else list(images),
            text=[text] * len(images),
            return_tensors="pt",
            padding=True,
        )
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    def _read_captions(self, output: Any, image_count: int, config: "GenerationConfig") -> list[list[Caption]]:
        """Returns the distinct captions of each image, best first."""
        beam_indices = output.get("beam_indices")
        if beam_indices is None:  # the scores depend on the temperature, but the logits do not
            log_probs = self._model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True)
        else:
            log_probs = self._model.compute_transition_scores(output.sequences, output.scores, beam_indices)
        generated = output.sequences[:, -log_probs.shape[1] :]
        counts = self._count_tokens(generated) if beam_indices is None else (beam_indices >= 0).sum(1)
        is_token = torch.arange(log_probs.shape[1], device=counts.device) < counts[:, None]
        sums = log_probs.float().masked_fill(~is_token, 0).sum(1).tolist()
        continues_prompt = config.prompt is not None and self._type in _PROMPT_OPTIONAL
        ids = output.sequences if continues_prompt else generated
        texts = [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
        captions = list(map(Caption, texts, sums, counts.tolist()))
        per_image = len(captions) // image_count
        distinct: list[list[Caption]] = []
        for start in range(0, len(captions), per_image):
            unique: dict[str, Caption] = {}
            for caption in captions[start : start + per_image]:
                unique.setdefault(caption.text, caption)
            ranked = list(unique.values())
            if config.decoding.strategy == "sample":
                exponent = config.decoding.length_penalty
                ranked.sort(key=lambda caption: caption.log_prob / caption.token_count**exponent, reverse=True)
            distinct.append(ranked)
        return distinct

    def _count_tokens(self, generated: Tensor) -> Tensor:
        """Returns the number of tokens up to and including the first end token, `[sentences]`."""
        end_ids = self._model.generation_config.eos_token_id
        ends = set(end_ids if isinstance(end_ids, list) else [end_ids])
        if self._type == "blip":
            ends = {self._model.config.text_config.sep_token_id}
        is_end = torch.isin(generated, torch.tensor([end for end in ends if end is not None], device=generated.device))
        return (is_end.cumsum(1) - is_end.int() == 0).sum(1)


def load(location: str) -> HuggingFaceCaptioner:
    """Loads a captioner from a folder or from `ORGANIZATION/NAME@REVISION`; see `open_captioner` for errors."""
    return HuggingFaceCaptioner(location)


def _map_decoding(config: DecodingConfig) -> dict[str, Any]:
    """Returns the arguments of `generate`, which override the model's own generation settings."""
    options: dict[str, Any] = {
        "max_new_tokens": config.find_max_tokens("subwords"),
        "max_length": None,
        "min_length": 0,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "repetition_penalty": 1.0,
        "num_return_sequences": config.candidate_count,
        "num_beams": config.beam_width,
        "do_sample": False,
        "length_penalty": config.length_penalty,
        "output_scores": True,
    }
    if config.strategy == "sample":
        options |= {
            "do_sample": True,
            "num_beams": 1,
            "temperature": config.temperature,
            "top_k": config.top_k or 0,
            "top_p": config.top_p,
        }
    if options["num_beams"] == 1:
        options |= {"output_scores": False, "output_logits": True}
        del options["length_penalty"]
    return options


def _derive_seed(image_id: str, seed: int) -> int:
    """Returns the seed of an image's samples."""
    return int.from_bytes(hashlib.sha256(f"{seed} {image_id}".encode()).digest()[:8], "big") >> 1


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
