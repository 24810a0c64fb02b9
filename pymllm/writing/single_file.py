"""An output that is one file, which appears whole: until then everything lies in a folder beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pymllm.disk import write_whole
from pymllm.errors import ConfigError
from pymllm.weights.safetensors_file import SafetensorsFile, TensorInfo
from pymllm.writing.output import AGAIN, STAGING, Output

Content = Callable[[Mapping[str, TensorInfo]], Iterator[bytes | memoryview]]


class SingleFileOutput(Output):
    """An output file in the making.  Its folder until then: NAME.unfinished, beside it.

    content: makes the file's bytes from the tensors of all pieces, by name.
    """

    def __init__(
        self, file: Path, request: Mapping[str, Any], content: Content, *, restart: bool = False
    ) -> None:
        self.file, self.content = file, content
        super().__init__(file, request, restart=restart)

    @property
    def path(self) -> Path:
        return self.file

    def _places(self, out: Path) -> tuple[Path, Path]:
        return out.parent, out.with_name(out.name + STAGING)

    def _check_kind(self) -> None:
        if self.file.is_dir():
            raise ConfigError(
                "the output is a folder",
                code="out-exists",
                file=str(self.file),
                expected="the path of a file that is not there yet",
            )

    def _check_empty(self) -> None:
        if self.file.exists():
            raise ConfigError(
                "the output file is there already",
                code="out-exists",
                file=str(self.file),
                fix="Write to a new file, or remove this one first.",
            )

    def _shard_name(self, index: int, count: int) -> str:
        return self.file.name

    def _join(self, shard: list[list[str]], target: Path) -> None:
        with ExitStack() as stack:
            names = dict.fromkeys(piece for _, piece in shard)
            pieces = {name: stack.enter_context(SafetensorsFile.open(self.staging / name)) for name in names}
            tensors = {name: pieces[piece].tensors[name] for name, piece in shard}
            size = sum(info.nbytes for info in tensors.values())  # and a little more
            write_whole(target, self.content(tensors), size, again=AGAIN)
