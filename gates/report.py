"""What every kernel compiles to, as a table for readers and as JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from gates.checks import matrix_instructions
from gates.describe import choices

Row = dict[str, Any]
HEADER = (
    "kernel", "configuration", "target", "triton", "warps", "shared", "registers", "stack", "matrix", "16-byte loads",
    "narrower", "exp2", "instructions", "main loop", "used by", "",
)  # fmt: skip


def configuration(description: Row) -> str:
    """Return dtype and configuration of a compile, on one line; what is False or 0 is left out."""
    pointers = [kind.lstrip("*") for kind in description["signature"].values() if kind.startswith("*")]
    named = [name if value is True else f"{name}={value}" for name, value in choices(description).items() if value]
    return " ".join([next(iter(pointers), ""), *named])


def _cells(row: Row) -> list[str]:
    found, description = row["found"], row["description"]
    start = [f"`{description['kernel']}`", configuration(description), row["target"], row["triton"]]
    end = [row["cases"][0] + (f" and {len(row['cases']) - 1} more" if len(row["cases"]) > 1 else "")]
    end.append("**" + "; ".join(row["failures"]) + "**" if row["failures"] else "")
    if "error" in found:
        return [*start, *[""] * (len(HEADER) - len(start) - len(end)), *end]
    counts = found["counts"]
    kinds = {"HMMA", "HGMMA", "UTCMMA", "MFMA", *matrix_instructions(row["target"], True)}
    matrix = " ".join(f"{counts[kind]} {kind}" for kind in sorted(kinds) if counts.get(kind))
    wide = counts.get("LDG.128", 0) + counts.get("LDGSTS.128", 0)
    narrow = counts.get("LDG", 0) + counts.get("LDGSTS", 0) - wide
    numbers = [found["num_warps"], found["shared"], found["registers"], found["stack"] + 4 * found["spills"]]
    loop = found["loop"]
    return [
        *start,
        *map(str, numbers),
        matrix or "-",
        str(wide + counts.get("UTMALDG", 0)),
        str(narrow),
        str(counts.get("EX2", 0)),
        str(counts["all"]),
        str(loop["all"]) if loop else "-",
        *end,
    ]


def render(rows: list[Row], provenance: Row) -> str:
    """Return the table, failures first."""
    ordered = sorted(rows, key=lambda row: (not row["failures"], row["description"]["kernel"], row["target"]))
    red = sum(bool(row["failures"]) for row in rows)
    lines = [
        "# What every kernel compiles to",
        "",
        f"Commit {provenance['commit'][:10]}{' and changes' if provenance['dirty'] else ''}, "
        f"Triton {' and '.join(provenance['triton'].values())}. {len(rows)} compiles, {red} fail a gate. "
        f"Compiled were {provenance['choice']}; nothing was run. Shared memory and stack in bytes, registers of a "
        "thread, instructions of a warp; counts are of SASS or of AMD's assembly.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
    ]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in ordered]) + "\n"


def by_lines(whole: Row, name: str) -> str:
    """Return JSON text with one line for every entry of ``whole[name]``, a list or a dictionary."""
    entries = whole[name]
    if isinstance(entries, dict):
        lines, (opening, closing) = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()], "{}"
    else:
        lines, (opening, closing) = [json.dumps(entry) for entry in entries], "[]"
    rest = {key: value for key, value in whole.items() if key != name}
    head = json.dumps(rest, indent=1).rstrip("}").rstrip()
    return f'{head},\n "{name}": {opening}\n' + ",\n".join(f"  {line}" for line in lines) + f"\n {closing}\n}}\n"


def as_json(rows: list[Row], provenance: Row) -> str:
    """Return the table for programs: ``found`` is what a worker answers, by row."""
    plain = [
        {
            "kernel": row["description"]["kernel"],
            "configuration": configuration(row["description"]),
            **{name: row[name] for name in ("key", "target", "triton", "cases", "found", "failures")},
        }
        for row in rows
    ]
    return by_lines({"schema": 1, "provenance": provenance, "rows": plain}, "rows")


def failures(rows: list[Row]) -> list[str]:
    """Return a line per failure: kernel, target, release, what was got and what is allowed."""
    return [
        f"{row['description']['kernel']} ({configuration(row['description'])}) on {row['target']}, "
        f"Triton {row['triton']}, for {row['cases'][0]}: {failure}"
        for row in rows
        for failure in row["failures"]
    ]
