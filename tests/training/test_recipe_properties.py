"""Any document is a recipe that can be written and read again, or a ValueError that names the file."""

import copy
from dataclasses import asdict

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmcr_hf.training.recipe import MAX_BYTES, load_recipe

MINIMAL = {
    "name": "small",
    "sources": {"clip": "some/clip", "clap": {"id": "some/clap", "revision": "main"}},
    "text": [{"table": "texts.csv", "column": "text", "limit": 5}],
    "image": [{"folder": "images", "label": "parent"}],
    "audio": [{"dataset": "some/sounds", "column": "audio", "where": {"year": ["2020"]}}],
    "connector": {"projection_dim": 8, "noise_norm": 0.5},
    "aggregate_temperature": 0.01,
    "train": {"epochs": 3, "learning_rate": 1e-3, "seed": 0},
    "evaluate": {"image": {"folder": "a", "label": "stem"}, "audio": {"folder": "b", "label": "stem"}},
    "world": {"images": 1},
}
# A recipe has a key of each name at one place at least.
NAMES = sorted({*MINIMAL, "clip", "clap", "id", "folder", "table", "column", "limit", "epochs", "batch_size", "split"})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**66),
    st.just(10**4000),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["1e-3", "nan", "-.inf", "a\0b", "a" * 5000, "../..", "\U0001f514", "clip", "\u2028"]),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=4),
)
documents = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4) | st.integers() | st.dates(), inner, max_size=4)
    ),
    max_leaves=12,
)


def places(document, place=()):
    """Yield the path of every value in a document."""
    entries = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in entries:
        yield (*place, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*place, key))


def dump(document):
    return yaml.safe_dump(document, allow_unicode=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def check(path, content):
    """Load a recipe and return whether it is one."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 5000
        return False
    path.write_text(yaml.safe_dump(asdict(recipe), allow_unicode=True), encoding="utf-8")
    # A number that is none is not equal to itself, its name is.
    assert repr(load_recipe(path)) == repr(recipe)
    return True


@given(documents)
def test_any_document_is_a_recipe_or_is_refused(path, document):
    check(path, dump(document))


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(places(MINIMAL), key=repr)), documents, st.booleans())
def test_any_value_in_place_of_one_of_a_recipe_is_taken_or_refused_by_name(path, place, value, added):
    document = copy.deepcopy(MINIMAL)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if added and isinstance(inner, dict):
        inner[f"{place[-1]}x"] = value
    else:
        inner[place[-1]] = value
    taken = check(path, dump(document))
    assert not (taken and added and isinstance(inner, dict) and place[:-1] not in [("audio", 0, "where")])


@given(
    st.text() | st.binary() | st.lists(st.sampled_from(list("[]{}:,-?&*!|>'\"#%@ \n\tab0")), max_size=40).map("".join)
)
def test_any_text_is_a_recipe_or_is_refused(path, text):
    assert not check(path, text)


def test_the_document_that_is_varied_is_a_recipe(path):
    assert check(path, dump(MINIMAL))


def refusal(path, text):
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 2000, "nested too deeply"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("name: &a [*a]", "stands for more than 10000 values"),
        ("name: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("name: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("name: !!int ''", "not valid YAML"),
        ("name: !!bool maybe", "not valid YAML"),
        ("name: !!timestamp soon", "not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("? [a, b]\n: 1", "not valid YAML"),
        ("näme: x", "unknown key 'näme'. Did you mean 'name'?"),
    ],
)
def test_a_document_that_means_harm_is_refused_in_one_line(path, text, expected):
    assert expected in refusal(path, text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-01-02", "expected name to be of type str, got datetime.date(2024, 1, 2)"),
        ("0x" + "f" * 5000, "expected name to fit into 64 bits, got a number of thousands of digits"),
        ("[0x" + "f" * 5000 + "]", "expected name to be of type str, got a number of thousands of digits"),
        ("!!binary aGk=", "expected name to be of type str, got b'hi'"),
        ("!!set {a}", "expected name to be of type str, got {'a'}"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_key(path, value, expected):
    assert expected in refusal(path, dump(MINIMAL).replace("name: small", f"name: {value}"))


def test_a_billion_laughs_are_refused_at_once(path):
    levels = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    levels += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 40)]
    assert "stands for more than 10000 values, aliases written out" in refusal(path, "\n".join(levels))


def test_an_alias_within_reason_is_written_out(path):
    text = dump(MINIMAL).replace("name: small", "name: small\nlicence: &l mit\ndescription: *l")
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path).description == "mit"


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed(path):
    assert f"is larger than {MAX_BYTES} bytes" in refusal(path, "#" * (MAX_BYTES + 1))


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_name_that_can_be_no_file_is_refused(name):
    with pytest.raises(ValueError, match="There is no recipe"):
        load_recipe(name)
