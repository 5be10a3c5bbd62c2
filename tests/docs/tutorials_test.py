"""The commands of the tutorials and of docs/extending.md and export.md, as printed, with overrides for a small size."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path for path in [*(ROOT / "docs/tutorials").glob("*.md"), ROOT / "docs/extending.md",
                                   ROOT / "docs/export.md"]}
NOT_RUN = "# not run by a test: "
# What the shell finds by these names: this Python, this checkout, and each verb with what is appended to it.
SHELL = r"""
python() { "$PYTHON" "$@"; }
mae_jax() {
    local small="SMALL_$1"
    eval "set -- \"\$@\" ${!small-}"
    PYTHONPATH="${PYTHONPATH-}:$ROOT" "$PYTHON" -m mae_jax "$@"
}
"""
TRAIN = ("--config.train.duration='2 steps' --config.optim.warmup='0 steps' --config.checkpoint.every='2 steps' "
         "--config.eval.every='2 steps' --config.eval.max_examples=16 --config.log.every='1 steps' "
         "--config.batch_size=8")
TINY = f"{TRAIN} --config.model.depth=2 --config.model.width=48 --config.model.heads=3"
SMALL = {  # page → verb → what is appended
    "unlabelled_folder": {"train": f"{TINY} --config.method.decoder_depth=1", "report": "--tsne_images=0"},
    "few_labels": {"train": TINY},
    "public_weights": {"train": TRAIN, "report": "--tsne_images=0"},
    "coco_like": {"train": TRAIN},
    "rent": {"plan": "--config.model.depth=2 --config.model.width=48 --config.model.heads=3 --config.batch_size=16 "
                     "--config.data.image_size='(32, 32)' --config.method.decoder_depth=1 --cache=''"},
    "extending": {},
    "export": {"train": TINY},
}
BEFORE = {  # page → the page whose runs it goes on with, and a command for what its reader has
    "few_labels": ("unlabelled_folder", ""),
    "public_weights": ("", "mae_jax train --config=quickstart:runlocal --config.data.image_size='(64, 64)' "
                           "--config.model.patch='(16, 16)' --workdir=runs/other\n"
                           "mae_jax export --from=runs/other --layout=hf --to=vit-mae-base"),
}
LEFT = {  # page → files that it speaks of
    "unlabelled_folder": ("grid.png", "runs/mine/DONE", "runs/mine/pictures/reconstruct_0000002.png", "report.html",
                          "features.parquet", "exports/mine/README.md"),
    "few_labels": ("labelled.png", "runs/quick/results.md", "runs/classifier/pictures/confusion_0000002.png",
                   "runs/scratch/DONE", "predictions.csv"),
    "public_weights": ("public.parquet", "public.html", "runs/quick_public/results.md", "exports/public/README.md"),
    "coco_like": ("objects.png", "runs/detector/pictures/detection_0000002.png", "found/detections.json"),
    "rent": ("runs/try/DONE",),
    "extending": ("discs.png", "runs/discs/DONE"),
    "export": ("exports/hf/preprocessor_config.json", "exports/timm/config.json", "exports/quickstart.pth",
               "exports/program/encoder.stablehlo", "exports/copy/config.json"),
}
SAID = {  # page → what its commands print, as a regular expression
    "unlabelled_folder": r"\w+\.png is most like \w+\.png",
    "few_labels": r"eval/top1",
    "public_weights": r"eval/top1",
    "coco_like": r"eval/box_ap",
    "rent": r"fits; .* (hours|seconds)",
    "extending": r"eval/feature_length",
    "export": r"\(5, 48\)",
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns (language, text) of what is run, in its order."""
    found = re.findall(r"^```(sh|python)\n(.*?)^```", PAGES[page].read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if not block[1].startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Returns a function that follows a page once: page → the folder, which all share, and the output."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "docs").symlink_to(ROOT / "docs")

    def bash(text: str, page: str) -> str:
        small = {f"SMALL_{verb}": added for verb, added in SMALL[page].items()}
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
        variables |= {"PYTHON": sys.executable, "ROOT": str(ROOT), "JAX_PLATFORMS": "cpu"} | small
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", SHELL + text], cwd=folder, capture_output=True,
                              text=True, timeout=900, env=variables)
        assert done.returncode == 0, text + done.stdout + done.stderr
        return done.stdout + done.stderr

    @functools.cache
    def follow(page: str) -> tuple[Path, str]:
        before, command = BEFORE.get(page, ("", ""))
        if before:
            follow(before)
        said, exported = bash(command, page), ""
        for language, text in blocks(page):
            file = re.match(r'"""([\w/]+\.py):', text)
            if file:
                (folder / file[1]).write_text(text)
            elif language == "python":
                (folder / "example.py").write_text(text)
                said += bash("python example.py", page)
            else:
                exported += "".join(re.findall(r"^export .*\n", text, re.MULTILINE))
                said += bash(exported + text, page)
        return folder, said

    return follow


def test_each_page_is_followed_by_a_test():
    assert set(PAGES) == set(SMALL) == set(LEFT) == set(SAID)
    assert all(blocks(page) for page in PAGES)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed_as_it_is_printed(read, page):
    folder, said = read(page)
    assert [name for name in LEFT[page] if not (folder / name).exists()] == []
    assert re.search(SAID[page], said), said
