"""A model of the hub by its id: its small files are downloaded, its weights are read by ranges until they are loaded.

"org/name" is a repository, "org/name:Q4_K_M" and "org/name/file.gguf" are one GGUF model of it. A model is found in the
hub's own cache, where huggingface_hub puts it: HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pymllm.disk import free_bytes
from pymllm.errors import CheckpointError, nearest
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.gguf_choice import choose_gguf, gguf_models
from pymllm.weights.hub_errors import hub_failures, is_offline, refused
from pymllm.weights.remote import RemoteFile, register, remote_file

SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Other copies of the weights (original/, onnx/); sentence-transformers numbers its modules (2_Dense/).
NOT_DOWNLOADED = ["[!0-9]*/*.safetensors"]
MODULE_WEIGHTS = re.compile(r"[0-9][^/]*/[^/]+\.safetensors")
HUB_NAME = re.compile(
    r"(?:(?:https://)?(?:hf\.co|huggingface\.co)/)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
    r"(?::(?P<tag>[\w.-]+(?:/[\w.-]+)*)|/(?P<file>(?:[\w.-]+/)*[\w.-]+\.gguf))?",
    re.IGNORECASE,
)

logger = logging.getLogger("pymllm")


@dataclass(frozen=True)
class HubName:
    """A hub id taken apart.  asked: a tag or file of a GGUF model; None: the repository's only, or usual, model."""

    repo: str
    asked: str | None

    def __str__(self) -> str:
        return self.repo if self.asked is None else f"{self.repo}:{self.asked}"


def parse_hub_name(text: str) -> HubName | None:
    """Read a hub id; None for what is none."""
    match = HUB_NAME.fullmatch(text)
    return None if match is None else HubName(match["repo"], match["tag"] or match["file"])


def find_model(name: HubName, revision: str | None, download: bool) -> Path:
    """Find the folder, or the .gguf file, of a model in the hub's cache.

    download: whether to have all of its files there; else only the small ones: `remote_file` knows the others.
    Raises CheckpointError "model-not-found" or "gguf-tag".
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name.repo, revision=revision, files_metadata=True)
    except hub_failures() as error:
        if not is_offline(error):
            raise refused(name.repo, error, revision=revision, near=_near(name, revision, error)) from error
        return _find_cached(name, revision, error)
    commit = info.sha or "main"
    files = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    if name.asked is None and not _is_only_gguf(files):
        chosen = None
        folder = _snapshot(name.repo, revision, commit, DOWNLOADED if download else SMALL)
    else:
        model, several = choose_gguf(name.repo, name.asked, files)
        chosen = model.files
        if several:
            logger.warning("%s holds several models: this is %s", name.repo, model.tag)
        folder = _folder(name.repo, commit)
        if download and not all((folder / file).exists() for file in chosen):
            folder = _snapshot(name.repo, revision, commit, list(chosen))
    for file, size in files.items():
        if not (folder / file).exists():
            url = huggingface_hub.hf_hub_url(
                name.repo, file, revision=commit, endpoint=huggingface_hub.constants.ENDPOINT
            )
            register(RemoteFile(folder / file, file, name.repo, commit, url, size, revision))
    return folder if chosen is None else folder / chosen[0]


def _folder(repo: str, commit: str) -> Path:
    """Return the folder that the cache has for a commit of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name / "snapshots" / commit


def _is_only_gguf(files: Sequence[str] | dict[str, int]) -> bool:
    weights = [file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    return not weights and bool(gguf_models(dict.fromkeys(files, 0)))


def _snapshot(repo: str, revision: str | None, commit: str, patterns: list[str]) -> Path:
    """Download the files of a commit that patterns name, with the hub's own progress, resumption and locks."""
    import huggingface_hub

    try:
        # By its revision's name, so that the cache knows that name offline, too.
        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_DOWNLOADED
        )
        if Path(found).name != commit:
            found = huggingface_hub.snapshot_download(
                repo, revision=commit, allow_patterns=patterns, ignore_patterns=NOT_DOWNLOADED
            )
    except hub_failures() as error:
        raise refused(repo, error, revision=revision) from error
    return Path(found)


def _find_cached(name: HubName, revision: str | None, error: BaseException) -> Path:
    """Find a model in the cache where the hub was not reached; raise that error where it is not there."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            name.repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=DOWNLOADED if name.asked is None else ["*.gguf"],
            ignore_patterns=NOT_DOWNLOADED,
        )
    except hub_failures():
        raise refused(str(name), error, revision=revision) from error
    folder = Path(found)
    files = {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }
    if name.asked is not None or _is_only_gguf(files):
        return folder / choose_gguf(name.repo, name.asked, files)[0].files[0]
    if not any(file.endswith((".safetensors", ".bin")) for file in files):  # a plan has left its small files
        raise refused(str(name), error, revision=revision)
    return folder


def _near(name: HubName, revision: str | None, error: BaseException) -> str:
    """Name the revisions that are like one that is not there."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    if not isinstance(error, RevisionNotFoundError) or revision is None:
        return ""
    try:
        refs = huggingface_hub.HfApi().list_repo_refs(name.repo)
    except hub_failures():
        return ""
    return nearest(revision, [ref.name for ref in (*refs.branches, *refs.tags)])


def download_weights(checkpoint: Checkpoint) -> None:
    """Download the files of a checkpoint that were only read by ranges, and check that they are what was read.

    Raises CheckpointError "changed" where they are not; "disk-full", with numbers and before any download, where the
    cache's disk has no room for them.
    """
    wanted = [remote for file in checkpoint.files if (remote := remote_file(file.path)) is not None]
    if wanted:
        first = wanted[0]
        wanted += _module_weights(checkpoint.path)
        _check_room(first, sum(file.size for file in wanted))
        _snapshot(first.repo, first.revision, first.commit, sorted({file.name for file in wanted}))
    for file in checkpoint.files:
        file.settle()


def _module_weights(folder: Path) -> list[RemoteFile]:
    """Find the weights of sentence-transformers' modules, which lie in numbered folders beside the model."""
    from pymllm.weights.remote import remote_files

    return [file for file in remote_files(folder) if MODULE_WEIGHTS.fullmatch(file.name)]


def _check_room(file: RemoteFile, needed: int) -> None:
    free = free_bytes(file.path)
    if free is not None and needed > free:
        raise CheckpointError(
            f"the disk has no room for the weights of {file.repo!r}",
            code="disk-full",
            file=os.fspath(file.path.parent),
            expected=f"room for {needed / 1e9:.2f} GB",
            found=f"{free / 1e9:.2f} GB free",
            fix=f"Free {(needed - free) / 1e9:.2f} GB (`pymllm list` and `pymllm rm` show and remove models), "
            "or set HF_HOME to another disk.",
        )
