"""Computes attention maps: the attention weights of each token of a caption over the positions of the image."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner
from captionlib.models.decoding.incremental import Candidate

__all__ = ["compute_attention_maps", "count_positions"]


def count_positions(captioner: LoadedCaptioner) -> int | None:
    """Returns the number of positions that the captioner attends to, or None without attention to a feature map."""
    if captioner.model.attention_module is None or len(captioner.encoder["shape"]) != 2:
        return None
    encoder_top = captioner.model.encoder_top
    return int(captioner.encoder["shape"][0]) if encoder_top is None else encoder_top.shape[0]


@torch.inference_mode()
def compute_attention_maps(
    model: CaptionerNetwork, features: npt.NDArray[np.float32], captions: Sequence[Candidate]
) -> list[npt.NDArray[np.float16]]:
    """Computes the attention weights of each caption's tokens (and of END if it was reached), `[tokens, positions]`."""
    device = model.output.weight.device
    token_ids = pad_sentences([caption.token_ids for caption in captions]).to(device)
    image_indices = torch.arange(len(captions), device=device)  # caption i describes image i
    per_caption = model.attention_weights(torch.from_numpy(features).to(device), token_ids, image_indices)
    return [
        weights[: caption.token_count].to(torch.float16).cpu().numpy()
        for weights, caption in zip(per_caption, captions, strict=True)
    ]
