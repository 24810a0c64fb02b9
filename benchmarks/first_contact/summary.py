"""What is printed at the end: what is wrong first, then what was left out, then the figures of each stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 9_500  # characters
WRONG_SHOWN, LEFT_OUT_SHOWN, WIDTH = 24, 8, 230

Row = dict[str, Any]


def is_wrong(rows: Iterable[Row]) -> bool:
    return any(row["ok"] is False for row in rows)


def write_summary(
    rows: Sequence[Row], titles: dict[str, str], folder: str, *, rehearsal: bool = False
) -> str:
    """Write the summary.  titles: those of the stages that ran, by name.  folder: where everything is."""
    wrong = [row for row in rows if row["ok"] is False]
    left_out = [row for row in rows if row["ok"] is None]
    lines = [
        f"=== {len(wrong)} WRONG, {sum(r['ok'] is True for r in rows)} right, {len(left_out)} left out ==="
    ]
    lines += ["A rehearsal on the CPU: its times say nothing of a GPU."] if rehearsal else []
    lines += _listed("WRONG", wrong, WRONG_SHOWN, "failures.txt")
    lines += _listed("left out", left_out, LEFT_OUT_SHOWN, "results.jsonl")
    for stage, title in titles.items():
        mine = [row for row in rows if row["stage"] == stage]
        count = Counter(row["ok"] for row in mine)
        lines += ["", f"{stage}: {title}: {count[True]} right, {count[False]} wrong, {count[None]} left out"]
        lines += [f"  {line}" for line in (*_groups(mine), *_said(mine))]
    end = f"\nEverything is in {folder}"
    text = "\n".join(lines)
    if len(text) + len(end) > LONGEST:
        text = text[: LONGEST - len(end) - 40].rpartition("\n")[0] + "\n... more in results.jsonl"
    return text + end


def _listed(word: str, rows: Sequence[Row], most: int, file: str) -> list[str]:
    """List rows; those that say the same for the same stage and group are one line."""
    alike: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        why = str(row.get("why", ""))
        key = why if len(why) > 20 and "error" not in why else f"{row['item']} {why}"
        alike.setdefault((row["stage"], str(row.get("group", "")), key), []).append(row)
    lines = []
    for (stage, _, _), same in list(alike.items())[:most]:
        more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
        lines.append(f"{word} {stage}: {same[0]['item']}{more}: {same[0].get('why', '')}"[:WIDTH])
    if len(alike) > most:
        lines.append(f"... and {len(alike) - most} more kinds: see {file}")
    return lines


def _groups(rows: Sequence[Row]) -> list[str]:
    """Sum up the checks of each group: how many are right, and the largest error of those."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "group" in row:
            groups.setdefault(row["group"], []).append(row)
    lines = []
    for group, mine in groups.items():
        right = [row for row in mine if row["ok"] is True]
        line = f"{group}: {len(right)} of {len(mine)} right"
        worst = max((row for row in right if "error" in row), key=lambda row: row["error"], default=None)
        lines.append(
            line
            if worst is None
            else f"{line}, largest error {worst['error']} ({worst['item'].removeprefix(group + ' ')})"
        )
    return lines


def _said(rows: Sequence[Row]) -> list[str]:
    """What rows have to say, line by line."""
    lines = []
    for row in rows:
        said = row.get("say", ())
        lines += [line[:WIDTH] for line in ([said] if isinstance(said, str) else said)]
    return lines
