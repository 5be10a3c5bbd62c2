"""How balanced are clusters of images, and what does balancing cost compared with plain k-means?

  python studies/balance/study.py runs/mae_of_photographs runs/mae_of_clipart     (of trained encoders)

For each workdir and 16 and 64 clusters: the number of images, the sizes of the smallest and the largest cluster, and
the mean similarity of an image to its own centroid, compared with that of k-means before balancing. Writes
studies/balance/results.md and .json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from mae_jax.commands.cluster.images import cluster
from mae_jax.data.cluster_ids import Clusters
from mae_jax.training import workdir

RESULTS = Path(__file__).parent
CLUSTERS, RATIO = (16, 64), 3.0


def measured(source: str, clusters: int) -> dict[str, Any]:
    """Clusters the images of a workdir in a temporary folder, and returns what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        cluster(source, folder, clusters, -1, RATIO, 0, None)
        found = Clusters.read(folder)
    return {"data": workdir.read_config(epath.Path(source)).data.source, "clusters": clusters,
            "pictures": int(found.sizes.sum()), "smallest": int(found.sizes.min()), "largest": int(found.sizes.max()),
            "similarity": found.meta["similarity"], "of k-means": found.meta["similarity_of_kmeans"]}


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the Markdown."""
    out = ["| data | clusters | images | smallest | largest | largest / smallest | similarity | of k-means | share |",
           "|---" * 9 + "|"]
    out += [f"| {line['data']} | {line['clusters']} | {line['pictures']} | {line['smallest']} | {line['largest']} | "
            f"{line['largest'] / line['smallest']:.2f} | {line['similarity']:.3f} | {line['of k-means']:.3f} | "
            f"{line['similarity'] / line['of k-means']:.3f} |" for line in lines]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
    options = parser.parse_args()
    lines = [measured(source, clusters) for source in options.workdirs for clusters in CLUSTERS]
    (RESULTS / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
    (RESULTS / "results.md").write_text(table(lines))
    print(table(lines))


if __name__ == "__main__":
    main()
