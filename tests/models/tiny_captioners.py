"""Small captioners with peaked, varied distributions, for tests of decoding."""

import torch
from hypothesis import strategies as st

from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.decoding.incremental import Candidate

FEATURE_SIZE = 3
CONFIGS = [
    CaptionerConfig("lstm", layers=2, hidden_size=6, embedding_size=5),
    CaptionerConfig("lstm", hidden_size=6, embedding_size=5, image_input="every_step"),
    CaptionerConfig("rnn", hidden_size=6, embedding_size=5, image_input="first_step"),
    CaptionerConfig("rnn", layers=2, hidden_size=6, embedding_size=5, image_input="initial_state"),
    CaptionerConfig("lstm", hidden_size=6, embedding_size=5, attention_size=4),
    CaptionerConfig("transformer", layers=2, hidden_size=6, embedding_size=6, heads=2),
]
seeds = st.integers(0, 1000)
configs = st.sampled_from(CONFIGS)


def build(config: CaptionerConfig, seed: int, vocabulary_size: int = 9) -> CaptionerNetwork:
    """Builds a captioner with large random weights.

    An RNN gets smaller weights, because its states would grow without bound, and positive biases, because dead states
    would make all orders of the same words equally probable.
    """
    spread = 1.5 if config.cell == "lstm" else 0.8
    model = CaptionerNetwork(config, FEATURE_SIZE, vocabulary_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-spread, spread, generator=generator)
        for name, parameter in model.named_parameters():
            if name.startswith("recurrence.bias") and config.cell == "rnn":
                parameter.abs_()
    return model.eval()


def features(images: int, seed: int) -> torch.Tensor:
    """Returns maps of three positions, whose means over positions have standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    return 3**0.5 * torch.randn(images, 3, FEATURE_SIZE, generator=generator)


def teacher_forced(model: CaptionerNetwork, image: torch.Tensor, candidates: list[Candidate]) -> list[float]:
    """Returns the log-probability of each whole sentence; END is included if the candidate reached it."""
    captions = pad_sentences([candidate.token_ids for candidate in candidates])
    scores = model(image[None], captions, torch.zeros(len(captions), dtype=torch.int64))
    return [
        scores.log_probs[scores.sentences == number][: candidate.token_count].sum().item()
        for number, candidate in enumerate(candidates)
    ]
