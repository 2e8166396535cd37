"""Tiny models of other families with random weights, saved as their users get them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    BitImageProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WORDS = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "ring")]
SENTENCES = [f"a {words} on a table next to a small dog" for words in WORDS]
SIDE = 32
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**LAYERS, "image_size": SIDE, "patch_size": 8}


def write_tokenizer_words(folder: Path) -> list[str]:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for text in SENTENCES for word in text.split()}),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    return words


def train_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Trains a byte-pair encoding, the kind of GPT-2's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=120, special_tokens=list(special.values())))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def randomize(model: torch.nn.Module, seed: int = 0) -> Any:
    """Gives a model large weights, so that its distributions are peaked and differ between images.

    Every weight that Transformers initializes at random is sampled again, such as the vector of CLIP's class token.
    Otherwise, it would depend on the tests that ran before.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35, generator=generator)
            elif "bias" in name or "embedding" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def write_blip(folder: Path) -> Path:
    words = write_tokenizer_words(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    text = {**LAYERS, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    special = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config={**text, **special}, vision_config=VISION, projection_dim=16)
    processor = BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)
    randomize(BlipForConditionalGeneration(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_git(folder: Path) -> Path:
    words = write_tokenizer_words(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GitConfig(vision_config=VISION, vocab_size=len(words), max_position_embeddings=64, **LAYERS, **special)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    randomize(GitForCausalLM(config)).save_pretrained(folder)
    GitProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_vit_gpt2(folder: Path) -> Path:
    tokenizer = train_tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 0, 0
    model = VisionEncoderDecoderModel(config=config)
    model.generation_config.update(decoder_start_token_id=0, pad_token_id=0, eos_token_id=0, num_beams=4, max_length=16)
    randomize(model).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    tokenizer = train_tokenizer(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **special}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    randomize(CLIPModel(config)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_siglip(folder: Path) -> Path:
    tokenizer = train_tokenizer(eos_token="</s>", pad_token="<pad>")
    text = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config=VISION)
    randomize(SiglipModel(config)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_dinov2(folder: Path) -> Path:
    randomize(Dinov2Model(Dinov2Config(**VISION, mlp_ratio=2))).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    BitImageProcessor(size={"shortest_edge": SIDE + 8}, crop_size=square, do_convert_rgb=True).save_pretrained(folder)
    return folder


def write_vit(folder: Path) -> Path:
    randomize(ViTModel(ViTConfig(**VISION))).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
