"""Weights of a Hugging Face Hub repository, hf://owner/name[@revision], through huggingface_hub (extra `hub`).

Only weights and their configuration files are downloaded, into huggingface_hub's cache; never code.
"""

import functools
import logging
import os
import re

from mae_jax.errors import UserError, printable
from mae_jax.runtime import bounded_json

logger = logging.getLogger(__name__)

SCHEME = "hf://"
PATTERN = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BESIDE = ("config.json", "preprocessor_config.json")


def check(source: str, flag: str = "") -> tuple[str, str | None]:
    """Parses hf://owner/name[@revision]; returns owner/name and the revision, None for the newest.

    Raises:
      UserError: `source` does not have this form; the message names `flag`.
    """
    match = PATTERN.fullmatch(source.rstrip("/"))
    if not match or ".." in source:
        raise UserError(f"{f'{flag}=' if flag else ''}{printable(source)} names no repository of the hub; expected "
                        "hf://owner/name or hf://owner/name@revision")
    return match[1], match[2]


@functools.cache  # the hub is queried once per process
def fetched(source: str) -> str:
    """Downloads a repository's weights; returns their folder in huggingface_hub's cache.

    Raises:
      UserError: huggingface_hub is missing, the repository does not exist or is not accessible, it has no weights in a
        known format, or the hub cannot be reached and the weights are not in the cache.
    """
    repository, revision = check(source)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "huggingface_hub":
            raise
        raise UserError(f"{source} needs huggingface_hub; run: pip install 'mae_jax[hub]'") from None
    unreached = ""  # why the hub could not be reached

    def file(name: str, at: str | None) -> str:
        """Returns the local path of a file; '' if the repository, or without a connection the cache, lacks it."""
        nonlocal unreached
        try:
            return huggingface_hub.hf_hub_download(repository, name, revision=at)
        except errors.LocalEntryNotFoundError as error:
            unreached = " ".join(str(error.__cause__ or error).split())[:200]
        except errors.EntryNotFoundError:
            pass
        except errors.RevisionNotFoundError:
            raise UserError(f"{source}: the repository has no revision {revision!r}") from None
        except errors.GatedRepoError:
            raise UserError(f"{source} is gated: accept its terms on the hub, then run `hf auth login` here") from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"{source}: there is no such repository, or it is private; for a private one, run "
                            "`hf auth login`") from None
        except (errors.HfHubHTTPError, OSError) as error:
            raise UserError(f"{source} cannot be fetched: {' '.join(str(error).split())[:200]}") from None
        return ""

    found = next(filter(None, (file(name, revision) for name in WEIGHTS)), "")
    if not found and unreached:
        raise UserError(f"{source}: the hub cannot be reached, and the cache here has none of its weights: {unreached}")
    if not found:
        raise UserError(f"{source} holds none of {', '.join(WEIGHTS)}")
    folder = os.path.dirname(found)
    commit = os.path.basename(folder)
    for name in _parts(found):
        if not file(name, commit) and unreached:
            raise UserError(f"{source}: the hub cannot be reached, and the cache here lacks {name}: {unreached}")
    unreached = ""
    unknown = [name for name in BESIDE if not file(name, commit) and unreached]
    if unknown:
        logger.warning("%s: the hub cannot be reached, and the cache here has no %s: heads, image size or "
                       "normalization may differ from the values that are used (%s)", source, " and no ".join(unknown),
                       unreached)
    logger.info("%s: %s of commit %s, in %s", source, os.path.basename(found), commit[:12], folder)
    return folder


def _parts(file: str) -> list[str]:
    """Returns the file names in an index of weights, without invalid names, which the reader of the index refuses."""
    if not file.endswith(".index.json"):
        return []
    with open(file, "rb") as opened:
        try:
            where = bounded_json.parse_object(opened.read()).get("weight_map")
        except ValueError:
            return []
    names = where.values() if isinstance(where, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)})
