from pathlib import Path

import pytest

from cmcr_hf.training.recipe import Bridge, DataSpec, load_recipe, recipe_names

MINIMAL = """
name: small
sources: {clip: some/clip, clap: some/clap}
text: [{table: texts.csv, column: text}]
image: [{folder: images}]
audio: [{folder: sounds}]
"""
C_MCR = "connector: {objective: c-mcr}\n"


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path):
    """Return the message that refuses a recipe, which names its file."""
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_loads(name):
    assert load_recipe(name).name == name


def test_a_minimal_recipe_has_the_schedule_of_the_paper(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.learning_rate) == (36, 4096, 1e-3)
    assert recipe.sources["clip"].id == "some/clip"
    assert recipe.text[0].column == "text"
    assert recipe.evaluate is None


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", ".", "two words", "''"])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path, name):
    assert "expected name of letters" in refusal(write(tmp_path, MINIMAL.replace("small", name)))


def test_numbers_that_yaml_reads_as_text_become_floats(tmp_path):
    text = (
        "connector: {objective: c-mcr}\naggregate_temperature: 2e-2\ntrain: {learning_rate: 1e-4, weight_decay: 0}\n"
    )
    recipe = load_recipe(write(tmp_path, MINIMAL + text))
    assert recipe.aggregate_temperature == 0.02
    assert recipe.train.learning_rate == 1e-4
    assert isinstance(recipe.train.weight_decay, float)


def test_two_spaces_are_connected_by_bridge_distillation_and_three_by_ex_mcr_where_a_recipe_does_not_say(tmp_path):
    assert load_recipe(write(tmp_path, MINIMAL)).connector_fields == {"objective": "bridge-distillation"}
    assert load_recipe(write(tmp_path, MINIMAL + C_MCR)).connector_fields == {"objective": "c-mcr"}
    three = load_recipe(write(tmp_path, THREE.replace("connector: {objective: ex-mcr}", "")))
    assert three.objective == "ex-mcr"


@pytest.mark.parametrize("name", ["demo", "shapes", "clip-clap", "clip-ulip"])
def test_the_recipes_of_the_paper_and_of_the_demonstrations_train_its_objective(name):
    assert load_recipe(name).objective == "c-mcr"


def test_numbers_of_the_connector_are_read_by_their_type(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "connector: {projection_dim: 64, leaf_temperature: 5e-2}\n"))
    assert recipe.connector == {"projection_dim": 64, "leaf_temperature": 0.05}
    temperatures = "connector: {posterior_temperatures: {clip: 5e-2, clap: 1}}\n"
    recipe = load_recipe(write(tmp_path, MINIMAL + temperatures))
    assert recipe.connector == {"posterior_temperatures": {"clip": 0.05, "clap": 1.0}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch: 3", "unknown key 'epoch'. Known keys: name, sources"),
        ("trian: {epochs: 3}", "unknown key 'trian'. Did you mean 'train'?"),
        ("train: {epoch: 3}", "unknown key 'epoch' in train. Did you mean 'epochs'?"),
        ("connector: {intra_weight: 0.5}", "connector.intra_weight goes with c-mcr and ex-mcr, not with bridge-dist"),
        ("connector: {objective: c-mcr, mix_items: false}", "connector.mix_items goes with bridge-distillation, not"),
        ("connector: {projection_dm: 3}", "unknown key 'projection_dm' in connector. Did you mean 'projection_dim'?"),
        ("connector: {clip_config: {}}", "unknown key 'clip_config' in connector"),
        ("connector: {projection_dim: wide}", "expected connector.projection_dim to be of type int, got 'wide'"),
        (
            "connector: {posterior_temperatures: {clip: cold}}",
            "expected connector.posterior_temperatures.clip to be of type float, got 'cold'",
        ),
        ("world: {pictures: 3}", "unknown key 'pictures' in world"),
        ("train: {epochs: many}", "expected train.epochs to be of type int, got 'many'"),
        ("train: {epochs: true}", "expected train.epochs to be of type int, got True"),
        ("train: {epochs: 1.5}", "expected train.epochs to be of type int, got 1.5"),
        ("train: {learning_rate: fast}", "expected train.learning_rate to be of type float, got 'fast'"),
        ("train: {learning_rate: .nan}", "train: expected a positive learning_rate, got nan"),
        ("train: {learning_rate: 0}", "train: expected a positive learning_rate, got 0.0"),
        ("train: {batch_size: 0}", "train: expected batch_size to be at least 1, got 0"),
        ("train: {validation_rows: -1}", "train: expected validation_rows to be 0 or more, got -1"),
        ("train: [epochs]", "expected train to be a mapping, got ['epochs']"),
        ("aggregate_temperature: 0.1", "aggregate_temperature is 0.1, expected none for bridge-distillation, which"),
        ("aggregate_temperature: 0", "expected a positive aggregate_temperature, got 0.0"),
        ("evaluate: {image: {folder: a, label: stem}}", "evaluate: expected audio, and image, text or both"),
        ("point_cloud: [{folder: clouds}]", "got data under point_cloud, expected text, image, audio alone"),
        ("world: {clouds: 3}", "unknown key 'clouds' in world"),
        ("connector: {bridges: [[clip, clap, image]]}", "expected connector.bridges as one [clip, clap, MODALITY]"),
        ("evaluate: {image: {folder: a}, audio: {folder: b, label: stem}}", "evaluate: image lacks a label"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, text, expected):
    message = refusal(write(tmp_path, MINIMAL + text + "\n"))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            "{folder: a, table: b.csv}",
            "image[0]: expected exactly one of folder, table and dataset, got folder, table",
        ),
        ("{limit: 3}", "image[0]: expected exactly one of folder, table and dataset, got none"),
        ("{folder: a, limit: 0}", "image[0]: expected limit to be at least 1, got 0"),
        ("{folder: a, where: {year: ['1']}}", "image[0]: where does not go with folder, which takes label, pattern"),
        ("{table: a.csv, pattern: '*.png'}", "image[0]: pattern does not go with table"),
        ("{table: a.csv, split: test}", "image[0]: split does not go with table"),
        ("{table: a.csv, column: []}", "image[0]: expected the name of a column"),
        ("{table: a.csv, template: plain}", "image[0]: expected a template with one {} for the text, got 'plain'"),
        ("{table: a.csv, where: {year: [2020]}}", "expected image[0].where.year[0] to be of type str, got 2020"),
        ("{table: a.csv, column: 3}", "expected image[0].column to be of type str, got 3"),
        ("images", "expected image[0] to be a mapping, got 'images'"),
    ],
)
def test_a_wrong_data_entry_is_named(tmp_path, entry, expected):
    assert expected in refusal(write(tmp_path, MINIMAL.replace("{folder: images}", entry)))


def test_a_missing_key_is_named(tmp_path):
    assert "expected at least one data entry under audio" in refusal(write(tmp_path, MINIMAL.replace("audio:", "#")))


def test_clip_and_ulip_are_connected_through_images():
    recipe = load_recipe("clip-ulip")
    assert recipe.bridges == [Bridge("ulip", "image", ("image",))]
    assert recipe.bridges[0].leaves == {"clip": "text", "ulip": "point_cloud"}
    assert recipe.connector["projectors"]["ulip"] == {"layout": "linear-bn-relu"}


def test_a_bridge_names_another_overlap(tmp_path):
    text = MINIMAL.replace("clap: some/clap", "ulip: some/ulip").replace("audio:", "point_cloud:")
    recipe = load_recipe(write(tmp_path, text + "connector: {bridges: [[clip, ulip, text]]}\n"))
    assert recipe.bridges[0].leaves == {"clip": "image", "ulip": "point_cloud"}


def test_a_missing_source_is_named(tmp_path):
    text = MINIMAL.replace("sources: {clip: some/clip, clap: some/clap}", "sources: {clip: some/clip}")
    assert "expected the sources clip and clap, clip and ulip, or all three, got clip" in refusal(
        write(tmp_path, text)
    )


def test_an_empty_list_of_data_is_refused(tmp_path):
    text = MINIMAL.replace("[{folder: sounds}]", "[]")
    assert "expected at least one data entry under audio" in refusal(write(tmp_path, text))


def test_a_key_given_twice_is_refused_in_place_of_dropping_the_first(tmp_path):
    message = refusal(write(tmp_path, MINIMAL + "image: [{folder: more}]\n"))
    assert "the key 'image' is given twice" in message
    assert "line 7" in message


def test_bad_yaml_is_refused_with_its_line(tmp_path):
    message = refusal(write(tmp_path, "name: [unclosed\n"))
    assert "is not valid YAML" in message
    assert "line 2" in message


def test_an_empty_file_is_refused(tmp_path):
    assert "expected the recipe to be a mapping, got None" in refusal(write(tmp_path, ""))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    assert "is not valid YAML" in refusal(path)


def test_a_missing_file_is_named(tmp_path):
    assert "No such file or directory" in refusal(tmp_path / "absent.yaml")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"There is no recipe 'absent'\. Use one of the package \(.*demo.*\)"):
        load_recipe("absent")


def test_a_folder_of_the_same_name_does_not_hide_a_recipe_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert load_recipe("demo").name == "demo"


def test_source_folders_are_found_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "encoders" / "clip").mkdir(parents=True)
    path = write(tmp_path, MINIMAL.replace("clip: some/clip", "clip: {id: encoders/clip, licence: MIT}"))
    monkeypatch.chdir("/")
    sources = load_recipe(path).sources
    assert sources["clip"].id == str((tmp_path / "encoders" / "clip").resolve())
    assert sources["clip"].licence == "MIT"
    assert sources["clap"].id == "some/clap"


def test_a_data_entry_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="exactly one of folder, table and dataset"):
        DataSpec()


# Stores


def stores(text, image="[{folder: images}]"):
    return MINIMAL.replace("[{table: texts.csv, column: text}]", text).replace("[{folder: images}]", image)


def test_stores_may_take_the_place_of_items(tmp_path):
    both = "[{stores: {clip: hf://datasets/org/a, clap: stores/b}, licence: cc0-1.0}]"
    recipe = load_recipe(write(tmp_path, stores(both, "[{folder: images, stores: {clip: c}}]")))
    assert recipe.text[0].stores == {"clip": "hf://datasets/org/a", "clap": "stores/b"}
    assert (recipe.text[0].has_items, recipe.image[0].has_items) == (False, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{stores: {clip: a}}]", "text has no store of clap, and no items to embed"),
        ("[{stores: {clip: a, clap: b}}, {table: t.csv}]", "text has 2 entries and one of them stores"),
        ("[{stores: {clip: a, ulip: b}}]", "text has a store of 'ulip', expected of clip and clap"),
        ("[{stores: {}}]", "text[0]: expected stores as {space: folder or address}"),
        ("[{stores: {clip: a, clap: b}, limit: 5}]", "text[0]: limit does not go with stores, which takes no other"),
        ("[{stores: [a, b]}]", "expected text[0].stores to be a mapping"),
    ],
)
def test_stores_that_cannot_be_used_are_refused(tmp_path, text, message):
    assert message in refusal(write(tmp_path, stores(text)))


def test_items_to_evaluate_with_come_from_no_store(tmp_path):
    evaluate = "evaluate: {image: {folder: a, label: stem, stores: {clip: b}}, audio: {folder: c, label: stem}}\n"
    assert "evaluate: image has stores, expected items" in refusal(write(tmp_path, MINIMAL + evaluate))


THREE = """
name: three
sources: {clip: some/clip, ulip: some/ulip, clap: some/clap}
text: [{table: texts.csv, column: text}]
image: [{folder: images}]
audio: [{folder: sounds}]
point_cloud: [{folder: clouds}]
connector: {objective: ex-mcr}
"""


def test_a_connection_of_two_spaces_is_centred_on_their_overlap_unless_pools_are_named(tmp_path):
    assert load_recipe(write(tmp_path, MINIMAL)).bridges == [Bridge("clap", "text", ("text",))]
    recipe = load_recipe(write(tmp_path, MINIMAL + "connector: {objective: c-mcr}\npools: [audio, text]\n"))
    assert recipe.bridges == [Bridge("clap", "text", ("text", "audio"))]
    recipe = load_recipe(write(tmp_path, MINIMAL + "connector: {objective: ex-mcr}\n"))
    assert recipe.bridges == [Bridge("clap", "text", ("text", "image", "audio"))]


def test_three_spaces_have_a_bridge_and_pools_for_each_that_is_extended(tmp_path):
    recipe = load_recipe(write(tmp_path, THREE))
    assert recipe.spaces == ["clip", "clap", "ulip"]
    assert recipe.bridges == [
        Bridge("clap", "text", ("text", "image", "audio")),
        Bridge("ulip", "image", ("image", "text", "point_cloud")),
    ]
    assert recipe.modalities == ["text", "image", "audio", "point_cloud"]
    assert {name: recipe.spaces_of(name) for name in recipe.modalities} == {
        "text": ["clip", "clap"],
        "image": ["clip", "ulip"],
        "audio": ["clap"],
        "point_cloud": ["ulip"],
    }


def test_bridges_of_three_spaces_may_go_through_texts_alone(tmp_path):
    bridges = "connector: {objective: ex-mcr, bridges: [[clip, ulip, text], [clip, clap, text]]}"
    recipe = load_recipe(write(tmp_path, THREE.replace("connector: {objective: ex-mcr}", bridges)))
    assert [(bridge.space, bridge.overlap) for bridge in recipe.bridges] == [("clap", "text"), ("ulip", "text")]
    assert recipe.spaces_of("text") == ["clip", "clap", "ulip"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (THREE.replace("ex-mcr", "c-mcr"), "expected the objective ex-mcr for three spaces, got c-mcr"),
        (THREE.replace("ex-mcr", "ex-mcr, bridges: [[clip, clap, text]]"), "and one [clip, ulip, MODALITY]"),
        (THREE + "pools: [audio]\n", "pools are ['audio'], expected one at least of image, text, point_cloud"),
        (
            MINIMAL + C_MCR + "pools: [text, point_cloud]\n",
            "pools name 'point_cloud', expected some of text, image, audio",
        ),
        (MINIMAL + "pools: []\n", "pools are [], expected none for bridge-distillation"),
        (
            MINIMAL + C_MCR + "pools: []\n",
            "pools are [], expected one at least of text, image, audio for clip and clap",
        ),
        (THREE + "evaluate: {image: {folder: a, label: parent}}\n", "evaluate: expected audio or point_cloud"),
    ],
)
def test_spaces_pools_and_bridges_that_do_not_fit_are_refused(tmp_path, text, expected):
    assert expected in refusal(write(tmp_path, text))
