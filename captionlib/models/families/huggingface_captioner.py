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
    ModelFolder,
    find_preprocessing,
    prepare_pixels,
    require_pixels,
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
        folder = ModelFolder(location)
        self._location = location
        self._model, missing = folder.load_model(AutoModelForImageTextToText)
        # TrOCR and ViT-GPT2 files often lack the weights of the encoder's pooler, which captioners do not use.
        folder.require_weights([name for name in missing if "pooler" not in name])
        self._type = str(self._model.config.model_type)
        image_processor = folder.load(AutoImageProcessor)
        self._tokenizer = folder.load(AutoTokenizer)
        self._processor: Any = None
        self._preprocessing: Preprocessing | SizeLimit = find_preprocessing(image_processor)
        if self._type not in _PROMPT_OPTIONAL or isinstance(self._preprocessing, SizeLimit):
            self._processor = folder.load(AutoProcessor)
            if not isinstance(self._processor, ProcessorMixin):  # the model has no processor for images and text
                self._processor = image_processor
            self._preprocessing = WHOLE_IMAGE
        self.fingerprint = folder.compute_fingerprint()
        self.encoder = describe_pixel_input(self._preprocessing)

    def find_input_transform(self, weights: str | None) -> Preprocessing | SizeLimit:
        return self._preprocessing

    def require_encoder(self, description: Mapping[str, Any]) -> None:
        require_pixels(f"hf:{self._location}", self.encoder, description)

    def to(self, device: torch.device) -> None:
        self._model.to(device)

    def describe_generation(self, config: "GenerationConfig") -> dict[str, Any]:
        self._require_support(config)
        ignored = {*_UNSUPPORTED, "diversity_penalty"}
        decoding = {name: value for name, value in to_dict(config.decoding).items() if name not in ignored}
        if config.decoding.rerank.method != "none":
            decoding["rerank"] = to_dict(config.decoding.rerank)
        return {"decoding": decoding, "dtype": config.dtype, "prompt": config.prompt}

    def prepare(self, config: "GenerationConfig") -> GenerateCaptions:
        self._require_support(config)
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
            gpus = [model.device] if model.device.type == "cuda" else []
            with torch.inference_mode(), torch.random.fork_rng(gpus, enabled=is_sampling):
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
        """See `SentenceScorer`. Raises ConfigError if the model answers prompts."""
        if self._type not in _PROMPT_OPTIONAL:
            raise ConfigError(
                f"hf:{self._location} answers prompts, and the perplexity of its answers is not supported; leave "
                "--checkpoint out"
            )

        def score(part: slice) -> list[list[tuple[float, int]]]:
            pixels = prepare_pixels(images[part], self._preprocessing, self._processor).to(self._model.device)
            return score_sentences(self._model, self._tokenizer, pixels, sentences[part])

        return [scores for part in halve_on_out_of_memory(score, len(images)) for scores in part]

    def _require_support(self, config: "GenerationConfig") -> None:
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
        if self._type in _PROMPT_OPTIONAL:
            inputs = {"pixel_values": prepare_pixels(images, self._preprocessing, self._processor)}
            if prompt is not None:
                ids = self._tokenizer(prompt, add_special_tokens=False).input_ids
                # GIT's prompts start with CLS. BLIP's `generate` replaces the first token and drops the last one.
                end = [self._tokenizer.sep_token_id] if self._type == "blip" else []
                ids = [self._tokenizer.cls_token_id, *ids, *end]
                inputs["input_ids"] = torch.tensor([ids] * len(images))
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            return inputs
        text = prompt or ""
        if self._processor.chat_template:
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            text = self._processor.apply_chat_template([message], add_generation_prompt=True)
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
    return HuggingFaceCaptioner(location)


def _map_decoding(config: DecodingConfig) -> dict[str, Any]:
    """Returns the arguments of `generate`, which override the model's own generation settings."""
    is_sampling = config.strategy == "sample"
    options: dict[str, Any] = {
        "max_new_tokens": config.find_max_tokens("subwords"),
        "max_length": None,
        "min_length": 0,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "repetition_penalty": 1.0,
        "num_return_sequences": config.candidate_count,
        "do_sample": is_sampling,
    }
    if is_sampling:
        options |= {"temperature": config.temperature, "top_k": config.top_k or 0, "top_p": config.top_p}
    if is_sampling or config.beam_width == 1:
        return {**options, "num_beams": 1, "output_logits": True}
    return {**options, "num_beams": config.beam_width, "length_penalty": config.length_penalty, "output_scores": True}


def _derive_seed(image_id: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {image_id}".encode()).digest()[:8], "big") >> 1
