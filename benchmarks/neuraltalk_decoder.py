"""Measures captions/s of beam search relative to a NumPy decoder like NeuralTalk's (one image at a time, float64).

Both decode the same captioner and must reach the same BLEU. By default, the captioner has random weights (see
`decoding_speed`), and the references are sampled from it. `--captioner` and `--features` specify a trained LSTM and
features with a split `dev` or `val`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bars import report, run_benchmark
from benchmarks.decoding_speed import BATCH, FEATURE_SIZE, build_captioner
from captionlib.data.batches.captions import average_positions, read_features
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.evaluation.metrics import compute_bleu
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

WIDTH, STEPS = 5, 20
IMAGES, ROUNDS = 1000, 7
SINGLES, BATCHES = 20, 3  # images for NumPy and batches for captionlib per round; both take about as long

Array = npt.NDArray[np.float64]
Hypothesis = tuple[float, list[int], Array, Array]  # log-probability, token ids, h, c


class NumpyDecoder:
    """Beam search like NeuralTalk's: one time step per hypothesis, in float64; finished hypotheses stay in the beam.

    Args:
        model: LSTM captioner with one layer, whose first input is the image.
    """

    def __init__(self, model: CaptionerNetwork) -> None:
        w_ih, w_hh, b_ih, b_hh = (weights.detach().double().numpy() for weights in model.recurrence.all_weights[0])
        self._gates = np.concatenate([(b_ih + b_hh)[None], w_ih.T, w_hh.T])  # rows for [1, x, h]
        self._hidden = w_hh.shape[1]
        self._words = model.word_vectors.weight.detach().double().numpy()
        self._output = model.output.weight.detach().double().numpy().T.copy()
        self._output_bias = model.output.bias.detach().double().numpy()

    def decode(self, image: Array) -> list[int]:
        """Returns the most probable caption of a projected image, `[embedding_size]`."""
        zero = np.zeros(self._hidden)
        h, c = self._step(image, zero, zero)
        beams: list[Hypothesis] = [(0.0, [], h, c)]
        for _ in range(STEPS):
            candidates: list[Hypothesis] = []
            for beam in beams:
                candidates += [beam] if beam[1][-1:] == [END] else self._extend(beam)
            candidates.sort(key=lambda hypothesis: -hypothesis[0])
            beams = candidates[:WIDTH]
        return [word for word in beams[0][1] if word != END]

    def _extend(self, beam: Hypothesis) -> list[Hypothesis]:
        log_prob, words, h, c = beam
        h, c = self._step(self._words[words[-1] if words else END], h, c)
        logits = h @ self._output + self._output_bias
        logits -= logits.max()
        log_probs = logits - np.log(np.exp(logits).sum())
        log_probs[UNKNOWN] = -np.inf
        best = np.argsort(-log_probs)[:WIDTH]
        return [(log_prob + float(log_probs[word]), [*words, int(word)], h, c) for word in best]

    def _step(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        gates = np.concatenate([np.ones(1), x, h]) @ self._gates
        size = self._hidden
        i, f, o = (1 / (1 + np.exp(-gates[n * size : (n + 1) * size])) for n in (0, 1, 3))
        c = f * c + i * np.tanh(gates[2 * size : 3 * size])
        return o * np.tanh(c), c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captioner", help="folder of a trained captioner")
    parser.add_argument("--features", help="features dataset that it was trained on")
    options = parser.parse_args()
    if options.captioner:
        model, features, references = _load_trained(options.captioner, options.features)
    else:
        model, features, references = _build_random()
    plain = NumpyDecoder(model)
    batched = Decoder(model, DecodingConfig(beam_width=WIDTH, max_tokens=STEPS, length_penalty=0))
    with torch.inference_mode():
        images = model.image_projection(model.transform_features(features)).double().numpy()
    ratios = [_compare_speed(number, plain, batched, images, features) for number in range(ROUNDS)]
    scored = min(len(features), IMAGES)
    batches = torch.split(features[:scored], BATCH)
    captions = [candidates[0].token_ids for batch in batches for candidates in batched.decode(batch)]
    plain_captions = [plain.decode(image) for image in images[:scored]]
    difference = abs(_compute_bleu(captions, references) - _compute_bleu(plain_captions, references))
    report("neuraltalk-decoder-ratio", statistics.median(ratios), 15)
    report("neuraltalk-decoder-bleu-difference", 100 * difference, 0.2, at_least=False)


def _compare_speed(number: int, plain: NumpyDecoder, batched: Decoder, images: Array, features: torch.Tensor) -> float:
    """Returns the captions/s of the batched decoder divided by those of the NumPy decoder, in one round."""
    began = time.perf_counter()
    for image in images[number * SINGLES : (number + 1) * SINGLES]:
        plain.decode(image)
    theirs = SINGLES / (time.perf_counter() - began)
    batches = [features[start * BATCH % len(features) :][:BATCH] for start in range(number, number + BATCHES)]
    began = time.perf_counter()
    for batch in batches:
        batched.decode(batch)
    ours = sum(map(len, batches)) / (time.perf_counter() - began)
    print(f"# {theirs:.1f} captions/s of NumPy, one image at a time; {ours:.1f} in batches of {BATCH}", flush=True)
    return ours / theirs


def _build_random() -> tuple[CaptionerNetwork, torch.Tensor, list[list[list[int]]]]:
    model = build_captioner()
    features = torch.randn(200, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))
    samples = Decoder(model, DecodingConfig("sample", n_best=5)).decode(features)
    return model, features, [[sample.token_ids for sample in per_image] for per_image in samples]


def _load_trained(captioner: str, features: str) -> tuple[CaptionerNetwork, torch.Tensor, list[list[list[int]]]]:
    loaded, dataset = load_captioner(captioner), open_dataset(features, "features").require_complete()
    loaded.require_encoder(dataset.config["encoder"])
    vectors, references = [], []
    for shard in range(dataset.shards):
        for rows, captions in read_features(dataset, shard, frozenset(["dev", "val"])):
            vectors.append(average_positions(rows).astype(np.float32))
            references += [[loaded.vocabulary.encode(text) for text in row] for row in captions]
    return loaded.model, torch.from_numpy(np.concatenate(vectors)), references


def _compute_bleu(captions: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]) -> float:
    numbers = range(len(captions))
    metric = compute_bleu(
        {str(number): [_join(captions[number])] for number in numbers},
        {str(number): [_join(reference) for reference in references[number]] for number in numbers},
    )
    return float(metric.formula(metric.rows.sum(0))[3])


def _join(token_ids: Sequence[int]) -> str:
    return " ".join(map(str, token_ids))


if __name__ == "__main__":
    run_benchmark(main)
