"""Measures images/s of `generate-captions` with a BLIP of Hugging Face Transformers, relative to two loops.

The first loop calls `generate` on the same images, already decoded and normalized. The second one passes each file to
`pipeline("image-text-to-text")`, which replaced `pipeline("image-to-text")` in Transformers 5.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    pipeline,
)

from benchmarks.bars import measure_cpu, report, run_benchmark
from benchmarks.synthetic_images import decode_images, write_images, write_manifest
from captionlib.data.images.decoding import Preprocessing
from captionlib.data.shards.dataset import open_dataset
from captionlib.models.decoding.config import DecodingConfig
from captionlib.models.families.captioner import open_captioner
from captionlib.models.inference.captioning import GenerationConfig
from pipelines.generate_captions import generate_captions
from pipelines.run import RunConfig

IMAGES, BATCH, ROUNDS = 800, 32, 3
PIPELINE_IMAGES = 64  # the pipeline is slow
SIDE, BEAMS, TOKENS = 128, 3, 16
LAYERS = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = GenerationConfig(DecodingConfig(beam_width=BEAMS, max_tokens=TOKENS), batch_size=BATCH)
OPTIONS = {"num_beams": BEAMS, "max_new_tokens": TOKENS, "min_length": 0, "length_penalty": 0.7}


def write_model(folder: Path) -> None:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(5000))]
    (folder / "vocab.txt").write_text("\n".join(words))
    special = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {**LAYERS, **special, "vocab_size": len(words), "encoder_hidden_size": LAYERS["hidden_size"]}
    config = BlipConfig(text_config=text, vision_config={**LAYERS, "image_size": SIDE, "patch_size": 16})
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2 if "embeddings" in name else 0.08)
    model.save_pretrained(folder)
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    BlipProcessor(images, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)


def measure(label: str, count: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Returns images/s, and the result. Prints the CPU time, which depends less on the load of the machine."""
    results: list[Any] = []
    began = time.perf_counter()
    cpu_seconds = measure_cpu(lambda: results.append(run()))
    seconds = time.perf_counter() - began
    print(f"# {label}: {count / seconds:.2f} images/s, {1000 * cpu_seconds / count:.1f} ms of CPU time per image")
    return count / seconds, results[0]


@torch.inference_mode()
def run_plain_loop(model: Any, tokenizer: Any, pixels: torch.Tensor) -> list[str]:
    texts: list[str] = []
    for batch in torch.split(pixels, BATCH):
        texts += tokenizer.batch_decode(model.generate(pixel_values=batch, **OPTIONS), skip_special_tokens=True)
    return texts


def run_stage(folder: Path, output: Path) -> list[str]:
    """Returns the captions of the files, from reading the manifest to writing `_SUCCESS`."""
    run = RunConfig(progress=False)
    generate_captions(folder / "manifest", f"hf:{folder / 'model'}", output, CONFIG, device="cpu", run=run)
    dataset = open_dataset(output).require_complete()
    return [text for shard in range(dataset.shards) for text in dataset.read(shard)["caption"].to_pylist()]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model")
        paths = [str(path) for path in write_images(folder / "images", IMAGES)]
        write_manifest(folder / "manifest", paths, IMAGES)
        captioner = pipeline("image-text-to-text", model=str(folder / "model"), device="cpu")
        model, processor = captioner.model, captioner.processor
        transform = open_captioner(f"hf:{folder / 'model'}").find_input_transform(None)
        assert isinstance(transform, Preprocessing)
        images = decode_images([Path(path) for path in paths], transform)
        pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        loops, pipelines = [], []
        for number in range(ROUNDS):
            loop, expected = measure("plain loop", IMAGES, lambda: run_plain_loop(model, processor.tokenizer, pixels))
            stage, captions = measure(
                "generate-captions", IMAGES, partial(run_stage, folder, folder / f"captions{number}")
            )
            files, _ = measure(
                "pipeline",
                PIPELINE_IMAGES,
                lambda: [captioner(images=path, text="", generate_kwargs=OPTIONS) for path in paths[:PIPELINE_IMAGES]],
            )
            same = sum(one == other for one, other in zip(captions, expected, strict=True))
            print(f"# {same} of {IMAGES} captions equal those of the plain loop")
            loops.append(stage / loop)
            pipelines.append(stage / files)
        report("transformers-captioner-loop", statistics.median(loops), 0.95)
        report("transformers-captioner-pipeline", statistics.median(pipelines), 1.5)


if __name__ == "__main__":
    run_benchmark(main)
