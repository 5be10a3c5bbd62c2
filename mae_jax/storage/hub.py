"""Weights of a repository of the Hugging Face hub, hf://owner/name[@revision], through huggingface_hub (extra `hub`).

Weights and what describes them are fetched into its cache, and nothing else of the repository: no code.
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
    """Returns owner/name and the revision, None for the newest; raises UserError for what names no repository."""
    match = PATTERN.fullmatch(source.rstrip("/"))
    if not match or ".." in source:
        raise UserError(f"{f'{flag}=' if flag else ''}{printable(source)} names no repository of the hub; expected "
                        "hf://owner/name or hf://owner/name@revision")
    return match[1], match[2]


@functools.cache  # one look at the hub in a process
def fetched(source: str) -> str:
    """Returns the local folder of a repository's weights, as huggingface_hub's cache has them.

    Raises:
      UserError: huggingface_hub is missing, the repository is not there or is not open to us, it holds no weights that
        are read, or the hub cannot be reached and they are not in the cache.
    """
    repository, revision = check(source)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "huggingface_hub":
            raise
        raise UserError(f"{source} needs huggingface_hub; run: pip install 'mae_jax[hub]'") from None
    unreached = ""  # why, where the hub could not be asked

    def file(name: str, at: str | None) -> str:
        """Returns the local path of a file, '' where the repository has none, or the cache has none of it."""
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
            raise UserError(f"{source}: its owner asks you to accept terms first, at the hub, and then for "
                            "`hf auth login` here") from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"{source}: there is no such repository, or it is private; `hf auth login` says who you "
                            "are") from None
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
                       "normalization may be other ones than what is taken now (%s)", source, " and no ".join(unknown),
                       unreached)
    logger.info("%s: %s of commit %s, in %s", source, os.path.basename(found), commit[:12], folder)
    return folder


def _parts(file: str) -> list[str]:
    """Returns the names of the parts that an index of weights names; those that lead elsewhere its reader refuses."""
    if not file.endswith(".index.json"):
        return []
    with open(file, "rb") as opened:
        try:
            where = bounded_json.parse_object(opened.read()).get("weight_map")
        except ValueError:
            return []
    names = where.values() if isinstance(where, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)})
