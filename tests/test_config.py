import pickle
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, strategies as st
from pydantic import PositiveInt

from captionlib.config import configclass, describe_differences, load_config, parse_yaml, to_dict
from captionlib.errors import ConfigError


@configclass
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@configclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str = "x"
    limit: int | None = None
    flip: bool = False
    optional: Inner | None = None


@configclass
class Group:
    members: tuple[Outer, ...]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members:\n- nam: a\n", r"unknown key members.0.nam \(did you mean members.0.name\?\)"),
        ("members:\n- name: a\n- inner: {rat: 1}\n", r"unknown key members.1.inner.rat \(did you mean"),
        ("members: a\n", "members: Input should be a list, got 'a'"),
        ("members: []\nmembers: []\n", "is not YAML: expected each key once, got members twice"),
    ],
)
def test_problems_in_lists_of_sections_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Group, tmp_path / "c.yaml")


def test_the_file_takes_precedence_over_given_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("inner:\n  rate: 0.5\n")
    config = load_config(Outer, file, ["limit=7"], defaults=["inner.rate=0.1", "inner.kind=b", "limit=2"])
    assert config == Outer(Inner(0.5, "b"), limit=7)


def test_overrides_take_precedence_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: from file\ninner:\n  rate: 0.5\n")
    config = load_config(Outer, file, ["inner.kind=b", "limit=7"])
    assert config == Outer(Inner(0.5, "b"), "from file", 7)
    assert to_dict(config) == {
        "inner": {"rate": 0.5, "kind": "b"},
        "name": "from file",
        "limit": 7,
        "flip": False,
        "optional": None,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nam=1"], r"unknown key nam \(did you mean name\?\); known keys: inner, name, limit, flip, optional"),
        (["inner.rat=1"], r"unknown key inner.rat \(did you mean inner.rate\?\); known keys: inner.rate, inner.kind"),
        (["inner.rate=fast"], "inner.rate: .* got 'fast'"),
        (["inner.kind=c"], "inner.kind: Input should be 'a' or 'b', got 'c'"),
        (["name"], "expected key=value"),
        (["name.first=x", "name.last=y", "name=3"], "name"),
        (["inner=3"], "inner"),
        (["limit=[1"], "is not YAML"),
        (["optional.rat=1"], r"unknown key optional.rat \(did you mean optional.rate\?\)"),
        (["limit=true"], "^options: limit: expected a number, got True"),
        (["flip=1"], "^options: flip: expected true or false, got 1"),
        (["optional.rate=false"], "^options: optional.rate: expected a number, got False"),
    ],
)
def test_invalid_values_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, overrides)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml cannot be read: No such file"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines, got list"):
        load_config(Outer, tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(Outer, tmp_path / "bad.yaml")


def test_describe_differences_names_fields_by_path() -> None:
    assert describe_differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: was 2, now 3",
        "d: was None, now 4",
    ]
    assert describe_differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []


@configclass
class Recipe:
    outer: Outer = field(default_factory=lambda: Outer(inner=Inner(rate=0.7), limit=3))


def test_omitted_nested_values_use_the_outer_default() -> None:
    assert load_config(Recipe, None, ["outer.name=y"]) == Recipe(Outer(Inner(0.7), "y", 3))
    assert load_config(Recipe, None, ["outer.inner.kind=b"]) == Recipe(Outer(Inner(0.7, "b"), limit=3))


@configclass
class Bounded:
    threads: PositiveInt = 16

    def __post_init__(self) -> None:
        if self.threads == 13:
            raise ConfigError("threads: expected another number than 13")


@configclass
class Nested:
    bounded: Bounded = field(default_factory=Bounded)


def test_bounds_apply_to_files_and_to_code() -> None:
    assert Bounded(4).threads == 4
    with pytest.raises(ConfigError, match="Bounded: threads: Input should be greater than 0, got 0"):
        Bounded(threads=0)
    with pytest.raises(ConfigError, match=r"options: bounded.threads: Input should be greater than 0, got 0"):
        load_config(Nested, None, ["bounded.threads=0"])
    with pytest.raises(ConfigError, match="another number than 13"):
        load_config(Nested, None, ["bounded.threads=13"])
    with pytest.raises(ConfigError, match="another number than 13"):
        replace(Bounded(), threads=13)


def test_configurations_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(Nested(Bounded(3)))) == Nested(Bounded(3))


def test_extends_merges_sections(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: base\ninner: {rate: 0.5, kind: b}\n")
    (tmp_path / "more.yaml").write_text("extends: base.yaml\ninner: {rate: 0.7}\n")
    assert load_config(Outer, tmp_path / "more.yaml") == Outer(Inner(0.7, "b"), "base")


def test_circular_extends_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="at most 8 levels of extends"):
        load_config(Outer, tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("extends: 3\n")
    with pytest.raises(ConfigError, match="extends: expected the path of a YAML file, got 3"):
        load_config(Outer, tmp_path / "c.yaml")
    (tmp_path / "d.yaml").write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none.yaml cannot be read"):
        load_config(Outer, tmp_path / "d.yaml")


YAML_BOMBS = {
    "aliases": "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 50))]),
    "cycle": "a: &a [*a]",
    "depth": "a: " + "[" * 1000,
    "mappings": "a: " + "{a: " * 1000,
    "digits": f"a: {'9' * 5000}",
    "date": "a: 2024-99-99",
    "tag": "a: !!python/object/apply:os.system [true]",
    "timestamp": "a: !!timestamp x",
    "bool": "a: !!bool x",
    "int": "a: !!int ''",
    "key": "? {a: 1}\n: b",
    "control": "a: \x07",
}


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_malicious_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bomb.yaml is not YAML: ") as raised:
        load_config(Outer, tmp_path / "bomb.yaml")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@given(st.text(st.sampled_from("&*!|>%@`'\"#{}[],?:-~ \n\tab1.<=e_+")), st.sampled_from(["", "name: ", "limit: "]))
def test_any_text_is_parsed_or_rejected(text: str, key: str) -> None:
    with suppress(ConfigError):
        parse_yaml(key + text, "options")
    with suppress(ConfigError):
        load_config(Outer, None, [f"name={text}"])
