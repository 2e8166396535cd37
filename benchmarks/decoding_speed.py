"""Measures captions/s of beam search from features in batches of 100 images, relative to one image at a time."""

import statistics
import time

import torch

from benchmarks.bars import report, run_benchmark
from captionlib.data.text.vocabulary import END
from captionlib.models.captioners.captioner import CaptionerConfig, CaptionerNetwork
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.decoding.decoder import Decoder

WORDS, FEATURE_SIZE = 2500, 4096
BATCH, SINGLES, ROUNDS = 100, 25, 7


def build_captioner(feature_size: int = FEATURE_SIZE, words: int = WORDS) -> CaptionerNetwork:
    """Builds an LSTM with random weights that takes as much work to decode as a captioner trained on Flickr8k.

    Captions have 10 words on average, with a standard deviation of 2.2 (trained captioner: 10.4 and 2.8). The mean
    probability of a token is about e^-1, and a search computes 56 rows per image; both equal those of the trained
    captioner. To achieve this, LSTM cell 0 counts the tokens, and the probability of END grows with the count.
    """
    torch.manual_seed(0)
    config = CaptionerConfig()
    model = CaptionerNetwork(config, feature_size, words).eval()
    hidden = config.hidden_size
    with torch.no_grad():
        model.image_projection.weight.uniform_(-0.05, 0.05)
        model.output.weight.uniform_(-3, 3)
        model.word_vectors.weight.uniform_(-0.3, 0.3)
        w_ih, w_hh, bias, _ = model.recurrence.all_weights[0]
        for gate, value in enumerate((10.0, 10.0, 0.05, 10.0)):  # input, forget, cell and output gates of the counter
            w_ih[gate * hidden] = w_hh[gate * hidden] = 0
            bias[gate * hidden] = value
        model.output.weight[:, 0] = 0
        model.output.weight[END, 0] = 40
        model.output.bias[END] = -12
    return model


def captions_per_second(decoder: Decoder, features: torch.Tensor, batch: int) -> float:
    """Returns the captions/s of decoding in batches of `batch` images."""
    began = time.perf_counter()
    for start in range(0, len(features), batch):
        decoder.decode(features[start : start + batch])
    return len(features) / (time.perf_counter() - began)


def measure(model: CaptionerNetwork, features: torch.Tensor, dtype: torch.dtype) -> float:
    """Returns the median over rounds of captions/s in batches ÷ captions/s one image at a time."""
    decoder = Decoder(model, DecodingConfig(beam_width=5), dtype)
    captions = [candidates[0].token_ids for candidates in decoder.decode(features)]
    distinct, words = len(set(map(tuple, captions))), statistics.mean(map(len, captions))
    print(f"# {dtype}: {distinct} distinct captions of {len(features)} images, {words:.1f} words on average")
    ratios = []
    for number in range(ROUNDS):
        singles = features[number * SINGLES % BATCH :][:SINGLES]
        single, batched = captions_per_second(decoder, singles, 1), captions_per_second(decoder, features, BATCH)
        print(f"# {dtype}: {single:.1f} captions/s one at a time, {batched:.1f} in batches of {BATCH}")
        ratios.append(batched / single)
    return statistics.median(ratios)


def main() -> None:
    model = build_captioner()
    features = torch.randn(BATCH, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))
    report("decoding-batch-ratio-float32", measure(model, features, torch.float32), 5)
    if torch.cpu._is_amx_tile_supported():
        report("decoding-batch-ratio-bfloat16", measure(model, features, torch.bfloat16), 10)
    else:
        print("# decoding-batch-ratio-bfloat16 not measured: this processor has no amx_bf16")


if __name__ == "__main__":
    run_benchmark(main)
