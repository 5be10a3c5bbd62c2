"""What config.json says of the packages that a run was made with."""

import importlib.metadata

from mae_jax.training import workdir


def test_the_version_of_a_package_is_that_of_whatever_name_it_is_distributed_under(monkeypatch):
    there = {"tensorflow-cpu": "2.21.0", "pillow-simd": "9.5", "jax": "0.10.2"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(workdir.importlib.metadata, "version", version)
    found = workdir.versions()
    assert (found["tensorflow"], found["pillow"], found["jax"], found["flax"]) == ("2.21.0", "9.5", "0.10.2", None)
    assert list(found) == list(workdir.PACKAGES)
