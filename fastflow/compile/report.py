"""What was compiled, as a table or as JSON, and what of it spills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PUBLIC = (
    "backend", "arch", "kernel", "variant", "warps", "registers", "spills", "local_accesses", "stack", "local", "shared",
    "occupancy", "loads",
)  # fmt: skip


def rows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each kernel and architecture, as JSON holds it: bytes, shares, {"128": load instructions}."""
    kept = [{name: entry[name] for name in PUBLIC} for entry in entries]
    return [row | {"loads": {str(bits): n for bits, n in sorted(row["loads"].items(), reverse=True)}} for row in kept]


def spilling(entries: list[dict[str, Any]]) -> list[str]:
    """Which kernels spill, one line each."""
    return [
        f"{entry['kernel']} for {entry['arch']} ({entry['variant']}): stack {entry['stack']}, local {entry['local']}, "
        f"{entry['local_accesses']} spill instructions"
        for entry in entries
        if entry["spills"]
    ]


def table(entries: list[dict[str, Any]]) -> Table:
    """A row a kernel and architecture, over its variants: registers, spills, stack, shared bytes, occupancy, 128-bit loads."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("backend", "kernel", "arch"):
        made.add_column(title, no_wrap=True)
    for title in ("variants", "registers", "spills", "stack", "shared", "occupancy", "128-bit loads"):
        made.add_column(title, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["backend"], entry["kernel"], entry["arch"]), []).append(entry)
    for names, group in sorted(groups.items(), key=lambda item: item[0][:2]):
        spilled = sum(entry["spills"] for entry in group)
        made.add_row(
            *names,
            str(len(group)),
            _range([entry["registers"] for entry in group]),
            f"[red]{spilled} of {len(group)}[/red]" if spilled else "0",
            _range([entry["stack"] for entry in group]),
            _range([entry["shared"] for entry in group]),
            _range([round(100 * entry["occupancy"]) for entry in group]) + "%",
            _loads(group),
        )
    return made


def _range(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _loads(group: list[dict[str, Any]]) -> str:
    """In how many variants elements are loaded by 128 bits; "" where machine code was not looked at."""
    if not any(entry["loads"] for entry in group):
        return ""
    wide = sum(entry["loads"].get(128, 0) > 0 for entry in group)
    return "yes" if wide == len(group) else "no" if wide == 0 else f"in {wide} of {len(group)}"
