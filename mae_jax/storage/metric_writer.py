"""Writes metrics to metrics.jsonl and to the sinks of a run."""

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
ASIDE = "metrics_set_aside.jsonl"  # file beside metrics.jsonl for its invalid lines
REMOTE_PERIOD = 30.0  # seconds between rewrites of metrics.jsonl in a bucket, where appending is not possible
FINAL_RETRY_SECONDS = 60.0  # seconds of retries at the end of a run


class JsonLines:
    """metrics.jsonl: one JSON object per line, and each metric of a step once.

    A line that cannot be written (a full disk) is kept and written with the next one. In a bucket the whole file is
    rewritten if its generation is unchanged; if another process, such as an evaluation, has added lines, both are kept.

    Attributes:
      seen: the (step, name) pairs in the file when it was opened.
    """

    def __init__(self, path: epath.Path, restored_step: float, active: bool = True, since: float = 0):
        """Reads the end of the file; if `active`, cuts lines after `restored_step` and an incomplete last line.

        Other invalid lines, which mae_jax does not write, are moved to the file ASIDE.

        Args:
          path: of the file.
          restored_step: lines of later steps are cut.
          active: whether to change the file.
          since: lines of earlier steps need not be read, if the file is long.
        """
        self.path = path
        self.local = not str(path).startswith("gs://")
        self.pending: list[str] = []
        self.written = time.monotonic()
        start, text = self._read(since)
        found = [(line, values_of(line)) for line in text.splitlines()]
        if found and not found[-1][1] and not text.endswith("\n"):  # incomplete after a crash
            found.pop()
        bad = [line for line, values in found if not values]
        kept = [(line, values) for line, values in found if values and values["step"] <= restored_step]
        self.seen = {(values["step"], name) for _, values in kept for name in values}
        if active and text != (content := _joined([line for line, _ in kept])):
            try:
                self._set_aside(bad)
                cut = len(text.splitlines()) - len(kept) - len(bad)
                logger.info("%s: cut %s after step %g or incomplete", path, pluralize(cut, "line"), restored_step)
                self._replace(start, content)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def _set_aside(self, bad: list[str]) -> None:
        if not bad:
            return
        file = self.path.parent / ASIDE
        replace_bytes(file, (read_bytes(file) or b"") + _joined(bad).encode())
        logger.warning("%s: %s that %s no metrics of a step, such as %.60r; moved to %s", self.path,
                       pluralize(len(bad), "line"), "holds" if len(bad) == 1 else "hold", bad[0], file.name)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line, without the metrics of this step that the file had when it was opened."""
        new = {name: value for name, value in values.items() if (step, name) not in self.seen}
        if len(new) < len(values):
            logger.info("%s already has %d of these metrics of step %d; they are not changed", self.path,
                        len(values) - len(new), step)
        values = new
        if not values:
            return
        self.pending.append(json.dumps({"step": step, "time": round(time.time(), 3), **values}))
        if self.local or time.monotonic() - self.written > REMOTE_PERIOD:
            self.flush()

    def flush(self, seconds: float = LOOP_RETRY_SECONDS) -> None:
        """Writes pending lines; after a failure, which is a warning, they are written at the next call.

        A failing bucket is retried for `seconds`.
        """
        if not self.pending:
            return
        try:
            if self.local:
                _check_writable()
                _append(self.path, _joined(self.pending))
            else:
                self._rewrite(seconds)
            self.pending = []
        except Exception as error:  # any error, since a metric must not end a run
            logger.warning("cannot write %s (%s); kept, and tried again", self.path, error)
        self.written = time.monotonic()

    def _read(self, since: float = 0) -> tuple[int, str]:
        """Returns the file's text from step `since` or earlier, and the byte at which the text starts."""
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

        _check_writable()  # at each try: the generation may have changed since another run took the workdir over
        # The file may have the lines already, if the response to an earlier try was lost.
        lines = dict.fromkeys([*self.found.content.decode(errors="replace").splitlines(), *self.pending])
        text = _joined(list(lines)).encode()
        try:
            self.found = gcs.StoredObject(text, gcs.write(str(self.path), text, seconds, self.found.generation))
        except gcs.GenerationMismatch:
            self._read()
            if tries == 1:
                raise
            self._rewrite(seconds, tries - 1)


def _check_writable() -> None:
    """Raises OSError if another run may have the workdir."""
    if why := workdir_lock.why_unwritable():
        raise OSError(why)


def _joined(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


def _append(path: epath.Path, text: str) -> None:
    """Appends the whole text or, if the disk is full, nothing."""
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
    """Parses a line of metrics.jsonl; returns {} for an invalid line: incomplete, or not written by mae_jax."""
    try:
        values = bounded_json.parse_object(line)
    except ValueError:
        return {}
    step: Any = values.get("step")
    return values if type(step) in (int, float) and 0 <= step < math.inf else {}


def series_of(content: bytes) -> tuple[dict[str, list[tuple[int, float]]], dict[int, float]]:
    """Parses the content of metrics.jsonl.

    Returns:
      Metric → (step, value), with ascending steps and NaN for values that were not finite; and step → time in seconds
      since 1970. Invalid lines are skipped.
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
    """Writes scalars and figures to metrics.jsonl and every sink on process 0 (`active`); does nothing on others.

    Attributes:
      jsonl: metrics.jsonl, which is always written; None on other processes.
      sinks: name → sink, for the sinks that have not failed.
    """

    def __init__(self, workdir: epath.Path, restored_step: float, sinks: Iterable[str], active: bool = True,
                 since: float = 0):
        """Opens metrics.jsonl and the sinks.

        Args:
          workdir, restored_step: as in `Sink.open`.
          sinks: names of sinks.
          active: whether this is process 0.
          since: as in `JsonLines`.

        Raises:
          UserError: a sink is unknown, or metrics.jsonl cannot be written.
        """
        self.jsonl = JsonLines(workdir / "metrics.jsonl", restored_step, since=since) if active else None
        self.sinks: dict[str, Sink] = {}
        for name in sinks if active else ():
            self._made(name, metric_sinks.find(name))
        self._each(lambda sink: sink.open(workdir, restored_step))

    def has(self, step: int, name: str) -> bool:
        """Returns whether metrics.jsonl had the metric of the step when it was opened; False on other processes."""
        return self.jsonl is not None and (step, name) in self.jsonl.seen

    def write_config(self, config: ConfigDict) -> None:
        """Writes the fields of a run's config to the sinks."""
        fields = {name: value if isinstance(value, bool | int | float | str) else str(tuple(value))
                  for name, value in param_tree.flat(config).items()}
        self._each(lambda sink: sink.write_config(fields))

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes name → value; metrics.jsonl has null for values that are not finite, since JSON has no NaN."""
        if self.jsonl:
            self.jsonl.write(step, {k: float(v) if np.isfinite(v) else None for k, v in values.items()})
        self._each(lambda sink: sink.write_scalars(step, values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a figure, uint8 [height, width, 3], such as pictures/<name>_<step>.png."""
        self._each(lambda sink: sink.write_image(step, name, image))

    def flush(self) -> None:
        """Makes everything written so far durable."""
        if self.jsonl:
            self.jsonl.flush()
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Writes what is pending and closes the sinks."""
        if self.jsonl:
            self.jsonl.flush(FINAL_RETRY_SECONDS)
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                call(sink)
            except Exception as error:  # a missing package, a full disk, an unreachable bucket: none must end a run
                _tell(sink.what, error)
                del self.sinks[name]

    def _made(self, name: str, kind: type[Sink]) -> None:
        try:
            self.sinks[name] = kind()
        except Exception as error:
            _tell(kind.what, error)


def _tell(what: str, error: Exception) -> None:
    logger.warning("no %s from here on: %s", what, str(error).split("\n")[0] or type(error).__name__)
