from captionlib.data.splits import add_split_aliases


def test_val_and_dev_are_one_split() -> None:
    assert add_split_aliases(["val"]) == add_split_aliases(["dev"]) == {"val", "dev"}
    assert add_split_aliases(["dev", "test"]) == {"val", "dev", "test"}
    assert add_split_aliases(["train"]) == {"train"}
    assert add_split_aliases([]) == frozenset()
