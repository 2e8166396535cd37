"""Captions/s of beam search from features, against a decoder in numpy as NeuralTalk's: one image at a time, in float64.

Both write with the same captioner, and must score alike: by default one that is made up but writes as a trained one
does, scored against sentences drawn from it; or, with `--captioner` and `--features`, a trained LSTM on its dev images.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bars import report
from benchmarks.decoding_speed import BATCH, FEATURE_SIZE, build_captioner
from captionlib.data.batches.captions import pool_map, read_features
from captionlib.data.shards.dataset import open_dataset
from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.evaluation.metrics import compute_bleu
from captionlib.models.captioners.captioner import Captioner
from captionlib.models.checkpoints.checkpoint import load_captioner
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

WIDTH, STEPS = 5, 20
IMAGES, ROUNDS = 1000, 7
SINGLES, BATCHES = 20, 3  # which take about as long

Array = npt.NDArray[np.float64]
Hypothesis = tuple[float, list[int], Array, Array]  # log-probability, words, h, c


class NumpyDecoder:
    """Beam search after NeuralTalk's: each hypothesis of each image is a tick of its own; ended ones stay in the beam.

    As there numbers are numpy's own, float64.

    Args:
        model: an LSTM captioner of one layer that takes the image in before START.
    """

    def __init__(self, model: Captioner) -> None:
        w_ih, w_hh, b_ih, b_hh = (weights.detach().double().numpy() for weights in model.recurrence.all_weights[0])
        self._gates = np.concatenate([(b_ih + b_hh)[None], w_ih.T, w_hh.T])  # of [1, x, h]
        self._hidden = w_hh.shape[1]
        self._words = model.word_vectors.weight.detach().double().numpy()
        self._output = model.output.weight.detach().double().numpy().T.copy()
        self._output_bias = model.output.bias.detach().double().numpy()

    def decode(self, image: Array) -> list[int]:
        """The likeliest sentence for a projected image, `[embedding_size]`."""
        zero = np.zeros(self._hidden)
        h, c = self._tick(image, zero, zero)
        beams: list[Hypothesis] = [(0.0, [], h, c)]
        for _ in range(STEPS):
            candidates: list[Hypothesis] = []
            for beam in beams:
                candidates += [beam] if beam[1][-1:] == [END] else self._extend(beam)
            candidates.sort(key=lambda one: -one[0])
            beams = candidates[:WIDTH]
        return [word for word in beams[0][1] if word != END]

    def _extend(self, beam: Hypothesis) -> list[Hypothesis]:
        log_prob, words, h, c = beam
        h, c = self._tick(self._words[words[-1] if words else END], h, c)
        logits = h @ self._output + self._output_bias
        logits -= logits.max()
        log_probs = logits - np.log(np.exp(logits).sum())
        log_probs[UNKNOWN] = -np.inf
        best = np.argsort(-log_probs)[:WIDTH]
        return [(log_prob + float(log_probs[word]), [*words, int(word)], h, c) for word in best]

    def _tick(self, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
        gates = np.concatenate([np.ones(1), x, h]) @ self._gates
        size = self._hidden
        i, f, o = (1 / (1 + np.exp(-gates[n * size : (n + 1) * size])) for n in (0, 1, 3))
        c = f * c + i * np.tanh(gates[2 * size : 3 * size])
        return o * np.tanh(c), c


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captioner", help="a trained captioner's folder")
    parser.add_argument("--features", help="the features dataset that it was trained on")
    options = parser.parse_args()
    if options.captioner:
        model, features, references = _trained(options.captioner, options.features)
    else:
        model, features, references = _made_up()
    slow, fast = (
        NumpyDecoder(model),
        Decoder(model, DecodingConfig(beam_width=WIDTH, max_tokens=STEPS, length_penalty=0)),
    )
    with torch.inference_mode():
        images = model.image_projection(model.transform_features(features)).double().numpy()
    ratios = []
    for number in range(ROUNDS):
        chosen = range(number * SINGLES, (number + 1) * SINGLES)
        began = time.perf_counter()
        for image in chosen:
            slow.decode(images[image])
        theirs = SINGLES / (time.perf_counter() - began)
        batches = [features[one * BATCH % len(features) :][:BATCH] for one in range(number, number + BATCHES)]
        began = time.perf_counter()
        for batch in batches:
            fast.decode(batch)
        ours = sum(map(len, batches)) / (time.perf_counter() - began)
        print(f"# {theirs:.1f} captions/s of numpy, one image at a time; {ours:.1f} in batches of {BATCH}", flush=True)
        ratios.append(ours / theirs)
    scored = min(len(features), IMAGES)
    ours_said = [
        one[0].token_ids for start in range(0, scored, BATCH) for one in fast.decode(features[start : start + BATCH])
    ]
    difference = abs(
        _bleu(ours_said, references) - _bleu([slow.decode(image) for image in images[:scored]], references)
    )
    met = report("neuraltalk-decoder-ratio", statistics.median(ratios), 15)
    met &= report("neuraltalk-decoder-bleu-difference", 100 * difference, 0.2, at_least=False)
    sys.exit(not met)


def _made_up() -> tuple[Captioner, torch.Tensor, list[list[list[int]]]]:
    model = build_captioner()
    features = torch.randn(200, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))
    drawn = Decoder(model, DecodingConfig("sample", n_best=5)).decode(features)
    return model, features, [[one.token_ids for one in some] for some in drawn]


def _trained(captioner: str, features: str) -> tuple[Captioner, torch.Tensor, list[list[list[int]]]]:
    loaded, dataset = load_captioner(captioner), open_dataset(features, "features").require_complete()
    loaded.require_encoder(dataset.config["encoder"])
    vectors, references = [], []
    for shard in range(dataset.shards):
        for rows, captions in read_features(dataset, shard, frozenset(["dev", "val"])):
            vectors.append(pool_map(rows).astype(np.float32))
            references += [[loaded.vocabulary.encode(text) for text in row] for row in captions]
    return loaded.model, torch.from_numpy(np.concatenate(vectors)), references


def _bleu(said: Sequence[Sequence[int]], references: Sequence[Sequence[Sequence[int]]]) -> float:
    """BLEU-4 over word ids."""
    numbers = range(len(said))
    captions = {str(number): [" ".join(map(str, said[number]))] for number in numbers}
    metric = compute_bleu(captions, {str(n): [" ".join(map(str, one)) for one in references[n]] for n in numbers})
    return float(metric.formula(metric.rows.sum(0))[3])


if __name__ == "__main__":
    main()
