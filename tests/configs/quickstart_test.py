"""The quickstart, and the recipes that go on from it."""

from pathlib import Path

import pytest

from tests.config.config_test import recipe


@pytest.mark.parametrize(("name", "argument"), [("quickstart_finetune", ""), ("moce", "quickstart")])
def test_what_goes_on_from_the_quickstart_has_its_images_and_its_encoder(name, argument):
    one, other = recipe(Path("configs/quickstart.py")), recipe(Path(f"configs/{name}.py"), argument)
    for group, fields in (("data", ("source", "image_size", "augment")),
                          ("model", ("width", "depth", "heads", "patch", "pool"))):
        for field in fields:
            assert other[group][field] == one[group][field], field
