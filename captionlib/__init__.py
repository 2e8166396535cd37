"""captionlib captions and indexes collections of images.

Every stage reads folders and writes a folder of Parquet shards. Folders are paths or addresses such as
`s3://bucket/captions`. Names of this module are imported on first use, so `import captionlib` is fast.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captionlib.data.images.loading import LoadingConfig as LoadingConfig
    from captionlib.data.ingestion.neuraltalk import import_features as import_features
    from captionlib.data.ingestion.prepare import PrepareConfig as PrepareConfig
    from captionlib.data.ingestion.prepare import prepare as prepare
    from captionlib.data.shards.dataset import ShardedDataset as ShardedDataset
    from captionlib.data.shards.dataset import open_dataset as open_dataset
    from captionlib.errors import CaptionlibError as CaptionlibError
    from captionlib.evaluation.evaluate import evaluate_captions as evaluate_captions
    from captionlib.models.captioners.captioner import CaptionerConfig as CaptionerConfig
    from captionlib.models.checkpoints.checkpoint import load_captioner as load_captioner
    from captionlib.models.checkpoints.checkpoint import load_ranker as load_ranker
    from captionlib.models.decoding.config import DecodingConfig as DecodingConfig
    from captionlib.models.encoders.encoder import EncoderConfig as EncoderConfig
    from captionlib.models.inference.captioning import GenerationConfig as GenerationConfig
    from captionlib.models.inference.captioning import caption_images as caption_images
    from captionlib.models.inference.embedding import EmbeddingConfig as EmbeddingConfig
    from captionlib.models.inference.extraction import ExtractionConfig as ExtractionConfig
    from captionlib.models.rankers.ranker import RankerConfig as RankerConfig
    from captionlib.search.config import IndexConfig as IndexConfig
    from captionlib.search.index import Index as Index
    from captionlib.search.sql.session import query_sql as query_sql
    from captionlib.training.captioning import CaptionerTrainingConfig as CaptionerTrainingConfig
    from captionlib.training.captioning import train_captioner as train_captioner
    from captionlib.training.optimization import TrainingConfig as TrainingConfig
    from captionlib.training.ranking import RankerTrainingConfig as RankerTrainingConfig
    from captionlib.training.ranking import train_ranker as train_ranker
    from pipelines.build_index import build_index as build_index
    from pipelines.embed_images import embed_images as embed_images
    from pipelines.extract_features import extract_features as extract_features
    from pipelines.generate_captions import generate_captions as generate_captions
    from pipelines.run import RunConfig as RunConfig

__version__ = "0.1.0"

# PyTorch reads this when it first allocates. Large tensors then use pages of 2 MB, which are faster to allocate, and
# glibc wastes less memory on fragmentation. It has no effect on systems without such pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_MODULES = {
    "CaptionerConfig": "captionlib.models.captioners.captioner",
    "CaptionerTrainingConfig": "captionlib.training.captioning",
    "CaptionlibError": "captionlib.errors",
    "DecodingConfig": "captionlib.models.decoding.config",
    "EmbeddingConfig": "captionlib.models.inference.embedding",
    "EncoderConfig": "captionlib.models.encoders.encoder",
    "ExtractionConfig": "captionlib.models.inference.extraction",
    "GenerationConfig": "captionlib.models.inference.captioning",
    "Index": "captionlib.search.index",
    "IndexConfig": "captionlib.search.config",
    "LoadingConfig": "captionlib.data.images.loading",
    "PrepareConfig": "captionlib.data.ingestion.prepare",
    "RankerConfig": "captionlib.models.rankers.ranker",
    "RankerTrainingConfig": "captionlib.training.ranking",
    "RunConfig": "pipelines.run",
    "ShardedDataset": "captionlib.data.shards.dataset",
    "TrainingConfig": "captionlib.training.optimization",
    "build_index": "pipelines.build_index",
    "caption_images": "captionlib.models.inference.captioning",
    "embed_images": "pipelines.embed_images",
    "evaluate_captions": "captionlib.evaluation.evaluate",
    "extract_features": "pipelines.extract_features",
    "generate_captions": "pipelines.generate_captions",
    "import_features": "captionlib.data.ingestion.neuraltalk",
    "load_captioner": "captionlib.models.checkpoints.checkpoint",
    "load_ranker": "captionlib.models.checkpoints.checkpoint",
    "open_dataset": "captionlib.data.shards.dataset",
    "open_index": "captionlib.search.index",
    "prepare": "captionlib.data.ingestion.prepare",
    "query_sql": "captionlib.search.sql.session",
    "train_captioner": "captionlib.training.captioning",
    "train_ranker": "captionlib.training.ranking",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
