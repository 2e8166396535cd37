import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from captionlib.errors import ConfigError
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.decoding.cider_d import CiderD
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder
from captionlib.models.decoding.incremental import Candidate, IncrementalCaptioner, score_sentences
from captionlib.models.decoding.rerank import RerankConfig, rerank_candidates
from tests.models.tiny_captioners import CONFIGS, FEATURE_SIZE, build, configs, features, seeds, teacher_forced

tokens = st.lists(st.integers(2, 8), max_size=5)


@settings(max_examples=30, deadline=None)
@given(configs, seeds, st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=12))
def test_scores_equal_teacher_forcing(
    config: CaptionerConfig, seed: int, sentences: list[tuple[list[int], bool]]
) -> None:
    model, image = build(config, seed), features(1, seed)
    incremental = IncrementalCaptioner(model)
    # Sentences that were cut off have no END.
    candidates = [Candidate(words, 0.0, len(words) + (not cut or not words)) for words, cut in sentences]
    scores = score_sentences(incremental, incremental.encode_images(image), candidates)
    assert scores.tolist() == pytest.approx(teacher_forced(model, image[0], candidates), rel=1e-4, abs=1e-4)


def test_no_sentences_give_no_scores() -> None:
    incremental = IncrementalCaptioner(build(CONFIGS[0], seed=3))
    assert score_sentences(incremental, incremental.encode_mean_features(), []).tolist() == []


def set_mean(model: CaptionerNetwork) -> CaptionerNetwork:
    model.standardization.set_statistics(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, 0.0]))
    return model


@settings(max_examples=15, deadline=None)
@given(configs, seeds)
def test_mutual_information_demotes_generic_captions(config: CaptionerConfig, seed: int) -> None:
    model, images = set_mean(build(config, seed)), features(4, seed)

    def decode(weight: float, n_best: int = 6) -> list[list[Candidate]]:
        rerank = RerankConfig("mbr", temperature=2.0, mutual_information_weight=weight)
        decoding = DecodingConfig(beam_width=6, n_best=n_best, rerank=rerank, length_penalty=0, max_tokens=6)
        return Decoder(model, decoding).decode(images)

    average = torch.tensor([[0.5, -1.0, 2.0]])
    for plain, reranked in zip(decode(0), decode(0.3), strict=True):
        gains = np.array([one.log_prob for one in plain]) - teacher_forced(model, average, plain)
        weights = np.exp(np.array([one.log_prob for one in plain]) / 2.0)
        sentences = [one.token_ids for one in plain]
        risks = CiderD().compare(sentences, sentences) @ (weights / weights.sum()) * np.exp(0.3 * gains)
        by_sentence = dict(zip(map(tuple, sentences), risks.tolist(), strict=True))
        ordered = [by_sentence[tuple(one.token_ids)] for one in reranked]
        assert ordered == pytest.approx(sorted(by_sentence.values(), reverse=True), rel=1e-4, abs=1e-6)
    assert [some[:2] for some in decode(0.3)] == decode(0.3, n_best=2)


def test_factors_break_ties() -> None:
    a, b = Candidate([2, 3], 0.0, 3), Candidate([2, 4], 0.0, 3)
    assert rerank_candidates([a, b], 1, CiderD(), factors=np.array([1.0, 1.01])) == [b, a]
    assert rerank_candidates([a, b], 1, CiderD(), factors=np.array([1.01, 1.0])) == [a, b]


@pytest.mark.parametrize("components", [0, 2])
def test_mean_features_invert_feature_transform(components: int) -> None:
    config = CaptionerConfig(
        hidden_size=6, embedding_size=5, feature_power=0.5, principal_components=components, image_input="every_step"
    )
    model = build(config, seed=1)
    same = torch.tensor([4.0, -9.0, 0.0]).expand(20, FEATURE_SIZE)  # the average equals each image
    if components:
        model.set_principal_components(model.power_normalize(same))
    else:
        model.standardization.set_statistics(model.power_normalize(same).mean(0), torch.ones(FEATURE_SIZE))
    for found, expected in zip(model.encode_mean_features(), model.encode_images(same[:1]), strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected)


def test_mutual_information_rejects_captioner_without_mean() -> None:
    model = build(CaptionerConfig(hidden_size=6, embedding_size=5, standardize_features=False), seed=0)
    with pytest.raises(ConfigError, match=r"stores the mean .* got one with standardize_features false"):
        Decoder(model, DecodingConfig(rerank=RerankConfig("mbr", mutual_information_weight=0.1)))
