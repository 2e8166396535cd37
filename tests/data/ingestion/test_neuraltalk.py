import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io

from captionlib.data.ingestion import matlab
from captionlib.data.ingestion.matlab import open_matrix
from captionlib.data.ingestion.neuraltalk import ImportConfig, import_features
from captionlib.data.shards.dataset import open_dataset
from captionlib.errors import ConfigError, DatasetError, DuplicateIdError, FingerprintError
from captionlib.models.encoders.encoder import EncoderConfig

FEATURES = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)  # 4 images of 5 numbers each
IMGIDS = [2, 0, 3]


def write_json(folder: Path, imgids: list[Any], **fields: Any) -> Path:
    images = [
        {
            "imgid": imgid,
            "filename": f"{number}.jpg",
            "split": "train" if number else "val",
            "sentids": [number],
            "sentences": [{"tokens": ["a", "dog"], "raw": f"A dog, {number}.", "imgid": imgid, "sentid": number}],
            **fields,
        }
        for number, imgid in enumerate(imgids)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    return folder / "dataset.json"


def write_mat(folder: Path, version: str, features: Any = FEATURES, name: str = "feats") -> Path:
    path = folder / "vgg_feats.mat"
    if version == "7":
        scipy.io.savemat(path, {name: features, "other": np.eye(2)}, do_compression=True)
    elif version == "7.3":
        with h5py.File(path, "w", userblock_size=512) as file:  # as MATLAB does
            file[name] = features.T
    else:
        scipy.io.savemat(path, {name: features, "other": np.eye(2)}, format=version)
    return path


@pytest.mark.parametrize("version", ["4", "5", "7.3"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_import_assigns_the_column_of_each_imgid(tmp_path: Path, version: str, dtype: Any) -> None:
    files = write_json(tmp_path, IMGIDS), write_mat(tmp_path, version)
    totals = import_features(*files, tmp_path / "features", ImportConfig(stored_dtype=dtype, shard_size=2))
    assert (totals.rows, totals.shards) == (3, 2)
    dataset = open_dataset(tmp_path / "features", "features").require_complete()
    rows = [row for shard in range(2) for row in dataset.read(shard).to_pylist()]
    assert [row["image_id"] for row in rows] == ["2", "0", "3"]
    assert [row["split"] for row in rows] == ["val", "train", "train"]
    assert rows[1]["uri"] == str(tmp_path / "1.jpg")
    assert rows[1]["captions"] == ["A dog, 1."]
    expected = FEATURES[:, IMGIDS].T.astype(dtype)
    np.testing.assert_array_equal(np.array([row["features"] for row in rows], dtype), expected)
    assert dataset.config["encoder"]["shape"] == [5]


def test_import_keeps_coco_ids_and_takes_columns_by_imgid(tmp_path: Path) -> None:
    files = write_json(tmp_path, [3], cocoid=391895, filepath="val2014"), write_mat(tmp_path, "5")
    import_features(*files, tmp_path / "features", ImportConfig(image_root="/images"))
    (row,) = open_dataset(tmp_path / "features").read(0).to_pylist()
    assert (row["image_id"], row["uri"]) == ("391895", "/images/val2014/0.jpg")
    np.testing.assert_allclose(row["features"], FEATURES[:, 3], rtol=1e-3)


def test_second_import_writes_nothing_and_other_files_need_overwrite(tmp_path: Path) -> None:
    files = write_json(tmp_path, IMGIDS), write_mat(tmp_path, "5")
    import_features(*files, tmp_path / "features")
    modified = (tmp_path / "features" / "part-00000.parquet").stat().st_mtime_ns
    import_features(*files, tmp_path / "features")
    assert (tmp_path / "features" / "part-00000.parquet").stat().st_mtime_ns == modified
    write_mat(tmp_path, "5", FEATURES + 1)
    with pytest.raises(FingerprintError, match="features_sha256"):
        import_features(*files, tmp_path / "features")
    import_features(*files, tmp_path / "features", overwrite=True)


def test_imported_features_name_no_encoder(tmp_path: Path) -> None:
    import_features(write_json(tmp_path, IMGIDS), write_mat(tmp_path, "5"), tmp_path / "features")
    with pytest.raises(ConfigError, match="features were imported"):
        EncoderConfig.from_description(open_dataset(tmp_path / "features").config["encoder"])


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize(
    ("features", "name", "message"),
    [
        (FEATURES[:, :3], "feats", r"got 3 columns of 5 values and an image with imgid 3 \(.*images\[2\]\)"),
        (FEATURES.T, "feats", "got 4 rows and 5 columns, so the matrix seems to be transposed; save its transpose"),
        (FEATURES, "x", "a numeric matrix named feats, got the variables x"),
        (np.zeros((2, 2, 2)), "feats", r"named feats, got shape \[2, 2, 2\]"),
        (np.where(np.arange(4) == 0, np.nan, FEATURES), "feats", "column 0 contains a value that is not finite"),
        (FEATURES * 1e6, "feats", "within the range of float16, but column 0 contains"),
    ],
)
def test_import_rejects_mismatched_files(tmp_path: Path, version: str, features: Any, name: str, message: str) -> None:
    files = write_json(tmp_path, sorted(IMGIDS)), write_mat(tmp_path, version, features, name)
    with pytest.raises(DatasetError, match=message):
        import_features(*files, tmp_path / "features")


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((8, 512), None, r"8 rows and 512 columns, so the matrix seems to be transposed; .* or set feature_size"),
        ((5, 4), 4, "5 rows and 4 columns, so the matrix seems to be transposed"),
        ((5, 4), 3, r"expected 3 rows \(feature_size\), got 5"),
        ((8, 512), 8, None),
        ((512, 8), None, None),
        ((4, 512), None, None),
        ((512, 1024), None, None),
    ],
)
def test_import_detects_a_transposed_matrix(
    tmp_path: Path, shape: tuple[int, int], size: int | None, message: str | None
) -> None:
    imgids = [0, 511] if shape == (4, 512) else [2, 0, 1]
    files = write_json(tmp_path, imgids), write_mat(tmp_path, "5", np.ones(shape))
    config = ImportConfig(feature_size=size)
    if message is None:
        assert import_features(*files, tmp_path / "features", config).rows == len(imgids)
    else:
        with pytest.raises(DatasetError, match=message):
            import_features(*files, tmp_path / "features", config)


@pytest.mark.parametrize("content", [b"", b"no MATLAB file at all, but long enough to have a header" * 20])
def test_import_rejects_files_that_are_not_matlab(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "vgg_feats.mat").write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be read as a MATLAB file"):
        import_features(write_json(tmp_path, [0]), tmp_path / "vgg_feats.mat", tmp_path / "features")


@pytest.mark.parametrize(
    ("imgids", "error", "message"),
    [
        ([0, 0], DuplicateIdError, "expected one row per image, got a second row for '0'"),
        (["zero"], DatasetError, "expected a column number as imgid, got text 'zero'"),
        ([-1], DatasetError, "got number -1"),
        ([None], DatasetError, "expected imgid as text or an integer, got no value"),
        ([], DatasetError, "no images"),
    ],
)
def test_import_rejects_images_without_a_column(
    tmp_path: Path, imgids: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        import_features(write_json(tmp_path, imgids), write_mat(tmp_path, "5"), tmp_path / "features")


def test_import_rejects_captions_that_are_not_unicode(tmp_path: Path) -> None:
    path = write_json(tmp_path, [0], sentences=[{"raw": "a \ud83d dog"}])
    with pytest.raises(DatasetError, match=r"images\[0\]: expected valid Unicode, got lone surrogates"):
        import_features(path, write_mat(tmp_path, "5"), tmp_path / "features")


def import_matrix(folder: Path) -> None:
    import_features(write_json(folder, [0]), folder / "vgg_feats.mat", folder / "features")


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_matrix_much_larger_than_its_file_is_rejected(tmp_path: Path, version: str) -> None:
    if version == "5":
        scipy.io.savemat(tmp_path / "vgg_feats.mat", {"feats": np.zeros((4096, 1000))}, do_compression=True)
    else:
        with h5py.File(tmp_path / "vgg_feats.mat", "w") as file:
            file.create_dataset("feats", (10**6, 10**7), "f4", chunks=(1000, 1000), compression="gzip")
    with pytest.raises(DatasetError, match=r"at most .* bytes \(100 times the size of the file\), got shape"):
        import_matrix(tmp_path)


def test_compressed_features_are_accepted(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "vgg_feats.mat", {"feats": np.arange(400.0).reshape(100, 4)}, do_compression=True)
    import_matrix(tmp_path)


@pytest.mark.parametrize("kind", ["external link", "soft link", "virtual", "external"])
def test_hdf5_that_refers_to_other_files_is_rejected(tmp_path: Path, kind: str) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["feats"] = FEATURES.T
    with h5py.File(tmp_path / "vgg_feats.mat", "w") as file:
        if kind == "external link":
            file["feats"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "feats")
        elif kind == "soft link":
            file["feats"] = h5py.SoftLink("/feats")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(FEATURES.T.shape, FEATURES.dtype)
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "feats", FEATURES.T.shape)
            file.create_virtual_dataset("feats", layout)
        else:
            file.create_dataset("feats", (4, 4), "f4", external=[(str(tmp_path / "other.h5"), 0, 64)])
    with pytest.raises(DatasetError, match=r"expected a numeric matrix named feats, got (a link|one that is stored)"):
        import_matrix(tmp_path)


def test_file_that_crashes_scipy_is_one_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_mat(tmp_path, "5")
    content = bytearray(path.read_bytes())
    content[145] = 8  # the flag of complex values, without the imaginary parts
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"^[^\n]* cannot be read as a MATLAB file[^\n]*$"):
        import_matrix(tmp_path)
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "features").exists()


def test_file_that_needs_too_much_memory_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of another variable are much larger than the file."""
    bomb = np.zeros(2**26, np.int8)
    scipy.io.savemat(tmp_path / "vgg_feats.mat", {"bomb": bomb, "feats": FEATURES}, do_compression=True)
    monkeypatch.setattr(matlab, "_BASE_MEMORY_BYTES", 0)
    with pytest.raises(DatasetError, match=r"it needs more than 0\.\d+ GB of memory; save only the matrix, without"):
        import_matrix(tmp_path)


def test_file_that_takes_too_long_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mat(tmp_path, "5")
    monkeypatch.setattr(matlab, "_BASE_TIMEOUT_SECONDS", 0)
    with pytest.raises(DatasetError, match=r"cannot be read as a MATLAB file in 0 seconds; save only the matrix"):
        import_matrix(tmp_path)


@pytest.mark.parametrize("version", ["4", "5", "7", "7.3"])
def test_damaged_file_is_read_or_is_one_error(tmp_path: Path, version: str) -> None:
    path = write_mat(tmp_path, version)
    content, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(15):
        damaged = bytearray(content[: random.integers(len(content)) or None] if random.random() < 0.3 else content)
        for position in random.integers(len(damaged), size=random.integers(1, 20)):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with suppress(DatasetError), open_matrix(str(path), "feats") as matrix:
            assert matrix.ndim == 2
