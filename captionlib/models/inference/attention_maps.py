"""Where a captioner with attention looked for each token of what it wrote, as the column `attention` of `captions/`."""

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
from captionlib.models.decoding.candidate import Candidate

__all__ = ["map_attention", "require_attention"]


def require_attention(captioner: LoadedCaptioner, checkpoint: str) -> int:
    """How many positions the captioner's maps have.

    Raises:
        CheckpointError: it has no attention.
    """
    if captioner.model.attention is None:
        raise CheckpointError(
            f"{checkpoint}: attention_maps expects a captioner with attention, got one that takes the image in at a "
            "image_state; leave attention_maps out, or train one with captioner.attention_size on features that are maps"
        )
    encoder_top = captioner.model.encoder_top
    return int(captioner.encoder["shape"][0]) if encoder_top is None else encoder_top.shape[0]


@torch.inference_mode()
def map_attention(model: Captioner, features: npt.NDArray[np.float32], captions: Sequence[Candidate]) -> pa.Array:
    """Where the model looks for the tokens of a caption an image, END last where it was reached.

    Args:
        model: a captioner with attention.
        features: `[images, positions, channels]`, as the encoder gave them.
        captions: one an image, as it was decoded.

    Returns:
        A list an image of a vector a token: `list<fixed_size_list<float16>[positions]>`.
    """
    device = model.output.weight.device
    words = pad_sentences([one.token_ids for one in captions]).to(device)
    looks = model.attention_weights(
        torch.from_numpy(features).to(device), words, torch.arange(len(captions), device=device)
    )
    numbers = torch.cat([look[: one.token_count] for look, one in zip(looks, captions, strict=True)])
    kind = captions_schema(numbers.shape[1]).field("attention").type
    vectors = numpy_to_vectors(numbers.to(torch.float16).cpu().numpy())
    ends = np.cumsum([0, *(one.token_count for one in captions)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), vectors, type=kind)
