"""The page of a report: what it says of runs, that nothing in a name is code, and what is refused."""

import base64
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.commands.report import curves, figures, record, writing
from mae_jax.errors import UserError
from mae_jax.training import workdir
from mae_jax.training.curves import COLORS, MAX_POINTS, panels, thinned
from tests.helpers.html_page import Page
from tests.helpers.stored import store_features, store_images
from tests.helpers.tiny import tiny_config

HOSTILE = "</script><img src=x onerror=alert(1)>.png"  # the folder < and a file in it


def store(folder, fields=None, figures=(), lines=None, done=0):
    """Writes a workdir with figures of 40 steps, and without a checkpoint."""
    workdir.record(epath.Path(folder), tiny_config(fields or {}))
    lines = [{"step": k, "time": 1.8e9 + k, "train/loss": 1 / (k + 1), "train/lr": 1e-3 * k, "train/replaced": k % 2,
              "train/images_per_sec": None if k == 0 else 100.0} for k in range(40)] if lines is None else lines
    lines += [{"step": 39, "eval/loss": 0.5, "eval/knn/top1": 0.25}] * bool(lines)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pictures").mkdir()
    for name in figures:
        Image.new("RGB", (30, 20), "red").save(folder / "pictures" / f"{name}.png")
    if done:
        (folder / "DONE").write_text(str(done))
    return folder


def write(to, *folders, embeddings="", images="", most=1000, tsne=0):
    code = writing.write([str(each) for each in folders], str(to), str(embeddings), str(images), None, most, tsne)
    assert code == 0
    return Page(to.read_text())


def check_whole(page):
    """The page is one file: two scripts at most, and every address is in it."""
    kinds = [attributes.get("type", "code") for attributes, _ in page.scripts]
    assert sorted(kinds) in (["code"], ["application/json", "code"])
    assert all(value.startswith(("#", "data:")) for name in ("src", "href", "xlink:href")
               for value in page.attributes(name))
    assert "default-src 'none'" in page.attributes("content")[0]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_a_run_is_shown_with_its_fields_figures_and_curves(tmp_path):
    drawn = [f"reconstruct_{k:07d}" for k in range(20)] + ["attention_0000003"]
    store(tmp_path / "run", {"optim.lr": 0.25}, drawn, done=40)
    page = write(tmp_path / "r.html", tmp_path / "run")
    check_whole(page)
    assert "finished at step 40" in page.text
    assert "optim.lr 0.25" in page.text
    assert "6.250% of the images to train on could not be read" in page.text  # one of 8 at each second step
    assert "1 x cpu" in page.text.lower() or "8 x cpu" in page.text.lower()
    assert "encoder/block_* " in page.text
    steps = [int(value) for value in page.attributes("data-step")]
    assert steps == [0, 2, 5, 8, 10, 13, 16, 19, 3]
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # loss, lr, replaced: of one value there is no curve


def test_runs_are_beside_each_other_and_told_apart(tmp_path):
    for name, rate in (("one", 0.5), ("two", 0.25)):
        store(tmp_path / name / "run", {"optim.lr": rate, "model.depth": 3})
    page = write(tmp_path / "r.html", tmp_path / "one" / "run", tmp_path / "two" / "run")
    check_whole(page)
    assert "one/run" in page.text
    assert "two/run" in page.text
    assert "optim.lr 0.5 0.25" in page.text
    assert page.attributes("class").count("differs") == 1
    loss = curves.svg(panels([record.read(str(tmp_path / name / "run"), name).series for name in ("one", "two")])[0])
    assert all(color in loss for color in COLORS[:2])
    assert curves.INK not in loss


@pytest.mark.parametrize(("lines", "said"), [
    ([], "no figures yet"),
    ([{"step": 3, "time": 1.8e9, "train/loss": None}], "train/loss was not finite at 1 logged")])
def test_a_run_that_has_just_begun_or_failed_has_a_page(tmp_path, lines, said):
    store(tmp_path / "run", lines=lines)
    (tmp_path / "run" / "guard_7.json").write_text("{}")
    (tmp_path / "run" / "pictures" / "reconstruct_0000001.png").write_bytes(b"torn")
    page = write(tmp_path / "r.html", tmp_path / "run")
    assert said in page.text
    assert "a guard stopped it at step 7" in page.text
    assert "reconstruct_0000001.png cannot be read" in page.text


def test_a_run_in_a_bucket_has_a_page_there(tmp_path, gcs):
    store(tmp_path / "run", figures=["reconstruct_0000001"])
    for file in ("config.json", "metrics.jsonl", "pictures/reconstruct_0000001.png"):
        epath.Path(f"gs://bucket/reported/{file}").write_bytes((tmp_path / "run" / file).read_bytes())
    assert writing.write(["gs://bucket/reported"], "gs://bucket/r.html", "", "", None, 10, 0) == 0
    page = Page(epath.Path("gs://bucket/r.html").read_text())
    assert "its last figures are of step 39" in page.text
    assert page.attributes("data-step") == ["1"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder whose labels and names are code, and features of it."""
    folder = tmp_path_factory.mktemp("hostile")
    store_images(folder / "images", ("<", "<!--<script>", "a\u2028b"), count=4)
    Image.new("RGB", (20, 20), "blue").save(folder / "images" / HOSTILE)
    return folder, store_features(folder / "f.parquet", folder / "images")


def test_no_name_is_code(hostile, tmp_path):
    page = write(tmp_path / "r.html", embeddings=hostile[1])
    check_whole(page)
    found = page.data()
    assert HOSTILE in found["files"]
    assert found["labels"] == ["<", "<!--<script>", "a\u2028b"]
    raw = next(content for attributes, content in page.scripts if attributes.get("id") == "map-data")
    assert not set("<>&\u2028\u2029") & set(raw)
    assert "<img src=x" not in (tmp_path / "r.html").read_text()
    store(tmp_path / "<img src=x onerror=alert(2)>", {"data.path": "<script>alert(3)</script>"})
    page = write(tmp_path / "s.html", tmp_path / "<img src=x onerror=alert(2)>")
    check_whole(page)
    assert "<img src=x onerror=alert(2)>" in page.text  # as text


def test_the_sizes_of_the_page_are_bounded(tmp_path, monkeypatch):
    points = [(k, float(k == 50_001)) for k in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS
    assert (50_001, 1.0) in kept
    store_images(tmp_path / "images", count=30)
    features = store_features(tmp_path / "f.parquet", tmp_path / "images")
    page = write(tmp_path / "r.html", embeddings=features, most=12, tsne=10)
    found = page.data()
    assert len(found["files"]) == 12
    assert "12 of 90 images, evenly spread" in page.text
    assert "t-SNE is of 10 of these images" in page.text
    some = np.frombuffer(base64.b64decode(found["projections"][1]["of"]), "<u4")
    assert some.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    monkeypatch.setattr(figures, "RUN_BYTES", 150)
    store(tmp_path / "run", figures=[f"reconstruct_{k:07d}" for k in range(4)])
    page = write(tmp_path / "s.html", tmp_path / "run")
    assert 0 < len(page.attributes("data-step")) < 4
    assert "is left out" in page.text


def store_weights(folder):
    """Writes what transformers has in a folder, as far as a page looks at it."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"arrays")
    (folder / "config.json").write_text('{"hidden_size": 48}')


def test_of_weights_that_made_the_features_the_map_alone_is_shown(tmp_path):
    features = store_features(tmp_path / "f.parquet", store_images(tmp_path / "images"))
    store_weights(tmp_path / "hub")
    page = write(tmp_path / "r.html", tmp_path / "hub", embeddings=features)
    check_whole(page)
    assert len(page.scripts) == 2
    assert "finished" not in page.text


@pytest.mark.parametrize(("flags", "said"), [
    ({"folders": ["nowhere"]}, "not a workdir"), ({"to": "r.pdf"}, ".html"),
    ({"folders": []}, "--from or --embeddings"),
    ({"folders": ["{run}", "{run}"]}, "a run twice"), ({"embeddings": "none.parquet"}, "none.parquet"),
    ({"embeddings": "{run}/metrics.jsonl"}, "metrics.jsonl"), ({"images": "a", "embeddings": "b"},
                                                                      "give either --embeddings"),
    ({"folders": ["{run}", "b"], "images": "a"}, "one --from, not 2"),
    ({"folders": ["{run}/hub"]}, "run/hub is a file of weights, not a run")])
def test_a_mistake_is_one_line(tmp_path, flags, said):
    store_weights(store(tmp_path / "run") / "hub")
    given = {"folders": ["{run}"], "to": "r.html", "embeddings": "", "images": "", "config": None, "most": 10,
             "tsne_most": 0} | flags
    given["folders"] = [each.format(run=tmp_path / "run") for each in given["folders"]]
    given["embeddings"] = given["embeddings"].format(run=tmp_path / "run")
    given["to"] = str(tmp_path / given["to"])
    with pytest.raises(UserError, match=said) as caught:
        writing.write(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r.html").exists()
