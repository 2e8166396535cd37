import json

import fsspec
import pytest
from click.testing import CliRunner

from captionlib.storage.folders import Folder
from jobs.cli import captionlib
from tests.object_storage.conftest import options
from tests.search.conftest import write_captions


def test_forked_query_reads_a_bucket_that_this_process_has_read(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", options(store))
    folder = "s3://bucket/query/captions"
    write_captions(folder)
    assert Folder(folder).list("") != []  # starts the client's thread, which does not exist in the fork
    arguments = ["query", folder, "--sql", "SELECT image_id FROM captions ORDER BY 1", "--format", "jsonl"]
    lines = CliRunner().invoke(captionlib, arguments, catch_exceptions=False).stdout.splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == ["a1", "a2", "b1", "b2"]
