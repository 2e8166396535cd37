"""Computes the probability of given sentences with captioners from Hugging Face Transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captionlib.errors import DatasetError

__all__ = ["score_sentences"]

_MAX_TOKENS = 4096  # per batch of sentences; the logits of a vocabulary of 30,000 words take 500 MB


@torch.inference_mode()
def score_sentences(
    model: Any, tokenizer: Any, pixels: Tensor, sentences: Sequence[Sequence[str]]
) -> list[list[tuple[float, int]]]:
    """Computes ln p(sentence | image) and the number of tokens of the sentences of each image; see `SentenceScorer`.

    `model` is BLIP, GIT or an encoder-decoder, in float32. `pixels` is `[images, 3, height, width] float32`,
    normalized, on the device of the model.

    Raises:
        DatasetError: a sentence is longer than the model supports.
    """
    start, end = _find_start_and_end(model)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for texts in sentences for text in texts]
    if not any(ids):
        return [[(0.0, 0) for _ in texts] for texts in sentences]
    image_indices = torch.tensor([index for index, texts in enumerate(sentences) for _ in texts], device=pixels.device)
    counts = torch.tensor([len(each) + 1 if each else 0 for each in ids], device=pixels.device)
    width = int(counts.max())
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", width)
    if width > limit:
        raise DatasetError(
            f"expected references of at most {limit - 1} tokens, the limit of the model, got one of {width - 1}; "
            "shorten it, or leave --checkpoint out"
        )
    padded = [[start, *each, *[end] * (width - len(each))] for each in ids]
    tokens = torch.tensor(padded, device=pixels.device)  # [sentences, width + 1], padded with end tokens
    is_token = torch.arange(width, device=pixels.device) < counts[:, None]
    compute_logits = _encode_images(model, pixels)
    sums: list[float] = []
    for rows in torch.split(torch.arange(len(ids), device=pixels.device), max(1, _MAX_TOKENS // width)):
        log_probs = compute_logits(image_indices[rows], tokens[rows, :-1]).log_softmax(2)
        log_probs = log_probs.gather(2, tokens[rows, 1:, None])[:, :, 0]
        sums += log_probs.masked_fill(~is_token[rows], 0).sum(1).tolist()
    scores = iter(zip(sums, counts.tolist(), strict=True))
    return [[next(scores) for _ in texts] for texts in sentences]


def _find_start_and_end(model: Any) -> tuple[int, int]:
    """Returns the ids of the tokens with which `generate` starts and stops."""
    config = model.config
    if config.model_type == "blip":
        return config.text_config.bos_token_id, config.text_config.sep_token_id
    settings = model.generation_config
    end = settings.eos_token_id
    start = settings.bos_token_id if config.model_type == "git" else settings.decoder_start_token_id
    return start, end[0] if isinstance(end, list) else end


def _encode_images(model: Any, pixels: Tensor) -> Callable[[Tensor, Tensor], Any]:
    """Returns a function that computes logits from the image of each sentence and from token ids.

    All models are causal, so padding at the end of a sentence has no effect.
    """
    if model.config.model_type == "git":  # pixels and tokens form one sequence
        return lambda images, tokens: model(pixel_values=pixels[images], input_ids=tokens).logits[:, -tokens.shape[1] :]
    if model.config.model_type == "blip":
        embeddings = model.vision_model(pixel_values=pixels)[0]
        return lambda images, tokens: (
            model.text_decoder(input_ids=tokens, encoder_hidden_states=embeddings[images]).logits
        )
    embeddings = model.encoder(pixel_values=pixels)[0]
    return lambda images, tokens: model(encoder_outputs=(embeddings[images],), decoder_input_ids=tokens).logits
