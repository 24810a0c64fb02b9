"""The house, counted from the source: circles, upward imports, questions about kinds of layers, docstrings, lines.

python tests/structure.py [ROOM] prints what `test_structure.py` holds to; with a room, its docstrings alone.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pymllm"

# Kinds of layers. Rooms above ask the protocol of `layers/held.py`, not for these.
KIND_NAMES = (
    "WeightedLayer Experts Attention FusedMoE EPFusedMoE TPFusedMoE NaiveFusedMoE RMSNorm GemmaRMSNorm LinearBase "
    "Linear ReplicatedLinear ColumnParallelLinear RowParallelLinear QKVParallelLinear MergedColumnParallelLinear "
    "VocabParallelEmbedding ParallelLMHead SplitLinearMethod PartHolder LoRAMixin SelfAttention LatentAttention "
    "GatedMLP QuantizedLayer RouterLinear"
)
KINDS = set(KIND_NAMES.split())
KIND_ROOMS = ("layers", "moe", "attention")

# What a function's docstring opens with. Add a verb that is missing; a property may open with a noun.
VERB_NAMES = """
abort accept account accumulate acquire activate add adopt advance align allocate allow alter answer append
apply arrange ask assemble assert assign attach attend average await back begin bind blend block borrow bound
break bring broadcast build cache calculate calibrate call cancel capture carry cast change check choose clamp
clear clip close collect combine commit compare compile complete compute concatenate configure connect consume
contain continue convert copy correct count cover create cut deactivate decide decline decode decrease dedupe
defer define delay delegate delete deliver demand dequantise dequantize derive describe detach detect
determine dispatch display divide do download draw drop embed emit empty enable encode end enforce ensure
enter enumerate estimate evaluate exchange exclude execute exit expand expect explain export expose extend
extract fail feed fetch fill filter find finish fit fix flatten flush fold follow forbid force forget format
forward free freeze gather generate get give group guard guess halt hand handle hash have hide hold identify
ignore import include increase index infer inherit initialise inject insert install interleave interpret
invert invoke issue iterate join judge keep know label launch lay learn leave let lift limit link list load
locate lock log look lower make map mark mask match measure merge mirror move multiply name narrow normalise
note notice obtain offer omit open order override pack pad pair parse pass patch peek permute pick place plan
play plot poll pop post predict prefer prepare prevent print probe process produce profile project promise
protect prove provide publish pull push put quantise quantize query queue quote raise rank read rebuild
receive recode recognise record reduce refer refine reflect refuse register reject release reload remember
remove rename render repack repeat replace replay reply report reproduce request require rescale reserve reset
reshape resolve restore resume retry return reuse reverse revert rewrite rotate round route run sample save
say scale scan scatter schedule score search see select send separate serialise serve set settle shape share
shift show shrink shuffle shut sign simulate sit skip slice snap solve sort spell split spread squeeze stack
stage start state step stop store stream strip subtract suggest sum summarise supply support swap switch
synchronise take tell terminate test tie time tokenise track train transform translate transpose trim truncate
try tune turn undo unfold unmerge unpack unpin update use validate verify view visit wait walk want warm warn
weigh widen wrap write yield zero
"""
VERBS = set(VERB_NAMES.split())
QUESTIONS = {"what", "how", "which", "whether", "why", "where", "told", "found", "when"}
PROPERTIES = ("property", "setter", "overload")


def modules() -> dict[str, ast.Module]:
    """Read every module of the package, by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room(module: str) -> str:
    """Return the part of the package that a module is in."""
    return module.split(".")[1] if "." in module else module


def imports(modules: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Collect what each module imports of the package, within functions too, but for what type checkers alone see."""
    graph: dict[str, set[str]] = {}
    for name, tree in modules.items():
        unseen = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        wanted: list[str] = []
        for node in ast.walk(tree):
            if id(node) in unseen:
                continue
            if isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted += [f"{node.module}.{alias.name}" for alias in node.names]
        graph[name] = set()
        for target in wanted:
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target and target not in (name, "pymllm"):
                graph[name].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Find the groups of nodes that all reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += graph.get(node, ())
        reach[start] = seen
    groups = {tuple(sorted(other for other in reach[node] if node in reach.get(other, ()))) for node in graph}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def between_rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Reduce imports between modules to imports between rooms."""
    rooms: dict[str, set[str]] = {room(name): set() for name in graph}
    for name, targets in graph.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    return rooms


def kind_questions(modules: dict[str, ast.Module]) -> list[str]:
    """List the isinstance calls on kinds of layers, outside the rooms of the layers themselves.

    `models/generic` looks at torch's kinds, in whose places it puts ours, and `hosts/vllm` at vLLM's.
    """
    found = []
    for name, tree in modules.items():
        if room(name) in KIND_ROOMS or name.startswith(("pymllm.models.generic.", "pymllm.hosts.vllm")):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {getattr(x, "id", getattr(x, "attr", "")) for x in ast.walk(node.args[1])}
                found += [f"{name}:{node.lineno} {kind}" for kind in sorted(names & KINDS)[:1]]
    return found


def odd_docstrings(modules: dict[str, ast.Module]) -> Iterator[str]:
    """List docstrings of functions that open with no verb, and of classes that open with one or with a question."""
    for name, tree in modules.items():
        for node in ast.walk(tree):
            text = (
                ast.get_docstring(node)
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                else None
            )
            if not text:
                continue
            assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            opening = re.match(r"[\w'-]*", text.lower())
            word = opening.group() if opening else ""
            if isinstance(node, ast.ClassDef):
                odd = word in QUESTIONS or (
                    word.endswith("s") and (word[:-1] in VERBS or word[:-2] in VERBS) and _runs_on(text)
                )
                odd = odd or text.split("\n")[0].split(" ")[0].endswith(":")
            elif any(mark in ast.unparse(d) for d in node.decorator_list for mark in PROPERTIES):
                odd = word in QUESTIONS
            else:
                odd = word not in VERBS
            if odd:
                first = text.split("\n")[0]
                yield f"{name}:{node.lineno} {node.name}: {first}"


def _runs_on(text: str) -> bool:
    """Tell "Reads a file" from "Tensors of a file": a verb is followed by what it acts on."""
    second = text.split()[1] if len(text.split()) > 1 else ""
    return second in ("a", "an", "the", "its", "one", "what", "how", "every", "each", "all", "any", "no")


def lines() -> dict[str, int]:
    """Count the lines of every module."""
    return {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def main() -> None:
    """Print the counts."""
    trees = modules()
    odd = list(odd_docstrings(trees))
    if len(sys.argv) > 1:
        chosen = [line for line in odd if room(line.split(":")[0]) == sys.argv[1]]
        print("\n".join(chosen), f"{len(chosen)} docstrings of {sys.argv[1]}", sep="\n")
        return
    graph = imports(trees)
    rooms = between_rooms(graph)
    counts = lines()
    longest = max(counts, key=lambda name: counts[name])
    median = statistics.median(counts.values())
    print(f"rooms {len(rooms)}, arrows {sum(map(len, rooms.values()))}")
    print(f"circles of modules: {circles(graph) or 'none'}; of rooms: {circles(rooms) or 'none'}")
    questions = kind_questions(trees)
    print(f"isinstance on kinds of layers outside {', '.join(KIND_ROOMS)}: {len(questions)}")
    print(*(f"  {question}" for question in questions), sep="\n")
    print(f"docstrings to mend: {len(odd)} (python tests/structure.py ROOM lists them)")
    print(
        f"{len(counts)} modules, {sum(counts.values())} lines, median {median:.0f}, longest {longest} {counts[longest]}"
    )


if __name__ == "__main__":
    main()
