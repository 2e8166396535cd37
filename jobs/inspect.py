"""The command `captionlib inspect`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from captionlib.errors import DatasetError

if TYPE_CHECKING:
    from captionlib.data.shards.inspection import DatasetReport, JobReport
    from captionlib.search.index_folder import IndexDescription

__all__ = ["command"]


@click.command()
@click.argument("folder")
@click.option("--json", "as_json", is_flag=True, help="Print all details as JSON.")
@click.option("--verify", is_flag=True, help="Read every file of a dataset and verify its checksum.")
@click.option("--html", metavar="FILE.html", help="Write a self-contained page about a dataset.")
@click.option("--serve", is_flag=True, help="Serve a page with the progress of the job that is writing a dataset.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=8001, show_default=True, help="The port to listen on with --serve."
)
def command(folder: str, as_json: bool, verify: bool, html: str | None, serve: bool, port: int) -> None:
    """Summarize FOLDER, a dataset, search index or checkpoint.

    For datasets, also show progress, speed and failed images. For a manifest, also show the images that were removed
    with `captionlib remove`. The command only reads the folder, so you can inspect a dataset that a job on another
    machine is writing.

    \b
    Examples:
      captionlib inspect features
      captionlib inspect s3://bucket/captions --serve
      captionlib inspect features --html features.html
      captionlib inspect captions --verify
      captionlib inspect captioner --json
    """
    from captionlib.config import to_dict
    from captionlib.data.shards.markers import DESCRIPTION_FILE
    from captionlib.search.index_folder import INDEX_FILE, read_description
    from captionlib.storage.folders import Folder

    if serve and (html or as_json or verify):
        raise click.UsageError("--serve cannot be combined with --html, --json or --verify.")
    names = Folder(folder).list()
    if DESCRIPTION_FILE in names:
        if serve:
            _serve(folder, port)
        else:
            _inspect_dataset(folder, as_json, verify, html)
        return
    if (html or serve) and names:
        raise DatasetError(f"{folder}: --html and --serve need a dataset (a folder with {DESCRIPTION_FILE})")
    if INDEX_FILE in names and (index := read_description(Folder(folder))) is not None:
        click.echo(_to_json(to_dict(index)) if as_json else _describe_index(folder, index))
    elif "config.json" in names:
        from captionlib.models.checkpoints.folder import describe_checkpoint  # imports torch, which is slow

        checkpoint = describe_checkpoint(folder)
        lines = [f"{folder}: checkpoint", *_format_values(checkpoint, "  ")]
        click.echo(_to_json(checkpoint) if as_json else "\n".join(lines))
    else:
        raise DatasetError(f"{folder} is {_describe_other_folder(folder, names)}")


def _describe_other_folder(folder: str, names: Sequence[str]) -> str:
    from captionlib.collection import COLLECTION_FILE
    from captionlib.data.shards.markers import DESCRIPTION_FILE
    from captionlib.search.index_folder import INDEX_FILE

    if COLLECTION_FILE in names:
        return (
            f"a collection (created by `captionlib init`); run `captionlib status {folder}`, or inspect one of its "
            "folders"
        )
    if "_training" in names:
        return (
            "a training run without a checkpoint; wait until its first epoch ends, or run the training command again "
            "to resume it"
        )
    return (
        f"not an output of captionlib: expected a dataset ({DESCRIPTION_FILE}), an index ({INDEX_FILE}) or a "
        f"checkpoint (config.json), got {', '.join(names[:5]) if names else 'a missing or empty folder'}"
    )


def _inspect_dataset(folder: str, as_json: bool, verify: bool, html: str | None) -> None:
    """Prints the report on a dataset, and exits with status 1 if the dataset has problems."""
    from captionlib.data.shards.inspection import inspect_dataset
    from captionlib.evaluation.dataset_page import write_dataset_page

    report = inspect_dataset(folder, verify)
    if html is not None:
        write_dataset_page(html, report)
    click.echo(_to_json(dataclasses.asdict(report)) if as_json else _describe_dataset(report, verify))
    sys.exit(1 if report.problems else 0)


def _describe_dataset(report: DatasetReport, verified: bool) -> str:
    lines = [
        f"{report.folder}: {report.kind}, {'complete' if report.complete else f'not complete: {report.explanation}'}",
        f"  rows         {report.rows:,} in {report.shards_done:,} of {report.shards:,} shards",
        f"  size         {report.size / 1e6:,.1f} MB, written in {report.seconds:,.0f} worker seconds",
        *_describe_job(report.job),
        f"  fingerprint  {report.fingerprint}",
        "  columns",
        *(f"    {name:<12} {kind}" for name, kind in report.columns.items()),
        "  configuration",
        *_format_values(report.config, "    "),
    ]
    if report.stale:
        lines.append(
            f"  stale        {report.stale:,} shards of {report.source} have changed or been added; run the command "
            "that writes this dataset again"
        )
    if report.failed:
        images = report.rows + report.failed
        lines.append(f"  failures     {report.failed:,} of {images:,} images ({report.failed / images:.1%})")
    for reason, failure in report.failures.items():
        example = [f", such as {each.image_id} ({each.uri}): {each.message}" for each in failure.examples[:1]]
        lines.append(f"    {failure.count:>7,} {reason}{''.join(example)}")
    if report.removed:
        lines.append(
            f"  removed      {len(report.removed):,} images; updates skip them; --json lists the hashes of their ids"
        )
    for (reason, date), count in sorted(Counter(report.removed.values()).items(), key=lambda item: item[0][1]):
        lines.append(f"    {count:>7,} on {date}: {' '.join(reason.split()) or 'no reason given'}")
    if report.temporary_files and not report.complete:
        lines.append(
            f"  temporary    {report.temporary_files:,} files of running or failed runs; a successful run removes them"
        )
    if verified and not report.problems:
        lines.append("  verified     all files match their checksums")
    if report.problems:
        lines += ["  PROBLEMS", *(f"    {problem}" for problem in report.problems)]
    return "\n".join(lines)


def _describe_job(job: JobReport) -> list[str]:
    if job.state == "complete":
        return []
    parts = [f"{job.images_done + job.images_in_progress:,}{f' of {job.images:,}' if job.images else ''} images"]
    if job.throughput is not None:
        parts.append(f"{job.throughput.images_per_second:,.1f} images/s")
    if job.seconds_left is not None:
        parts.append(f"about {timedelta(seconds=round(job.seconds_left))} left")
    if in_progress := job.count_shards("in progress"):
        parts.append(f"{in_progress:,} shards in progress")
    return [f"  {job.state:<12} {', '.join(parts)}"]


def _serve(folder: str, port: int) -> None:
    """Serves the page until Ctrl-C. Only this machine can connect."""
    import uvicorn

    from captionlib.serving.config import ServingConfig
    from captionlib.serving.job_page import create_job_app
    from captionlib.serving.server import configure_server, listen

    with listen("127.0.0.1", port) as server_socket:
        click.echo(f"Serving a page about {folder} at http://127.0.0.1:{port}/. Press Ctrl-C to stop.")
        app = create_job_app(folder, ServingConfig.allowed_hosts)
        uvicorn.Server(configure_server(app)).run([server_socket])


def _describe_index(folder: str, index: IndexDescription) -> str:
    from captionlib.config import to_dict

    missing = sum(dataset.shards for dataset in index.captions) - len(index.shards)
    layout = index.layout
    vectors = f", {layout.encoding} in {layout.nlist:,} lists, {layout.nprobe:,} probed per query" if layout else ""
    lines = [
        f"{folder}: index, {f'not complete: {missing:,} shards are missing' if missing else 'complete'}",
        f"  captions     {index.captions_count:,} from {', '.join(dataset.folder for dataset in index.captions)}",
        f"  vectors      {index.vectors_count:,}{vectors}",
        f"  built        {index.created}",
        f"  fingerprint  {index.fingerprint}",
        "  configuration",
        *_format_values(to_dict(index.config), "    "),
    ]
    if index.embeddings:
        lines.append(f"    ranker: {index.ranker}")  # hash of the model that computed the embeddings
    return "\n".join(lines)


def _to_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _format_values(values: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_format_values(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines
