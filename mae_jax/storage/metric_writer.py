"""Metrics on their way out: metrics.jsonl, and the sinks that a run has besides."""

import errno
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax import param_tree
from mae_jax.errors import UserError, pluralize
from mae_jax.runtime import bounded_json
from mae_jax.storage import metric_sinks, tail, workdir_lock
from mae_jax.storage.metric_sinks import LOOP_RETRY_SECONDS, Sink
from mae_jax.storage.paths import read_bytes, replace_bytes

logger = logging.getLogger(__name__)
ASIDE = "metrics_set_aside.jsonl"  # beside metrics.jsonl: its lines that are none
REMOTE_PERIOD = 30.0  # seconds between rewrites of metrics.jsonl in a bucket, which cannot append
FINAL_RETRY_SECONDS = 60.0  # the same at the end


class JsonLines:
    """metrics.jsonl: one JSON object per line, each metric of a step once.

    A line that cannot be written (a full disk) is kept and written with the next one. In a bucket the file is written
    anew, on condition that nobody else has; an evaluation that has adds its lines, and both stay.

    Attributes:
      seen: the (step, name) that the file held when it was opened.
    """

    def __init__(self, path: epath.Path, restored_step: float, active: bool = True, since: float = 0):
        """Reads the file's end and, where `active`, cuts lines past `restored_step` and a torn last one.

        Other lines that are none, which no run of ours wrote, move to the file ASIDE.

        Args:
          path: of the file.
          restored_step: after which lines are cut.
          active: whether they are.
          since: lines before this step are not read, where the file is long.
        """
        self.path = path
        self.local = not str(path).startswith("gs://")
        self.pending: list[str] = []
        self.written = time.monotonic()
        start, text = self._read(since)
        found = [(line, values_of(line)) for line in text.splitlines()]
        if found and not found[-1][1] and not text.endswith("\n"):  # torn by a crash
            found.pop()
        bad = [line for line, values in found if not values]
        kept = [(line, values) for line, values in found if values and values["step"] <= restored_step]
        self.seen = {(values["step"], name) for _, values in kept for name in values}
        if active and text != (content := _joined([line for line, _ in kept])):
            try:
                self._set_aside(bad)
                cut = len(text.splitlines()) - len(kept) - len(bad)
                logger.info("%s: %s past step %g, and torn ones, are cut off", path, pluralize(cut, "line"),
                            restored_step)
                self._replace(start, content)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def _set_aside(self, bad: list[str]) -> None:
        if not bad:
            return
        file = self.path.parent / ASIDE
        replace_bytes(file, (read_bytes(file) or b"") + _joined(bad).encode())
        logger.warning("%s: %s that %s no figures of a step, such as %.60r; moved to %s", self.path,
                       pluralize(len(bad), "line"), "holds" if len(bad) == 1 else "hold", bad[0], file.name)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line; names that the file held at this step when it was opened are left out."""
        new = {name: value for name, value in values.items() if (step, name) not in self.seen}
        if len(new) < len(values):
            logger.info("%s has %d of these figures of step %d already: they stay as they are", self.path,
                        len(values) - len(new), step)
        values = new
        if not values:
            return
        self.pending.append(json.dumps({"step": step, "time": round(time.time(), 3), **values}))
        if self.local or time.monotonic() - self.written > REMOTE_PERIOD:
            self.flush()

    def flush(self, seconds: float = LOOP_RETRY_SECONDS) -> None:
        """Writes what is pending; a failure is a warning and is tried again at the next call.

        A bucket that fails is tried again for so many seconds.
        """
        if not self.pending:
            return
        try:
            if why := workdir_lock.why_unwritable():
                raise OSError(why)
            if self.local:
                _append(self.path, _joined(self.pending))
            else:
                self._rewrite(seconds)
            self.pending = []
        except Exception as error:  # buckets raise errors of their own, and no metric is worth a run
            logger.warning("cannot write %s (%s); kept, and tried again", self.path, error)
        self.written = time.monotonic()

    def _read(self, since: float = 0) -> tuple[int, str]:
        """Returns the text of the file from this step on, and the byte where it begins."""
        if self.local and not self.path.exists():
            return 0, ""
        if not self.local:
            from mae_jax.storage import gcs

            self.found = gcs.read(str(self.path)) or gcs.StoredObject(b"", 0)
        with open(self.path, "rb") if self.local else io.BytesIO(self.found.content) as file:
            start, text = tail.read(file, since)
        return start, text.decode(errors="replace")

    def _replace(self, start: int, text: str) -> None:
        if self.local:
            tail.replace(self.path, start, text)
        else:
            replace_bytes(self.path, self.found.content[:start] + text.encode())

    def _rewrite(self, seconds: float, tries: int = 2) -> None:
        from mae_jax.storage import gcs

        # A line is there already where the answer to an earlier try was lost.
        lines = dict.fromkeys([*self.found.content.decode(errors="replace").splitlines(), *self.pending])
        text = _joined(list(lines)).encode()
        try:
            self.found = gcs.StoredObject(text, gcs.write(str(self.path), text, seconds, self.found.generation))
        except gcs.GenerationMismatch:
            self._read()
            if tries == 1:
                raise
            self._rewrite(seconds, tries - 1)


def _joined(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _append(path: epath.Path, text: str) -> None:
    """Appends all of the text or, when the disk is full, nothing."""
    data = text.encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, "no space left on device")
        except OSError:
            file.truncate(size)
            raise


def values_of(line: str) -> dict[str, Any]:
    """Returns what a line of metrics.jsonl says, {} for one that is none: torn, or written by somebody else."""
    try:
        values = bounded_json.parse_object(line)
    except ValueError:
        return {}
    step: Any = values.get("step")
    return values if type(step) in (int, float) and 0 <= step < math.inf else {}


def series_of(content: bytes) -> tuple[dict[str, list[tuple[int, float]]], dict[int, float]]:
    """Returns metric → (step, value), ascending, and step → seconds since 1970, of what metrics.jsonl holds.

    A value that was not finite is NaN; lines that are none are left out.
    """
    found: dict[str, dict[int, float]] = {}
    times: dict[int, float] = {}
    for line in content.decode(errors="replace").splitlines():
        values = values_of(line)
        step = int(values.pop("step", 0))
        if isinstance(at := values.pop("time", None), int | float):
            times[step] = at
        for name, value in values.items():
            if value is None or isinstance(value, int | float):
                found.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {name: sorted(points.items()) for name, points in sorted(found.items())}, times


class MetricWriter:
    """Writes scalars and figures of process 0 (`active`) to every sink; other processes read and write nothing.

    Attributes:
      jsonl: metrics.jsonl, which is always written: it is the record of what was measured. None in other processes.
      sinks: name → sink, those that have not failed.
    """

    def __init__(self, workdir: epath.Path, restored_step: float, sinks: Iterable[str], active: bool = True,
                 since: float = 0):
        """Args: as of `JsonLines` and `Sink.open`; sinks: names. Raises UserError for an unknown one."""
        self.jsonl = JsonLines(workdir / "metrics.jsonl", restored_step, since=since) if active else None
        self.sinks: dict[str, Sink] = {}
        for name in sinks if active else ():
            self._made(name, metric_sinks.find(name))
        self._each(lambda sink: sink.open(workdir, restored_step))

    def has(self, step: int, name: str) -> bool:
        """Says whether metrics.jsonl held the metric at the step when the run began, as process 0 alone knows."""
        return self.jsonl is not None and (step, name) in self.jsonl.seen

    def write_config(self, config: ConfigDict) -> None:
        """Tells the sinks the fields of a run's config."""
        fields = {name: value if isinstance(value, bool | int | float | str) else str(tuple(value))
                  for name, value in param_tree.flat(config).items()}
        self._each(lambda sink: sink.write_config(fields))

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → number; JSON has no NaN, so a number that is not finite is written as null."""
        if self.jsonl:
            self.jsonl.write(step, {k: float(v) if np.isfinite(v) else None for k, v in values.items()})
        self._each(lambda sink: sink.write_scalars(step, values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a figure, uint8 [height, width, 3], such as pictures/<name>_<step>.png."""
        self._each(lambda sink: sink.write_image(step, name, image))

    def flush(self) -> None:
        if self.jsonl:
            self.jsonl.flush()
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        if self.jsonl:
            self.jsonl.flush(FINAL_RETRY_SECONDS)
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                call(sink)
            except Exception as error:  # no TensorFlow, a full disk, a bucket out of reach: none is worth a run
                _tell(sink.what, error)
                del self.sinks[name]

    def _made(self, name: str, kind: type[Sink]) -> None:
        try:
            self.sinks[name] = kind()
        except Exception as error:
            _tell(kind.what, error)


def _tell(what: str, error: Exception) -> None:
    logger.warning("no %s from here on: %s", what, str(error).split("\n")[0] or type(error).__name__)
