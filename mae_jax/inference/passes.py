"""A pass of an encoder over a part: outputs per image, and the images that could not be read."""

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

FIELDS = ("label", "labels", "id", "valid")  # fields of a batch that are returned with the outputs


class Rows(NamedTuple):
    """Results for n consecutive images of a part.

    Attributes:
      first: index of the first image in the part.
      outputs, sums: results of the function of `rows_of`: arrays [n, ...], and sums over the batch.
      fields: `label` int32 [n]; `valid` bool [n], False for an unreadable image, which a gray one replaced; with
        several labels per image, `labels` uint8 [n, C].
      reasons: index in these rows → reason, for images that are not valid. Complete on process 0; other processes have
        only the reasons of their own images.
    """

    first: int
    outputs: Any
    sums: Any
    fields: dict[str, np.ndarray]
    reasons: dict[int, str]


def rows_of(encoder: Encoder, part: Part, key: Any, function: Callable[..., tuple[Any, Any]], tell: Tell,
            first: int = 0, renumber: np.ndarray | None = None) -> Iterator[Rows]:
    """Applies a function to the images of a part, in order; all processes must iterate together.

    Args:
      encoder: its parameters are the function's arguments.
      part: the images.
      key: identifies the compiled function in the encoder's cache.
      function: (params, extras, batch) → (tree of arrays [B, ...], tree of sums over the batch).
      tell: called with the number of images after each batch.
      first: index of the first image.
      renumber: int32 [classes of the part], maps the part's labels to new labels; None: unchanged.
    """
    spec = Method.eval_spec(encoder.method)
    for field in ("labels", "pixel_label"):
        if field in part.source.fields and field in (own := encoder.method.eval_spec()):
            spec[field] = own[field]
    if encoder.method.task == "detection":  # these fields include the image's position in its canvas
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
    """Returns a function for `rows_of` that computes features, flattened to float32 [B, values]."""
    compute = encoder.program(features, block)

    def function(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, tuple[()]]:
        found = compute(params, extras, batch)
        return found.reshape(len(found), -1).astype(jnp.float32), ()

    return function


def _learn(bad: deque[str], why: dict[str, str]) -> None:
    """Gathers 'name: reason' of all processes into `why` of process 0; all processes must call it together."""
    told = []
    while bad:
        told.append(bad.popleft())
    for text in (text for texts in peers.gather(told) for text in texts):
        for colon in re.finditer(": ", text):  # names may contain ': ' too
            why.setdefault(text[:colon.start()], text[colon.end():])


def _renumbered(batch: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
    label = batch["label"]
    return {**batch, "label": np.where(label < 0, label, numbers[np.maximum(label, 0)]).astype(np.int32)}


def summary_of_unreadable(names: list[tuple[str, str]], count: int, listed: int = 20) -> str:
    """Returns lines that list images that could not be read; '' if there are none.

    Args:
      names: (name, reason) of the first ones.
      count: number of all.
      listed: most images to list.
    """
    if not count:
        return ""
    lines = [f"  {name}: {printable(reason)}" for name, reason in names[:listed]]
    more = [f"  ... and {count - len(lines)} more"] * (count > len(lines))
    return "\n".join([f"{count} image{'s' * (count > 1)} could not be read:", *lines, *more])
