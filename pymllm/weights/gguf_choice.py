"""The choice of one GGUF model among the files of a repository: by tag, by file name, or the usual one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pymllm.errors import CheckpointError, nearest
from pymllm.weights.gguf_checkpoint import SPLIT_NAME

USUAL = "Q4_K_M"
# The types of GGUF files, as their makers put them into names, in capitals or not.
TAG = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4|BF16|F16|F32|FP16|FP32)(?![A-Za-z0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF model of a repository.  files: its parts in order.  size: of all, in bytes."""

    files: tuple[str, ...]
    size: int

    @property
    def stem(self) -> str:
        name = self.files[0]
        split = SPLIT_NAME.fullmatch(name)
        return split["stem"] if split else name[: -len(".gguf")]

    @property
    def tag(self) -> str:
        """The tag that names it: the last part of its name that is a type, else its folder, else its name."""
        found = TAG.findall(self.stem)
        return found[-1].upper() if found else self.stem


def gguf_models(sizes: Mapping[str, int]) -> list[GGUFModel]:
    """Collect the GGUF models among files; those of a model's eyes or ears (mmproj) are none.

    sizes: in bytes, by the files' names.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(sizes):
        last = name.rpartition("/")[2].lower()
        if (
            not last.endswith(".gguf")
            or last.startswith("mmproj")
            or "-mmproj" in last
            or last.startswith("imatrix")
        ):
            continue
        split = SPLIT_NAME.fullmatch(name)
        groups.setdefault(f"{split['stem']} {split['count']}" if split else name, []).append(name)
    return [GGUFModel(tuple(files), sum(sizes[name] for name in files)) for files in groups.values()]


def choose_gguf(repo: str, asked: str | None, sizes: Mapping[str, int]) -> tuple[GGUFModel, bool]:
    """Choose the model that was asked for.

    asked: a tag, a file's name, or None for the usual one.
    Returns it, and whether it is one of several that nobody asked for.  CheckpointError "gguf-tag" with the tags.
    """
    models = gguf_models(sizes)
    if asked is None:
        found = models if len(models) == 1 else [model for model in models if model.tag == USUAL]
    else:
        wanted = asked.lower()
        found = [model for model in models if wanted in (file.lower() for file in model.files)]
        found = found or [
            model for model in models if wanted in {f.lower().rpartition("/")[2] for f in model.files}
        ]
        found = found or [model for model in models if model.tag.lower() == wanted]
        found = found or [model for model in models if _ends(model.stem.lower(), wanted)]
    if len(found) == 1:
        return found[0], asked is None and len(models) > 1
    tags = {model.tag: f"{model.tag} ({model.size / 1e9:.2f} GB)" for model in models}
    if len(found) > 1:
        tags = {model.files[0]: f"{model.files[0]} ({model.size / 1e9:.2f} GB)" for model in found}
    what = f"no GGUF file {asked!r}" if asked is not None else f"several GGUF files, and none is {USUAL}"
    if len(found) > 1:
        what = f"{len(found)} GGUF files that are {asked or USUAL!r}"
    if not models:
        what = "no GGUF files"
    raise CheckpointError(
        f"{repo!r} has {what}",
        code="gguf-tag",
        file=repo,
        expected=" or ".join(tags.values()) or "a repository with .gguf files",
        found=asked,
        fix=(nearest(asked, tags) if asked else "")
        or (
            f"Name one: {repo}:{next(iter(tags))}."
            if tags
            else "Leave the tag out, or name another repository."
        ),
    )


def _ends(stem: str, tag: str) -> bool:
    return stem == tag or (stem.endswith(tag) and stem[-len(tag) - 1] in "-._/")
