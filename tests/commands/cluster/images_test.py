"""From a MAE to clusters, a mixture of experts, and one encoder of it for a task; and what goes wrong on that way."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.commands.cluster import images
from mae_jax.commands.cluster.feature_store import Features
from mae_jax.commands.cluster.images import cluster
from mae_jax.commands.export.expert_path import count_cluster_votes, extract_expert
from mae_jax.commands.export.weights import export
from mae_jax.data.cluster_ids import Clusters
from mae_jax.data.sources import folder as sources_folder
from mae_jax.errors import UserError
from mae_jax.evals import expert_routing, frozen_encoder
from mae_jax.evals.expert_routing import information
from mae_jax.evals.frozen_encoder import frozen
from mae_jax.ops import spherical_kmeans
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import split_eval_params
from mae_jax.runtime import peers as runtime_peers
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop, run, workdir
from tests.faults.processes import free_port
from tests.helpers import records
from tests.helpers.devices import simulated
from tests.helpers.tiny import open_inputs, tiny_config, tiny_method

CROPS = {"data.source": "photo_crops", "data.train_split": "train[:400]", "train.duration": "2 steps",
         "eval.every": "2 steps", "checkpoint.every": "2 steps", "batch_size": 16, "eval.max_examples": 64,
         "model.pool": "mean", "optim.lr": 0.001}


def make_folder(folder, count, broken):
    """Writes images of noise, and files that are none."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draws.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{number:03d}.png")
    for number in range(broken):
        (folder / f"broken{number}.png").write_bytes(b"no image")


def of_folder(folder):
    """Returns the fields of a run on a folder of images, without an evaluation."""
    return {"data.source": "folder", "data.path": str(folder), "data.train_split": "train", "data.eval_split": "",
            "eval.every": ""}


def clustered(folder, to, clusters=8, **options):
    return cluster(str(folder), str(to), clusters, options.get("block", -1), 3.0, options.get("seed", 0),
                   options.get("data"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the workdirs mae and moce, and clusters of the first one's pictures."""
    folder = tmp_path_factory.mktemp("moce")
    assert loop.train(tiny_config(CROPS), str(folder / "mae")) == 0
    assert clustered(folder / "mae", folder / "clusters") == 0
    fields = CROPS | {"init_from": str(folder / "mae"), "method.clusters": str(folder / "clusters"),
                      "method.blocks": "all"}
    assert loop.train(tiny_config(fields, "moce"), str(folder / "moce")) == 0
    return folder


@pytest.mark.slow
def test_clusters_cover_all_pictures_and_are_of_nearly_one_size(made):
    found = Clusters.read(str(made / "clusters"))
    assert set(found.assigned) == {"train[:400]", "test"}
    assert [len(each) for each in found.assigned.values()] == [400, 1020]
    assert min(each.min() for each in found.assigned.values()) >= 0
    assert found.sizes.sum() == 400
    assert found.sizes.max() / found.sizes.min() <= 3
    np.testing.assert_array_equal(found.sizes, np.bincount(found.assigned["train[:400]"]))
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-5)
    assert found.meta["similarity"] >= 0.95 * found.meta["similarity_of_kmeans"]
    assert workdir.config_of(str(made / "clusters" / "encoder.safetensors")).model.width == 32


@pytest.mark.slow
def test_the_same_command_gives_the_same_clusters_and_goes_on_with_features(made, tmp_path):
    shutil.copytree(made / "clusters", tmp_path / "again")
    last = sorted((tmp_path / "again" / "features" / "1").glob("0*.npz"))[-1]
    before = last.read_bytes()
    with np.load(last) as columns:  # as if it had been stopped within a batch of that chunk
        np.savez(last.with_name(f"begun_{last.name}"), **{name: columns[name][:5] for name in columns.files})
    last.unlink()
    (tmp_path / "again" / "clusters.npz").unlink()
    kept = sorted((tmp_path / "again" / "features" / "0").glob("0*.npz"))[0].stat().st_mtime_ns
    assert clustered(made / "mae", tmp_path / "again") == 0
    assert last.read_bytes() == before
    assert not list(last.parent.glob("begun_*"))
    assert sorted((tmp_path / "again" / "features" / "0").glob("0*.npz"))[0].stat().st_mtime_ns == kept
    ours, theirs = (Clusters.read(str(folder / name)) for folder, name in ((tmp_path, "again"), (made, "clusters")))
    np.testing.assert_array_equal(ours.centroids, theirs.centroids)
    np.testing.assert_array_equal(ours.prices, theirs.prices)
    for other in ({"block": 0}, {"seed": 5}, {"clusters": 4}):
        with pytest.raises(UserError, match=f"other {next(iter(other))}"):
            clustered(made / "mae", tmp_path / "again", **other)
    (tmp_path / "again" / "clusters.npz").unlink()
    with pytest.raises(UserError, match="features, by their block"):
        clustered(made / "mae", tmp_path / "again", block=0)
    classes = tiny_config(CROPS | {"data.classes": "0-3", "data.train_split": "train"})
    with pytest.raises(UserError, match="features, by their data"):
        clustered(made / "mae", tmp_path / "again", data=classes)


@pytest.mark.slow
def test_clusters_that_are_there_stay_and_those_cut_off_are_made_again(made, tmp_path, capsys):
    shutil.copytree(made / "clusters", tmp_path / "again")
    file = tmp_path / "again" / "clusters.npz"
    before = file.stat().st_mtime_ns
    assert clustered(made / "mae", tmp_path / "again") == 0
    assert "there already; 8 clusters of" in capsys.readouterr().out
    assert file.stat().st_mtime_ns == before
    file.unlink()  # stopped before its last file: meta.json and the encoder are there
    assert clustered(made / "mae", tmp_path / "again") == 0
    for name in ("clusters.npz", "meta.json", "encoder.safetensors", "clusters.png"):
        assert (tmp_path / "again" / name).read_bytes() == (made / "clusters" / name).read_bytes(), name
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"clusters\.npz.* damaged"):
        clustered(made / "mae", tmp_path / "again")


@pytest.mark.slow
def test_the_picture_shows_the_members_nearest_to_each_centroid(made, monkeypatch):
    found = Clusters.read(str(made / "clusters"))
    config = frozen(workdir.read_config(made / "mae"), -1)
    folder = made / "clusters" / "features" / "0"
    features = Features(folder, json.loads((folder / "about.json").read_text()))
    monkeypatch.setattr(images, "tile", lambda rows, captions, title, names: (rows, names))
    rows, names = images.picture(found, config, features)
    assert names == [f"cluster {i}\n{size} images" for i, size in enumerate(found.sizes)]
    values, ids = (np.concatenate(part) for part in zip(*features.chunks(), strict=True))
    batches = list(images.pictures(frozen_encoder.Frozen(config, -1)).support())
    seen = {int(i): PatchGrid(4, 4, 4, 4).unpatchify(batch["patches"][k:k + 1], batch["order"][k:k + 1])[0]
            for batch in batches for k, i in enumerate(batch["id"]) if i >= 0}
    for number, row in enumerate(rows):
        own = np.flatnonzero(found.assigned["train[:400]"][ids] == number)
        similar = spherical_kmeans.unit(values[own] - found.mean) @ found.centroids[number]
        for picture, place in zip(row, own[np.argsort(-similar, kind="stable")], strict=False):
            np.testing.assert_array_equal(picture, seen[int(ids[place])])


def test_the_nearest_members_are_sought_in_all_chunks_or_in_the_first():
    draws = np.random.default_rng(0)
    values = draws.normal(size=(90, 5)).astype(np.float32)
    order = draws.permutation(90)

    class Chunks:
        def chunks(self):
            yield from ((values[part], part) for part in np.split(order, 3))

    centroids = spherical_kmeans.unit(draws.normal(size=(2, 5))).astype(np.float32)
    assigned = (values @ centroids.T).argmax(1)
    found = Clusters(centroids, None, np.zeros(5, np.float32), None, {"train": assigned})
    for most, seen in ((np.inf, order), (30, order[:30]), (31, order[:60])):
        for number, members in enumerate(images.nearest(found, Chunks(), "train", np.arange(2), most)):
            own = seen[assigned[seen] == number]
            similar = spherical_kmeans.unit(values[own]) @ centroids[number]
            np.testing.assert_array_equal(members, own[np.argsort(-similar, kind="stable")[:8]])


def test_the_picture_of_experts_seeks_further_than_the_first_batch(monkeypatch):
    config = tiny_config({"method.num_clusters": 4, "method.centroid_width": 12, "method.blocks": "1"}, "moce")
    monkeypatch.setattr(expert_routing, "routes", lambda *_: {1: np.array([0, 0, 2, 3])})
    monkeypatch.setattr(expert_routing, "tile", lambda rows, captions, title, names: (rows, names))
    extras = {"share": np.array([0.5, 0.25, 0.125, 0.125])}
    order = np.tile(np.arange(16), (8, 1))
    batches = [{"patches": np.full((8, 16, 48), shade, np.uint8), "order": order,
                "cluster": np.full(8, cluster), "valid": np.ones(8)} for shade, cluster in ((10, 0), (20, 1), (30, 2))]
    batches[2]["valid"][1:] = 0
    rows, names = expert_routing.picture(tiny_method(config), {}, extras, iter(batches))
    shades = [[int(picture[0, 0, 0]) for picture in row] for row in rows]
    assert shades == [[10] * 8 + [20] * 2, [255] * 10, [30] + [255] * 9, [255] * 10]
    assert names[0] == "block 1, expert 0\n2 of 4 clusters,\n75% of images"


@pytest.mark.slow
def test_records_that_readers_leave_out_have_clusters_like_all_others(made, tmp_path):
    records.write(tmp_path / "train-0.tfrecord", [records.record(i) for i in range(103)])  # the i-th of gray i
    data = {"data.source": "tfrecord", "data.path": str(tmp_path / "{split}-*.tfrecord"), "data.train_split": "train",
            "data.eval_split": "", "eval.every": "", "data.readers": 8, "data.shuffle_mb": 1}
    assert clustered(made / "mae", tmp_path / "clusters", data=tiny_config(CROPS | data)) == 0
    config = tiny_config(CROPS | data | {"method.clusters": str(tmp_path / "clusters")}, "moce")
    inputs = open_inputs(config)
    assert inputs.num_train == 96
    assigned = Clusters.read(str(tmp_path / "clusters")).assigned["train"]
    assert (len(assigned), assigned.min()) == (103, 0)
    for batch in itertools.islice(inputs.train(0), 7):
        gray = np.rint(batch["patches"].reshape(16, -1).mean(1)).astype(int)
        np.testing.assert_array_equal(batch["cluster"], assigned[gray])


@pytest.mark.slow
def test_pictures_that_changed_their_places_are_refused(tmp_path):
    make_folder(tmp_path / "in", count=40, broken=0)
    data = of_folder(tmp_path / "in")
    assert loop.train(tiny_config(CROPS | data), str(tmp_path / "mae")) == 0
    assert clustered(tmp_path / "mae", tmp_path / "clusters", clusters=4) == 0
    (tmp_path / "in" / "000.png").rename(tmp_path / "in" / "zzz.png")
    sources_folder.folder_listing.files.cache_clear()
    fields = CROPS | data | {"init_from": str(tmp_path / "mae"), "method.clusters": str(tmp_path / "clusters")}
    with pytest.raises(UserError, match="other examples of 'train'"):
        loop.train(tiny_config(fields, "moce"), str(tmp_path / "moce"))
    with pytest.raises(UserError, match="other examples"):
        clustered(tmp_path / "mae", tmp_path / "clusters", clusters=4)


@pytest.mark.slow
def test_pictures_that_are_all_alike_give_no_clusters(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(40):
        Image.new("RGB", (20, 20), "red").save(tmp_path / "in" / f"{number:03d}.png")
    data = of_folder(tmp_path / "in")
    assert loop.train(tiny_config(CROPS | data), str(tmp_path / "mae")) == 0
    with pytest.raises(UserError, match=r"--ratio=3 .* 4 clusters"):
        clustered(tmp_path / "mae", tmp_path / "clusters", clusters=4)
    assert not (tmp_path / "clusters" / "clusters.npz").exists()


@pytest.mark.slow
def test_a_mixture_reads_no_clusters_but_its_own(made, tmp_path):
    assert clustered(made / "mae", tmp_path / "others", seed=5) == 0
    shutil.copytree(made / "moce", tmp_path / "moce")
    config = workdir.read_config(tmp_path / "moce").copy_and_resolve_references().unlock()
    config.method.clusters = str(tmp_path / "others")
    config.train.duration = "3 steps"
    with pytest.raises(UserError, match=r"clusters=.*mixture"):
        loop.train(config.lock(), str(tmp_path / "moce"))
    shutil.copytree(made / "clusters", tmp_path / "moved")
    config.unlock().method.clusters = str(tmp_path / "moved")
    assert loop.train(config.lock(), str(tmp_path / "moce")) == 0


@pytest.mark.slow
def test_pictures_that_cannot_be_read_count_for_their_own_cluster_alone(tmp_path):
    make_folder(tmp_path / "in", count=40, broken=3)
    data = of_folder(tmp_path / "in")
    assert loop.train(tiny_config(CROPS | data), str(tmp_path / "mae")) == 0
    assert clustered(tmp_path / "mae", tmp_path / "clusters", clusters=4) == 0
    found = Clusters.read(str(tmp_path / "clusters"))
    assert (len(found.assigned["train"]), found.sizes.sum()) == (43, 40)
    assert found.assigned["train"].min() >= 0
    broken = tiny_config(CROPS | data | {"data.path": str(tmp_path / "junk")})
    make_folder(tmp_path / "junk", count=0, broken=4)
    with pytest.raises(UserError, match=r"no image of data.source='folder' .*junk"):
        count_cluster_votes(found, tmp_path / "clusters", broken)


@pytest.mark.slow
def test_features_are_read_in_chunks_that_hold_every_picture_once(made):
    about = json.loads((made / "clusters" / "features" / "1" / "about.json").read_text())
    features = Features(made / "clusters" / "features" / "1", about)
    ids = np.concatenate([ids for _, ids in features.chunks()])
    assert sorted(ids) == list(range(1020))
    mean = features.mean()
    points = np.concatenate(list(features.points(mean)))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-5)
    sample = features.sample(100, mean, np.random.default_rng(0))
    assert len(np.unique(sample, axis=0)) == 100
    assert np.isin(sample[:, 0], points[:, 0]).all()
    assert not np.array_equal(np.sort(sample[:, 0]), np.sort(points[:100, 0]))  # of all chunks, not the first ones
    assert spherical_kmeans.CHUNK % 16 == 0


@pytest.mark.slow
def test_a_mixture_reports_who_sees_what(made):
    rows = [json.loads(line) for line in (made / "moce" / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for row in rows for name, value in row.items()}
    for block in ("block_00", "block_01"):
        assert sum(last[f"eval/share/{block}/{i}"] for i in range(4)) == pytest.approx(1)
        assert sum(last[f"eval/clusters/{block}/{i}"] for i in range(4)) == 8
        assert 0 <= last[f"eval/label_information/{block}"] <= 1
    assert {"eval/gate_cv", "eval/gate_confidence", "eval/balance_loss", "train/confidence_loss"} <= last.keys()
    assert {path.name.split("_")[0] for path in (made / "moce" / "pictures").iterdir()} == {
        "attention", "curves", "experts", "inputs", "ratios", "reconstruct"}


def test_information_is_all_where_the_choice_is_the_label_and_nothing_where_it_is_not():
    label = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    assert information(label, label) == pytest.approx(1)
    assert information(np.repeat([0, 1, 2], 3), label) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_processes_that_see_other_encoders_or_pictures_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_peers, "broadcast", lambda value: {**value, "encoder": "another"})
    with pytest.raises(UserError, match=r"processes .*encoder or images"):
        clustered(made / "mae", tmp_path / "clusters")


@pytest.mark.processes
def test_processes_cluster_as_one_does_with_as_many_devices(made, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "mae_jax", "cluster", f"--from={made / 'mae'}", "--clusters=8"]
    peers = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    started = [subprocess.Popen([*command, *more], env=simulated(devices), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for devices, more in (
        (1, [f"--to={tmp_path / 'two'}", *peers, "--process=0"]),
        (1, [f"--to={tmp_path / 'two'}", *peers, "--process=1"]),
        (2, [f"--to={tmp_path / 'one'}", "--coordinator=off"]))]
    said = [each.communicate(timeout=200)[0] for each in started]
    assert [each.returncode for each in started] == [0, 0, 0], "\n".join(said)
    two, one = (Clusters.read(str(tmp_path / name)) for name in ("two", "one"))
    np.testing.assert_array_equal(two.centroids, one.centroids)
    for split, assigned in one.assigned.items():
        np.testing.assert_array_equal(two.assigned[split], assigned)
    assert (tmp_path / "two" / "clusters.png").read_bytes() == (tmp_path / "one" / "clusters.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vote", "probe", "random"])
def test_a_task_gets_an_ordinary_encoder_that_trains_on(made, tmp_path, how):
    folder = made / "moce"
    params, extras = split_eval_params(load_params(folder, extras=True))
    task = tiny_config(CROPS | {"data.train_split": "train[400:600]"})
    tree, config, report = extract_expert(workdir.read_config(folder), params, extras, task, how)
    shares = [float(line.split(": ")[1].split("%")[0]) for line in report if line.endswith("of the task's images")]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert shares == sorted(shares, reverse=True)
    taken = report[-1].removeprefix("taken: path ")
    if how == "vote":
        assert report[0].startswith(f"path {taken}: ")
        path = tuple(map(int, taken.split("-")))
        for block, expert in enumerate(path):
            np.testing.assert_array_equal(tree["encoder"][f"block_{block:02d}"]["mlp"]["fc1"]["kernel"],
                                          params["encoder"][f"block_{block:02d}"]["experts"]["fc1"]["kernel"][expert])
    assert any("linear probe" in line for line in report) == (how == "probe")
    assert config.method.name == "mae"
    file = tmp_path / "task.safetensors"
    export(str(folder), str(file), "mae_jax", task, how)
    fields = CROPS | {"init_from": str(file), "model.positions": "learned", "method.classes": 0}
    assert loop.train(tiny_config(fields, "supervised"), str(tmp_path / "tuned")) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "text"), [
    ({"data.train_split": "train[:401]"}, r"split 'train\[:401\]'"),
    ({"data.source": "folder"}, "data.source='photo_crops'"),
    ({"method.clusters": "nowhere"}, "method.clusters='nowhere' .*clusters.npz"),
    ({"model.width": 48, "model.heads": 3}, "init_from")])
def test_clusters_of_other_data_are_refused(made, tmp_path, fields, text):
    if fields.get("data.source") == "folder":
        make_folder(tmp_path / "pictures", count=400, broken=0)
        fields = fields | {"data.path": str(tmp_path / "pictures"), "data.train_split": "train"}
    config = tiny_config(CROPS | {"init_from": str(made / "mae"), "method.clusters": str(made / "clusters")} | fields,
                         "moce")
    with pytest.raises(UserError, match=text):
        loop.train(config, str(tmp_path / "run"))


@pytest.mark.slow
def test_what_cannot_be_clustered_or_cut_is_refused(made, tmp_path):
    with pytest.raises(UserError, match=r"--clusters=201 of 400 .*200"):
        clustered(made / "mae", tmp_path / "many", clusters=201)
    with pytest.raises(UserError, match=r"--block=2; .*0 to 1"):
        clustered(made / "mae", tmp_path / "deep", block=2)
    with pytest.raises(UserError, match="is a mixture of experts"):
        clustered(made / "moce", tmp_path / "again")
    with pytest.raises(UserError, match=r"--for-task .*method.name=moce"):
        export(str(made / "mae"), str(tmp_path / "x.safetensors"), "mae_jax", tiny_config(CROPS), "vote")
    with pytest.raises(UserError, match=r"--for-task .*task's data"):
        export(str(made / "moce"), str(tmp_path / "x.safetensors"), "mae_jax", None, "vote")
    with pytest.raises(UserError, match=r"mixture of experts, .*layout"):
        export(str(made / "moce"), str(tmp_path / "x.safetensors"), "timm")
    with pytest.raises(UserError, match=r"--clusters is read with --for-task only"):
        export(str(made / "moce"), str(tmp_path / "x.safetensors"), "mae_jax", clusters=str(made / "clusters"))
    with pytest.raises(UserError, match=r"no single encoder.*--for-task"):
        run.prepare(workdir.read_config(made / "moce"), tmp_path, for_training=False)
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "clusters", damaged)
    (damaged / "clusters.npz").write_bytes((damaged / "clusters.npz").read_bytes()[:200])
    with pytest.raises(UserError, match="is damaged"):
        Clusters.read(str(damaged))
