"""Configuration: round trip through YAML, overrides, and errors that name the key."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tilelli_jax import config as config_lib
from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.io import yaml_text
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.training.config import ExperimentConfig


@dataclasses.dataclass(frozen=True)
class Apple(Section):
    """An apple."""

    family: Literal["apple"] = setting("apple", "which fruit")
    weight: float = setting(0.2, "kilograms")
    sorts: tuple[Literal["red", "green"], ...] = setting(("red",), "colours")


@dataclasses.dataclass(frozen=True)
class Pear(Section):
    """A pear."""

    family: Literal["pear"] = setting("pear", "which fruit")
    weight: float = setting(0.3, "kilograms", min=0, below=10)
    stalk: bool = setting(True, "whether it has one")


@dataclasses.dataclass(frozen=True)
class Box(Section):
    """A box."""

    width: int = setting(3, "centimetres", above=0, max=200)
    label: str = setting("", "what is written on it")


@dataclasses.dataclass(frozen=True)
class Basket(Section):
    """A basket."""

    name: str = setting("", "its name")
    count: int = setting(1, "pieces")
    price: float | None = setting(None, "of all")
    full: bool = setting(False, "whether more goes in")
    notes: tuple[str, ...] = setting((), "remarks")
    shares: tuple[float, ...] = setting((0.5, 0.5), "of the owners")
    fruit: Apple | Pear = setting(Apple(), "what is in it")
    box: Box = setting(Box(), "what is around it")
    lid: Box | None = setting(None, "what is on it")
    parts: dict[str, Box] = setting({}, "what it is divided into")
    tag: Box = setting(Box(width=1, label="ripe"), "what its label says")


floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["1e-3", "no", "null", "2024-01-01", "*.txt", "a: b", "'", "- x", "\x85\u2028", "1_0", "=", "<<", "010"])
baskets = st.builds(
    Basket, name=texts, count=st.integers(max_value=2**31 - 1), price=floats | st.none(), full=st.booleans(),
    notes=st.lists(texts).map(tuple), shares=st.lists(floats).map(tuple),
    fruit=st.builds(Apple, weight=floats, sorts=st.lists(st.sampled_from(["red", "green"])).map(tuple))
    | st.builds(Pear, weight=st.floats(0, 10, exclude_max=True), stalk=st.booleans()),
    box=st.builds(Box, width=st.integers(1, 200), label=texts),
    lid=st.none() | st.builds(Box, width=st.integers(1, 200), label=texts),
    parts=st.dictionaries(texts.filter(lambda text: text and "." not in text),
                          st.builds(Box, width=st.integers(1, 200), label=texts), max_size=3))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(basket=baskets)
def test_dump_and_load_are_inverse(basket: Basket, tmp_path: Path) -> None:
    (tmp_path / "basket.yaml").write_bytes(config_lib.dump(basket).encode())
    assert config_lib.load(Basket, tmp_path / "basket.yaml") == basket
    assert config_lib.from_dict(Basket, config_lib.to_dict(basket)) == basket
    assert config_lib.differences(basket, basket) == {}


def variations(config: Any) -> st.SearchStrategy[Any]:
    """Returns trees with some of a section's keys, at or near their defaults."""
    def values(hint: Any, value: Any) -> st.SearchStrategy[Any]:
        if typing.get_origin(hint) is Literal:
            return st.sampled_from(typing.get_args(hint))
        if typing.get_origin(hint) is tuple:
            return st.permutations(value).map(tuple)
        if dataclasses.is_dataclass(hint):
            return variations(hint())
        if typing.get_args(hint):
            return st.one_of(*(values(option, value) for option in typing.get_args(hint)))
        return {int: lambda: st.sampled_from([value, 2 * value]), bool: st.booleans,
                float: lambda: st.floats(0.1, 0.9), type(None): st.none,
                str: lambda: texts.filter(bool) if value else texts}[hint]()
    hints = typing.get_type_hints(type(config))
    required = {"family": st.just(config.family)} if hasattr(config, "family") else {}
    return st.fixed_dictionaries(required, optional={
        name: values(hint, getattr(config, name)) for name, hint in hints.items() if name != "family"})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(variations(ExperimentConfig()))
def test_dump_and_load_of_the_training_schema_are_inverse(tree: dict[str, Any]) -> None:
    try:
        config = config_lib.from_dict(ExperimentConfig, tree)
    except InputError:  # an invalid combination of keys
        assume(False)
    assert config_lib.from_dict(ExperimentConfig, yaml_text.parse(config_lib.dump(config))) == config


def load(tmp_path: Path, text: str, *overrides: str) -> Basket:
    (tmp_path / "basket.yaml").write_text(text, encoding="utf-8")
    return config_lib.load(Basket, tmp_path / "basket.yaml", overrides)


def test_a_file_and_overrides(tmp_path: Path) -> None:
    basket = load(tmp_path, """
        name: mine
        price: 1e-3
        shares: [1, 2e0]
        fruit: {family: pear, weight: 1}
        box:
        """, "count=7", "notes=[a, 'b: c']", "fruit.stalk=false", "box.width=9", "count=8", "full=true")
    assert basket == Basket(name="mine", price=1e-3, shares=(1.0, 2.0), fruit=Pear(weight=1.0, stalk=False),
                            count=8, notes=("a", "b: c"), full=True, box=Box(width=9))
    assert isinstance(basket.fruit.weight, float) and isinstance(basket.shares[0], float)
    assert config_lib.load(Basket, None, ["price=2"]) == Basket(price=2.0)
    assert load(tmp_path, "price: 3", "price=null") == Basket()
    assert load(tmp_path, "box:\nfruit:\n") == Basket(), "empty sections have their defaults"


@pytest.mark.parametrize(("text", "value"), [
    ("", ""), ("*.txt", "*.txt"), ("2024-01-01", "2024-01-01"), ("a=b", "a=b"), ("hf:some/thing:text",) * 2,
    ("@x", "@x"), ("'7'", "7"), ("[x", "[x"), ("no way", "no way"),
    ("{question} ", "{question} "), ("007", "007"), ("1e3", "1e3"), ("true", "true"), ("[a, b]", "[a, b]")])
def test_an_override_of_text_is_kept_as_typed(text: str, value: str) -> None:
    assert config_lib.load(Basket, None, [f"name={text}"]).name == value


BAD = [
    # keys
    ("nam: x", (), "unknown key 'nam' (did you mean 'name'?)"),
    ("box: {widht: 3}", (), "unknown key 'box.widht' (did you mean 'box.width'?)"),
    ("width: 3", (), "unknown key 'width' (did you mean 'box.width'?)"),
    ("box: {count: 3}", (), "unknown key 'box.count' (did you mean 'count'?)"),
    ("fruits: {weight: 3}", (), "unknown key 'fruits' (did you mean 'fruit'?)"),
    ("xyzzy: 3", (), "unknown key 'xyzzy'"),
    ("3: 4", (), "unknown key '3'"),
    ("nam: 1\nbox: {q: 1}\ncuont: 3", (),
     "unknown keys 'nam' (did you mean 'name'?), 'box.q', 'cuont' (did you mean 'count'?)"),
    ("fruit: {family: apple, sorts: [red]}", ("fruit.family=pear",),
     "unknown key 'fruit.sorts' (not with fruit.family pear)"),
    ("fruit: {stalk: true, wieght: 1}", (), "unknown keys 'fruit.stalk' (not with fruit.family apple), "
     "'fruit.wieght' (did you mean 'fruit.weight'?)"),
    ("", ("nam=3",), "unknown key 'nam' (did you mean 'name'?)"),
    ("", ("box.=3",), "unknown key 'box.' (did you mean 'box.width'?)"),
    # values
    ("count: true", (), "count: expected an integer, found a boolean True"),
    ("count: 1.0", (), "count: expected an integer, found a number 1.0"),
    ("count: 1e-3", (), "count: expected an integer, found text '1e-3'"),
    ("count: '3'", (), "count: expected an integer, found text '3'"),
    ("count: [3]", (), "count: expected an integer, found a list [3]"),
    ("count:", (), "count: expected an integer, found null"),
    ("price: false", (), "price: expected a number or null, found a boolean False"),
    ("price: nan", (), "price: expected a number or null, found text 'nan'"),
    ("price: 1" + 400 * "0", (), "price: expected a number or null, found an integer 1"),
    ("full: 1", (), "full: expected true or false, found an integer 1"),
    ("name: 3", (), "name: expected text, found an integer 3"),
    ("name: {a: b}", (), "name: expected text, found keys {'a': 'b'}"),
    ("notes: text", (), "notes: expected a list of texts, found text 'text'"),
    ("notes: [a, 3]", (), "notes[1]: expected text, found an integer 3"),
    ("fruit: {sorts: [gren]}", (),
     "fruit.sorts[0]: expected red or green, found text 'gren'; did you mean 'green'?"),
    ("fruit: {family: paer}", (),
     "fruit.family: expected one of apple, pear, found 'paer'; did you mean 'pear'?"),
    ("fruit: {family: [pear]}", (), "fruit.family: expected one of apple, pear, found ['pear']"),
    ("price: -.inf", (), "price: expected a number, found -inf"),
    ("fruit: {family: pear, weight: -1}", (), "fruit.weight: expected a number ≥ 0 and < 10, found -1.0"),
    ("fruit: {family: pear, weight: 10}", (), "fruit.weight: expected a number ≥ 0 and < 10, found 10.0"),
    ("box: {width: 0}", (), "box.width: expected an integer > 0 and ≤ 200, found 0"),
    ("box: {width: 201}", (), "box.width: expected an integer > 0 and ≤ 200, found 201"),
    ("fruit: 3", (), "fruit: expected keys with values, found an integer"),
    ("box: [1]", (), "box: expected keys with values, found a list"),
    ("parts: [left]", (), "parts: expected names with a section each, found a list"),
    ("parts: {left: 3}", (), "parts.left: expected keys with values, found an integer"),
    ("parts: {left: {widht: 3}}", (), "unknown key 'parts.left.widht' (did you mean 'parts.left.width'?)"),
    ("parts: {left: {count: 3}}", (), "unknown key 'parts.left.count' (did you mean 'count'?)"),
    ("parts: {left: {width: 201}}", (), "parts.left.width: expected an integer > 0 and ≤ 200, found 201"),
    ("parts: {left: {label: 3}}", (), "parts.left.label: expected text, found an integer 3"),
    ("parts: {3: {width: 3}}", (), "parts: expected names that are text without dots, found 3"),
    ("parts: {a.b: {width: 3}}", (), "parts: expected names that are text without dots, found 'a.b'"),
    ("parts: {'': {width: 3}}", (), "parts: expected names that are text without dots, found ''"),
    # overrides
    ("parts: {left: {width: 3}}", ("parts.left.wdth=4",),
     "unknown key 'parts.left.wdth' (did you mean 'parts.left.width'?)"),
    ("", ("parts={left: {width: 0}}",), "parts.left.width: expected an integer > 0 and ≤ 200, found 0"),
    ("", ("parts.left={wdth: 1}",), "unknown key 'parts.left.wdth' (did you mean 'parts.left.width'?)"),
    ("", ("parts=3",), "parts: expected names with a section each, found an integer"),
    ("", ("count",), "override 'count': expected key.subkey=value"),
    ("", ("=3",), "override '=3': expected key.subkey=value"),
    ("count: 3", ("count.x=3",), "override 'count.x=3': 'count' holds a value, not keys"),
    ("", ("box=3",), "box: expected keys with values, found an integer"),
    ("", ("count=[",), "count: expected an integer, found text '['"),
    # YAML
    ("- a", (), "expected keys with values, found a list"),
    ("text", (), "expected keys with values, found text"),
    ("count: 3\nname: x\ncount: 4", (), "not YAML: the key 'count' is given twice (line 3)"),
    ("box:\n  width: 3\n  width: 3", (), "not YAML: the key 'width' is given twice (line 3)"),
    ("box: {width: 3, 'width': 3}", (), "not YAML: the key 'width' is given twice (line 1)"),
    ("count: [", (), "not YAML: "), ("a: b: c", (), "not YAML: "), ("\x00", (), "not YAML: "),
    ("name: !!python/object/apply:os.getcwd []", (), "not YAML: "), ("[" * 5000, (), "not YAML: "),
    ("count: " + "1" * 5000, (), "not YAML: "), ("name: *x", (), "not YAML: "),
]


@pytest.mark.parametrize(("text", "overrides", "message"), BAD, ids=[f"{t[:30]} {o}" for t, o, _ in BAD])
def test_errors_are_one_line_and_name_the_key(
        text: str, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load(tmp_path, text or "count: 1", *overrides)
    error_text = str(error.value)
    if not message.startswith("override"):
        message = f"{'overrides' if overrides else tmp_path / 'basket.yaml'}: {message}"
    assert error_text.startswith(message) and "\n" not in error_text
    if message[-1] in "?')" or message.endswith("null"):
        assert error_text == message


@pytest.mark.parametrize(("tree", "override", "message"), [
    ({"count": 2}, "count=many", "--set: count: expected an integer, found text 'many'"),
    ({"count": 2}, "cuont=3", "--set: unknown key 'cuont' (did you mean 'count'?)"),
    ({"count": "x"}, "full=true", "x.pt: count: expected an integer, found text 'x'"),
    ({"count": "x"}, "count=y", "--set: count: expected an integer, found text 'y'"),
    ({"fruit": {"family": "pear", "weight": 10}}, "count=y",
     "x.pt: fruit.weight: expected a number ≥ 0 and < 10, found 10.0"),
    ({}, "count", "override 'count': expected key.subkey=value")])
def test_an_error_names_the_origin_of_the_invalid_value(tree: dict[str, Any], override: str,
                                                        message: str) -> None:
    with pytest.raises(InputError) as error:
        config_lib.overridden(Basket, tree, [override], "x.pt", "--set")
    assert str(error.value) == message


def test_overrides_of_a_tree() -> None:
    """They keep text as typed and the other keys of a section, and do not change the tree."""
    tree = {"count": 2, "box": {"width": 4, "label": "a"}, "parts": {"left": {"width": 5}}}
    basket = config_lib.overridden(Basket, tree, ["name=007", "box.label=2024", "parts.left.label=x"], "x.pt")
    assert basket == Basket(name="007", count=2, box=Box(4, "2024"), parts={"left": Box(5, "x")})
    assert tree == {"count": 2, "box": {"width": 4, "label": "a"}, "parts": {"left": {"width": 5}}}
    assert config_lib.overridden(Basket, tree, [], "x.pt").count == 2


@pytest.mark.parametrize(("shipped", "example"), [("demo", "--config demo"), ("", "--config FILE")])
def test_a_missing_configuration_is_one_line_with_an_example(shipped: str, example: str) -> None:
    parser = config_lib.command_line("tilelli basket", None, Basket, shipped, "count=2")
    with pytest.raises(InputError) as error:
        parser.parse_args([])
    assert str(error.value) == f"the following arguments are required: --config, e.g. {example}"


def test_merged_keys_are_not_duplicates(tmp_path: Path) -> None:
    basket = load(tmp_path, "box: &box {width: 4, label: a}\nfruit: {weight: 1}\n")
    assert basket.box == Box(4, "a")
    (tmp_path / "merged.yaml").write_text("width: 1\n<<: {width: 4, label: a}\n")
    assert config_lib.load(Box, tmp_path / "merged.yaml") == Box(1, "a")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tilelli-lite.yaml").write_text("count: 1")
    near = f"no such file; did you mean '{tmp_path}/tilelli-lite.yaml'?"
    for path, message in ((tmp_path / "tileli-lite.yaml", near),
                          (tmp_path / "none" / "x.yaml", "no such file"),
                          (tmp_path, "cannot be read: ")):
        with pytest.raises(InputError) as error:
            config_lib.load(Basket, path)
        assert str(error.value).startswith(f"{path}: {message}")
    (tmp_path / "link.yaml").symlink_to("tileli")
    with pytest.raises(InputError, match=r"link.yaml: no such file$"):
        config_lib.load(Basket, tmp_path / "link.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty.yaml").write_bytes(b"# nothing\n")
    for name, message in (("bytes", "cannot be read: "),
                          ("empty", "expected keys with values, found null")):
        with pytest.raises(InputError, match=f"^{tmp_path}/{name}.yaml: {message}"):
            config_lib.load(Basket, tmp_path / f"{name}.yaml")


def test_differences_are_named_by_key() -> None:
    a, b = Basket(count=3), Basket(fruit=Pear(weight=0.2), box=Box(label="x"))
    assert config_lib.differences(a, b) == {
        "count": (3, 1), "fruit.family": ("apple", "pear"), "fruit.sorts": (["red"], None),
        "fruit.stalk": (None, True), "box.label": ("", "x")}


def test_a_mapping_of_sections(tmp_path: Path) -> None:
    text = "parts: {left: {width: 4}, right: {label: x}}"
    assert load(tmp_path, text).parts == {"left": Box(4), "right": Box(3, "x")}
    basket = load(tmp_path, text, "parts.left.label=007", "parts.top.width=9", "parts.under={label: y}")
    assert basket.parts == {"left": Box(4, "007"), "right": Box(3, "x"), "top": Box(9), "under": Box(3, "y")}
    assert list(basket.parts) == ["left", "right", "top", "under"]
    assert load(tmp_path, text, "parts={left: {width: 5}}").parts == {"left": Box(5)}, "replaces the mapping"
    assert load(tmp_path, "parts:").parts == Basket().parts == {}
    assert Basket().parts is not Basket().parts
    assert config_lib.to_dict(basket)["parts"]["left"] == {"width": 4, "label": "007"}
    assert config_lib.settings(basket)["parts.left.width"] == 4
    assert config_lib.differences(load(tmp_path, text), basket) == {
        "parts.left.label": ("", "007"), "parts.top.width": (None, 9), "parts.top.label": (None, ""),
        "parts.under.width": (None, 3), "parts.under.label": (None, "y")}
    described = config_lib.describe(Basket).splitlines()
    rows = {line.split()[0]: following.strip() for line, following in zip(described[::2], described[1::2],
                                                                          strict=True)}
    assert rows["parts.NAME"] == "what it is divided into"
    assert rows["parts.NAME.width"] == "centimetres" and rows["parts.NAME.label"] == "what is written on it"


def test_a_section_keeps_the_defaults_of_its_key(tmp_path: Path) -> None:
    """Those of the key, which may differ from those of the section's class; also in --help."""
    assert load(tmp_path, "tag: {width: 2}").tag == Box(2, "ripe")
    assert load(tmp_path, "tag:", "tag.label=x").tag == Box(1, "x")
    assert load(tmp_path, "tag:").tag == Box(1, "ripe")
    assert load(tmp_path, "box: {label: x}").box == Box(3, "x")
    assert load(tmp_path, "fruit: {family: pear}").fruit == Pear(), "another family than the default"
    described = config_lib.describe(Basket)
    assert "tag.width         integer > 0 and ≤ 200 [1]" in described
    assert "tag.label         text [ripe]" in described and "box.width         integer" in described


def leaves(cls: Any, prefix: str = "") -> list[tuple[str, str]]:
    keys = []
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        sections = [h for h in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(h)]
        for section in sections:
            keys += leaves(section, f"{prefix}{field.name}.")
        if not sections:
            keys.append((prefix + field.name, field.metadata["meaning"]))
    return keys


def test_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = config_lib.describe(ExperimentConfig)
    described, joined = text.splitlines(), " ".join(text.split())
    expected = leaves(ExperimentConfig)
    assert len(expected) > 60
    for key, meaning in expected:
        words = re.escape(" ".join(meaning.split()))
        assert meaning and re.search(rf"(?<!\S){re.escape(key)} \w.*? \[.*?\] {words}", joined), key
    width = max(len(line.split()[0]) for line in described if line[2] != " ")
    assert max(len(line) for line in described if line[2] == " ") <= width + 6 + 50, "meanings are wrapped"
    assert any(line.split() == ["model", "if", "model.family=vanilla:"] for line in described)
    from tilelli_jax.train import main
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    assert config_lib.describe(ExperimentConfig) in capsys.readouterr().out


def test_overriding_the_family_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "lite.yaml").write_text("model: {family: routed, n_heads: 4, top_k: 8, d_head: 9}")
    with pytest.raises(InputError) as error:
        config_lib.load(ExperimentConfig, tmp_path / "lite.yaml", ["model.family=vanilla"])
    assert str(error.value) == (
        "overrides: unknown keys 'model.top_k' (not with model.family vanilla), "
        "'model.d_head' (not with model.family vanilla)")
    config = config_lib.load(ExperimentConfig, None, ["model.family=vanilla", "model.d_model=64"])
    assert config.model == VanillaConfig(d_model=64)
