"""From what was seen to what is told: a row a phase, the bound, and where the rest goes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

__all__ = ["PHASES", "Measured", "Row", "StageProfile", "per_iteration", "profile_table", "reading", "rows_of"]

# In the order of an iteration. The update's three are also shown as one.
PHASES = (
    "sampling", "scoring", "reference", "forward", "backward", "optimiser",
    "data", "evaluation", "logging", "checkpoint", "other",
)  # fmt: skip
UPDATE = ("forward", "backward", "optimiser")
ARITHMETIC = frozenset({"sampling", "scoring", "reference", *UPDATE, "evaluation"})
BIG_SHARE = 0.05  # a phase that is no model arithmetic should stay below it


@dataclass(frozen=True, slots=True)
class Measured:
    """What one phase took and did in an iteration, on average. See `accord.profiling.observer.Work`."""

    seconds: float
    tokens: float = 0.0
    padding: float = 0.0
    useful: float = 0.0
    overhead: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """A phase beside the machine.

    share     of the iteration's seconds
    rate      useful floating-point operations a second, 0 where there are none
    of_peak   that, as a fraction of the peak
    bound     seconds that the useful operations take at the peak, and the bytes at the speed memory moves at
    """

    phase: str
    seconds: float
    share: float
    tokens: float
    padding: float
    useful: float
    overhead: float
    rate: float
    of_peak: float
    bound: float


@dataclass(frozen=True, slots=True)
class StageProfile:
    """One stage.

    iterations    measured ones, after those of the warm-up
    seconds       of an iteration, mean; fastest and slowest beside it
    rows          a row a phase, in order; `update` the three of an update together, `total` everything
    once          seconds of each phase before the first iteration, scaled to the whole of the data where only a sample
                  of it was read
    notes         what was done otherwise than the recipe would, to measure it
    """

    stage: str
    iterations: int
    seconds: float
    fastest: float
    slowest: float
    rows: tuple[Row, ...]
    update: Row
    total: Row
    once: Mapping[str, float]
    parameters: int
    trained: int
    notes: tuple[str, ...]


def rows_of(measured: Mapping[str, Measured], *, peak: float, moved: float) -> tuple[tuple[Row, ...], Row, Row]:
    """(a row for each phase that took time, the update's three together, all together).

    bound = useful / peak + bytes / moved        of_peak = useful / seconds / peak

    Args:
        peak: floating-point operations a second. moved: bytes a second.
    """
    whole = sum(m.seconds for m in measured.values())

    def row(name: str, parts: Sequence[Measured]) -> Row:
        seconds, useful = sum(m.seconds for m in parts), sum(m.useful for m in parts)
        rate = useful / seconds if seconds > 0 else 0.0
        return Row(
            phase=name,
            seconds=seconds,
            share=seconds / whole if whole > 0 else 0.0,
            tokens=sum(m.tokens for m in parts),
            padding=sum(m.padding for m in parts),
            useful=useful,
            overhead=sum(m.overhead for m in parts),
            rate=rate,
            of_peak=rate / peak,
            bound=useful / peak + sum(m.bytes for m in parts) / moved,
        )

    rows = tuple(row(name, [measured[name]]) for name in PHASES if name in measured)
    update = row("update", [measured[name] for name in UPDATE if name in measured])
    return rows, update, row("total", list(measured.values()))


def per_iteration(
    iterations: Sequence[Mapping[str, Measured]], warm_up: int, rare: Mapping[str, float]
) -> dict[str, Measured]:
    """What each phase takes in an iteration on average, those that warm up left out.

    rare   phases that happen now and then: what share of one that happened, whenever it did, belongs to an iteration
    """
    names = {name for iteration in iterations for name in iteration}
    nothing = Measured(0.0)
    means = {
        name: _scaled_mean([iteration.get(name, nothing) for iteration in iterations[warm_up:]], 1.0)
        for name in names - rare.keys()
    }
    for name in names & rare.keys():
        means[name] = _scaled_mean([iteration[name] for iteration in iterations if name in iteration], rare[name])
    return means


def _scaled_mean(measured: Sequence[Measured], factor: float) -> Measured:
    """The mean of each number, times `factor`."""
    return Measured(*(factor * fmean(getattr(m, name) for m in measured) for name in Measured.__slots__))


def profile_table(profile: StageProfile) -> Table:
    """For people: one row a phase; those of the update follow their sum."""
    table = Table(
        "phase",
        title=f"{profile.stage}: an iteration takes {profile.seconds:.3g} s "
        f"({profile.fastest:.3g} to {profile.slowest:.3g}, {profile.iterations} measured)",
    )
    for name in ("seconds", "share", "tokens", "padding", "GFLOP", "overhead", "GFLOP/s", "of peak", "bound, s"):
        table.add_column(name, justify="right")
    shown = False
    for row in profile.rows:
        inner = row.phase in UPDATE
        if inner and not shown:
            table.add_row(*_cells(profile.update))
            shown = True
        table.add_row(*_cells(row, indent="  " if inner else ""))
    table.add_section()
    table.add_row(*_cells(profile.total))
    return table


def _cells(row: Row, indent: str = "") -> list[str]:
    arithmetic = row.useful > 0
    return [
        indent + row.phase,
        f"{row.seconds:.4f}",
        f"{row.share:.1%}",
        f"{row.tokens:,.0f}" if row.tokens else "",
        f"{row.padding:,.0f}" if row.tokens else "",
        f"{row.useful / 1e9:,.2f}" if arithmetic else "",
        f"{row.overhead / 1e9:,.2f}" if arithmetic else "",
        f"{row.rate / 1e9:,.1f}" if arithmetic else "",
        f"{row.of_peak:.0%}" if arithmetic else "",
        f"{row.bound:.4f}" if row.bound > 0 else "",
    ]


def reading(profile: StageProfile, *, peak: float) -> str:
    """Where the rest goes, as a paragraph. The parts add up to the seconds of an iteration."""
    total = profile.total
    overhead = total.overhead / peak
    idle = [row for row in profile.rows if row.phase not in ARITHMETIC]
    slower = {
        row.phase: row.seconds - row.bound - row.overhead / peak for row in profile.rows if row.phase in ARITHMETIC
    }
    worst = sorted(slower, key=lambda name: -slower[name])[:2]
    parts = [
        f"{_share(sum(slower.values()), total)} is arithmetic, or moving memory, below the peak"
        f" ({', '.join(f'{name} {_share(slower[name], total)}' for name in worst)})",
        f"{_share(overhead, total)} is what the peak would take for padding and for what is computed twice",
        f"{_share(sum(row.seconds for row in idle), total)} is no model arithmetic"
        f" ({', '.join(f'{row.phase} {row.share:.1%}' for row in idle)})",
    ]
    big = [row.phase for row in idle if row.share > BIG_SHARE]
    return (
        f"What {profile.stage} has to compute and move would take {total.bound:.3g} s of the {total.seconds:.3g} s at "
        f"this machine's peak: {_share(total.bound, total)}. Of the iteration, {'; '.join(parts)}. "
        f"Updates reach {profile.update.of_peak:.0%} of the peak"
        + (f". Above {BIG_SHARE:.0%} and no model arithmetic: {', '.join(big)}." if big else ".")
    )


def _share(seconds: float, total: Row) -> str:
    return f"{seconds / total.seconds:.1%}" if total.seconds > 0 else "0%"
