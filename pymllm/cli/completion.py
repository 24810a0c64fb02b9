"""`pymllm completion SHELL`: print a script that lets the shell complete pymllm's words on Tab.

The script asks this file each time (`--for SHELL LINE`), so that it never grows stale: the words come from the parsers
themselves, which import no torch. Libraries that complete argparse's words know no fish (shtab), or must be installed
beside pymllm when Tab is pressed (argcomplete).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pymllm.cli.known_names import DEVICES, DTYPES, KERNELS, KV_METHODS, METHODS, STRATEGIES
from pymllm.cli.options import add_common_options
from pymllm.cli.usage import add_verb_arguments, options_of, parsers_within

# The line that asks the shell for the names of files.
FILES = ":files"
EXAMPLES = """to have it in every shell from now on (in zsh, after compinit):
  bash  echo 'eval "$(pymllm completion bash)"' >> ~/.bashrc
  zsh   echo 'eval "$(pymllm completion zsh)"' >> ~/.zshrc
  fish  pymllm completion fish > ~/.config/fish/completions/pymllm.fish"""

SCRIPTS = {
    "bash": r"""# pymllm's words on Tab, for bash: eval "$(pymllm completion bash)"
_pymllm() {
    local cur=${COMP_WORDS[COMP_CWORD]} word
    COMPREPLY=()
    [[ $cur == "=" ]] && cur=
    while IFS=$'\t' read -r word _; do
        if [[ $word == :files ]]; then
            compopt -o filenames 2>/dev/null
            while IFS= read -r word; do COMPREPLY+=("$word"); done < <(compgen -f -- "${cur/#\~\//$HOME/}")
        else
            COMPREPLY+=("$word")
        fi
    done < <("${COMP_WORDS[0]}" completion --for bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
}
complete -F _pymllm pymllm""",
    "zsh": r"""#compdef pymllm
# pymllm's words on Tab, for zsh: eval "$(pymllm completion zsh)", after compinit
_pymllm() {
    local line files tab=$'\t'
    local -a found
    while IFS= read -r line; do
        if [[ $line == :files ]]; then
            files=1
        else
            found+=("${${line//:/\\:}/$tab/:}")
        fi
    done < <("${words[1]}" completion --for zsh "${(j: :)words[1,CURRENT]}" 2>/dev/null)
    (( $#found )) && _describe 'pymllm' found
    [[ -n $files ]] && _files
}
if [[ ${funcstack[1]} == _pymllm ]]; then _pymllm "$@"; else compdef _pymllm pymllm; fi""",
    "fish": r"""# pymllm's words on Tab, for fish: pymllm completion fish > ~/.config/fish/completions/pymllm.fish
function __pymllm_words
    for line in (pymllm completion --for fish (commandline -pc | string collect) 2>/dev/null)
        if test "$line" = ":files"
            __fish_complete_path (commandline -ct)
        else
            printf '%s\n' $line
        end
    end
end
complete -c pymllm -f -a '(__pymllm_words)'""",
}

# What options take that is not among argparse's choices.
VALUES = {
    "--dtype": DTYPES,
    "--device": DEVICES,
    "--strategy": STRATEGIES,
    "--methods": (*METHODS, "stored"),
    "--kernel": KERNELS,
}
# The metavars of files and folders.
PATHS = re.compile(r"FILE|FOLDER|DIR|OUT|IN|MODEL|PATH|\w+\.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage, parser.epilog = "pymllm completion SHELL [options]", EXAMPLES
    parser.add_argument("shell", nargs="?", metavar="SHELL", choices=tuple(SCRIPTS), help="bash, zsh or fish")
    parser.add_argument("--for", nargs=2, dest="line", metavar=("SHELL", "LINE"), help=argparse.SUPPRESS)
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    if args.line is not None:
        print("\n".join(line for line in complete_line(*args.line) if line.replace("\t", "").isprintable()))
    elif args.shell is None:
        args.parser.error(f"say for which shell: {', '.join(SCRIPTS)}")
    else:
        print(SCRIPTS[args.shell])
    return 0


def complete_line(shell: str, line: str) -> Iterator[str]:
    """List what may stand at the end of a command line, as the shell's script takes it.

    line: up to the cursor.  Yields a word a line, with a tab and its meaning but for bash; FILES: names of files, too.
    """
    words, quoted = _split(line)
    current = words[-1]
    # bash takes "=" and ":" for ends of words, outside of quotes.
    broken = max(current.rfind("="), current.rfind(":")) + 1 if shell == "bash" and not quoted else 0
    for word, meaning in complete_words(words[1:]):
        if word == FILES:
            yield FILES
        elif word.startswith(current) and word != current:
            yield word[broken:] if shell == "bash" or not meaning else f"{word}\t{meaning}"


def complete_words(words: list[str]) -> Iterator[tuple[str, str]]:
    """List the words, with their meanings, that may take the place of the last one."""
    from pymllm.cli import VERBS, _parser

    *before, current = words
    parser = _parser([])
    place = next((index for index, word in enumerate(before) if not word.startswith("-")), None)
    if place is None:
        yield from (VERBS.items() if not current.startswith("-") else _options(parser))
        return
    verb = parsers_within(parser).get(before[place])
    if verb is None:
        return
    add_verb_arguments(verb, before[place])
    before = before[place + 1 :]
    actions = parsers_within(verb)
    if actions:
        place = next((index for index, word in enumerate(before) if not word.startswith("-")), None)
        if place is None:
            yield from ((name, action.description or "") for name, action in actions.items())
            return
        verb, before = actions.get(before[place], verb), before[place + 1 :]
    yield from _arguments(verb, before, current)


def _arguments(verb: argparse.ArgumentParser, before: list[str], current: str) -> Iterator[tuple[str, str]]:
    """List a verb's options, or the values of the one that the last word belongs to."""
    options = {spelling: action for action in options_of(verb) for spelling in action.option_strings}
    name, equals, _ = current.partition("=")
    if equals and name in options:
        yield from (
            (word if word == FILES else f"{name}={word}", "")
            for word in _values(options[name], current[len(name) + 1 :])
        )
        return
    if before and before[-1] in options and options[before[-1]].nargs != 0:
        yield from ((word, "") for word in _values(options[before[-1]], current))
        return
    if current.startswith("-"):
        yield from _options(verb)
        return
    taken, skip = 0, False
    for word in before:
        if skip or word.startswith("-"):
            skip = not skip and word in options and options[word].nargs != 0
        else:
            taken += 1
    positional = [action for action in options_of(verb) if not action.option_strings]
    if taken < len(positional):
        yield from ((word, "") for word in _values(positional[taken], current))
    elif not taken or positional:
        yield FILES, ""


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in options_of(parser):
        meaning = re.split(r"[;:(]", (action.help or "").replace("%%", "%"))[0].strip()
        yield from ((spelling, meaning) for spelling in action.option_strings if spelling.startswith("--"))


def _values(action: argparse.Action, current: str) -> Iterator[str]:
    """List the values that an argument may have."""
    name = action.option_strings[-1] if action.option_strings else action.dest
    metavar = str(action.metavar or "")
    if action.choices is not None:
        yield from (str(choice) for choice in action.choices if choice is not None)
    elif name in VALUES:
        yield from VALUES[name]
    elif name in ("--quant", "--kv-cache"):
        pattern, equals, _ = current.rpartition("=")
        if equals or name == "--kv-cache":
            methods = METHODS if name == "--quant" else KV_METHODS
            yield from (f"{pattern}{equals}{method}" for method in methods)
    elif "MODEL" in metavar and action.dest in ("model", "words"):
        yield from _cached_models()
        yield FILES
    elif PATHS.fullmatch(metavar) or action.type is Path:
        yield FILES


def _cached_models() -> list[str]:
    """List the hub ids that the hub's cache has."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    try:
        return sorted(entry.name[8:].replace("--", "/") for entry in cache.glob("models--*--*"))
    except OSError:
        return []


def _split(line: str) -> tuple[list[str], bool]:
    """Split a line as a shell does.

    Returns its words, the last of which has the cursor, and whether that one is in quotes.
    """
    mark = "\0"
    for end in ("", '"', "'"):
        try:
            words = shlex.split(line + mark + end)
        except ValueError:
            continue
        return [*words[:-1], words[-1].rstrip(mark)], end != ""
    return ["pymllm", ""], False
