"""Turn what a person typed as MODEL into a folder or a GGUF file on disk.

Owns hub ids and the hub's own client, cache, token and offline switches. Never opens what it finds.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abliterate.checkpoint.folder import FOREIGN_WEIGHTS
from abliterate.errors import CheckpointError, HubError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
#: Never downloaded: weights of other frameworks, and the original-format copies some repositories carry.
_IGNORED = [f"*{ending}" for ending in FOREIGN_WEIGHTS if ending != ".safetensors"] + ["original/*", "consolidated*"]


def resolve_model(model: str) -> Path:
    """The folder or GGUF file `model`, else the hub's snapshot of `org/name` or `org/name@revision`.

    Raises:
        CheckpointError: neither a folder, nor a GGUF file, nor a hub id.
        HubError: the hub is unreachable, or does not know the id or revision, or wants a token.
    """
    if not model.strip():
        raise CheckpointError("MODEL is empty; expected a checkpoint folder, a GGUF file or a hub id org/name")
    path = first_part(Path(model).expanduser())
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_dir() or (is_gguf and path.is_file()):
        return path
    if is_gguf:
        raise CheckpointError(f"{model}: no such GGUF file; check the path")
    if path.is_file():
        raise CheckpointError(f"{model}: a file; expected the checkpoint folder that holds it and its config.json")
    if hub_name(model) is None:
        raise CheckpointError(
            f"{model}: no such folder, and not a hub id (org/name or org/name@revision); check the path"
        )
    return download(model)


def first_part(path: Path) -> Path:
    """The first part of the split GGUF that is called `path` as a whole; `path` itself where there is none.

    Results are called `e.gguf` by whoever asks for them, and lie as `e-00001-of-00003.gguf` and so on where their
    source was split like that.
    """
    if path.suffix.lower() != ".gguf" or path.exists():
        return path
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-00001-of-?????.gguf"))
    return parts[0] if len(parts) == 1 else path


def hub_name(model: str) -> str | None:
    """The `org/name` that `model` names on the hub, without its revision; None for a folder."""
    path = Path(model)
    if _HUB_ID.fullmatch(model) is None or path.is_dir() or (path.parent.is_dir() and str(path.parent) != "."):
        return None
    return model.partition("@")[0]


def download(hub_id: str, repo_type: str = "model", file: str | None = None) -> Path:
    """The cached snapshot folder of a hub id with an optional `@revision`, fetched where it is not complete.

    With `file`, that one alone is fetched; the folder lacks it where the hub has none of that name.

    Raises:
        HubError: the hub is unreachable, or does not know the id or revision, or wants a token.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    with _plain_errors(hub_id, repo_type):
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                repo_type=repo_type,
                allow_patterns=None if file is None else glob.escape(file),
                ignore_patterns=_IGNORED if repo_type == "model" else None,
            )
        )


def files_on_hub(hub_id: str, repo_type: str) -> list[str]:
    """The names of all files that the hub has under an id with an optional `@revision`, sorted.

    Raises:
        HubError: as `download`.
    """
    from huggingface_hub import HfApi

    name, _, revision = hub_id.partition("@")
    with _plain_errors(hub_id, repo_type):
        return sorted(HfApi().list_repo_files(name, revision=revision or None, repo_type=repo_type))


@contextmanager
def _plain_errors(hub_id: str, repo_type: str) -> Iterator[None]:
    """What the hub's client raises, as errors of ours."""
    from huggingface_hub import errors as hub

    # These bases are OSError and the root of the errors of the library beneath the client, httpx or httpx2.
    failed: tuple[type[Exception], ...] = (*hub.HfHubHTTPError.__bases__, hub.HFValidationError)
    name, _, revision = hub_id.partition("@")
    try:
        yield
    except hub.GatedRepoError:
        raise HubError(
            f"{name}: gated on the hub; accept its terms on its page, then log in with 'hf auth login' or set HF_TOKEN"
        ) from None
    except hub.RepositoryNotFoundError:
        raise HubError(
            f"{hub_id}: no such folder here and no such {repo_type} on the hub (or it is private: set HF_TOKEN)"
        ) from None
    except hub.RevisionNotFoundError:
        raise HubError(f"{hub_id}: the hub has no revision '{revision}' of {name}; try the name alone") from None
    except failed as error:
        raise HubError(_unreachable(hub_id, error)) from None


def _unreachable(hub_id: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    return (
        f"{hub_id}: not found here, and the hub could not be reached ({reason}); "
        "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or give a path"
    )
