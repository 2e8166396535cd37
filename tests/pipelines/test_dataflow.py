"""Tests of the job graphs that are submitted to a cluster."""

import subprocess
import sys
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from captionlib.data.shards.dataset import ShardedDataset, create_dataset, open_dataset
from captionlib.data.shards.schemas import captions_schema, embeddings_schema
from captionlib.data.shards.stages import ShardJob, Stage
from captionlib.errors import ConfigError
from captionlib.models.encoders.encoder import EncoderConfig
from captionlib.models.inference.captioning import CaptionGeneration, GenerationConfig
from captionlib.models.inference.embedding import EmbeddingConfig, ImageEmbedding
from captionlib.models.inference.extraction import ExtractionConfig, FeatureExtraction
from captionlib.models.inference.shared_models import CheckpointVersion
from captionlib.search.build import IndexBuild
from captionlib.search.config import IndexConfig
from captionlib.storage.folders import Folder
from pipelines.build_index import BuildIndex
from pipelines.extract_features import extract_features
from pipelines.process_shards import ProcessShards
from pipelines.run import RunConfig, choose_runner

Job = beam_runner_api_pb2.Pipeline

L4 = "type:nvidia-l4;count:1;install-nvidia-driver"
RANKER = CheckpointVersion("s3://bucket/ranker", "fingerprint")
STAGES: dict[str, Stage] = {
    "extract-features": FeatureExtraction(ExtractionConfig(), {"model": "vgg16"}, "cuda"),
    "generate-captions": CaptionGeneration(
        GenerationConfig(),
        CheckpointVersion("s3://bucket/captioner", "fingerprint"),
        {"decoding": {}},
        EncoderConfig(),
        "cuda",
        None,
        RANKER,
    ),
    "embed": ImageEmbedding(EmbeddingConfig(), RANKER, EncoderConfig(), "cuda"),
}
DATAFLOW = (
    "--runner=DataflowRunner",
    "--project=some-project",
    "--region=europe-west4",
    "--temp_location=gs://some-bucket/temporary",
    "--sdk_container_image=host/worker:1",
    "--dry_run=True",
)

# Unpickles the transforms of a job in a fresh process.
_UNPICKLE = """
import inspect
import sys
from pathlib import Path
from apache_beam.internal import pickler
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_runner_api_pb2
for path in sys.argv[1:]:
    job = beam_runner_api_pb2.Pipeline.FromString(Path(path).read_bytes())
    for transform in job.components.transforms.values():
        if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
            payload = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload)
            if payload.do_fn.urn == python_urns.PICKLED_DOFN_INFO:
                fn = pickler.loads(payload.do_fn.payload)[0]
                code = getattr(fn, "_fn", type(fn))  # the function of a FlatMap, or the class of another DoFn
                if inspect.isfunction(code):  # a Map wraps its function
                    code = inspect.getclosurevars(code).nonlocals.get("fn", code)
                print(transform.unique_name, f"{code.__module__}.{code.__name__}")
"""


@pytest.fixture
def jobs(tmp_path: Path, manifest: ShardedDataset) -> dict[str, Job]:
    """The jobs of all pipelines, by label."""
    captions = create_dataset(tmp_path / "captions", "captions", captions_schema(), config={}, shards=3)
    vectors = create_dataset(tmp_path / "vectors", "embeddings", embeddings_schema(8), config={}, shards=3)
    transforms: dict[str, beam.PTransform[object, object]] = {
        label: ProcessShards(ShardJob(manifest, (captions,), stage), range(3), 0.1, L4)
        for label, stage in STAGES.items()
    }
    transforms["build-index"] = BuildIndex(IndexBuild(Folder(tmp_path / "index"), captions, vectors, IndexConfig()))
    return {label: build(transform, label) for label, transform in transforms.items()}


def build(transform: beam.PTransform[object, object], label: str) -> Job:
    pipeline = beam.Pipeline(FnApiRunner(), PipelineOptions([]))
    _ = pipeline | label >> transform
    return pipeline.to_runner_api()


def hints_of(job: Job) -> dict[str, dict[str, bytes]]:
    """Returns the resource hints of each transform, by label."""
    return {
        transform.unique_name: dict(job.components.environments[transform.environment_id].resource_hints)
        for transform in job.components.transforms.values()
        if transform.environment_id
    }


@pytest.mark.parametrize("label", STAGES)
def test_only_model_transforms_request_a_gpu(jobs: dict[str, Job], label: str) -> None:
    hints = hints_of(jobs[label])
    assert hints.pop(f"{label}/Process") == {
        "beam:resources:accelerator:v1": L4.encode(),
        "beam:resources:max_active_bundles_per_worker:v1": b"2",
    }
    assert f"{label}/Finish" in hints
    assert not any(hints.values())


def test_pickled_transforms_are_small_and_self_contained(jobs: dict[str, Job], tmp_path: Path) -> None:
    for label, job in jobs.items():
        assert job.ByteSize() < 100_000
        (tmp_path / label).write_bytes(job.SerializeToString())
    command = [sys.executable, "-c", _UNPICKLE, *(str(tmp_path / label) for label in jobs)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")
    assert {line for line in printed if " pipelines." in line} == {
        "build-index/Train pipelines.build_index._train",
        "build-index/AddShards pipelines.build_index._add_shard",
        "build-index/Finish pipelines.build_index._finish",
        *(f"{label}/Process pipelines.process_shards._ProcessShard" for label in STAGES),
        *(f"{label}/Finish pipelines.process_shards._finish" for label in STAGES),
    }


def test_accelerator_limits_workers_to_one_process() -> None:
    _, options = choose_runner(RunConfig(beam_options=DATAFLOW, accelerator=L4))
    assert "no_use_multiple_sdk_containers" in options.view_as(DebugOptions).experiments
    _, options = choose_runner(RunConfig(beam_options=DATAFLOW))
    assert not options.view_as(DebugOptions).experiments


def test_accelerator_requires_a_gpu_on_workers_only() -> None:
    assert RunConfig(accelerator=L4).choose_devices("auto") == ("auto", "cuda")
    assert RunConfig(accelerator=L4).choose_devices("cuda:1") == ("auto", "cuda:1")
    assert RunConfig().choose_devices("auto") == ("auto", "auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--accelerator applies to workers of a cluster; use --device cuda"),
        ((*DATAFLOW, f"--dataflow_service_options=worker_accelerator={L4}"), "conflicts with Dataflow"),
    ],
)
def test_conflicting_accelerators_are_rejected(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_runner(RunConfig(beam_options=options, accelerator=L4))


def test_dataflow_accepts_the_job(
    manifest: ShardedDataset, tmp_path: Path, small_encoder: ExtractionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submits the job through Beam's DataflowRunner up to the first request to Google. Needs `captionlib[dataflow]`."""
    pytest.importorskip("google.auth", reason="captionlib[dataflow] is not installed")
    from apache_beam.io.gcp.gcsio import GcsIO
    from apache_beam.runners.dataflow.internal import apiclient

    jobs: list[Job] = []
    make = apiclient.Job.__init__

    def note(self: object, options: PipelineOptions, proto: Job) -> None:
        jobs.append(proto)
        make(self, options, proto)

    monkeypatch.setattr(apiclient.Job, "__init__", note)
    monkeypatch.setattr(GcsIO, "is_soft_delete_enabled", lambda *_: False)
    monkeypatch.setattr("apache_beam.internal.gcp.auth.get_service_credentials", lambda _options: None)
    run = RunConfig(beam_options=DATAFLOW, progress=False, accelerator=L4)
    totals = extract_features(manifest.folder.uri, tmp_path / "features", small_encoder, run=run)
    assert totals.shards == 0
    assert open_dataset(tmp_path / "features").pending_shards() == list(range(manifest.shards))
    [job] = jobs
    containers = {
        beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image
        for environment in job.components.environments.values()
        if environment.urn == common_urns.environments.DOCKER.urn
    }
    assert containers == {"host/worker:1"}
    assert hints_of(job)["extract-features/Process"]["beam:resources:accelerator:v1"] == L4.encode()
