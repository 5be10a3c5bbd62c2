r"""Fine-tunes or probes one encoder on many data sets, one after the other: one table, one plot.

  python -m mae_jax.transfer --config=configs/transfer.py --names=cifar10,dtd,pets --from=runs/pretrained --to=runs/suite
  python -m mae_jax.transfer --config=configs/transfer.py:L --names=cars --protocols=finetune,linear,quick \
      --from=vit_l.safetensors --to=runs/cars --config.train.duration='10000 steps'
  python -m mae_jax.transfer --config=configs/transfer.py --names=cifar10 --blocks=0,0.5,1,2,4,all --from=... --to=...
  python -m mae_jax.transfer --config=configs/quickstart.py --protocols=quick --from=runs/quickstart --to=runs/quick

A cell is a data set, a protocol and a number of blocks; it is trained in its own workdir TO/<cell> as by mae_jax.main,
from the encoder of --from, whose shape it takes. The protocol `quick` does not train: it looks at the encoder as
--mode=eval does, with k-NN and a linear probe. Give --config the size in its argument where its recipe depends on it
(configs/transfer.py:L). Any recipe will do: --names and --protocols, but for `quick`, are arguments that it knows;
without them it is run as it is. What a recipe's own `metric(argument)` names is reported, else top1 or map.

The same command goes on, and does not repeat what is finished. A cell that is your mistake (data that are not prepared)
is named in the table, and the others go on. Exit codes: as mae_jax.main; 2 where any cell was a mistake, 3 where a guard
stopped one and none was a mistake.

--lrs=1e-4,3e-4,1e-3 first trains every cell once for each, in TO/<cell>/lr_<x>, and chooses by the recipe's
data.val_split, or where it has none with the argument `held`; the test data are read by the chosen one alone, which is
trained anew by the recipe.
"""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mae_jax import cli
from mae_jax.errors import GuardError, UserError

CONFIG = cli.define_config()
FROM = flags.DEFINE_string("from", "", "the encoder: a workdir, one step's folder in it, or an exported *.safetensors")
TO = flags.DEFINE_string("to", "", "folder of the cells and of results.json, results.md and transfer.png")
NAMES = flags.DEFINE_list("names", [], "data sets, as arguments of the recipe: cifar10,dtd")
PROTOCOLS = flags.DEFINE_list("protocols", [], "arguments of the recipe: finetune,linear; quick: no training")
BLOCKS = flags.DEFINE_list("blocks", [], "how many of the last blocks to fine-tune: 0,0.5,1,2,4,all")
LRS = flags.DEFINE_list("lrs", [], "learning rates (optim.lr) to choose from on a part of the training data")

QUICK = "quick"
QUICK_METRICS = ("linear/top1", "knn/top1")
SHAPE = ("width", "depth", "heads", "patch", "mlp_ratio", "gelu", "positions", "layer_scale")  # what parameters fit
DATA_GROUPS = ("data", "eval", "mesh", "log")  # of the recipe, when the encoder is looked at without training
ALL = "all"


class Cell(NamedTuple):
    """One training or probe of the table."""

    data: str
    protocol: str = ""  # '' is the recipe as it stands
    blocks: str = ""  # '' is what the recipe says

    @property
    def folder(self) -> str:
        return "_".join(filter(None, (self.data, self.protocol, self.blocks and f"blocks_{self.blocks}")))


class Row(NamedTuple):
    """One line of the table."""

    cell: Cell
    metric: str
    value: float | None  # in 0..1
    step: int | None
    lr: float | None  # that was chosen
    problem: str = ""


class Recipe:
    """A config file, the arguments that were given with it, and the overrides of the command line."""

    def __init__(self, flag: flags.Flag):
        file, _, self.arg = config_flags.get_config_filename(flag).partition(":")
        self.overrides = config_flags.get_override_values(flag)
        self.module = _module(Path(file))
        self.stem = Path(file).stem

    def config(self, *args: str) -> ConfigDict:
        """Returns the config for more arguments, with the overrides; unlocked."""
        config = self.module.get_config(self._joined(*args)).unlock()
        config.update_from_flattened_dict(self.overrides)
        return config

    def metric(self, *args: str) -> str:
        """Returns the metric that the recipe names, '' for none."""
        return self.module.metric(self._joined(*args)) if hasattr(self.module, "metric") else ""

    def _joined(self, *args: str) -> str:
        return ",".join(filter(None, (self.arg, *args)))


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    from mae_jax.stop import Stopper

    recipe = Recipe(flags.FLAGS["config"])
    suite = Suite(recipe, FROM.value, TO.value, [_number(text) for text in LRS.value])
    cells = plan(recipe, NAMES.value, PROTOCOLS.value, BLOCKS.value)
    for cell in cells:
        suite.config(cell)  # a misspelt argument stops all before anything runs
    with Stopper():  # also between two trainings a signal ends with its own code
        return suite.run(cells)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--lrs: {text!r} is no number; write for example 1e-4,3e-4,1e-3") from None


def plan(recipe: Recipe, names: list[str], protocols: list[str], blocks: list[str]) -> list[Cell]:
    """Returns the cells in the order in which they run; raises UserError for a number of blocks that is none."""
    for text in blocks:
        if text != ALL and not (text.replace(".", "", 1).isdecimal() and (float(text) == 0.5 or float(text) % 1 == 0)):
            raise UserError(f"--blocks: {text!r}; write whole numbers, 0.5 (the MLP of the last block) or all")
    cells = [Cell(name, protocol, number) for name in names or [""] for protocol in protocols or [""]
             for number in (blocks if blocks and protocol not in (QUICK, "linear") else [""])]
    return [cell if cell.data else cell._replace(data=recipe.stem) for cell in cells]


def encoder_config(source: str) -> ConfigDict:
    """Returns the config of a workdir, of a step's folder in one, or of what was exported; raises UserError."""
    from mae_jax import config as configs
    from mae_jax import workdir

    path = workdir.locate(source)
    if path.suffix != ".safetensors":
        return workdir.read_config(path.parent.parent if path.parent.name == "checkpoints" else path)
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return configs.from_dict(json.loads(header["__metadata__"]["config"]))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} does not say the shape of its model ({error}): it was not written by "
                        "mae_jax.export") from None


class Suite:
    """All cells of one encoder under one folder."""

    def __init__(self, recipe: Recipe, source: str, to: str, lrs: list[float]):
        from mae_jax import workdir

        self.recipe, self.source, self.lrs = recipe, source, lrs
        self.encoder = encoder_config(source)
        self.to = workdir.locate(to)

    def config(self, cell: Cell, *args: str) -> ConfigDict:
        """Returns the config of a cell; raises UserError for what the recipe does not know."""
        name = "" if cell.data == self.recipe.stem else cell.data
        if cell.protocol == QUICK:
            return self._quick_config(self.recipe.config(name))
        config = self.recipe.config(name, cell.protocol, *args)
        config.model.update({field: self.encoder.model[field] for field in SHAPE})
        config.init_from = self.source
        if cell.blocks:
            if "train_blocks" not in config.method:
                raise UserError(f"--blocks: method.name={config.method.name!r} fine-tunes all blocks or none")
            number = -1.0 if cell.blocks == ALL else float(cell.blocks)
            config.method.train_blocks = number if number == 0.5 else int(number)
        return config.lock()

    def _quick_config(self, recipe: ConfigDict) -> ConfigDict:
        """Returns the encoder's own config on the data of the recipe."""
        config = self.encoder.copy_and_resolve_references().unlock()
        config.update({group: recipe[group] for group in DATA_GROUPS})
        config.update(init_from=self.source, batch_size=recipe.batch_size)
        config.data.val_split = config.checkpoint.best = ""
        config.train.update(duration="1 steps", accumulate=1)
        return config.lock()

    def run(self, cells: list[Cell]) -> int:
        """Runs the cells, and writes table and plot after each; returns the exit code."""
        rows, codes = [], [cli.FINISHED]
        for cell in cells:
            try:
                code, found = self.run_cell(cell)
            except (UserError, GuardError) as error:
                code, line = cli.explain(error)
                print(f"{cell.folder}: {line}", flush=True)
                found = [Row(cell, "", None, None, None, str(error))]
            if code == cli.STOPPED:
                return code
            codes.append(code)
            rows += found
            write(rows, self.to, self.source, self.encoder.model.depth)
        print(table(rows))
        return cli.MISTAKE if cli.MISTAKE in codes else max(codes)

    def run_cell(self, cell: Cell) -> tuple[int, list[Row]]:
        """Returns the exit code of a cell and, where it is finished, its rows."""
        from mae_jax import train

        folder, lr = self.to / cell.folder, None
        print(f"-- {cell.folder}", flush=True)
        config = self.config(cell)
        if cell.protocol == QUICK:
            look(config, folder)
            return cli.FINISHED, [self._row(cell, folder, metric) for metric in QUICK_METRICS]
        if self.lrs:
            code, lr = self._best_lr(cell, folder)
            if code != cli.FINISHED:
                return code, []
            config = with_lr(config, lr)
        code = train.train(config, str(folder))
        return code, [self._row(cell, folder, self._metric(cell), lr)] if code == cli.FINISHED else []

    def _best_lr(self, cell: Cell, folder: epath.Path) -> tuple[int, float]:
        """Trains once per learning rate without the test data; returns an exit code and the best on data.val_split."""
        from mae_jax import train

        config = self.config(cell)
        if not config.data.val_split:
            config = self.config(cell, "held")
        config.data.eval_split = ""
        scores = {}
        for lr in self.lrs:
            code = train.train(with_lr(config, lr), str(folder / f"lr_{lr:g}"))
            if code != cli.FINISHED:
                return code, lr
            scores[lr] = measured(folder / f"lr_{lr:g}", self._metric(cell), "val")[1]
        print("  ".join(f"lr {lr:g}: {score:.4f}" for lr, score in scores.items()), flush=True)
        return cli.FINISHED, max(scores, key=scores.__getitem__)

    def _metric(self, cell: Cell) -> str:
        return self.recipe.metric("" if cell.data == self.recipe.stem else cell.data)

    def _row(self, cell: Cell, folder: epath.Path, metric: str, lr: float | None = None) -> Row:
        name, value, step = measured(folder, metric, "eval")
        return Row(cell, name, value, step, lr)


def with_lr(config: ConfigDict, lr: float) -> ConfigDict:
    """Returns a copy of the config with another learning rate."""
    config = config.copy_and_resolve_references()
    config.optim.lr = lr
    return config


def look(config: ConfigDict, folder: epath.Path) -> None:
    """Evaluates the encoder of `init_from` in a workdir as --mode=eval does, unless that is done."""
    import jax

    from mae_jax import train, workdir
    from mae_jax.evals.evaluate import Evaluator
    from mae_jax.metrics import Recorder

    run = train.opened(config, str(folder))
    if (run.workdir / "DONE").exists():
        return
    with jax.set_mesh(run.program.mesh), train.compiled_programs(config, run.workdir):
        state = train.initial_state(run)
        workdir.record(run.workdir, config)
        recorder = Recorder(run.workdir, 0, config.log.tensorboard)
        train.evaluate_into(recorder, Evaluator(run.program.method, run.inputs, run.program.mesh), state, 0)
        recorder.close()
    workdir.replace_text(run.workdir / "DONE", "0\n")


def measured(folder: epath.Path, metric: str, part: str) -> tuple[str, float, int]:
    """Returns (metric, value, step): the last value of <part>/<metric> in metrics.jsonl; of map or top1 for ''."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in [metric] if metric else ["map", "top1"]:
        found = [line for line in lines if line.get(f"{part}/{name}") is not None]
        if found:
            return name, found[-1][f"{part}/{name}"], found[-1]["step"]
    known = sorted({name for line in lines for name in line if name.startswith(f"{part}/")})
    raise UserError(f"{folder}: no {part}/{metric or 'top1'} was measured; there is {', '.join(known) or 'nothing'}")


def series(rows: list[Row]) -> dict[str, list[Row]]:
    """Returns what is comparable over data sets: protocol, blocks and probe in words → rows; no row has failed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.value is not None:
            words = (row.cell.protocol, row.cell.blocks and f"{row.cell.blocks} blocks",
                     row.metric if row.cell.protocol == QUICK else "")
            groups.setdefault(" ".join(filter(None, words)), []).append(row)
    return groups


def table(rows: list[Row]) -> str:
    """Returns a Markdown table, means over the data sets of whatever ran on several, and then what failed and why."""
    lines = [("data", "protocol", "blocks", "metric", "value", "steps", "lr")]
    for row in rows:
        lines.append((*row.cell, row.metric, "failed" if row.value is None else f"{row.value:.2%}",
                      "" if row.step is None else str(row.step), "" if row.lr is None else f"{row.lr:g}"))
    for words, group in series(rows).items():
        if len(group) > 1:
            mean = sum(row.value for row in group) / len(group)
            lines.append((f"mean of {len(group)}", words, "", "", f"{mean:.2%}", "", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    failed = [f"{row.cell.folder}: {row.problem}" for row in rows if row.problem]
    return "\n".join([*text, *([""] if failed else []), *failed])


def write(rows: list[Row], to: epath.Path, source: str, depth: int) -> None:
    """Writes results.json, results.md and transfer.png; the plot only when something was measured."""
    from mae_jax.workdir import replace_text

    to.mkdir(parents=True, exist_ok=True)
    found = [{**row.cell._asdict(), **{k: v for k, v in row._asdict().items() if k != "cell"}} for row in rows]
    replace_text(to / "results.json", json.dumps({"from": source, "results": found}, indent=2) + "\n")
    replace_text(to / "results.md", f"{table(rows)}\n")
    if any(row.value is not None for row in rows):
        (to / "transfer.png").write_bytes(plot(rows, depth))


def plot(rows: list[Row], depth: int) -> bytes:
    """Returns a PNG: bars for each data set, and a curve over the number of fine-tuned blocks where several ran."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured_rows = [row for row in rows if row.value is not None]
    bars = [row for row in measured_rows if not row.cell.blocks]
    lines = [row for row in measured_rows if row.cell.blocks]
    panels = [(draw, some) for draw, some in ((draw_bars, bars), (draw_curves, lines)) if some]
    height = max(4.0, 1.0 + 0.22 * len(bars))
    figure = Figure(figsize=(7 * len(panels), height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for axes, (draw, some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, some, depth)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def draw_bars(axes: Any, rows: list[Row], depth: int) -> None:
    """Draws one group of bars for each data set, one colour for each protocol or probe."""
    names = list(dict.fromkeys(row.cell.data for row in rows))
    groups = series(rows)
    thick = 0.8 / len(groups)
    for k, (words, group) in enumerate(groups.items()):
        places = [names.index(row.cell.data) + (k - (len(groups) - 1) / 2) * thick for row in group]
        drawn = axes.barh(places, [100 * row.value for row in group], thick, label=words or "as the recipe says")
        axes.bar_label(drawn, [f"{100 * row.value:.1f}" for row in group], padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("%, in the metric of the data set")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)


def draw_curves(axes: Any, rows: list[Row], depth: int) -> None:
    """Draws the metric over the number of fine-tuned blocks, which are spaced evenly; one curve for each data set."""
    def blocks(text: str) -> float:
        return float(depth) if text == ALL else float(text)

    ticks = sorted({blocks(row.cell.blocks) for row in rows})
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = " ".join(filter(None, (row.cell.data, row.cell.protocol, f"({row.metric})")))
        curves.setdefault(name, []).append((ticks.index(blocks(row.cell.blocks)), 100 * row.value))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(f"blocks fine-tuned, of {depth}")
    axes.set_ylabel("%")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    cli.run(main, __doc__, required=("config", "from", "to"))
