"""Computes the probability of given sentences with captioners from Hugging Face Transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["score_sentences"]


@torch.inference_mode()
def score_sentences(
    model: Any, tokenizer: Any, pixels: Tensor, sentences: Sequence[Sequence[str]]
) -> list[list[tuple[float, int]]]:
    """Returns ln p(sentence | image) and the number of tokens, including the end token, of the sentences of each image.

    `model` is BLIP, GIT or an encoder-decoder, in float32. `pixels` is `[images, 3, height, width] float32`,
    normalized, on the device of the model.
    """
    start, end = _find_start_and_end(model)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for texts in sentences for text in texts]
    if not ids:
        return [[] for _ in sentences]
    image_indices = torch.tensor([index for index, texts in enumerate(sentences) for _ in texts], device=pixels.device)
    counts = torch.tensor([len(each) + 1 for each in ids], device=pixels.device)
    width = int(counts.max())
    rows = [[start, *each, *[end] * (width - len(each))] for each in ids]
    tokens = torch.tensor(rows, device=pixels.device)  # [sentences, width + 1], padded with end tokens
    log_probs = _compute_logits(model, pixels, image_indices, tokens)[:, :-1].log_softmax(2)
    log_probs = log_probs.gather(2, tokens[:, 1:, None])[:, :, 0]
    is_token = torch.arange(width, device=pixels.device) < counts[:, None]
    scores = iter(zip(log_probs.masked_fill(~is_token, 0).sum(1).tolist(), counts.tolist(), strict=True))
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


def _compute_logits(model: Any, pixels: Tensor, image_indices: Tensor, tokens: Tensor) -> Tensor:
    """Returns logits, `[sentences, tokens, vocabulary]`. All models are causal, so padding at the end has no effect."""
    logits: Tensor
    if model.config.model_type == "git":  # pixels and tokens form one sequence
        logits = model(pixel_values=pixels[image_indices], input_ids=tokens).logits[:, -tokens.shape[1] :]
    elif model.config.model_type == "blip":
        embeddings = model.vision_model(pixel_values=pixels)[0]
        logits = model.text_decoder(input_ids=tokens, encoder_hidden_states=embeddings[image_indices]).logits
    else:
        embeddings = model.encoder(pixel_values=pixels)[0]
        logits = model(encoder_outputs=(embeddings[image_indices],), decoder_input_ids=tokens).logits
    return logits
