"""Weights of the Hugging Face hub: what is fetched, from where it is read, and what is said where it cannot be."""

import builtins
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from mae_jax.errors import UserError
from mae_jax.inference.encoder import open_encoder
from mae_jax.interop.hf import to_hf
from mae_jax.storage import hub, paths
from mae_jax.training import workdir
from tests.helpers.tiny import tiny_config, tiny_params
from tests.training.weights_of_others_test import check


class Missing(Exception):
    """The repository has no such file."""


class Unreached(Missing):
    """The hub cannot be reached, and the cache has no such file: a kind of the other, as in huggingface_hub."""


class Errors(SimpleNamespace):
    EntryNotFoundError, LocalEntryNotFoundError = Missing, Unreached
    RevisionNotFoundError = type("RevisionNotFoundError", (Exception,), {})
    GatedRepoError = type("GatedRepoError", (Exception,), {})
    RepositoryNotFoundError = type("RepositoryNotFoundError", (Exception,), {})
    HfHubHTTPError = type("HfHubHTTPError", (Exception,), {})


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub that serves the files of a folder; its attribute `asked` has what it was asked."""
    module = ModuleType("huggingface_hub")
    module.errors, module.asked, module.failing = Errors(), [], None
    module.folder = tmp_path / "snapshots" / "0123456789abcdef"
    module.folder.mkdir(parents=True)

    def hf_hub_download(repository, name, revision=None):
        module.asked.append((repository, name, revision))
        if module.failing:
            raise module.failing
        if not (module.folder / name).is_file():
            raise Missing(name)
        return str(module.folder / name)

    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    hub.fetched.cache_clear()
    yield module
    hub.fetched.cache_clear()


@pytest.fixture
def weights():
    """Random parameters of a tiny MAE, and their state dict of transformers."""
    params = tiny_params(tiny_config(), seed=3)
    return params, to_hf(params, (4, 4), (4, 4))


def test_weights_and_what_describes_them_are_fetched_once_and_read_and_nothing_else(served, weights):
    save_file(weights[1], served.folder / "model.safetensors")
    (served.folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "id2label": {"0": "ant"}}))
    (served.folder / "modeling.py").write_text("raise SystemExit")
    check("hf://some/model@v1.0", weights[0])
    assert workdir.classes_of("hf://some/model@v1.0") == ("ant",)
    assert served.asked == [("some/model", "model.safetensors", "v1.0"),
                            ("some/model", "config.json", "0123456789abcdef"),
                            ("some/model", "preprocessor_config.json", "0123456789abcdef")]


def test_an_encoder_of_the_hub_can_be_asked_about_images(served, weights):
    save_file(weights[1], served.folder / "model.safetensors")
    (served.folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "image_size": 16}))
    encoder = open_encoder("hf://some/model", batch_size=2)
    assert (encoder.source, encoder.image_size, encoder.config.model.heads) == ("hf://some/model", (16, 16), 2)
    assert np.isfinite(encoder(np.zeros((16, 16, 3), np.uint8))).all()


def test_all_parts_that_an_index_names_are_fetched(served, weights):
    names = sorted(weights[1])
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: weights[1][name] for name in inside}, served.folder / file)
    where = {name: file for file, inside in parts.items() for name in inside}
    (served.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check("hf://some/parts", weights[0])
    assert {name for _, name, _ in served.asked} >= set(parts)


@pytest.mark.parametrize(("failing", "line"), [
    (Unreached("no network"), "hub cannot be reached, .* none of its weights: no network"),
    (Errors.RepositoryNotFoundError(), "no such repository, or it is private"),
    (Errors.RevisionNotFoundError(), "no revision 'v2'"), (Errors.GatedRepoError(), "accept its terms"),
    (Errors.HfHubHTTPError("503\nbusy"), "cannot be fetched: 503 busy"),
    (Missing(), "holds none of model.safetensors")])
def test_what_cannot_be_fetched_is_one_line(served, failing, line):
    served.failing = failing
    with pytest.raises(UserError, match=line) as caught:
        paths.locate("hf://some/model@v2", "init_from")
    assert "\n" not in str(caught.value)


def test_what_is_in_the_cache_is_read_where_the_hub_cannot_be_reached(served, weights, caplog):
    save_file(weights[1], served.folder / "model.safetensors")
    download = served.hf_hub_download

    def offline(repository, name, revision=None):
        try:
            return download(repository, name, revision)
        except Missing as error:
            raise Unreached("no network") from error

    served.hf_hub_download = offline
    check("hf://some/model", weights[0])
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert "no config.json and no preprocessor_config.json" in said[0]


def test_a_part_that_neither_the_hub_nor_the_cache_gives_is_named(served):
    index = served.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a-1.safetensors"}}))

    def offline(repository, name, revision=None):
        if not (served.folder / name).is_file():
            raise Unreached("no network")
        return str(served.folder / name)

    served.hf_hub_download = offline
    with pytest.raises(UserError, match=r"cannot be reached, and the cache here lacks a-1.safetensors: no network"):
        paths.locate("hf://some/parts", "init_from")


def test_the_extra_is_named_where_huggingface_hub_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    hub.fetched.cache_clear()
    with pytest.raises(UserError, match=r"hf://a/b needs huggingface_hub; run: pip install 'mae_jax\[hub\]'"):
        workdir.config_of("hf://a/b")


@pytest.mark.parametrize("source", ["hf://model", "hf://a/b/c", "hf://a/../b", "hf://a/b@", "hf://a/..", "hf://"])
def test_what_names_no_repository_is_refused_with_what_is_expected(source):
    with pytest.raises(UserError, match="expected hf://owner/name"):
        paths.normalized(source, "init_from")


@pytest.mark.parametrize("flag", ["--workdir", "--to", "data.path"])
def test_other_flags_name_no_repository(flag):
    with pytest.raises(UserError, match="a folder is local or gs://"):
        paths.locate("hf://a/b", flag)


def test_a_config_that_names_a_repository_is_valid_without_a_look_at_the_hub(served):
    served.failing = AssertionError("it looked")
    assert tiny_config({"init_from": "hf://a/b@main"}).init_from == "hf://a/b@main"
    assert np.size(served.asked) == 0
