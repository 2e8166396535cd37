"""Sentences about feature maps, and checks of captioners that attend to the maps."""

import torch

from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.captioners.packed_sequences import pad_sentences

SENTENCES = [[4, 2, 3], [], [2], [3, 3, 3, 3, 2], [4]]
IMAGE_OF_CAPTION = torch.tensor([1, 0, 0, 2, 1])
MAPS = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))


def check_gradients_and_positions(model: CaptionerNetwork) -> None:
    """Checks that every parameter gets a gradient, and that moving a value to another position changes the result."""
    model.train()
    model(MAPS, pad_sentences(SENTENCES), IMAGE_OF_CAPTION).log_probs.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    model.eval()
    sentence, moved = torch.tensor([[2, 3, 4]]), MAPS[:1].clone()
    moved[0, :, 0] = moved[0, :, 0].roll(1)  # the mean over positions stays
    before, after = (model(maps, sentence, torch.tensor([0])).log_probs.sum().item() for maps in (MAPS[:1], moved))
    assert abs(before - after) > 1e-4


def check_attention_weights(model: CaptionerNetwork) -> None:
    """Checks that each token has one distribution over positions, which does not depend on other sentences."""
    per_sentence = model.attention_weights(MAPS, pad_sentences(SENTENCES), IMAGE_OF_CAPTION)
    assert [weights.shape for weights in per_sentence] == [(len(sentence) + 1, 7) for sentence in SENTENCES]
    for weights in per_sentence:
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    (alone,) = model.attention_weights(MAPS[2:], torch.tensor([SENTENCES[3]]), torch.tensor([0]))
    torch.testing.assert_close(per_sentence[3], alone)
