"""The work of `report`: reads the runs, embeds images, and writes the page."""

from ml_collections import ConfigDict

from mae_jax import errors
from mae_jax.commands.report import map_data, page, record
from mae_jax.errors import UserError
from mae_jax.inference import asked, embedding
from mae_jax.storage import paths, weight_files


def write(folders: list[str], to: str, embeddings: str, images: str, config: ConfigDict | None,
          most: int, tsne_most: int) -> int:
    """Writes the page. Returns the exit code.

    The arguments are the flags --from, --to, --embeddings, --images, --config, --max_images and --tsne_images.

    Raises:
      UserError: flags that do not fit each other, or an input that cannot be read.
    """
    target = paths.locate(to, "--to")
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--to={to}: the page's name must end in .html")
    if not folders and not embeddings:
        raise UserError("--from or --embeddings must be given; --help shows an example")
    embeds = bool(images) or config is not None
    if embeds and embeddings:
        raise UserError("give either --embeddings, or --images or --config, which are embedded first")
    if embeds and len(folders) != 1:
        raise UserError(f"--images and --config are embedded by one encoder; give one --from, not {len(folders)}")
    weights = [folder for folder in folders if weight_files.file_of(paths.locate(folder, "--from"))]
    if weights and not (embeds or embeddings):
        raise UserError(f"--from={weights[0]} is a file of weights, not a run; add --images=FOLDER to map images by it")
    runs = [folder for folder in folders if folder not in weights]  # weights appear in the map only
    records = [record.read(folder, name) for folder, name in zip(runs, record.names_of(runs), strict=True)]
    if target.is_dir():
        raise UserError(f"--to={to} is a folder; expected the name of a file")
    paths.make_folder(target.parent)
    if embeds:
        features = target.with_suffix(".parquet")
        encoder, parts = asked.opened(folders[0], images, config, "", all_splits=True)
        found = embedding.embed(encoder, parts, features, images=images)
        print(embedding.told(found))
    else:
        features = paths.locate(embeddings, "--embeddings") if embeddings else None
    drawn = map_data.made(features, most, tsne_most) if features else None
    content = page.made(records, drawn, folders[0] if folders else embeddings).encode()
    paths.replace_bytes(target, content)
    print(f"{target}: {len(content) / 1e6:.1f} MB")
    if embeds:
        return asked.exit_code(encoder, found.images, found.unreadable_count)
    return errors.FINISHED
