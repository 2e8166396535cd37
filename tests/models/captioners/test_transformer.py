"""Tests of captioners with `cell: transformer`; the tests of decoding and training cover them as well."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captionlib.data.text.vocabulary import END, PAD
from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.captioners.language_model import LanguageModelConfig, build_language_model
from captionlib.models.captioners.packed_sequences import pad_sentences
from captionlib.models.decoding.incremental import IncrementalCaptioner
from tests.models.captioners.attending import (
    IMAGE_OF_CAPTION,
    MAPS,
    SENTENCES,
    check_attention_weights,
    check_gradients_and_positions,
)

CONFIG = CaptionerConfig("transformer", layers=2, hidden_size=6, embedding_size=6, heads=3)
EVERY_STEP = replace(CONFIG, image_input="every_step")
CONFIGS = pytest.mark.parametrize("config", [CONFIG, EVERY_STEP], ids=["initial_input", "every_step"])
VECTORS = MAPS[:, 0]
BOTH = pytest.mark.parametrize("features", [MAPS, VECTORS], ids=["maps", "vectors"])


def randomize(model: CaptionerNetwork) -> CaptionerNetwork:
    """Sets large weights, so that every input matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return model.eval()


def build(config: CaptionerConfig = CONFIG) -> CaptionerNetwork:
    return randomize(CaptionerNetwork(config, feature_size=4, vocabulary_size=7))


@CONFIGS
def test_log_probs_equal_those_of_pytorchs_decoder(config: CaptionerConfig) -> None:
    model = build(config)
    transformer = model.transformer
    assert transformer is not None
    for standardization in (model.standardization, transformer.standardization):
        standardization.set_statistics(torch.full((4,), 0.5), torch.full((4,), 2.0))
    annotations = torch.relu(transformer.annotation((MAPS - 0.5) / 2))
    position, pair = torch.arange(6.0)[:, None], torch.arange(3)
    angle = position / 10000 ** (2 * pair / 6)
    sinusoids = torch.zeros(6, 6)
    sinusoids[:, 0::2], sinusoids[:, 1::2] = angle.sin(), angle.cos()
    for number, sentence in enumerate(SENTENCES):
        image = annotations[IMAGE_OF_CAPTION[number]][None]
        words = torch.tensor([END, *sentence])
        hidden = (model.word_vectors.weight[words] * 6**0.5 + sinusoids[: len(words)])[None]
        if config.image_input == "every_step":
            hidden = hidden + model.image_projection((MAPS[IMAGE_OF_CAPTION[number]].mean(0) - 0.5) / 2)
        for layer in range(2):
            hidden = pytorch_layer(model, layer)(
                hidden, image, nn.Transformer.generate_square_subsequent_mask(len(words)), tgt_is_causal=True
            )
        log_probs = torch.log_softmax(model.output(transformer.norm(hidden[0])), 1)
        expected = log_probs[torch.arange(len(words)), torch.tensor([*sentence, END])]
        scores = model(MAPS, pad_sentences(SENTENCES), IMAGE_OF_CAPTION)
        torch.testing.assert_close(scores.log_probs[scores.sentences == number], expected)


def pytorch_layer(model: CaptionerNetwork, number: int) -> nn.TransformerDecoderLayer:
    """Returns PyTorch's pre-norm decoder layer with the weights of a layer of the model."""
    ours = model.transformer.layers[number]  # type: ignore[union-attr]
    keys_values = model.transformer.image_keys_values  # type: ignore[union-attr]
    layer = nn.TransformerDecoderLayer(6, 3, 24, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        for attention, output in (
            (layer.self_attn, ours.word_output),
            (layer.multihead_attn, ours.image_output),
        ):
            attention.out_proj.load_state_dict(output.state_dict())
        layer.self_attn.in_proj_weight.copy_(ours.word_projections.weight)
        layer.self_attn.in_proj_bias.copy_(ours.word_projections.bias)
        key, value = slice(6 * number, 6 * number + 6), slice(6 * (2 + number), 6 * (2 + number) + 6)
        for name in ("weight", "bias"):
            parts = [getattr(ours.image_query, name), *(getattr(keys_values, name)[part] for part in (key, value))]
            getattr(layer.multihead_attn, f"in_proj_{name}").copy_(torch.cat(parts))
    for theirs, module in (
        (layer.norm1, ours.word_norm),
        (layer.norm2, ours.image_norm),
        (layer.norm3, ours.inner_norm),
        (layer.linear1, ours.inner),
        (layer.linear2, ours.inner_output),
    ):
        theirs.load_state_dict(module.state_dict())
    return layer


@BOTH
def test_log_probs_are_independent_of_padding_and_batch(features: Tensor) -> None:
    model = build()
    together = model(features, pad_sentences(SENTENCES), IMAGE_OF_CAPTION)
    for number, sentence in enumerate(SENTENCES):
        image = IMAGE_OF_CAPTION[number]
        padded = torch.tensor([[*sentence, PAD, PAD]])
        alone = model(features[image : image + 1], padded, torch.tensor([0])).log_probs
        torch.testing.assert_close(together.log_probs[together.sentences == number], alone)


@BOTH
@CONFIGS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_cached_steps_match_whole_sentence_after_reordering(
    features: Tensor, config: CaptionerConfig, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(config)
    words = torch.tensor([[2, 5, 3, 1], [4, 4, 2, 6], [3, 2, 6, 2]])
    scores = model(features, words, torch.arange(3))
    incremental = IncrementalCaptioner(model, dtype)
    state = incremental.initial_state(incremental.encode_images(features))
    for step, word in enumerate([torch.full((3,), END), *words.t()]):
        log_probs, state = incremental.step(state, word)
        target = words[:, step] if step < 4 else torch.full((3,), END)
        expected = scores.log_probs.view(5, 3)[step]
        torch.testing.assert_close(log_probs[torch.arange(3), target], expected, rtol=tolerance, atol=tolerance)
        assert all(cache.shape == (3, step + 1, 6) for cache in (*state.h, *state.c))
    rows = torch.tensor([2, 0, 2, 1])
    reordered, after = incremental.step(state.select(rows), torch.tensor([3, 4, 5, 6]))
    repeated, _ = incremental.step(after.select(torch.tensor([3, 0])), torch.tensor([2, 2]))
    for number, (row, word) in enumerate(zip(rows.tolist(), [3, 4, 5, 6], strict=True)):
        sentence = torch.tensor([[*words[row].tolist(), word, 2]])
        expected = model(features[row : row + 1], sentence, torch.tensor([0])).log_probs
        torch.testing.assert_close(reordered[number, 2], expected[5], rtol=tolerance, atol=tolerance)
        if number in (3, 0):
            after_two = repeated[[3, 0].index(number), END]
            torch.testing.assert_close(after_two, expected[6], rtol=tolerance, atol=tolerance)


@CONFIGS
def test_every_parameter_gets_gradients_and_positions_matter(config: CaptionerConfig) -> None:
    check_gradients_and_positions(build(config))


def test_attention_weights_has_one_distribution_per_token() -> None:
    check_attention_weights(build())


def test_mean_features_are_the_same_at_every_position() -> None:
    model = build(replace(CONFIG, feature_power=0.5))
    model.standardization.set_statistics(torch.tensor([0.5, -0.5, 1, 2]), torch.ones(4))
    average = model.encode_mean_features()
    expected = model.encode_images(torch.tensor([[0.25, -0.25, 1, 4]]))
    assert average.annotations is not None
    torch.testing.assert_close(average.annotations, expected.annotations)


def test_language_model_attends_to_words_alone() -> None:
    config = LanguageModelConfig("transformer", layers=2, hidden_size=6, embedding_size=6, heads=2)
    model = randomize(build_language_model(config, 7))
    assert not [name for name, _ in model.named_parameters() if "image" in name or "annotation" in name]
    words, no_image = torch.tensor([[2, 5, 3], [4, 4, 2]]), torch.zeros(2, 0)
    scores = model(no_image, words, torch.arange(2)).log_probs.view(4, 2)
    incremental = IncrementalCaptioner(model)
    state = incremental.initial_state(incremental.encode_images(no_image))
    for step, word in enumerate([torch.full((2,), END), *words.t()[:2]]):
        log_probs, state = incremental.step(state, word)
        torch.testing.assert_close(log_probs[torch.arange(2), words[:, step]], scores[step])


@pytest.mark.parametrize("layers", [1, 6])
def test_initial_keys_and_values_of_the_image_do_not_depend_on_the_number_of_layers(layers: int) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, layers=layers, hidden_size=96, embedding_size=96)
    transformer = CaptionerNetwork(config, feature_size=4, vocabulary_size=7).transformer
    assert transformer is not None
    assert transformer.image_keys_values.weight.std().item() == pytest.approx(
        96**-0.5, rel=0.02
    )  # Glorot & Bengio 2010


def test_initial_predictions_are_close_to_the_word_frequencies() -> None:
    torch.manual_seed(0)
    model = CaptionerNetwork(CaptionerConfig("transformer", layers=6), 512, 50).eval()
    frequencies = torch.linspace(1, 50, 50) / 1275
    model.initialize_bias(frequencies.log())
    captions = torch.arange(2, 42).view(2, 20)
    log_probs = model(torch.randn(2, 9, 512), captions, torch.arange(2)).log_probs
    expected = torch.cat([frequencies[captions.t().flatten()], frequencies[[0, 0]]]).log()
    assert (log_probs - expected).abs().mean() < 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_size": 300}, "a Transformer needs embedding_size = hidden_size, got 300 and 512; set them equal"),
        ({"heads": 7}, "expected heads that divide hidden_size, got 7 and 512"),
        ({"attention_size": 64}, "cell transformer needs attention_size 0, got 64"),
        ({"principal_components": 9}, "cell transformer needs principal_components 0, got 9"),
        ({"image_input": "first_step"}, "needs image_input initial_input or every_step or none, got first_step"),
    ],
)
def test_config_rejects_options_of_recurrent_cells(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CaptionerConfig(cell="transformer", **options)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, tuple) else [output]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return output


def test_memory_of_a_long_sentence_without_gradients_is_linear() -> None:
    config = LanguageModelConfig("transformer", layers=1, hidden_size=6, embedding_size=6, heads=3, dropout=0)
    model = randomize(build_language_model(config, 7))
    sentence = torch.randint(2, 7, (1, 1000))
    arguments = torch.zeros(1, 0), sentence, torch.tensor([0])
    with torch.no_grad(), LargestTensor() as largest:
        scores = model(*arguments)
    assert largest.elements <= 1001 * 4 * 6  # of the feed-forward network
    torch.testing.assert_close(scores.log_probs, model(*arguments).log_probs)
