"""Plans the MAE paper's Table 2: hours of 800 epochs on 128 TPU-v3 cores at batch 4096, without a TPU.

  python studies/paper_table2/study.py               (six compilations, minutes each; resumes after an interruption)
  python studies/paper_table2/study.py --extra       (memory of ViT-H/14 and a 2B ViT, sharded over all cores)
  python studies/paper_table2/study.py --only=L-dec1 (some cells)

Each cell is one `python -m mae_jax plan`. Its figures are kept in studies/paper_table2/results.json (--to=), from which
the table in results.md is made; delete the file to plan anew. The estimates assume full speed, while the paper's
hours were measured (with TensorFlow): only ratios are comparable.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results.json"
WITH_MASKS = ("--config.method.encoder_mask_tokens",)
ONE_BLOCK = ("--config.method.decoder_depth=1",)
CUT = ("--config.mesh.fsdp=128", "--config.model.scan", "--config.model.remat=full")


class Cell(NamedTuple):
    """One row of the paper's Table 2: the recipe, overrides of it, and what the paper measured."""

    name: str
    title: str
    recipe: str
    overrides: tuple[str, ...]
    paper_hours: float | None = None
    paper_speedup: str = ""


CELLS = (
    Cell("L-masks-dec8", "ViT-L, mask tokens in the encoder, decoder of 8", "vit_l_mae", WITH_MASKS, 42.4),
    Cell("L-dec8", "ViT-L, decoder of 8", "vit_l_mae", (), 15.4, "2.8x"),
    Cell("L-dec1", "ViT-L, decoder of 1", "vit_l_mae", ONE_BLOCK, 11.6, "3.7x"),
    # the paper estimates this one from 10 epochs
    Cell("H-masks-dec8", "ViT-H, mask tokens in the encoder, decoder of 8", "vit_h_mae", WITH_MASKS, 119.6),
    Cell("H-dec8", "ViT-H, decoder of 8", "vit_h_mae", (), 34.5, "3.5x"),
    Cell("H-dec1", "ViT-H, decoder of 1", "vit_h_mae", ONE_BLOCK, 29.3, "4.1x"),
)
EXTRA = (
    Cell("H-fsdp", "ViT-H/14", "vit_h_mae", CUT),
    Cell("2B-fsdp", "ViT/14, width 1792, depth 52", "vit_h_mae",
         (*CUT, "--config.model.width=1792", "--config.model.depth=52")),
)


def plan(cell: Cell, more: list[str]) -> dict[str, Any]:
    """Returns the planner's figures of a cell; where its step does not fit, with every layer computed twice."""
    found: dict[str, Any] = {}
    for remat in ("none", "full"):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            subprocess.run([sys.executable, "-m", "mae_jax", "plan", f"--config=configs/{cell.recipe}.py",
                            "--topology=v3:8x8", f"--config.model.remat={remat}", *cell.overrides, *more,
                            f"--json={file.name}"], check=True)
            found = json.loads(Path(file.name).read_text())
        if found["fits"]:
            break
    return found


def table(cells: dict[str, Any]) -> str:
    """Returns the Markdown tables of the cells that were planned."""
    lines = ["| v3:8x8, batch 4096, 800 epochs | GiB of 16 per core | remat | step, s | estimated hours | "
             "paper's hours | estimated speed-up | paper's speed-up |", "|---|---|---|---|---|---|---|---|"]
    for cell in CELLS:
        if cell.name in cells:
            f, base = cells[cell.name], cells.get(f"{cell.name[0]}-masks-dec8", {}).get("hours")
            speedup = f"{base / f['hours']:.1f}x" if base and f["hours"] and cell.paper_speedup else ""
            hours = f"{f['hours']:.1f}" if f["hours"] else f"none: {f['no_time_because']}"
            step = f"{f['estimated_step_seconds']:.4f}" if f["hours"] else ""
            lines.append(f"| {cell.title} | {_memory(f)} | {f['config']['model.remat']} | {step} | {hours} | "
                         f"{cell.paper_hours} | {speedup} | {cell.paper_speedup} |")
    extra = [cell for cell in EXTRA if cell.name in cells]
    if extra:
        lines += ["", "| cut over 128 cores (`mesh.fsdp=128`, `model.scan`, `model.remat=full`) | parameters | "
                  "GiB of 16 per core | fits |", "|---|---|---|---|"]
        lines += [f"| {cell.title} | {f['parameters']:,} | {_memory(f)} | {'yes' if f['fits'] else 'no'} |"
                  for cell in extra for f in [cells[cell.name]]]
    return "\n".join(lines) + "\n"


def _memory(figures: dict[str, Any]) -> str:
    return f"{figures['hbm_gib_per_core']:.2f}" if figures["hbm_gib_per_core"] else "more"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="store_true", help="plan the two large models as well")
    parser.add_argument("--only", default="", help="names of cells, comma-separated")
    parser.add_argument("--to", type=Path, default=RESULTS, help="file of the figures; the table is written beside it")
    options, more = parser.parse_known_args()
    known = {cell.name: cell for cell in CELLS + EXTRA}
    names = options.only.split(",") if options.only else [
        cell.name for cell in CELLS + (EXTRA if options.extra else ())]
    if unknown := set(names) - known.keys():
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    cells = json.loads(options.to.read_text()) if options.to.exists() else {}
    for name in names:
        if name not in cells:
            print(f"== {known[name].title}", flush=True)
            cells[name] = plan(known[name], more)
            options.to.write_text(json.dumps(cells, indent=2) + "\n")
    options.to.with_suffix(".md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
