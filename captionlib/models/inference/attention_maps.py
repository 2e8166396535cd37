"""Attention maps: the attention weights of each caption's tokens, the column `attention` of a captions dataset."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captionlib.data.arrays import numpy_to_vectors
from captionlib.data.shards.schemas import captions_schema
from captionlib.errors import CheckpointError
from captionlib.models.captioners.captioner import Captioner
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.checkpoints.checkpoint import LoadedCaptioner
from captionlib.models.decoding.incremental import Candidate

__all__ = ["attends_to_map", "compute_attention_maps", "require_attention"]


def require_attention(captioner: LoadedCaptioner, checkpoint: str) -> int:
    """Returns the number of positions in the captioner's feature maps; errors name `checkpoint`.

    Raises:
        CheckpointError: the captioner has no attention.
    """
    if not attends_to_map(captioner):
        raise CheckpointError(
            f"{checkpoint}: attention_maps needs a captioner with attention to a feature map, got one without; leave "
            "attention_maps out, or train a captioner with captioner.attention_size on spatial feature maps"
        )
    encoder_top = captioner.model.encoder_top
    return int(captioner.encoder["shape"][0]) if encoder_top is None else encoder_top.shape[0]


def attends_to_map(captioner: LoadedCaptioner) -> bool:
    """Returns whether the captioner attends to the positions of a feature map."""
    return captioner.model.annotator is not None and len(captioner.encoder["shape"]) == 2


@torch.inference_mode()
def compute_attention_maps(
    model: Captioner, features: npt.NDArray[np.float32], captions: Sequence[Candidate]
) -> pa.Array:
    """Computes the attention weights of each caption's tokens, including END if it was reached.

    Returns:
        One vector per token: `list<fixed_size_list<float16>[positions]>` per image.
    """
    device = model.output.weight.device
    words = pad_sentences([caption.token_ids for caption in captions]).to(device)
    images = torch.arange(len(captions), device=device)
    per_caption = model.attention_weights(torch.from_numpy(features).to(device), words, images)
    counts = [caption.token_count for caption in captions]
    weights = torch.cat([tokens[:count] for tokens, count in zip(per_caption, counts, strict=True)])
    vectors = numpy_to_vectors(weights.to(torch.float16).cpu().numpy())
    offsets = pa.array(np.cumsum([0, *counts], dtype=np.int32))
    column_type = captions_schema(weights.shape[1]).field("attention").type
    return pa.ListArray.from_arrays(offsets, vectors, type=column_type)
