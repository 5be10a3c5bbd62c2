"""The table of data sets against TFDS, and the recipe's arguments; the command itself."""

from pathlib import Path
from unittest import mock

import pytest
from etils import epath

from mae_jax.commands.transfer.protocols import Recipe
from mae_jax.config import validate
from mae_jax.data.sources import expected_sizes
from mae_jax.errors import UserError
from tests.config.config_test import recipe

FILE = Path("configs/transfer.py")
DATA = Recipe(str(FILE), {}).module.DATA
# Lists that a builder reads before it says its splits, with their lines.
EMPTY = {"Partitions/Training_01.txt": 0, "Partitions/Testing_01.txt": 0, "cifar-10-batches-bin/batches.meta.txt": 10,
         "cifar-100-binary/coarse_label_names.txt": 20, "cifar-100-binary/fine_label_names.txt": 100}


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


def of_tfds():
    return [name for name in DATA if recipe(FILE, name).data.source == "tfds"]


@pytest.mark.parametrize("name", of_tfds())
def test_pictures_labels_and_classes_of_the_table_are_those_of_tfds(name, tfds, tmp_path):
    row = DATA[name]
    features = tfds.builder(row.name, data_dir=tmp_path).info.features
    assert isinstance(features["image"], tfds.features.Image)
    assert features[row.label_key].num_classes == row.classes
    assert isinstance(features[row.label_key], tfds.features.ClassLabel) == (row.metric != "map")


def split_names(builder, folder: Path) -> set[str]:
    """Returns the splits that a builder would make, from empty downloads."""
    for file, lines in EMPTY.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("\n".join(map(str, range(lines))))
    downloads = mock.MagicMock()
    for name in ("download", "extract", "download_and_extract"):
        getattr(downloads, name).return_value = epath.Path(folder)
    for answer in (downloads, mock.MagicMock()):  # builders ask for one path, or for several by name
        try:
            splits = builder._split_generators(answer)
        except TypeError:
            continue
        return set(splits) if isinstance(splits, dict) else {str(split.name) for split in splits}
    raise AssertionError(builder.name)


@pytest.mark.parametrize("name", of_tfds())
def test_the_splits_of_the_table_are_those_that_tfds_makes(name, tfds, tmp_path):
    row = DATA[name]
    known = split_names(tfds.builder(row.name, data_dir=tmp_path / "data"), tmp_path)
    used = {part.split("[")[0] for text in (row.train, row.test, *row.held) for part in text.split("+")}
    assert used <= known
    assert row.test not in row.train.split("+")
    if "test" in known and "inaturalist" not in name:  # whose test labels are not public
        assert row.test == "test"


def test_every_data_set_that_is_not_in_tfds_is_a_folder_beside_it(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/data")
    assert DATA.keys() - set(of_tfds()) == {"aircraft", "inaturalist2019"}
    config = recipe(FILE, "aircraft")
    assert (config.data.source, config.data.path, config.data.name) == ("folder", "/data/aircraft", "aircraft")
    assert recipe(FILE, "aircraft,dtd").data.path == ""


def test_the_sizes_and_metrics_are_those_of_the_papers_tables():
    def size(row, expression):
        counts = expected_sizes.SIZES[row.name.split(":")[0]]
        return sum(counts[split] for split in expression.split("+"))

    assert {name: (size(row, row.train), size(row, row.test)) for name, row in DATA.items()}.items() >= {
        "aircraft": (6667, 3333), "caltech101": (102 * 30, 6084), "cars": (8144, 8041), "dtd": (3760, 1880),
        "flowers": (2040, 6149), "food101": (101 * 750, 101 * 250), "pets": (3680, 3669), "sun397": (19850, 19850),
        "voc2007": (5011, 4952)}.items()
    assert {name for name, row in DATA.items() if row.metric == "mean_per_class"} == {
        "aircraft", "caltech101", "flowers", "pets"}
    assert {name for name, row in DATA.items() if row.metric == "map"} == {"voc2007"}
    assert len(DATA) == 16


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("more", ["", "linear", "held", "L,linear,held"])
def test_every_combination_of_arguments_is_a_valid_recipe(name, more):
    config = recipe(FILE, f"{name},{more}")
    validate(config)
    row = DATA[name]
    if "held" in more:
        assert (config.data.train_split, config.data.val_split, config.eval.test) == (*row.held, False)
    else:
        assert (config.data.train_split, config.data.val_split, config.data.eval_split) == (row.train, "", row.test)
    assert config.method.multi_label == (row.metric == "map")
    assert (config.model.width, config.optim.name) == (1024 if "L" in more else 768,
                                                       "lars" if "linear" in more else "adamw")


def test_arguments_mean_the_same_in_any_order():
    assert recipe(FILE, "linear,held,L,dtd").to_dict() == recipe(FILE, "dtd,L,linear,held").to_dict()
    assert recipe(FILE).to_dict() == recipe(FILE, "cifar10,finetune").to_dict()
    with pytest.raises(UserError, match=r"'cifar1O'.* 'cifar10'"):
        recipe(FILE, "cifar1O")


def test_a_recipe_has_the_values_of_its_size_and_warms_up_for_a_twentieth():
    config = recipe(FILE, "H,dtd")
    assert (config.optim.lr, config.optim.layer_decay, config.model.drop_path) == (1e-3, 0.75, 0.3)
    assert (config.optim.warmup, config.train.duration) == ("250 steps", "5000 steps")
    frozen = recipe(FILE, "H,inaturalist2019,linear")
    assert (frozen.optim.lr, frozen.optim.layer_decay, frozen.model.drop_path) == (0.1, 1.0, 0.0)
    assert (frozen.optim.warmup, frozen.train.duration) == ("5 epochs", "100 epochs")
