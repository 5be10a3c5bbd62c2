"""A suite of transfers: each cell fine-tunes or probes the same encoder, in a workdir of its own."""

from collections.abc import Iterable

from etils import epath
from ml_collections import ConfigDict

from mae_jax import config as configs
from mae_jax import errors
from mae_jax.commands.transfer.protocols import Recipe
from mae_jax.commands.transfer.report import ALL, QUICK, Cell, Row, joined, stored, table, write
from mae_jax.errors import GuardError, UserError
from mae_jax.runtime import startup_timer

QUICK_METRICS = ("linear/top1", "sgd/top1", "knn/top1")
DATA_GROUPS = ("data", "eval", "mesh", "log")  # config groups that `quick` takes from the recipe


def rates(texts: list[str]) -> list[float]:
    """Parses learning rates from the command line; raises UserError."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise UserError(f"--lrs={','.join(texts)}: expected numbers, such as 1e-4,3e-4,1e-3") from None


def encoder_config(source: str) -> ConfigDict:
    """Returns the config of the run that trained an encoder; raises UserError if it is not known."""
    from mae_jax.training import workdir

    config = workdir.config_of(source)
    if config is None:
        raise UserError(f"{source} does not state its model; expected a workdir, a step's folder in it, or an export "
                        "of mae_jax")
    return config


class Suite:
    """All cells of one encoder, in one folder.

    The encoder of a workdir is its newest step at this time. Cells of a later step need another folder.
    """

    def __init__(self, recipe: Recipe, source: str, to: str, lrs: list[float]):
        from mae_jax.storage import paths, step_dirs

        self.recipe, self.lrs = recipe, lrs
        found = paths.locate_checkpoints(source, "--from")
        self.encoder = encoder_config(str(found))
        self.source = str(step_dirs.newest(found))
        self.to = paths.locate_checkpoints(to, "--to")
        if self.to.exists() and not self.to.is_dir():
            raise UserError(f"--to={to} is a file; expected a folder for the cells")

    def check(self, cells: list[Cell]) -> None:
        """Raises UserError for the first cell or learning rate whose config is invalid, independent of the data."""
        for cell in cells:
            config = self.config(cell)
            configs.validate(config, for_training=cell.protocol != QUICK)
            for lr in self.lrs if cell.protocol != QUICK else ():
                configs.validate(with_lr(config, lr))

    def config(self, cell: Cell, *args: str) -> ConfigDict:
        """Returns the config of a cell; raises UserError for arguments or fields that the recipe lacks."""
        recipe, own_args = self.recipe.of(cell.protocol)
        name = "" if cell.data == recipe.stem else cell.data
        config = recipe.config(name, own_args, *args, encoder=self.encoder)
        if cell.protocol == QUICK:
            return self._quick_config(config)
        config.init_from = self.source
        if config.train.compilation_cache == "auto":  # shared: many cells run the same programs
            config.train.compilation_cache = str(self.to / "compiled")
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
        config.update(init_from=self.source, batch_size=recipe.batch_size,
                      plugins=tuple(dict.fromkeys((*config.plugins, *recipe.plugins))))
        config.update_from_flattened_dict({name: value for name, value in self.recipe.overrides.items()
                                           if name == "seed" or name.startswith("model.")})
        config.data.val_split = config.checkpoint.best_metric = ""
        config.train.update(duration="1 steps", accumulate=1)
        return config.lock()

    def run(self, cells: list[Cell], left_out: Iterable[Row] = ()) -> int:
        """Runs the cells, and writes table and plot after each, with the rows of earlier calls; returns the exit code.

        Args:
          cells: the cells to run.
          left_out: rows of pairs that do not fit; they are printed and reported.
        """
        rows, codes = joined(stored(self.to, self.source), list(left_out)), [errors.FINISHED]
        for row in left_out:
            print(f"{row.cell.folder}: {row.problem}", flush=True)
        for cell in cells:
            try:
                code, found = self.run_cell(cell)
            except (UserError, GuardError, OSError) as error:
                code, line = errors.explain(error)
                print(f"{cell.folder}: {line}", flush=True)
                found = [Row(cell, "", None, None, None, str(error))]
            if code == errors.STOPPED:
                return code
            codes.append(code)
            rows = joined(rows, found)
            write(rows, self.to, self.source, self.encoder.model.depth)
        print(table(rows))
        return errors.MISTAKE if errors.MISTAKE in codes else max(codes)

    def run_cell(self, cell: Cell) -> tuple[int, list[Row]]:
        """Runs a cell; returns its exit code and, if it finished, its rows."""
        from mae_jax.training import loop

        folder, lr = self.to / cell.folder, None
        print(f"-- {cell.folder}", flush=True)
        config = self.config(cell)
        if cell.protocol == QUICK:
            look(config, folder)
            return errors.FINISHED, [self._row(cell, folder, metric) for metric in QUICK_METRICS]
        if self.lrs:
            code, lr = self._best_lr(cell, folder)
            if code != errors.FINISHED:
                return code, []
            config = with_lr(config, lr)
        code = loop.train(config, str(folder), alone=False)
        if code != errors.FINISHED:
            return code, []
        return code, self._rows(cell, folder, lr, "eval/best" if config.checkpoint.best_metric else "eval")

    def _best_lr(self, cell: Cell, folder: epath.Path) -> tuple[int, float]:
        """Trains once per learning rate without the test data; returns an exit code and the best by data.val_split.

        Rates at which a guard stops the training are excluded.

        Raises:
          GuardError: all rates were excluded.
        """
        from mae_jax.training import loop

        config = self.config(cell)
        if not config.data.val_split:
            config = self.config(cell, "held")
        config.eval.test = False  # the test part is held out of data without splits, and not read
        scores = {}
        for lr in self.lrs:
            try:
                code = loop.train(with_lr(config, lr), str(folder / f"lr_{lr:g}"), alone=False)
            except GuardError as error:
                print(f"{cell.folder}: lr {lr:g}: {errors.explain(error)[1]}", flush=True)
                stopped = error
                continue
            if code != errors.FINISHED:
                return code, lr
            scores[lr] = measured(folder / f"lr_{lr:g}", self._metrics(cell)[0], "val")[1]
        if not scores:
            raise stopped
        print("  ".join(f"lr {lr:g}: {score:.4f}" for lr, score in scores.items()), flush=True)
        return errors.FINISHED, max(scores, key=scores.__getitem__)

    def _metrics(self, cell: Cell) -> tuple[str, ...]:
        recipe, _ = self.recipe.of(cell.protocol)
        return recipe.metrics("" if cell.data == recipe.stem else cell.data)

    def _rows(self, cell: Cell, folder: epath.Path, lr: float | None, part: str) -> list[Row]:
        """Returns the rows of a trained cell; skips further metrics that its data lack, as those of masks."""
        first, *more = self._metrics(cell)
        rows = [self._row(cell, folder, first, lr, part)]
        for metric in more:
            try:
                rows.append(self._row(cell, folder, metric, lr, part))
            except UserError as error:
                print(f"{cell.folder}: {error}", flush=True)
        return rows

    def _row(self, cell: Cell, folder: epath.Path, metric: str, lr: float | None = None, part: str = "eval") -> Row:
        name, value, step = measured(folder, metric, part)
        return Row(cell, name, value, step, lr)


def with_lr(config: ConfigDict, lr: float) -> ConfigDict:
    """Returns a copy of the config with another learning rate."""
    config = config.copy_and_resolve_references()
    config.optim.lr = lr
    return config


def look(config: ConfigDict, folder: epath.Path) -> None:
    """Probes the encoder of `init_from` without training, in a workdir of its own, unless it was probed before."""
    import jax

    from mae_jax.evals.evaluator import Evaluator
    from mae_jax.storage import metric_sinks, paths
    from mae_jax.storage.metric_writer import MetricWriter
    from mae_jax.training import run as training_run
    from mae_jax.training import workdir

    startup_timer.begin()
    run = training_run.open_run(config, str(folder), for_training=False)
    if (run.workdir / "DONE").exists():
        if workdir.read_config(folder).eval == config.eval:
            return
        folder.rmtree()  # probed with other eval fields; probing again takes seconds
    with jax.set_mesh(run.program.mesh), training_run.compiled_programs(config, run.workdir):
        state = training_run.initial_state(run, for_training=False)
        evaluator = Evaluator(run.program.method, run.inputs, run.program.mesh)
        workdir.record(run.workdir, config, evaluations=evaluator.names_applying)
        recorder = MetricWriter(run.workdir, 0, metric_sinks.names(config.log))
        recorder.write_scalars(0, evaluator.on_demand("frozen_probes", state))
        recorder.close()
    paths.replace_text(run.workdir / "DONE", "0\n")


def measured(folder: epath.Path, metric: str, part: str) -> tuple[str, float, int]:
    """Returns (metric, value, step): the last value of <part>/<metric> in metrics.jsonl; '' means map, else top1.

    Raises:
      UserError: there is no such value.
    """
    from mae_jax.storage.metric_writer import values_of

    lines = [values_of(line) for line in (folder / "metrics.jsonl").read_bytes().decode(errors="replace").splitlines()]
    for name in [metric] if metric else ["map", "top1"]:
        found = [line for line in lines if line.get(f"{part}/{name}") is not None]
        if found:
            return name, found[-1][f"{part}/{name}"], found[-1]["step"]
    known = sorted({name for line in lines for name in line if name.startswith(f"{part}/")})
    raise UserError(f"{folder}: no {part}/{metric or 'top1'} was measured; there is {', '.join(known) or 'nothing'}")
