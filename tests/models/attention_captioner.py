"""Writes the checkpoint of a small captioner with attention, for tests of attention maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from captionlib.data.text.vocabulary import END, Vocabulary
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import save_captioner


def write_captioner(folder: Path, encoder: Mapping[str, Any], attention_size: int = 4) -> Path:
    """Writes random weights large enough that images get different captions and maps."""
    vocabulary = Vocabulary.from_captions(["a dog runs on the grass"], 1)
    config = CaptionerConfig(hidden_size=6, embedding_size=5, attention_size=attention_size)
    model = CaptionerNetwork(config, encoder["shape"][-1], len(vocabulary))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
        model.output.bias[END] += 2  # some captions end soon, others are cut off
    save_captioner(folder, model, vocabulary, encoder, provenance={}, training={})
    return folder
