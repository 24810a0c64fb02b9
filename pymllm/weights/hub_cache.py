"""The models in the hub's cache: what each is, whether it is complete, and how to remove it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm.errors import CheckpointError, ConfigError, nearest
from pymllm.weights.folder import CONFIG, INDEX
from pymllm.weights.gguf_checkpoint import SPLIT_NAME
from pymllm.weights.gguf_choice import choose_gguf, gguf_models
from pymllm.weights.hub import HubName, parse_hub_name


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's cache that pymllm can open.

    id: as a command takes it.  revision: a branch or tag, else the commit.  format: of the weights, as far as the
    config says.  size: in bytes.  last_used: in seconds since 1970.  complete: whether all of its files are there.
    """

    id: str
    revision: str
    commit: str
    format: str
    size: int
    last_used: float
    complete: bool
    folder: Path


def _repositories() -> tuple[Any, list[Any]]:
    """Scan the cache.  Returns what the hub's client found, and its repositories of models by name."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        found = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None, []
    models = (repo for repo in found.repos if repo.repo_type == "model")
    return found, sorted(models, key=lambda repo: repo.repo_id)


def cached_models() -> list[CachedModel]:
    """List the models in the hub's cache, by id."""
    _, repositories = _repositories()
    return [
        model
        for repo in repositories
        for revision in sorted(repo.revisions, key=lambda one: one.commit_hash)
        for model in _models(repo, revision)
    ]


def _models(repo: Any, revision: Any) -> list[CachedModel]:
    """List what a revision holds: its folder of safetensors, and each of its GGUF models."""
    folder = Path(revision.snapshot_path)
    files = {file.file_path.relative_to(folder).as_posix(): file for file in revision.files}
    sizes = {name: file.size_on_disk for name, file in files.items()}
    name = ", ".join(sorted(revision.refs)) or revision.commit_hash[:8]

    def model(id: str, format: str, parts: Sequence[str], complete: bool) -> CachedModel:
        used = max((files[part].blob_last_accessed for part in parts), default=revision.last_modified)
        size = sum(sizes[part] for part in parts)
        return CachedModel(id, name, revision.commit_hash, format, size, used, complete, folder)

    found = []
    config = _read(folder / CONFIG) if CONFIG in files else None
    if config is not None and not any(file.endswith("adapter_config.json") for file in files):
        own = [file for file in files if not file.lower().endswith(".gguf")]
        found.append(model(repo.repo_id, _format(config), own, _is_complete(folder, list(files))))
    for one in gguf_models(sizes):
        split = SPLIT_NAME.fullmatch(one.files[0])
        complete = split is None or len(one.files) == int(split["count"])
        found.append(model(f"{repo.repo_id}:{one.tag}", f"gguf {one.tag}", one.files, complete))
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
    """What is about to be removed.  names: as they were asked for.  size: bytes that this frees."""

    names: tuple[str, ...]
    size: int
    commits: tuple[str, ...]
    files: tuple[Path, ...]

    def execute(self) -> None:
        """Remove it."""
        import huggingface_hub
        from huggingface_hub import constants

        for path in self.files:
            path.unlink(missing_ok=True)
        if self.commits:
            huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(*self.commits).execute()


def plan_removal(names: Sequence[str]) -> Removal:
    """Find what removing models means: all revisions of a repository, or one GGUF model of it.

    ConfigError "model-not-found" for a name that the cache does not have.
    """
    scanned, repositories = _repositories()
    by_name = {repo.repo_id: repo for repo in repositories}
    commits: list[str] = []
    files: set[Path] = set()
    freed: dict[Path, int] = {}
    for text in names:
        name = parse_hub_name(text) or HubName(text, None)
        repo = by_name.get(name.repo)
        if repo is None:
            raise ConfigError(
                f"the hub's cache has no model {text!r}",
                code="model-not-found",
                fix=nearest(name.repo, by_name) or "`pymllm list` shows what it has.",
            )
        if name.asked is None:
            commits += [revision.commit_hash for revision in repo.revisions]
            continue
        for link, blob, size in _gguf_files(repo, name):
            files |= {link, blob}
            freed[blob] = size
    strategy = scanned.delete_revisions(*commits) if commits else None
    whole = [repo.repo_path for repo in repositories if any(r.commit_hash in commits for r in repo.revisions)]
    apart = {path for path in files if not any(folder in path.parents for folder in whole)}
    size = sum(freed[path] for path in apart if path in freed)
    return Removal(
        tuple(names),
        size + (strategy.expected_freed_size if strategy else 0),
        tuple(commits),
        tuple(sorted(apart)),
    )


def _gguf_files(repo: Any, name: HubName) -> list[tuple[Path, Path, int]]:
    """Find the links, and the files that they lead to, of one GGUF model in all revisions."""
    found, failure = [], None
    for revision in repo.revisions:
        folder = Path(revision.snapshot_path)
        files = {file.file_path.relative_to(folder).as_posix(): file for file in revision.files}
        sizes = {path: file.size_on_disk for path, file in files.items()}
        try:
            model, _ = choose_gguf(name.repo, name.asked, sizes)
        except CheckpointError as error:
            failure = error
            continue
        found += [
            (Path(files[part].file_path), Path(os.path.realpath(files[part].blob_path)), sizes[part])
            for part in model.files
        ]
    if not found and failure is not None:
        raise failure
    return found
