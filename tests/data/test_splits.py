from captionlib.data.splits import expand_splits


def test_val_and_dev_are_one_split() -> None:
    assert expand_splits(["val"]) == expand_splits(["dev"]) == {"val", "dev"}
    assert expand_splits(["dev", "test"]) == {"val", "dev", "test"}
    assert expand_splits(["train"]) == {"train"}
    assert expand_splits([]) == frozenset()
