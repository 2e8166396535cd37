from typing import Literal

import pytest
import torch

from captionlib.data.text.vocabulary import END
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.decoding.incremental import IncrementalCaptioner

FEATURES = torch.linspace(-2, 2, 12).view(3, 4)


def build(config: CaptionerConfig) -> CaptionerNetwork:
    torch.manual_seed(0)
    model = CaptionerNetwork(config, feature_size=4, vocabulary_size=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("image_input", ["initial_input", "first_step", "every_step", "initial_state"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_incremental_steps_match_whole_sentence(
    cell: Literal["lstm", "rnn"],
    layers: int,
    image_input: Literal["initial_input", "first_step", "every_step", "initial_state"],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    model = build(CaptionerConfig(cell, layers, hidden_size=6, embedding_size=5, image_input=image_input))
    model.standardization.set_statistics(FEATURES.mean(0), FEATURES.std(0))
    words = torch.tensor([[2, 5, 3, 1], [4, 4, 2, 6], [3, 2, 6, 2]])
    scores = model(FEATURES, words, torch.arange(3))
    incremental = IncrementalCaptioner(model, dtype)
    state = incremental.initial_state(incremental.encode_images(FEATURES))
    for step, word in enumerate([torch.full((3,), END), *words.t()]):
        log_probs, state = incremental.step(state, word)
        target = words[:, step] if step < 4 else torch.full((3,), END)
        expected = scores.log_probs.view(5, 3)[step]
        torch.testing.assert_close(log_probs[torch.arange(3), target], expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
@pytest.mark.parametrize("image_input", ["initial_input", "every_step"])
def test_state_rows_can_be_selected_and_repeated(
    cell: Literal["lstm", "rnn"], image_input: Literal["initial_input", "every_step"]
) -> None:
    incremental = IncrementalCaptioner(
        build(CaptionerConfig(cell, 2, hidden_size=6, embedding_size=5, image_input=image_input))
    )
    _, state = incremental.step(
        incremental.initial_state(incremental.encode_images(FEATURES)), torch.tensor([END, END, END])
    )
    all_rows, after = incremental.step(state, torch.tensor([2, 3, 4]))
    rows = torch.tensor([2, 0, 2])
    selected, selected_after = incremental.step(state.select(rows), torch.tensor([4, 2, 4]))
    torch.testing.assert_close(selected, all_rows[rows])
    reselected, _ = incremental.step(state.select(rows).select(torch.tensor([1, 0])), torch.tensor([2, 4]))
    torch.testing.assert_close(reselected, all_rows[[0, 2]])
    words = torch.tensor([5, 6, 5])
    torch.testing.assert_close(
        incremental.step(selected_after, words)[0], incremental.step(after.select(rows), words)[0]
    )


def test_incremental_captioner_is_a_snapshot() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5)).train()
    incremental = IncrementalCaptioner(model)
    before, _ = incremental.step(
        incremental.initial_state(incremental.encode_images(FEATURES)), torch.tensor([END, END, END])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    after, _ = incremental.step(
        incremental.initial_state(incremental.encode_images(FEATURES)), torch.tensor([END, END, END])
    )
    assert torch.equal(before, after)
    assert model.training
