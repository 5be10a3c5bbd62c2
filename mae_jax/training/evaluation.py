"""Periodic evaluation of a run, its best checkpoint, and early stopping."""

import json
import logging
import re
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data import labels
from mae_jax.errors import UserError, did_you_mean
from mae_jax.evals.base import Probe
from mae_jax.evals.evaluator import Evaluator, Figures, missing
from mae_jax.runtime import bounded_json, peers
from mae_jax.runtime.console import print_once
from mae_jax.state import TrainState
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.metric_writer import MetricWriter
from mae_jax.training.ending import EarlyEnd
from mae_jax.training.run import Run

logger = logging.getLogger(__name__)
LOWER = re.compile(r"loss$")
HIGHER = re.compile(r"(top\d+|_ap(\d+|_\w+)?|mean_per_class|map|map_all|iou|accuracy|rankme)$")
OF_EXPERTS = re.compile(r"/block_\d+/")  # metrics of single experts, such as eval/share/block_09/3; not printed


def known_mode(metric: str) -> str:
    """Returns 'max' or 'min', the best value of a metric by its name; raises UserError for an unknown name."""
    for mode, pattern in (("min", LOWER), ("max", HIGHER)):
        if pattern.search(metric):
            return mode
    raise UserError(f"checkpoint.best_metric={metric!r}: it is not known whether larger or smaller is better; set "
                    "checkpoint.best_mode=max or min")


class BestCheckpoint:
    """The best checkpoint by a metric of the validation part, in <workdir>/best.

    Attributes:
      score: the best value of the metric, negated if lower is better; -inf before the first evaluation.
      step: the step of the best value.
    """

    def __init__(self, folder: epath.Path, metric: str, mode: str = "auto", **how: float):
        """Args: metric, mode: best_metric and best_mode of config.checkpoint; how: evaluation settings of the score."""
        self.metric, self.file = metric.removeprefix("val/"), folder / "best" / "score.json"
        self.sign = {"max": 1, "min": -1}[known_mode(self.metric) if mode == "auto" else mode]
        # A stored score with other evaluation settings is not comparable, and is ignored.
        self.of = {"metric": self.metric, **({} if mode == "auto" else {"mode": mode}), **how}
        self.checkpoints = Checkpoints(folder / "best", keep_last=1)
        self.score, self.step = peers.broadcast(self._read())
        self.unwritten = ""

    def _read(self) -> tuple[float, int]:
        content, none = paths.read_bytes(self.file), (float("-inf"), 0)
        if content is None:
            return none
        try:
            stored = bounded_json.parse_object(content)
            score, step = float(stored["score"]), int(stored.get("step", 0))
            same = all(stored.get(key) == value for key, value in {"mode": None, **self.of}.items())
            return (score, step) if same else none
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{unreadable(self.file, content, error)}; without it the next one counts as best"
                            ) from None

    def update(self, done: int, state: TrainState, figures: Figures) -> None:
        """Saves the state of step `done` if its metric is the best so far.

        Raises:
          UserError: `figures` lacks the metric.
        """
        if f"val/{self.metric}" not in figures:
            raise UserError(f"checkpoint.best_metric={self.metric!r}: the validation part has no such metric; perhaps "
                            "it has no images, or none with a label")
        score = figures[f"val/{self.metric}"] * self.sign
        if score > self.score:  # False for NaN
            self.checkpoints.save(done, state)
            self.checkpoints.wait()
            if not self.checkpoints.failed:
                self.score, self.step = score, done
                self.unwritten = json.dumps({"step": done, **self.of, "score": score})
        if self.unwritten and jax.process_index() == 0:
            try:
                paths.replace_text(self.file, self.unwritten + "\n")
                self.unwritten = ""
            except OSError as error:  # the next evaluation retries; a restart before it uses the old score
                logger.warning("cannot write %s: %s", self.file, error)


def check(run: Run) -> Evaluator:
    """Builds the evaluator of a run and checks its settings before the first step.

    Raises:
      UserError: an evaluation, possibly one at the end of the run, cannot be computed; or an evaluation that a resumed
        run had is missing, whose metrics would be lost.
    """
    config, best = run.config, run.config.checkpoint.best_metric.removeprefix("val/")
    for text in missing():
        raise UserError(f"{run.workdir}: the evaluation {text}; install the package, or remove it from 'plugins' in "
                        "config.json to continue without it")
    evaluator = Evaluator(run.program.method, run.inputs, run.program.mesh)
    if best:
        if best.startswith("eval/"):
            raise UserError(f"checkpoint.best_metric={best!r}: checkpoints are chosen by data.val_split, not by what "
                            f"is reported at the end; did you mean {'val/' + best.removeprefix('eval/')!r}?")
        names = [name for name in evaluator.metric_names(run.program.state) if not OF_EXPERTS.search(name)]
        if best not in names:
            why = "" if run.inputs.classes else ": the images have no classes"
            raise UserError(f"checkpoint.best_metric={best!r} is not evaluated{why}; {did_you_mean(best, names)}")
        if config.checkpoint.best_mode == "auto":
            known_mode(best)
        of_labels = [name for each in evaluator.applying if isinstance(each, Probe)
                     for name in each.metric_names(evaluator.method, run.inputs)]
        val = run.inputs.parts.get(config.data.val_split)
        if best in of_labels and val and not labels.labeled(val):
            raise UserError(f"checkpoint.best_metric={best!r}: data.val_split={config.data.val_split!r} has no image "
                            "with a label; use 'loss' or 'rankme', or a part with labels")
    for name in config.eval.sets if config.data.eval_split and config.eval.test else ():
        run.inputs.extra(name)
    return evaluator


def is_due(run: Run, done: int) -> bool:
    """Returns whether the state of step `done` is evaluated; step 0 is, unless only the last step is."""
    total, every = run.timeline.total, run.timeline.eval_every if _part(run.config) else 0
    return every > 0 and (done == total or (done % every == 0 and every < total))


def _part(config: ConfigDict) -> str:
    """Returns the part of periodic evaluations: 'val', 'eval', or '' for none."""
    return "val" if config.data.val_split else "eval" if config.data.eval_split and config.eval.test else ""


class PeriodicEvaluation:
    """Evaluates a run every eval.every on its validation part or, without one, on the evaluation split.

    With a validation part, the evaluation split is used once, at the end.
    """

    def __init__(self, run: Run, evaluator: Evaluator, recorder: MetricWriter):
        config = run.config
        self.run, self.evaluator, self.recorder = run, evaluator, recorder
        self.reports = bool(config.data.eval_split) and config.eval.test
        self.part = _part(config)
        how = {"max_examples": config.eval.max_examples, "crop_ratio": config.eval.crop_ratio[0]}
        by, mode = config.checkpoint.best_metric, config.checkpoint.best_mode
        self.best = BestCheckpoint(run.workdir, by, mode, **how) if by else None

    def is_due(self, done: int) -> bool:
        """See the function `is_due`."""
        return is_due(self.run, done)

    def ends_early(self, done: int) -> EarlyEnd | None:
        """Returns the reason to stop at step `done`, if the best metric has not improved for train.patience; or None.

        It depends on score.json only, which is written before the evaluation's metrics, and so is the same after a
        restart.
        """
        patience, best = self.run.timeline.patience, self.best
        if not (patience and best and best.score > float("-inf") and self.is_due(done)):
            return None
        return EarlyEnd(f"val/{best.metric}", best.step) if done - best.step >= patience else None

    def is_last(self, done: int) -> bool:
        """Returns whether step `done` is the last one, after which the final metrics are computed."""
        return done == self.run.timeline.total or self.ends_early(done) is not None

    def is_overdue(self, done: int) -> bool:
        """Returns whether the evaluation of step `done` is due and not yet recorded; the same on every process."""
        part = "eval" if self.is_last(done) and self.reports else self.part
        return self.is_due(done) and not peers.broadcast(self.recorder.has(done, f"{part}/loss"))

    def evaluate(self, state: TrainState, done: int) -> None:
        """Evaluates the state of step `done`, saves it if it is the best one, and writes and prints the results."""
        began = time.monotonic()
        figures = self.evaluator.scalars(state, self.part)
        if self.best:
            self.best.update(done, state, figures)
        if self.is_last(done):
            figures |= self.evaluator.last_evaluations(state, self.part)
            figures |= self.final_metrics(state, {} if self.part == "val" else figures)
        if early := self.ends_early(done):
            figures["val/best_step"] = early.best_step
        self.write(state, done, figures, began)

    def final_metrics(self, state: TrainState, known: Figures) -> Figures:
        """Returns the final metrics of the evaluation split, of the last state and of the best checkpoint.

        Args:
          state: the last state.
          known: metrics of the last state that have been computed already; {} for none.
        """
        if not self.reports:
            return {}
        best = self.best.checkpoints.restore(self.run.program.state) if self.best else None
        of_best = {} if best is None else {name.replace("eval/", "eval/best/", 1): value
                                           for name, value in self.evaluator.scalars(best).items()}
        # The last state is evaluated after the best one, so that the drawn confusion matrix is that of the last state.
        return (known or self.evaluator.scalars(state)) | self.evaluator.final_evaluations(state) | of_best

    def write_file(self, name: str, text: str) -> None:
        """Writes a file of an evaluation to the workdir, and replaces that of an earlier one."""
        if jax.process_index() == 0:
            try:
                paths.replace_text(self.run.workdir / name, text)
            except OSError as error:  # the next evaluation writes it again
                logger.warning("cannot write %s: %s", self.run.workdir / name, error)

    def write(self, state: TrainState, done: int, figures: Figures, began: float) -> None:
        """Writes metrics and, after step 0, images and files of the evaluation of step `done`; prints the metrics.

        Args:
          state: the evaluated state.
          done: its step.
          figures: metric → value.
          began: start of the evaluation, in seconds of time.monotonic.
        """
        if done > 0:  # at step 0, they would delay the first step and show little
            for name, picture in self.evaluator.images(state, self.part or "eval"):
                self.recorder.write_image(done, name, picture)
            for name, text in self.evaluator.files(state, self.part or "eval"):
                self.write_file(name, text)
        self.recorder.write_scalars(done, figures)  # last, since scalars mark the evaluation as done
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if not OF_EXPERTS.search(name))
        print_once(f"evaluation at step {done}: {text}  ({time.monotonic() - began:.0f} s)")
