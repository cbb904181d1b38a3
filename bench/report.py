"""The table, its Markdown, the picture: what is made of the numbers that pytest-benchmark stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.measure import Case
    from bench.timing import Timing

HEAD = (
    "op",
    "shape",
    "dtype",
    "cache",
    "time",
    "× floor",
    "× eager",
    "× compile",
    "× peer",
    "moves",
    "extra memory",
)
MISSING = "–"
QUIET = 0.05  # share of the processors that others may use


@dataclass
class Row:
    """One line of the table: medians in seconds by kind and name of the variant."""

    op: str
    shape: str
    dtype: str
    state: str  # "cold": inputs come from memory; "hot": they are in the cache
    bytes: int
    readme: bool = False
    others: float = 0.0  # share of the processors that other processes used meanwhile
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    extra_memory: dict[str, int] = field(default_factory=dict)

    def best(self, kind: str) -> float | None:
        """Seconds of the fastest variant of a kind, None when there is none."""
        return min(self.seconds.get(kind, {}).values(), default=None)

    @property
    def ours(self) -> float:
        return self.seconds["ours"]["fastppo"]

    def ratio(self, kind: str) -> float | None:
        """Ours over the floor, or another kind over ours: how many times the floor, how many times as fast."""
        best = self.best(kind)
        if best is None:
            return None
        return self.ours / best if kind == "floor" else best / self.ours

    @property
    def label(self) -> str:
        return f"{self.shape} {self.dtype} {self.state}"


def rows_of(benchmarks: Iterable[dict[str, Any]]) -> list[Row]:
    """Group the entries of pytest-benchmark, one per variant, into rows; rows without ours are dropped."""
    rows: dict[tuple[str, ...], Row] = {}
    for one in benchmarks:
        info = one["extra_info"]
        key = (info["op"], info["shape"], info["dtype"], info["state"])
        row = rows.setdefault(
            key, Row(*key, bytes=info["bytes"], readme=info["readme"], others=info["others"])
        )
        row.seconds.setdefault(info["kind"], {})[info["variant"]] = one["stats"]["median"]
        if info["extra_memory"] is not None:
            row.extra_memory[info["kind"]] = info["extra_memory"]
    return [row for row in rows.values() if "fastppo" in row.seconds.get("ours", {})]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) | {"ratios": {kind: row.ratio(kind) for kind in row.seconds}} for row in rows]


def from_json(rows: Iterable[dict[str, Any]]) -> list[Row]:
    return [Row(**{name: value for name, value in row.items() if name != "ratios"}) for row in rows]


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return MISSING
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def bytes_text(count: int | None) -> str:
    if count is None:
        return MISSING
    if count < 1e6:
        return f"{count / 1e3:.0f} kB" if count >= 1e3 else f"{count} B"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def memory_text(extra: dict[str, int]) -> str:
    """Ours, and in brackets what the others take."""
    if "ours" not in extra:
        return MISSING
    others = [f"{kind} {bytes_text(extra[kind])}" for kind in ("eager", "peer") if kind in extra]
    return bytes_text(extra["ours"]) + (f" ({', '.join(others)})" if others else "")


def cells(row: Row) -> tuple[str, ...]:
    return (
        *(row.op, row.shape, row.dtype, row.state, time_text(row.ours)),
        *(ratio_text(row.ratio(kind)) for kind in ("floor", "eager", "compile", "peer")),
        *(bytes_text(row.bytes), memory_text(row.extra_memory)),
    )


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A plain table: the first `left` columns and the last one to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def text(line: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left or i == len(head) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([text(head), *map(text, lines)])


def table(rows: Sequence[Row]) -> str:
    return aligned(HEAD, [cells(row) for row in rows], left=4)


def markdown(rows: Sequence[Row]) -> str:
    """The short table as README shows it."""
    columns = [name for name in HEAD if name != "moves"]
    chosen = [i for i, name in enumerate(HEAD) if name != "moves"]
    lines = [[cells(row)[i] for i in chosen] for row in rows]
    rule = ["---" if i < 4 or i == len(columns) - 1 else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines]) + "\n"


def short(rows: Sequence[Row], limit: int = 19) -> list[Row]:
    """Rows of the short table and the picture: those marked for it that are compared with something."""
    return [row for row in rows if row.readme and len(row.seconds) > 1][:limit]


def disturbed(rows: Sequence[Row]) -> str:
    """Which rows were measured while others used the machine, in words; empty when none was."""
    found = [row for row in rows if row.others > QUIET]
    if not found:
        return ""
    worst = max(found, key=lambda row: row.others)
    return (
        f"NOT QUIET: during {len(found)} of {len(rows)} rows other processes used more than {100 * QUIET:.0f} % of the "
        f"processors ({100 * worst.others:.0f} % during {worst.op} {worst.label}); measure those again"
    )


def progress(case: Case, timings: dict[str, Timing], others: float = 0.0) -> str:
    """One line while the benchmark runs: every variant's median."""
    medians = ", ".join(
        f"{variant.name} {time_text(timings[f'{variant.kind} {variant.name}'].median)}"
        for variant in case.variants
    )
    state = "hot" if case.hot else "cold"
    note = f" (others used {100 * others:.0f} % of the processors)" if others > QUIET else ""
    return f"{case.op} {case.shape} {case.dtype} {state}: {medians}{note}"


# The picture

INK, MUTED, GRID = "#0b0b0b", "#5f5e5a", "#e4e3df"
SIDES = (  # kind, colour, marker, what the legend says
    ("ours", "#2a78d6", "o", "fastppo"),
    ("compile", "#1baf7a", "s", "torch.compile (faster mode)"),
    ("peer", "#e0912b", "D", "TRL, Hugging Face, fused AdamW"),
    ("eager", "#a9a8a3", "o", "plain torch (fastest form)"),
)


def draw(rows: Sequence[Row], path: Path, machine: str = "") -> None:
    """Time over floor of every row and side, on a logarithmic axis: left is better, 1 is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.best("floor") is not None]
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.46 * max(1, len(rows))))
    axis.set_xscale("log")
    shown: set[str] = set()
    furthest = 2.0
    for y, row in enumerate(rows):
        floor = row.best("floor") or 1.0
        points = {kind: seconds / floor for kind, *_ in SIDES if (seconds := row.best(kind)) is not None}
        furthest = max(furthest, *points.values())
        axis.plot([min(1.0, *points.values()), max(points.values())], [y, y], color=GRID, lw=5, zorder=1)
        for kind, colour, marker, legend in reversed(SIDES):
            if kind not in points:
                continue
            label = None if kind in shown else legend
            shown.add(kind)
            x = points[kind]
            axis.plot(x, y, marker, color=colour, ms=9 if kind == "ours" else 7, label=label, zorder=3, ls="")
        for kind, x, above in places(points):
            colour = INK if kind == "ours" else MUTED
            text = f"{x:.2g}" if x < 9.95 else f"{x:.0f}"
            axis.annotate(
                text,
                (x, y),
                xytext=(0, 6 if above else -6),
                textcoords="offset points",
                ha="center",
                va="bottom" if above else "top",
                fontsize=8,
                color=colour,
                fontweight="bold" if kind == "ours" else "normal",
            )
    axis.axvline(1, color=INK, lw=1, zorder=2)
    axis.set_yticks(range(len(rows)), [f"{row.op}\n{row.shape} {row.dtype}" for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(min(0.8, axis.get_xlim()[0]), furthest * 1.5)
    ticks = [x for x in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if x < furthest * 1.5]
    axis.set_xticks(ticks, ["1 = floor", *(f"{x}×" for x in ticks[1:])])
    axis.minorticks_off()
    axis.set_xlabel(
        "time as a multiple of the floor (reading the inputs, copying the gradients, or the bare matrix products)"
    )
    axis.grid(axis="x", color=GRID, lw=0.8, zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="both", length=0)
    handles, labels = axis.get_legend_handles_labels()
    order = [labels.index(legend) for *_, legend in SIDES if legend in labels]
    axis.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        ncols=4,
        fontsize=8.5,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        handletextpad=0.2,
    )
    if machine:
        figure.text(0.995, 0.004, machine, ha="right", va="bottom", fontsize=7, color=MUTED)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def places(points: dict[str, float]) -> list[tuple[str, float, bool]]:
    """(kind, x, above): labels over the points, and under them where the neighbour to the left is too close."""
    placed: list[tuple[str, float, bool]] = []
    for kind, x in sorted(points.items(), key=lambda item: item[1]):
        crowded = bool(placed) and x / placed[-1][1] < 1.35
        placed.append((kind, x, not placed[-1][2] if crowded else True))
    return placed
