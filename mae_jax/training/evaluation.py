"""When a run is evaluated, on which part of the data, and which of its checkpoints is the best."""

import json
import logging
import re
import time

import jax
from etils import epath

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
from mae_jax.training.run import Run

logger = logging.getLogger(__name__)
OF_EXPERTS = re.compile(r"/block_\d+/")  # figures of single experts, eval/share/block_09/3, are not printed


class BestCheckpoint:
    """The checkpoint that was best by a figure of the validation part, under <workdir>/best."""

    def __init__(self, folder: epath.Path, metric: str, **how: float):
        self.metric, self.file = metric, folder / "best" / "score.json"
        self.of = {"metric": metric, **how}  # a score that was measured otherwise is none to compare with
        self.checkpoints = Checkpoints(folder / "best", keep_last=1)
        self.score = peers.broadcast(self._read())

    def _read(self) -> float:
        content = paths.read_bytes(self.file)
        if content is None:
            return float("-inf")
        try:
            stored = bounded_json.parse_object(content)
            return float(stored["score"]) if all(stored.get(k) == v for k, v in self.of.items()) else float("-inf")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{unreadable(self.file, content, error)}; without it the next one counts as best"
                            ) from None

    def update(self, done: int, state: TrainState, figures: Figures) -> None:
        """Keeps the state of step `done` if it is better than all before; of a loss, the lowest is the best."""
        if f"val/{self.metric}" not in figures:
            raise UserError(f"checkpoint.best_metric={self.metric!r}: the validation part has no labelled pictures")
        score = figures[f"val/{self.metric}"] * (-1 if self.metric.endswith("loss") else 1)
        if not score > self.score:  # nor where it is not a number
            return
        self.checkpoints.save(done, state)
        self.checkpoints.wait()
        if self.checkpoints.failed:
            return
        self.score = score
        if jax.process_index() == 0:
            text = json.dumps({"step": done, **self.of, "score": score})
            try:
                paths.replace_text(self.file, text + "\n")
            except OSError as error:  # a later start then compares with the score before
                logger.warning("cannot write %s: %s", self.file, error)


def check(run: Run) -> Evaluator:
    """Makes the evaluator of a run.

    Raises:
      UserError: before the first step, for what evaluations, perhaps at the end only, cannot give; or the run goes on
        without one that it had: its figures would be lost for good, and nobody reads the log of a job that goes on.
    """
    config, best = run.config, run.config.checkpoint.best_metric
    for text in missing():
        raise UserError(f"{run.workdir}: the evaluation {text}; install the package, or take it out of 'plugins' in "
                        "config.json, and the run goes on without")
    evaluator = Evaluator(run.program.method, run.inputs, run.program.mesh)
    if best:
        names = [name for name in evaluator.metric_names(run.program.state) if not OF_EXPERTS.search(name)]
        if best not in names:
            why = "" if run.inputs.classes else ": the pictures have no classes"
            raise UserError(f"checkpoint.best_metric={best!r} is not evaluated{why}; {did_you_mean(best, names)}")
        of_labels = [name for each in evaluator.applying if isinstance(each, Probe)
                     for name in each.metric_names(evaluator.method, run.inputs)]
        val = run.inputs.parts.get(config.data.val_split)
        if best in of_labels and val and not labels.labeled(val):
            raise UserError(f"checkpoint.best_metric={best!r}: data.val_split={config.data.val_split!r} has no picture "
                            "with a label; choose by 'loss', or take a part that has labels")
    for name in config.eval.sets if config.data.eval_split and config.eval.test else ():
        run.inputs.extra(name)
    return evaluator


class PeriodicEvaluation:
    """Evaluates a run every eval.every: on its validation part, where it has one, else on the evaluation split.

    A run with a validation part reads the evaluation split once, at its end.
    """

    def __init__(self, run: Run, evaluator: Evaluator, recorder: MetricWriter):
        config = run.config
        self.run, self.evaluator, self.recorder = run, evaluator, recorder
        self.reports = bool(config.data.eval_split) and config.eval.test
        self.part = "val" if config.data.val_split else "eval" if self.reports else ""
        self.every = run.timeline.eval_every if self.part else 0
        how = {"max_examples": config.eval.max_examples, "crop_ratio": config.eval.crop_ratio[0]}
        by = config.checkpoint.best_metric
        self.best = BestCheckpoint(run.workdir, by, **how) if by else None

    def is_due(self, done: int) -> bool:
        """Says whether the state of step `done` is to be evaluated; the first one, where others come before the last.
        """
        total = self.run.timeline.total
        return self.every > 0 and (done == total or (done % self.every == 0 and self.every < total))

    def is_overdue(self, done: int) -> bool:
        """Says whether that evaluation was due and is not on record, on all processes alike."""
        part = "eval" if done == self.run.timeline.total and self.reports else self.part
        return self.is_due(done) and not peers.broadcast(self.recorder.has(done, f"{part}/loss"))

    def evaluate(self, state: TrainState, done: int) -> None:
        """Evaluates, writes scalars and pictures, and prints one line; keeps the state if it is the best one."""
        began = time.monotonic()
        figures = self.evaluator.scalars(state, self.part)
        figures |= self.evaluator.first_evaluations(state, self.part) if done == 0 else {}
        if self.best:
            self.best.update(done, state, figures)
        if done == self.run.timeline.total:
            figures |= self.final_metrics(state, {} if self.part == "val" else figures)
        self.write(state, done, figures, began)

    def final_metrics(self, state: TrainState, known: Figures) -> Figures:
        """Returns the figures of the evaluation split: of the last state, `known` or not, and of the best one."""
        if not self.reports:
            return {}
        best = self.best.checkpoints.restore(self.run.program.state) if self.best else None
        of_best = {} if best is None else {name.replace("eval/", "eval/best/", 1): value
                                           for name, value in self.evaluator.scalars(best).items()}
        # The last state comes last: the table of confusions that is drawn is of its figures.
        return (known or self.evaluator.scalars(state)) | self.evaluator.final_evaluations(state) | of_best

    def write(self, state: TrainState, done: int, figures: Figures, began: float) -> None:
        """Records figures and pictures of step `done`."""
        for name, picture in self.evaluator.images(state, self.part or "eval"):
            self.recorder.write_image(done, name, picture)
        self.recorder.write_scalars(done, figures)  # last: it marks the evaluation as done
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if not OF_EXPERTS.search(name))
        print_once(f"evaluation at step {done}: {text}  ({time.monotonic() - began:.0f} s)")
