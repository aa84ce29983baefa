"""Models by their id on the Hugging Face Hub (`owner/name`), through huggingface_hub and its cache, and that cache's
directories by their path.

The library's own variables hold for it: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN.
"""

import re
from collections.abc import Callable, MutableMapping
from pathlib import Path

from sdpo_megatron.errors import ConfigError, UserError

MAIN = "main"
"""The revision that is taken where none is named."""
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
SAFETENSORS = ("*.safetensors", "model.safetensors.index.json")
BINARIES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
UNUSED = ("*/*", "consolidated*")
"""The same weights in other formats, as some makers add."""

LONGEST_ID = 96
"""Characters, by the Hub's rules."""
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"{_PART}/{_PART}")


def is_hub_id(text: str) -> bool:
    """Returns whether `text` has the form of a model's id. A directory of that name has precedence; see
    `resolve_model_path`."""
    return len(text) <= LONGEST_ID and bool(_ID.fullmatch(text)) and not re.search(r"--|\.\.|\.git$", text)


def fetch(
    name: str,
    revision: str | None,
    snapshots: MutableMapping[str, str],
    *,
    key: str,
    announce: Callable[[str], None] = lambda message: None,
) -> Path:
    """Returns the snapshot of the model `name` in the library's cache, after what it lacks was downloaded.

    `revision` is a branch, a tag or a commit; None is MAIN. `snapshots` holds, by id and revision, directories that are
    taken as long as they are there, without a question to the Hub; the one found is added. `key` is the setting that
    named the model. Raises UserError, with a way around, where the model cannot be had."""
    wanted = f"{name}@{revision or MAIN}"
    if Path(snapshots.get(wanted, "")).is_absolute() and Path(snapshots[wanted]).is_dir():
        return Path(snapshots[wanted])
    announce(f"Looking for {wanted} on the Hugging Face Hub and in its cache")
    snapshots[wanted] = str(_download(name, revision, key))
    return Path(snapshots[wanted])


def _download(name: str, revision: str | None, key: str) -> Path:
    import httpx2
    from huggingface_hub import constants, errors, snapshot_download

    def download(*weights: str) -> Path:
        patterns = [*BESIDE_WEIGHTS, *weights]
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(UNUSED))
        )

    option = "" if revision is None else f" --revision {revision}"
    elsewhere = f"hf download {name}{option} --local-dir DIR, where it can be had, and set {key}=DIR"
    try:
        directory = download(*SAFETENSORS)
        return directory if any(directory.glob("*.safetensors")) else download(*BINARIES)
    except errors.GatedRepoError:
        reason = (
            "is shown to those alone whom its owners admit; ask for that on its page, then run: hf auth login"
        )
    except errors.RepositoryNotFoundError:
        reason = "is not there, or is private; correct the id, or run: hf auth login"
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{key}: the model {name} of the Hugging Face Hub has no revision '{revision or MAIN}'; correct "
            f"{key.removesuffix('path')}revision."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        offline = constants.is_offline_mode()
        why = "HF_HUB_OFFLINE is set" if offline else _first_line(error.__cause__ or error)
        reason = f"is not whole in the cache {constants.HF_HUB_CACHE}, and cannot be fetched ({why})"
    # hf_xet, which moves large files, raises RuntimeError
    except (httpx2.HTTPError, OSError, RuntimeError) as error:
        reason = f"could not be fetched into {constants.HF_HUB_CACHE} ({_first_line(error)})"
    raise UserError(
        f"{key}: there is no directory {name}, and the model {name} of the Hugging Face Hub {reason}. Or run: "
        f"{elsewhere}."
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def snapshot_in(directory: Path, key: str = "model.path") -> Path:
    """Returns the model directory that `directory`, the value of `key`, means: itself, or where it is a model's folder
    in the library's cache (models--OWNER--NAME), its MAIN snapshot, or its only one."""
    snapshots = directory / "snapshots"
    if not directory.is_dir() or not snapshots.is_dir() or (directory / "config.json").exists():
        return directory
    main = directory / "refs" / MAIN
    if (
        main.is_file()
        and (commit := main.read_text(encoding="utf-8").strip())
        and (snapshots / commit).is_dir()
    ):
        return snapshots / commit
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    which = f"give one of them: {', '.join(map(str, found))}" if found else "download the model again"
    raise ConfigError(
        f"{key}: {directory} is a folder of the Hugging Face Hub's cache with {len(found)} snapshots, none of them "
        f"its {MAIN}; {which}."
    )
