"""captionlib captions and indexes collections of images.

Every stage (such as feature extraction or caption generation) reads datasets and writes a new one. A dataset is a
folder of Parquet shards at a path or a URL such as `s3://bucket/captions`. Public names are imported on first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captionlib.data.images.loading import LoadingConfig as LoadingConfig
    from captionlib.data.ingestion.neuraltalk import import_features as import_features
    from captionlib.data.ingestion.prepare import PrepareConfig as PrepareConfig, prepare as prepare
    from captionlib.data.shards.dataset import ShardedDataset as ShardedDataset, open_dataset as open_dataset
    from captionlib.errors import CaptionlibError as CaptionlibError
    from captionlib.evaluation.evaluate import evaluate_captions as evaluate_captions
    from captionlib.models.captioners.captioner import CaptionerConfig as CaptionerConfig
    from captionlib.models.checkpoints.checkpoint import load_captioner as load_captioner, load_ranker as load_ranker
    from captionlib.models.decoding.config import DecodingConfig as DecodingConfig
    from captionlib.models.encoders.encoder import EncoderConfig as EncoderConfig
    from captionlib.models.inference.captioning import (
        GenerationConfig as GenerationConfig,
        caption_images as caption_images,
    )
    from captionlib.models.inference.embedding import EmbeddingConfig as EmbeddingConfig
    from captionlib.models.inference.extraction import ExtractionConfig as ExtractionConfig
    from captionlib.models.rankers.ranker import RankerConfig as RankerConfig
    from captionlib.search.config import IndexConfig as IndexConfig
    from captionlib.search.duplicates import find_duplicates as find_duplicates
    from captionlib.search.index import Index as Index, open_index as open_index
    from captionlib.search.sql.session import query_sql as query_sql
    from captionlib.training.captioning import (
        CaptionerTrainingConfig as CaptionerTrainingConfig,
        train_captioner as train_captioner,
    )
    from captionlib.training.optimization import TrainingConfig as TrainingConfig
    from captionlib.training.ranking import RankerTrainingConfig as RankerTrainingConfig, train_ranker as train_ranker
    from pipelines.build_index import build_index as build_index
    from pipelines.embed_images import embed_images as embed_images
    from pipelines.extract_features import extract_features as extract_features
    from pipelines.generate_captions import generate_captions as generate_captions
    from pipelines.run import RunConfig as RunConfig

__version__ = "0.1.0"

# Makes PyTorch use transparent huge pages (2 MB) for large tensors. Huge pages are faster to allocate and fragment
# memory less. PyTorch reads the variable at its first allocation. Systems without huge pages ignore it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_NAMES = {
    "captionlib.data.images.loading": "LoadingConfig",
    "captionlib.data.ingestion.neuraltalk": "import_features",
    "captionlib.data.ingestion.prepare": "PrepareConfig prepare",
    "captionlib.data.shards.dataset": "ShardedDataset open_dataset",
    "captionlib.errors": "CaptionlibError",
    "captionlib.evaluation.evaluate": "evaluate_captions",
    "captionlib.models.captioners.captioner": "CaptionerConfig",
    "captionlib.models.checkpoints.checkpoint": "load_captioner load_ranker",
    "captionlib.models.decoding.config": "DecodingConfig",
    "captionlib.models.encoders.encoder": "EncoderConfig",
    "captionlib.models.inference.captioning": "GenerationConfig caption_images",
    "captionlib.models.inference.embedding": "EmbeddingConfig",
    "captionlib.models.inference.extraction": "ExtractionConfig",
    "captionlib.models.rankers.ranker": "RankerConfig",
    "captionlib.search.config": "IndexConfig",
    "captionlib.search.duplicates": "find_duplicates",
    "captionlib.search.index": "Index open_index",
    "captionlib.search.sql.session": "query_sql",
    "captionlib.training.captioning": "CaptionerTrainingConfig train_captioner",
    "captionlib.training.optimization": "TrainingConfig",
    "captionlib.training.ranking": "RankerTrainingConfig train_ranker",
    "pipelines.build_index": "build_index",
    "pipelines.embed_images": "embed_images",
    "pipelines.extract_features": "extract_features",
    "pipelines.generate_captions": "generate_captions",
    "pipelines.run": "RunConfig",
}
_MODULES = dict(sorted((name, module) for module, names in _NAMES.items() for name in names.split()))

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # later accesses bypass this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
