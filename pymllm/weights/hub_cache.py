"""The models in the hub's cache: what each is, whether it is complete, and how to remove it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm.disk import reading, writing
from pymllm.errors import CheckpointError, ConfigError, nearest
from pymllm.weights.folder import CONFIG, INDEX
from pymllm.weights.gguf_checkpoint import SPLIT_NAME
from pymllm.weights.gguf_choice import choose_gguf, gguf_models
from pymllm.weights.hub import HubName, parse_hub_name

PREFIX = "models--"  # of a model's folder in the cache


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's cache.

    id: as a command takes it.  revision: a branch or tag, else the commit; "" for a damaged one.  format: of the
    weights, as far as the config says.  size: in bytes.  last_used: in seconds since 1970.  complete: whether all of
    its files are there.  first: the first file of a GGUF model.
    """

    id: str
    revision: str
    commit: str
    format: str
    size: int
    last_used: float
    complete: bool
    folder: Path
    first: Path | None = None


def _repositories() -> list[Any]:
    """Scan the cache.  Returns the repositories of models, by id, that the hub's client can read."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        found = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    return sorted((repo for repo in found.repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id)


def cached_models() -> list[CachedModel]:
    """List the models in the hub's cache, by id; also what is left of those whose files are damaged or missing."""
    models = [
        model
        for repo in _repositories()
        for revision in sorted(repo.revisions, key=lambda one: one.commit_hash)
        for model in _models(repo, revision)
    ]
    listed = {model.id.partition(":")[0] for model in models}
    for name, folder in _folders().items():
        if name not in listed:
            with reading(folder):
                used = folder.stat().st_mtime
                models.append(CachedModel(name, "", "", "unknown", _size(folder), used, False, folder))
    return sorted(models, key=lambda model: model.id)


def _models(repo: Any, revision: Any) -> list[CachedModel]:
    """List what a revision holds: its folder of safetensors, and each of its GGUF models."""
    folder = Path(revision.snapshot_path)
    files = {file.file_path.relative_to(folder).as_posix(): file for file in revision.files}
    sizes = {name: file.size_on_disk for name, file in files.items()}
    name = ", ".join(sorted(revision.refs)) or revision.commit_hash[:8]

    def model(
        id: str, format: str, parts: Sequence[str], complete: bool, first: Path | None = None
    ) -> CachedModel:
        used = max((files[part].blob_last_accessed for part in parts), default=revision.last_modified)
        size = sum(sizes[part] for part in parts)
        return CachedModel(id, name, revision.commit_hash, format, size, used, complete, folder, first)

    found = []
    config = _read(folder / CONFIG) if CONFIG in files else None
    if config is not None and not any(file.endswith("adapter_config.json") for file in files):
        own = [file for file in files if not file.lower().endswith(".gguf")]
        found.append(model(repo.repo_id, _format(config), own, _is_complete(folder, list(files))))
    for one in gguf_models(sizes):
        split = SPLIT_NAME.fullmatch(one.files[0])
        complete = split is None or len(one.files) == int(split["count"])
        first = folder / one.files[0]
        found.append(model(f"{repo.repo_id}:{one.tag}", f"gguf {one.tag}", one.files, complete, first))
    return found


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object as far as it is one: a list of models is no place to refuse one of them."""
    try:
        read = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _format(config: dict[str, Any]) -> str:
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            settings = holder.get("quantization_config")
            if isinstance(settings, dict):
                bits = settings.get("bits")
                named = str(settings.get("quant_method", "quantised"))
                return f"{named} {bits} bits" if isinstance(bits, int) else named
            dtype = holder.get("dtype") or holder.get("torch_dtype")
            if isinstance(dtype, str):
                return dtype
    return "unknown"


def _is_complete(folder: Path, files: Sequence[str]) -> bool:
    if INDEX in files:
        mapped = _read(folder / INDEX).get("weight_map")
        return isinstance(mapped, dict) and {str(name) for name in mapped.values()} <= set(files)
    return any(file.endswith(".safetensors") for file in files)


@dataclass(frozen=True)
class Removal:
    """Models about to be removed.  names: as they were asked for.  size: bytes that this frees.

    folders: repositories.  files: of others.  opened: what a model is opened by, for each that is removed alone.
    """

    names: tuple[str, ...]
    size: int
    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    opened: tuple[Path, ...] = ()

    def execute(self) -> None:
        """Remove it.  ConfigError where that is not allowed."""
        for path in self.files:
            with writing(path):
                path.unlink(missing_ok=True)
        for folder in self.folders:
            with writing(folder):
                shutil.rmtree(folder)


def plan_removal(names: Sequence[str]) -> Removal:
    """Find what removing models means: all revisions of a repository, or one GGUF model of it.

    ConfigError "model-not-found" for a name that the cache does not have.
    """
    repositories = {repo.repo_id: repo for repo in _repositories()}
    known = _folders()
    folders: set[Path] = set()
    links: dict[Path, Path] = {}  # to the files that they lead to
    opened: list[Path] = []
    for text in names:
        name = parse_hub_name(text) or HubName(text, None)
        if name.repo not in known:
            raise ConfigError(
                f"the hub's cache has no model {text!r}",
                code="model-not-found",
                fix=nearest(name.repo, known) or "`pymllm list` shows what it has.",
            )
        if name.asked is None:
            folders.add(known[name.repo])
        elif name.repo not in repositories:
            raise ConfigError(
                f"the hub's cache has no whole model {text!r}",
                code="model-not-found",
                fix=f"`pymllm rm {name.repo}` removes all that there is of {name.repo}.",
            )
        else:
            for parts in _gguf_files(repositories[name.repo], name):
                links.update(parts)
                opened.append(next(iter(parts)))
    for repo in repositories.values():
        if all(link in links for link in _links(repo)) and any(link in links for link in _links(repo)):
            folders.add(known[repo.repo_id])
    links = {link: blob for link, blob in links.items() if not folders & set(link.parents)}
    # Files of one content are one blob: it stays as long as another link leads to it.
    kept = {
        blob for repo in repositories.values() for link, blob in _links(repo).items() if link not in links
    }
    blobs = set(links.values()) - kept
    size = sum(map(_size, folders)) + sum(blob.stat().st_size for blob in blobs)
    return Removal(
        tuple(names), size, tuple(sorted(folders)), tuple(sorted({*links, *blobs})), tuple(sorted(opened))
    )


def _folders() -> dict[str, Path]:
    """Find the folders of models in the cache, also damaged ones, by id."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{PREFIX}*"))
    return {path.name.removeprefix(PREFIX).replace("--", "/"): path for path in folders if path.is_dir()}


def _size(folder: Path) -> int:
    """Sum the bytes of the files in a folder, also of those that were not downloaded to their end."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _links(repo: Any) -> dict[Path, Path]:
    """Find all links of a repository, and the files that they lead to."""
    return {
        Path(file.file_path): Path(os.path.realpath(file.blob_path))
        for revision in repo.revisions
        for file in revision.files
    }


def _gguf_files(repo: Any, name: HubName) -> list[dict[Path, Path]]:
    """Find the links, and the files that they lead to, of one GGUF model in each revision that has it."""
    found, failure, links = [], None, _links(repo)
    for revision in repo.revisions:
        folder = Path(revision.snapshot_path)
        sizes = {file.file_path.relative_to(folder).as_posix(): file.size_on_disk for file in revision.files}
        try:
            model, _ = choose_gguf(name.repo, name.asked, sizes)
        except CheckpointError as error:
            failure = error
            continue
        found.append({folder / part: links[folder / part] for part in model.files})
    if not found and failure is not None:
        raise failure
    return found
