"""The table of evaluations, and the Evaluator, which runs those that apply to a method and its data."""

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from mae_jax import plugins
from mae_jax.errors import UserError, did_you_mean
from mae_jax.evals.attention_maps import AttentionMaps
from mae_jax.evals.attention_overlap import AttentionOverlap
from mae_jax.evals.base import Evaluation, When
from mae_jax.evals.classification import Classification
from mae_jax.evals.context import Context, Source, compiled_measure, measure, united
from mae_jax.evals.detection import Detection
from mae_jax.evals.expert_routing import ExpertRouting
from mae_jax.evals.frozen_probes import FrozenProbes
from mae_jax.evals.further_sets import FurtherSets
from mae_jax.evals.held_out_loss import HeldOutLoss
from mae_jax.evals.knn import KNN
from mae_jax.evals.linear_probe import LinearProbe
from mae_jax.evals.own_size import OwnSize
from mae_jax.evals.pixel_baseline import PixelBaseline
from mae_jax.evals.rankme import RankMe
from mae_jax.evals.reconstruction import Reconstruction
from mae_jax.evals.segmentation import Segmentation
from mae_jax.methods.base import Batch, Method
from mae_jax.runtime import progress
from mae_jax.runtime.sharding import batch_sharding, with_shardings
from mae_jax.state import TrainState

EVALUATIONS: tuple[Evaluation, ...] = (  # the order of metrics and images
    HeldOutLoss(),
    ExpertRouting(),
    LinearProbe(),
    KNN(),
    RankMe(),
    Classification(),
    FurtherSets(),
    Reconstruction(),
    Segmentation(),
    Detection(),
    OwnSize(),
    AttentionMaps(),
    AttentionOverlap(),
    FrozenProbes(),
    PixelBaseline(),
)
Figures = dict[str, float]


def evaluations() -> tuple[Evaluation, ...]:
    """Returns all evaluations: those of the table, then those of plug-ins; classes are instantiated.

    Raises:
      UserError: of a plug-in, the registered name differs from the attribute `name`, or `when` is unknown.
    """
    known = {name: _made(each) if isinstance(each, type) else each for name, each in _table().items()}
    for name, each in known.items():
        if getattr(each, "name", None) != name:
            raise UserError(f"the evaluation {name!r} of a plug-in has the attribute "
                            f"name={getattr(each, 'name', None)!r}; both must be the same")
        if each.when not in get_args(When):
            hint = did_you_mean(each.when, get_args(When))
            raise UserError(f"the evaluation {name!r} has when={each.when!r}; {hint}")
    return tuple(known.values())


def missing() -> list[str]:
    """Returns a message for each evaluation of the stored run that is missing here: which package provided it."""
    return plugins.missing("evaluations", _table())


def _table() -> Mapping[str, Any]:
    return plugins.table("evaluations", {each.name: each for each in EVALUATIONS})


@functools.cache
def _made(kind: type[Evaluation]) -> Evaluation:
    return kind()


class Evaluator:
    """Evaluates train states on the data of a run. Every process calls it and gets the same results.

    Attributes:
      applying: the evaluations that apply.
      names_applying: their names.
      notes: evaluation name → values of the last `scalars` that the images show.
    """

    def __init__(self, method: Method, inputs: Any, mesh: Mesh):
        self.method, self.inputs, self.mesh = method, inputs, mesh
        self.parts = {"eval": inputs.evaluate, "val": inputs.validate}
        self.applying = tuple(each for each in evaluations() if each.applies(method, inputs))
        self.names_applying = tuple(each.name for each in self.applying)
        self.notes: dict[str, Any] = {}
        self._compiling = threading.Lock()
        if not set(self.applying) <= set(EVALUATIONS):
            self._check_names()

    def compile(self, state: TrainState) -> None:
        """Compiles the pass over the evaluated part; for another thread, before `scalars`, which waits for it.

        Args:
          state: with jax.ShapeDtypeStruct as leaves.
        """
        with self._compiling:
            batch = with_shardings(self.method.eval_spec(), batch_sharding(self.mesh))
            program = compiled_measure(self.method, self.mesh, self._those("periodic"))
            program.lower(state.ema or state.params, state.extras, batch).compile()

    def scalars(self, state: TrainState, part: str = "eval") -> Figures:
        """Runs the periodic evaluations.

        Args:
          state: the train state. With averaged parameters the average is evaluated; for classification, the last
            parameters too, as '<part>/raw/...'.
          part: 'eval', or 'val', the validation part of the training data.

        Returns:
          '<part>/<metric>' → value.
        """
        with self._compiling:  # waits for another thread's `compile`
            pass
        out: Figures = {}
        for kind, params in self._weights(state):
            notes = {} if out else self.notes
            out |= self._run(self._those("periodic"), f"{part}/{kind}", params, state, part, notes=notes)
        return out

    def last_evaluations(self, state: TrainState, part: str = "eval") -> Figures:
        """Returns '<part>/<metric>' → value of the evaluations that run once, with the last periodic ones."""
        return self._run(self._those("last"), f"{part}/", state.ema or state.params, state, part)

    def final_evaluations(self, state: TrainState) -> Figures:
        """Returns the metrics that are computed once, at the end of a run: further crops, and final evaluations.

        They are those of data.eval_split; {} without one.
        """
        config, out = self.method.config, Figures()
        if not config.data.eval_split:
            return out
        for kind, params in self._weights(state):
            for ratio in config.eval.crop_ratio[1:]:
                prefix, source = f"eval/{kind}crop_{ratio:g}/", partial(self.inputs.evaluate, ratio)
                those = tuple(each for each in self._those("periodic") if each.of_crops)
                out |= self._run(those, prefix, params, state, "eval", source)
            out |= self._run(self._those("final"), f"eval/{kind}", params, state, "eval")
        return out

    def on_demand(self, name: str, state: TrainState, part: str = "eval") -> Figures:
        """Returns '<part>/<metric>' → value of one evaluation; {} if it does not apply.

        Raises:
          UserError: no on-demand evaluation has this name.
        """
        known = {each.name: each for each in evaluations() if each.when == "on_demand"}
        if name not in known:
            raise UserError(f"unknown evaluation on demand {name!r}; {did_you_mean(name, known)}")
        if known[name] not in self.applying:
            return {}
        return self._run((known[name],), f"{part}/", state.ema or state.params, state, part)

    def metric_names(self, state: TrainState) -> list[str]:
        """Returns the keys of `scalars` without '<part>/' for a part with labeled images, computed from shapes only."""
        names = [name for each in self._those("periodic") for name in each.metric_names(self.method, self.inputs)]
        return [kind + name for kind, _ in self._weights(state) for name in dict.fromkeys(names)]

    def images(self, state: TrainState, part: str = "eval") -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, uint8 [height, width, 3]) of the periodic evaluations; nothing for a part without images."""
        those = self._those("periodic")
        ctx = self._context(those, state.ema or state.params, state, part, notes=self.notes)
        if ctx.shown is None:
            return
        for each in those:
            with progress.doing(f"drawing {_words(each)}"):
                yield from each.images(ctx)

    def files(self, state: TrainState, part: str = "eval") -> Iterator[tuple[str, str]]:
        """Yields (name, text) of the files of the periodic evaluations for the workdir, for the last `scalars`."""
        those = self._those("periodic")
        ctx = self._context(those, state.ema or state.params, state, part, notes=self.notes)
        for each in those:
            yield from each.files(ctx)

    def _check_names(self) -> None:
        """Raises UserError if two evaluations return the same metric or count; computes shapes only."""
        _figures((each, dict.fromkeys(each.metric_names(self.method, self.inputs)))
                 for each in self.applying if each.when != "on_demand")

        def measured(first: Batch, batch: Batch) -> Any:
            params, extras = self.method.init(jax.random.key(0), first)
            parts = [self._those("periodic"), self._those("final")]
            return [measure(self.method, those, params, extras, batch)[:2] for those in parts]

        jax.eval_shape(measured, self.method.batch_spec(), self.method.eval_spec())

    def _those(self, when: When) -> tuple[Evaluation, ...]:
        return tuple(each for each in self.applying if each.when == when)

    def _run(self, those: tuple[Evaluation, ...], prefix: str, *about: Any, **more: Any) -> Figures:
        """Returns prefix + metric → value of evaluations, in one new context; for the arguments see `_context`."""
        ctx = self._context(those, *about, **more)
        figures = _figures((each, _measured(each, ctx)) for each in those)
        return {prefix + name: value for name, value in figures.items()}

    def _context(self, those: tuple[Evaluation, ...], params: Any, state: TrainState, part: str,
                 source: Source | None = None, notes: dict[str, Any] | None = None) -> Context:
        return Context(self.method, params, state.extras, self.inputs, self.mesh, part, source or self.parts[part],
                       those, notes)

    def _weights(self, state: TrainState) -> list[tuple[str, Any]]:
        """Returns (prefix of the metrics, parameters to evaluate), the main parameters first."""
        raw = [("raw/", state.params)] if state.ema and self.method.task == "classification" else []
        return [("", state.ema or state.params), *raw]


def _measured(each: Evaluation, ctx: Context) -> dict[str, float]:
    with progress.doing(f"evaluating {_words(each)}"):
        return each.scalars(ctx)


def _words(each: Evaluation) -> str:
    return each.name.replace("_", " ")


def _figures(given: Iterable[tuple[Evaluation, Mapping[str, Any]]]) -> dict[str, Any]:
    """Merges the metrics of several evaluations; one of EVALUATIONS may replace a metric of another one of these."""
    own = [each.name for each in EVALUATIONS]
    return united("figure", ((each.name, figures) for each, figures in given), own)
