"""Measures captions/s of beam search in batches, relative to a dense batched loop in plain PyTorch.

The dense loop extends all hypotheses of all images at every step, as most implementations do, until each image has
`beam_width` finished hypotheses. Both use one thread.
"""

import statistics

import torch
from torch import Tensor, nn

from benchmarks.bars import measure_cpu, report, run_benchmark
from benchmarks.decoding_speed import BATCH, FEATURE_SIZE, build_captioner
from captionlib.data.text.vocabulary import END, UNKNOWN
from captionlib.models.captioners.captioner import CaptionerNetwork
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

CONFIG, ROUNDS = DecodingConfig(beam_width=5), 7
VOCABULARY_SIZES = (2500, 9500)


class DenseSearch:
    """Beam search with `nn.LSTMCell`, whose scores and length normalization equal captionlib's."""

    def __init__(self, model: CaptionerNetwork) -> None:
        w_ih, w_hh, b_ih, b_hh = model.recurrence.all_weights[0]
        self._model = model
        self._cell = nn.LSTMCell(w_ih.shape[1], w_hh.shape[1])
        for name, value in (("weight_ih", w_ih), ("weight_hh", w_hh), ("bias_ih", b_ih), ("bias_hh", b_hh)):
            setattr(self._cell, name, value)

    @torch.inference_mode()
    def decode(self, features: Tensor) -> list[list[int]]:
        images, width, steps = len(features), CONFIG.beam_width, CONFIG.find_max_tokens()
        device = features.device
        h, c = (each.repeat_interleave(width, 0) for each in self._model.encode_images(features).state)
        words = torch.full((images * width, 1), END, device=device)
        scores = torch.full((images, width), -torch.inf, device=device)
        scores[:, 0] = 0
        first_row = width * torch.arange(images, device=device)[:, None]
        finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(images)]
        for step in range(1, steps + 1):
            h, c = self._cell(self._model.word_vectors(words[:, -1]), (h, c))
            log_probs = torch.log_softmax(self._model.output(h), 1)
            log_probs[:, UNKNOWN] = -torch.inf
            classes = log_probs.shape[1]
            scores, best = (scores.view(-1, 1) + log_probs).view(images, -1).topk(width)
            rows = (first_row + best // classes).view(-1)
            words = torch.cat([words[rows], (best % classes).view(-1, 1)], 1)
            h, c = h[rows], c[rows]
            ends = (words[:, -1].view(images, width) == END) | (step == steps)
            for image, rank in ends.nonzero().tolist():
                score = scores[image, rank].item()
                if score > -torch.inf and len(finished[image]) < width:
                    finished[image].append((score / step**CONFIG.length_penalty, words[image * width + rank].tolist()))
            scores = scores.masked_fill(ends, -torch.inf)
            if all(len(each) == width for each in finished):
                break
        return [[word for word in max(each)[1] if word != END] for each in finished]


def measure_ratio(words: int) -> float:
    """Returns the median over rounds of the CPU time of the dense loop ÷ the CPU time of captionlib."""
    model = build_captioner(words=words)
    features = torch.randn(BATCH, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))
    dense, decoder = DenseSearch(model), Decoder(model, CONFIG)
    theirs = dense.decode(features)
    ours = [candidates[0].token_ids for candidates in decoder.decode(features)]
    same = sum(first == second for first, second in zip(ours, theirs, strict=True))
    print(f"# {words} words: {same} of {BATCH} captions are the same")
    ratios = []
    for _ in range(ROUNDS):
        loop = measure_cpu(lambda: dense.decode(features))
        stage = measure_cpu(lambda: decoder.decode(features))
        print(f"# dense loop {BATCH / loop:.0f} captions/s, captionlib {BATCH / stage:.0f}")
        ratios.append(loop / stage)
    return statistics.median(ratios)


def main() -> None:
    torch.set_num_threads(1)
    for words in VOCABULARY_SIZES:
        report(f"dense-beam-search-{words}", measure_ratio(words), 2.5)


if __name__ == "__main__":
    run_benchmark(main)
