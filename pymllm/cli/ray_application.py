"""The application of `pymllm serve --ray` for a Serve config, as `serve deploy` and KubeRay's RayService read it.

applications:
- name: pymllm
  import_path: pymllm.cli.ray_application:application
  args: {command: ["MODEL", "--replicas", "1:4"]}
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pymllm.cli import serve
from pymllm.cli.ray_serve import check_ray, describe, scale_of
from pymllm.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve import Application

# Where requests come in is said by the http_options of a Serve config.
NOT_HERE = ("host", "port", "ray_address")


def application(args: Mapping[str, Any]) -> Application:
    """Build the application from the args of a Serve config.

    args: {"command": ["MODEL", "--replicas", "2", ...]}, the words of `pymllm serve` after the verb.  ConfigError for
    anything else.
    """
    command = args.get("command")
    if set(args) != {"command"} or not isinstance(command, (list, tuple)) or not _are_words(command):
        raise ConfigError(
            "the args of the Serve application cannot be read",
            code="ray-args",
            expected='{"command": ["MODEL", "--replicas", "2", ...]}',
            found=repr(dict(args)),
        )
    parsed = parse_command(command)
    check_ray()
    return describe(parsed, serve.make_app, scale_of(parsed))


def _are_words(command: Sequence[object]) -> bool:
    return all(isinstance(word, str) for word in command)


def parse_command(command: Sequence[str]) -> argparse.Namespace:
    """Read the words of `pymllm serve`.  ConfigError for words that it does not know, or that a replica cannot have."""
    parser = _Parser(prog="pymllm serve", allow_abbrev=False)
    serve.add_arguments(parser)
    parsed = parser.parse_args(list(command))
    parsed.parser, parsed.ray = parser, True
    for name in NOT_HERE:
        if getattr(parsed, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is not for a Serve config, whose http_options say where requests come in")
    serve.check_arguments(parsed)
    return parsed


class _Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError: whoever reads the config has no command line to be shown."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the command of the Serve application: {message}", code="ray-args")
