import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from captionlib.data.text.vocabulary import PAD
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork, TokenLogProbs
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.captioners.recurrence import run_fused, run_recurrence

SHAPES = [
    CaptionerConfig(cell=cell, layers=layers, hidden_size=6, embedding_size=5, image_input=image_input)
    for cell in ("lstm", "rnn")
    for layers in (1, 2)
    for image_input in ("initial_input", "first_step", "every_step", "initial_state")
]
SENTENCES = [[4, 2, 3], [], [2], [3, 3, 3, 3, 2], [4]]
FEATURES = torch.linspace(-2, 2, 12).view(3, 4)
IMAGE_OF_CAPTION = torch.tensor([1, 0, 0, 2, 1])


def build(config: CaptionerConfig, feature_size: int = 4, vocabulary_size: int = 7) -> CaptionerNetwork:
    """Builds a small model with large weights, so that every input matters."""
    torch.manual_seed(0)
    model = CaptionerNetwork(config, feature_size, vocabulary_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    return model


def set_weights(model: CaptionerNetwork, **weights: list[float] | list[list[float]]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, values in weights.items():
            model.get_parameter(name.replace("__", ".")).copy_(torch.tensor(values))


def sentence_log_probs(scores: TokenLogProbs, sentences: int) -> Tensor:
    return torch.zeros(sentences).index_add(0, scores.sentences, scores.log_probs)


def test_rnn_matches_hand_computed_steps() -> None:
    config = CaptionerConfig(cell="rnn", hidden_size=2, embedding_size=2, image_input="first_step")
    model = build(config, feature_size=1, vocabulary_size=3)
    set_weights(
        model,
        word_vectors__weight=[[1, 0], [0, 0], [0, 1]],  # START, UNKNOWN, a word
        image_projection__weight=[[1], [0]],
        recurrence__weight_ih_l0=[[1, 0], [0, 2]],
        recurrence__weight_hh_l0=[[0, 1], [1, 0]],
        recurrence__bias_ih_l0=[0, -1],
        output__weight=[[0, 1], [0, 0], [1, 0]],
    )
    model.standardization.set_statistics(torch.tensor([1.0]), torch.tensor([2.0]))
    # v = (3 - 1) / 2 = 1
    # h_0 = max(0, Wxh START + Wih v + b)      = max(0, (1, 0) + (1, 0) + (0, -1))  = (2, 0), logits (0, 0, 2)
    # h_1 = max(0, Wxh word + Whh (2, 0) + b)  = max(0, (0, 2) + (0, 2) + (0, -1))  = (0, 3), logits (3, 0, 0)
    scores = model(torch.tensor([[3.0]]), torch.tensor([[2]]), torch.tensor([0]))
    expected = [2 - math.log(2 + math.exp(2)), 3 - math.log(2 + math.exp(3))]
    assert scores.log_probs.tolist() == pytest.approx(expected, rel=1e-6)


def test_lstm_matches_hand_computed_steps() -> None:
    config = CaptionerConfig(cell="lstm", hidden_size=1, embedding_size=1, image_input="initial_input")
    model = build(config, feature_size=1, vocabulary_size=2)
    set_weights(
        model,
        word_vectors__weight=[[0.5], [0]],
        image_projection__weight=[[2]],
        recurrence__weight_ih_l0=[[1], [0], [2], [3]],  # input, forget, cell and output gate
        recurrence__weight_hh_l0=[[0], [4], [1], [0]],
        recurrence__bias_hh_l0=[0, 1, 0, -1],
        output__weight=[[1], [0]],
    )
    # The first time step reads the image, 2 * 0.25 = 0.5; the second reads START, also 0.5.
    c = _sigmoid(0.5) * math.tanh(1.0)
    h = _sigmoid(0.5) * math.tanh(c)
    c = _sigmoid(4 * h + 1) * c + _sigmoid(0.5) * math.tanh(1.0 + h)
    h = _sigmoid(0.5) * math.tanh(c)
    scores = model(torch.tensor([[0.25]]), torch.full((1, 0), PAD), torch.tensor([0]))
    assert scores.log_probs.tolist() == pytest.approx([h - math.log(math.exp(h) + 1)], rel=1e-6)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_log_probs_are_independent_of_padding_and_batch(config: CaptionerConfig) -> None:
    model = build(config)
    together = model(FEATURES, pad_sentences(SENTENCES), IMAGE_OF_CAPTION)
    assert together.log_probs.shape == (sum(map(len, SENTENCES)) + len(SENTENCES),)
    for number, sentence in enumerate(SENTENCES):
        image = IMAGE_OF_CAPTION[number]
        padded = torch.tensor([[*sentence, PAD, PAD]])
        alone = model(FEATURES[image : image + 1], padded, torch.tensor([0])).log_probs
        torch.testing.assert_close(together.log_probs[together.sentences == number], alone)


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_log_probs_depend_on_image(config: CaptionerConfig) -> None:
    model = build(config)
    captions = pad_sentences([[2, 3], [2, 3]])
    totals = sentence_log_probs(model(FEATURES[:2], captions, torch.tensor([0, 1])), 2)
    assert abs(totals[0] - totals[1]) > 1e-3


@pytest.mark.parametrize("config", SHAPES, ids=str)
def test_fused_call_and_its_gradients_equal_loop(config: CaptionerConfig) -> None:
    model = build(config)
    inputs = torch.randn(6, config.embedding_size, requires_grad=True)
    state = torch.randn(model.state_count, 3, config.hidden_size, requires_grad=True)
    loop = run_recurrence(model.recurrence, model.dropout, inputs, [3, 2, 1], state)
    fused = run_fused(model.recurrence, inputs, [3, 2, 1], state)
    torch.testing.assert_close(loop.hidden, fused.hidden)
    torch.testing.assert_close(loop.state, fused.state)
    variables = [inputs, state, *model.recurrence.parameters()]
    gradients = [torch.autograd.grad(each.hidden.sin().sum() + each.state.sum(), variables) for each in (loop, fused)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", SHAPES[:2] + SHAPES[8:10], ids=str)
def test_every_parameter_gets_gradients(config: CaptionerConfig) -> None:
    model = build(config).train()
    model(FEATURES, pad_sentences(SENTENCES), IMAGE_OF_CAPTION).log_probs.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_is_active_only_in_training() -> None:
    model = build(CaptionerConfig(hidden_size=16, embedding_size=16, dropout=0.5))
    inputs = FEATURES, pad_sentences(SENTENCES), IMAGE_OF_CAPTION
    assert torch.equal(model(*inputs).log_probs, model(*inputs).log_probs)
    model.train()
    assert not torch.equal(model(*inputs).log_probs, model(*inputs).log_probs)


def test_standardization_removes_feature_scale() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5))
    captions = pad_sentences(SENTENCES)
    model.standardization.set_statistics(FEATURES.mean(0), FEATURES.std(0))
    before = model(FEATURES, captions, IMAGE_OF_CAPTION).log_probs
    scaled = FEATURES * torch.tensor([2.0, 3.0, 100.0, 0.01]) + 7
    model.standardization.set_statistics(scaled.mean(0), scaled.std(0))
    torch.testing.assert_close(model(scaled, captions, IMAGE_OF_CAPTION).log_probs, before)


def test_feature_power_damps_large_features_and_keeps_sign() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5, feature_power=0.5))
    assert model.transform_features(torch.tensor([[4.0, -9.0, 0.0, 1.0]])).tolist() == [[2, -3, 0, 1]]
    model.standardization.set_statistics(torch.full((4,), 1.0), torch.full((4,), 2.0))
    assert model.transform_features(torch.tensor([[9.0, 1.0, 0.0, 4.0]])).tolist() == [[1, 0, -0.5, 0.5]]


def test_feature_power_has_finite_gradient_at_zero() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5, feature_power=0.5))
    features = torch.tensor([[0.0, 4.0, -4.0]], requires_grad=True)
    model.power_normalize(features).sum().backward()
    assert features.grad is not None
    assert features.grad.tolist() == [[0.0, 0.25, 0.25]]  # 0.5 |x|^-0.5


def test_principal_components_are_whitened() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5, principal_components=3))
    sample = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([9.0, 1, 0.1, 0])
    )
    sample += torch.tensor([5.0, -2.0, 0.3, 8.0])
    model.set_principal_components(sample)
    components = model.transform_features(sample)
    torch.testing.assert_close(components.t() @ components / len(components), torch.eye(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(components.mean(0), torch.zeros(3), atol=1e-4, rtol=0)


def test_components_beyond_rank_stay_zero() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5, principal_components=4))
    model.set_principal_components(FEATURES[:2])
    assert model.transform_features(FEATURES)[:, 1:].abs().max() == 0


def test_constant_feature_becomes_zero() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5))
    model.standardization.set_statistics(torch.full((4,), 5.0), torch.zeros(4))
    image_state = model.encode_images(torch.full((1, 4), 5.0))
    assert torch.equal(image_state.projection[0], model.image_projection.bias)


def test_initialize_bias_predicts_word_frequencies() -> None:
    model = build(CaptionerConfig(hidden_size=2, embedding_size=2), vocabulary_size=3)
    set_weights(model)
    model.initialize_bias(torch.tensor([0.5, 0.2, 0.3]).log())
    scores = model(torch.zeros(1, 4), torch.tensor([[2, 1]]), torch.tensor([0]))
    assert scores.log_probs.exp().tolist() == pytest.approx([0.3, 0.2, 0.5])


def test_tied_embeddings_are_weights_of_softmax() -> None:
    model = build(CaptionerConfig(hidden_size=5, embedding_size=5, tie_embeddings=True))
    free = build(CaptionerConfig(hidden_size=5, embedding_size=5))
    assert model.output.weight is model.word_vectors.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in model.parameters()) == 7 * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers: Input should be greater than or equal to 1, got 0"),
        ({"feature_power": 0.0}, "feature_power: Input should be greater than 0, got 0.0"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1, got 1.0"),
        ({"embedding_size": 300, "tie_embeddings": True}, "embedding_size = hidden_size, got 300 and 512"),
    ],
)
def test_captioner_config_rejects_impossible_values(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CaptionerConfig(**options)


@pytest.mark.parametrize("config", SHAPES[:2])
def test_mean_log_probs_averages_over_vocabulary(config: CaptionerConfig) -> None:
    model = build(config)
    sentence = torch.tensor([[4, 2]])
    plain = model(FEATURES[:1], sentence, torch.tensor([0]))
    requested = model(FEATURES[:1], sentence, torch.tensor([0]), mean_log_probs=True)
    assert plain.mean_log_probs is None
    assert torch.equal(plain.log_probs, requested.log_probs)
    with torch.no_grad():  # score each class as the second word
        others = [model(FEATURES[:1], torch.tensor([[4, word]]), torch.tensor([0])).log_probs[1] for word in range(7)]
    assert requested.mean_log_probs[1].item() == pytest.approx(torch.stack(others).mean().item(), rel=1e-5)


@pytest.mark.parametrize("attention_size", [0, 64])
def test_weight_init_selects_distribution(attention_size: int) -> None:
    torch.manual_seed(0)
    shape = CaptionerConfig(hidden_size=64, embedding_size=64, attention_size=attention_size)
    for name, parameter in CaptionerNetwork(shape, 64, 500).named_parameters():
        assert (parameter == 0).all() if "bias" in name else 0.09 < parameter.abs().max() <= 0.1
    default = CaptionerNetwork(replace(shape, weight_init="pytorch"), 64, 500)
    assert default.word_vectors.weight.std().item() == pytest.approx(1, abs=0.05)
    for parameter in default.recurrence.weight_hh_l0, default.output.weight, default.image_projection.weight:
        assert 0.12 < parameter.abs().max() <= 0.125


@pytest.mark.parametrize("image_input", ["initial_input", "first_step", "every_step", "initial_state"])
@pytest.mark.parametrize("layers", [1, 2])
def test_initial_predictions_of_a_large_rnn_are_the_word_frequencies(image_input: Any, layers: int) -> None:
    torch.manual_seed(0)
    model = CaptionerNetwork(CaptionerConfig("rnn", layers, image_input=image_input), 4096, 50).eval()
    frequencies = torch.linspace(1, 50, 50) / 1275
    model.initialize_bias(frequencies.log())
    captions = torch.arange(2, 42).view(2, 20)
    log_probs = model(torch.randn(2, 4096), captions, torch.arange(2)).log_probs
    expected = torch.cat([frequencies[captions.t().flatten()], frequencies[[0, 0]]]).log()
    assert (log_probs - expected).abs().max() < 1.5  # hundreds if all weights are U(-0.1, 0.1)


def test_recurrent_weights_of_an_rnn_are_orthogonal() -> None:
    model = CaptionerNetwork(CaptionerConfig("rnn", layers=2, hidden_size=8, embedding_size=8), 4, 9)
    for name, weight in model.recurrence.named_parameters():
        if "weight_hh" in name:
            torch.testing.assert_close(weight @ weight.t(), torch.eye(8))
