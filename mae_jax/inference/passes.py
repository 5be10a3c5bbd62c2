"""One pass of an encoder over a part of the images: outputs row by row, and which images could not be read."""

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import printable
from mae_jax.inference import forward
from mae_jax.inference.encoder import Encoder
from mae_jax.inference.parts import Part
from mae_jax.methods.base import Batch, Method
from mae_jax.runtime import peers, sharding
from mae_jax.runtime.progress import Tell

FIELDS = ("label", "labels", "id", "valid")  # of a batch, that come along with what is computed of it


class Rows(NamedTuple):
    """Images that lie in order, from the number `first` of their part on.

    Attributes:
      first: number of the first one.
      outputs, sums: of the function that `rows_of` is given; rows of n images, and what is added up of the batch.
      fields: `label` int32 [n], `valid` bool [n], False where a gray image stood in; of several labels `labels` uint8
        [n, C].
      reasons: why, for each that is not valid: its place in these rows → text. On the first process; the others know
        their own alone.
    """

    first: int
    outputs: Any
    sums: Any
    fields: dict[str, np.ndarray]
    reasons: dict[int, str]


def rows_of(encoder: Encoder, part: Part, key: Any, function: Callable[..., tuple[Any, Any]], tell: Tell,
            first: int = 0, renumber: np.ndarray | None = None) -> Iterator[Rows]:
    """Yields what a function makes of the images of a part, in order; all processes go along.

    Args:
      encoder: whose parameters the function is given.
      part: the images.
      key: by which the compiled function is kept.
      function: (params, extras, batch) → (tree of arrays [B, ...], tree of sums over the batch).
      tell: is told of progress.
      first: number of the image to begin with.
      renumber: int32 [classes of the part]: the label that each is; None: the same.
    """
    spec = Method.eval_spec(encoder.method)
    for field in ("labels", "pixel_label"):
        if field in part.source.fields and field in (own := encoder.method.eval_spec()):
            spec[field] = own[field]
    if encoder.method.task == "detection":  # where an image lies in its canvas comes with the fields of its objects
        spec |= encoder.method.eval_spec()
    bad: deque[str] = deque()
    rows = sharding.local_rows(encoder.mesh, encoder.batch_size)
    batches = part.batches(spec, rows, bad, first)
    if renumber is not None:
        batches = (_renumbered(batch, renumber) for batch in batches)
    program = encoder.compiled((key, tuple(spec)), lambda params, extras, batch: (
        function(params, extras, batch), {name: batch[name] for name in FIELDS if name in batch}))
    why: dict[str, str] = {}
    for (outputs, sums), fields in forward.outputs(program, encoder.params, encoder.extras, batches, encoder.mesh,
                                                   encoder.batch_size):
        there = fields.pop("id") >= 0
        outputs, fields = jax.tree.map(lambda x: x[there], (outputs, fields))  # noqa: B023 (called at once)
        fields["valid"] = fields["valid"] > 0
        lost = np.flatnonzero(~fields["valid"])
        if len(lost):
            _learn(bad, why)
        reasons = {int(row): why.pop(part.name(first + int(row)), "it cannot be read") for row in lost}
        yield Rows(first, outputs, sums, fields, reasons)
        first += int(there.sum())
        tell(int(there.sum()))


def features_of(encoder: Encoder, features: str, block: int) -> Callable[..., tuple[jax.Array, tuple[()]]]:
    """Returns the function to features, float32 [B, values]: each image's in one row."""
    compute = encoder.program(features, block)

    def function(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, tuple[()]]:
        found = compute(params, extras, batch)
        return found.reshape(len(found), -1).astype(jnp.float32), ()

    return function


def _learn(bad: deque[str], why: dict[str, str]) -> None:
    """Moves 'name: reason' of all processes, which call it alike, to `why` of the first one."""
    told = []
    while bad:
        told.append(bad.popleft())
    for text in (text for texts in peers.gather(told) for text in texts):
        for colon in re.finditer(": ", text):  # a name may have one in it
            why.setdefault(text[:colon.start()], text[colon.end():])


def _renumbered(batch: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
    label = batch["label"]
    return {**batch, "label": np.where(label < 0, label, numbers[np.maximum(label, 0)]).astype(np.int32)}


def summary_of_unreadable(names: list[tuple[str, str]], count: int, listed: int = 20) -> str:
    """Returns lines that name images which could not be read, '' for none.

    Args:
      names: (name, reason), of the first ones.
      count: how many there are.
      listed: lines at most.
    """
    if not count:
        return ""
    lines = [f"  {name}: {printable(reason)}" for name, reason in names[:listed]]
    more = [f"  ... and {count - len(lines)} more"] * (count > len(lines))
    return "\n".join([f"{count} image{'s' * (count > 1)} could not be read:", *lines, *more])
