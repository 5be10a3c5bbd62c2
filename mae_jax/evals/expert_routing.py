"""Expert routing of MoCE: share of images and clusters per expert, information about the label, images per expert."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.evals.image_grid import tile
from mae_jax.methods.base import Batch, Method
from mae_jax.methods.moce import MoCE
from mae_jax.models.intermediates import block_name

IMAGES_PER_EXPERT = 10
MAX_SEARCHED_IMAGES = 4096  # images that are searched for them


class ExpertRouting(Evaluation):
    """The metrics of `figures` and the image of `picture`, for a MoCE with cluster-conditional gates."""

    name = "expert_routing"

    def applies(self, method: Method, data: Any) -> bool:
        return isinstance(method, MoCE) and not method.by_token

    def metric_names(self, method: MoCE, data: Any) -> list[str]:
        blocks, experts = [block_name(block) for block in method.blocks], range(method.config.method.experts)
        names = [f"{what}/{block}/{i}" for block in blocks for what in ("share", "clusters") for i in experts]
        return names + [f"label_information/{block}" for block in blocks] * (len(data.classes) > 1)

    def scalars(self, ctx: Context) -> dict[str, float]:
        rows = ctx.held_out.rows
        return figures(ctx.method, ctx.params, ctx.extras, rows["cluster"], rows["label"]) if rows else {}

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        yield "experts", picture(ctx.method, ctx.params, ctx.extras, ctx.batches())


def routes(method: MoCE, params: Any, extras: Any) -> dict[int, np.ndarray]:
    """Returns block → expert of each cluster, int [m], without gate noise."""
    table = jax.jit(method.probabilities)(params, extras)  # sharded over processes where the centroids are
    return {block: _whole(each).argmax(1) for block, each in table.items()}


def _whole(values: jax.Array) -> np.ndarray:
    return np.asarray(process_allgather(values, tiled=True))


def figures(method: MoCE, params: Any, extras: Any, cluster: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Returns routing metrics for each block with experts; {} without images.

    'share/<block>/<expert>', the share of images, 0 to 1; 'clusters/<block>/<expert>', the number of clusters; and,
    for at least two labels, 'label_information/<block>': I(expert; label) / H(label), 0 to 1.

    Args:
      method: a MoCE with cluster-conditional gates.
      params, extras: the state of the method.
      cluster, label: int [n] of the images; label is -1 for unlabeled images.
    """
    if not len(cluster):
        return {}
    out: dict[str, float] = {}
    for block, expert in routes(method, params, extras).items():
        name, count = block_name(block), method.config.method.experts
        own = expert[cluster]
        shares, clusters = (np.bincount(which, minlength=count) for which in (own, expert))
        out |= {f"share/{name}/{i}": float(share) for i, share in enumerate(shares / len(own))}
        out |= {f"clusters/{name}/{i}": float(number) for i, number in enumerate(clusters)}
        known = label >= 0
        if len(np.unique(label[known])) > 1:
            out[f"label_information/{name}"] = information(own[known], label[known])
    return out


def information(choice: np.ndarray, label: np.ndarray) -> float:
    """Returns I(choice; label) / H(label), the normalized mutual information of two integer arrays [n]."""
    joint = np.zeros((choice.max() + 1, label.max() + 1))
    np.add.at(joint, (choice, label), 1 / len(choice))

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    of_label = entropy(joint.sum(0))
    return (entropy(joint.sum(1)) + of_label - entropy(joint.ravel())) / of_label


def picture(method: MoCE, params: Any, extras: Any, batches: Iterator[Batch]) -> np.ndarray:
    """Draws one row for each block and expert: the first images that are routed to it, uint8 [height, width, 3].

    Searches the first MAX_SEARCHED_IMAGES images, until each expert that has clusters has IMAGES_PER_EXPERT.
    """
    config, table = method.config, routes(method, params, extras)
    count, share = config.method.experts, _whole(extras["share"])
    rows: dict[tuple[int, int], list[np.ndarray]] = {(block, i): [] for block in table for i in range(count)}
    used = {(block, int(i)) for block, expert in table.items() for i in np.unique(expert)}
    for batch in itertools.islice(batches, -(-MAX_SEARCHED_IMAGES // config.batch_size)):
        cluster, valid = _whole(batch["cluster"]), _whole(batch["valid"]) > 0
        wanted = {(block,
                   i): np.flatnonzero(valid & (table[block][cluster] == i))[: IMAGES_PER_EXPERT - len(rows[block, i])]
                  for block, i in used}
        if any(map(len, wanted.values())):
            patches, order = _whole(batch["patches"]), _whole(batch["order"])
            for each, own in wanted.items():
                rows[each] += list(method.grid.unpatchify(patches[own], order[own]))
        if all(len(rows[each]) == IMAGES_PER_EXPERT for each in used):
            break
    blank = np.full((*config.data.image_size, 3), 255, np.uint8)
    names = [f"block {block}, expert {i}\n{(table[block] == i).sum()} of {method.num_clusters} clusters,\n"
             f"{share[table[block] == i].sum():.0%} of images" for block, i in rows]
    return tile([[*seen, *[blank] * (IMAGES_PER_EXPERT - len(seen))] for seen in rows.values()],
                [""] * IMAGES_PER_EXPERT,
                "what each expert sees", names)
