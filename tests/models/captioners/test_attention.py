import math
from dataclasses import replace

import pytest
import torch

from captionlib.data.text.vocabulary import END, PAD
from captionlib.errors import CheckpointError, ConfigError, DatasetError
from captionlib.models.captioners.attention import Attention, group_by_image
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.decoding.incremental import IncrementalCaptioner
from tests.models.captioners.attending import (
    IMAGE_OF_CAPTION,
    MAPS,
    SENTENCES,
    check_attention_weights,
    check_gradients_and_positions,
)

SHAPES = [
    CaptionerConfig(cell, layers, hidden_size=6, embedding_size=5, image_input=image_input, attention_size=3)
    for cell, layers, image_input in (
        ("lstm", 1, "initial_input"),
        ("lstm", 2, "initial_state"),
        ("rnn", 1, "first_step"),
        ("rnn", 2, "every_step"),
    )
]


def build(config: CaptionerConfig) -> CaptionerNetwork:
    """Builds a small model with large weights, so that every input matters."""
    torch.manual_seed(0)
    model = CaptionerNetwork(config, feature_size=4, vocabulary_size=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model


def test_attention_matches_hand_computed_values() -> None:
    attention = Attention(channels=1, size=1, hidden_size=1, gates=1, dropout=0.5).eval()
    attention.standardization.set_statistics(torch.tensor([1.0]), torch.tensor([2.0]))
    with torch.no_grad():
        attention.annotation.weight.fill_(3)
        attention.annotation.bias.fill_(1)
        attention.query.weight.fill_(2)
        attention.query.bias.fill_(-1)
    # annotations: max(0, 3 (x - 1) / 2 + 1) for x = 1, 3, -5: 1, 4, 0; query 2 * 0.75 - 1 = 0.5: scores 0.5, 2, 0
    annotations = attention.annotate(torch.tensor([[[1.0], [3.0], [-5.0]]]))
    assert annotations.flatten().tolist() == [1, 4, 0]
    context, weights = attention(torch.tensor([[0.75]]), annotations, group_by_image(torch.tensor([0]), 1))
    total = math.exp(0.5) + math.exp(2) + 1
    expected = [math.exp(0.5) / total, math.exp(2) / total, 1 / total]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert context.item() == pytest.approx(expected[0] + 4 * expected[1], rel=1e-6)


def test_rows_attend_to_their_own_images_in_any_order() -> None:
    attention = Attention(channels=4, size=5, hidden_size=3, gates=1, dropout=0.0)
    annotations, hidden = attention.annotate(MAPS), torch.randn(6, 3)
    image = torch.tensor([2, 0, 2, 0, 2, 0])
    context, weights = attention(hidden, annotations, group_by_image(image, 3))
    for row in range(6):
        alone = group_by_image(torch.tensor([0]), 1)
        expected = attention(hidden[row : row + 1], annotations[image[row]][None], alone)
        torch.testing.assert_close(context[row : row + 1], expected[0])
        torch.testing.assert_close(weights[row : row + 1], expected[1])


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_log_probs_are_independent_of_padding_and_batch(config: CaptionerConfig) -> None:
    model = build(config)
    together = model(MAPS, pad_sentences(SENTENCES), IMAGE_OF_CAPTION)
    for number, sentence in enumerate(SENTENCES):
        image = IMAGE_OF_CAPTION[number]
        padded = torch.tensor([[*sentence, PAD, PAD]])
        alone = model(MAPS[image : image + 1], padded, torch.tensor([0])).log_probs
        torch.testing.assert_close(together.log_probs[together.sentences == number], alone)


@pytest.mark.parametrize("config", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_incremental_steps_match_whole_sentence(config: CaptionerConfig, dtype: torch.dtype, tolerance: float) -> None:
    model = build(config)
    words = torch.tensor([[2, 5, 3, 1], [4, 4, 2, 6], [3, 2, 6, 2]])
    scores = model(MAPS, words, torch.arange(3))
    incremental = IncrementalCaptioner(model, dtype)
    state = incremental.initial_state(incremental.encode_images(MAPS))
    for step, word in enumerate([torch.full((3,), END), *words.t()]):
        log_probs, state = incremental.step(state, word)
        target = words[:, step] if step < 4 else torch.full((3,), END)
        expected = scores.log_probs.view(5, 3)[step]
        torch.testing.assert_close(log_probs[torch.arange(3), target], expected, rtol=tolerance, atol=tolerance)
        if step == 1:  # reorder, repeat, and select again
            state = state.select(torch.tensor([2, 0, 0, 1])).select(torch.tensor([1, 3, 0]))


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_every_parameter_gets_gradients_and_positions_matter(config: CaptionerConfig) -> None:
    check_gradients_and_positions(build(config))


def test_attention_weights_has_one_distribution_per_token() -> None:
    check_attention_weights(build(SHAPES[0]))


def test_captioner_without_attention_uses_mean_of_map() -> None:
    model = build(replace(SHAPES[0], attention_size=0))
    captions = pad_sentences(SENTENCES)
    from_maps = model(MAPS, captions, IMAGE_OF_CAPTION).log_probs
    torch.testing.assert_close(from_maps, model(MAPS.mean(1), captions, IMAGE_OF_CAPTION).log_probs)


def test_attention_rejects_missing_maps_and_images() -> None:
    with pytest.raises(DatasetError, match="attention needs feature maps"):
        build(SHAPES[0]).encode_images(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="attention_size needs an image"):
        CaptionerConfig(image_input="none", attention_size=4)
    with pytest.raises(CheckpointError, match="got one without"):
        build(replace(SHAPES[0], attention_size=0)).attention_weights(MAPS, torch.tensor([[2]]), torch.tensor([0]))
