"""A failure of the storage is reported, and never taken for a missing file."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from captionlib.data.images.addresses import image_exists
from captionlib.data.ingestion.matlab import open_matrix
from captionlib.data.ingestion.neuraltalk import import_features
from captionlib.data.ingestion.prepare import prepare
from captionlib.data.sources.folder import find_images
from captionlib.data.sources.formats import detect_format
from captionlib.data.sources.locations import locate_all
from captionlib.errors import CaptionlibError, DatasetError, StorageError
from tests.data.sources.source_files import read, write_empty_files, write_json


@pytest.fixture(autouse=True)
def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses access to files and folders whose path contains `secret`, as for a user without permission."""

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any, **options: Any) -> Any:
            path = next((str(each) for each in arguments if isinstance(each, str | os.PathLike)), "")
            if "secret" in path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return call(*arguments, **options)

        return checked

    for name in ("info", "open", "get_file"):
        monkeypatch.setattr(LocalFileSystem, name, guard(getattr(LocalFileSystem, name)))
    monkeypatch.setattr(os, "scandir", guard(os.scandir))


def open_secret_matrix(path: str) -> None:
    with open_matrix(path, "feats"):
        pass


@pytest.mark.parametrize(
    "use",
    [
        detect_format,
        image_exists,
        find_images,
        open_secret_matrix,
        lambda path: import_features(path, "features.mat", "output"),
        lambda path: locate_all(f"{path}/{{a,b}}.csv"),
        lambda path: read(f"{path}/*.csv"),
        lambda path: read(f"{path}/*.jpg"),
        lambda path: prepare(path, "output"),
    ],
)
def test_refused_access_is_an_error_in_one_line(tmp_path: Path, use: Callable[[str], object]) -> None:
    with pytest.raises(CaptionlibError, match=r"secret.* cannot be (accessed|read): Permission denied") as raised:
        use(f"{tmp_path}/secret")
    assert "\n" not in str(raised.value)


def test_refused_subfolder_of_a_glob_is_an_error(tmp_path: Path) -> None:
    for name in ("open/a.csv", "secret/b.csv", "open/deep/c.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"url\n{name}.jpg\n")
    (tmp_path / "open/parent").symlink_to(tmp_path / "open")
    assert len(read(f"{tmp_path}/open/**/*.csv")[0]) == 2
    with pytest.raises(StorageError, match="secret cannot be accessed: Permission denied"):
        read(f"{tmp_path}/*/*.csv")


def test_refused_image_folder_of_coco_is_an_error(tmp_path: Path) -> None:
    source = write_json(tmp_path / "captions_train2014.json", {"images": [{"id": 1, "file_name": "a.jpg"}]})
    with pytest.raises(StorageError, match="secret/train2014 cannot be accessed: Permission denied"):
        read(source, image_root=str(tmp_path / "secret"))


def test_refused_image_is_reported_only_if_no_image_exists(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url\nsecret.jpg\nb.jpg\n")
    with pytest.raises(DatasetError, match=r"none of the first 2 images exists; .*secret.jpg cannot be accessed: Perm"):
        prepare(tmp_path / "a.csv", tmp_path / "manifest")
    write_empty_files(tmp_path, ["b.jpg"])
    assert prepare(tmp_path / "a.csv", tmp_path / "manifest").images == 2
