"""The plot of the effects, and the page around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from cmcr_hf.durable import write_durably
from cmcr_hf.evaluation.connection import mean_and_spread
from cmcr_hf.pages.page import render, write_page

from .conclusions import conclusions
from .results import Table
from .variants import FULL, NULL

LEFT, PLOT, RIGHT, ROW = 380, 430, 230, 21
# Effects beyond are drawn at the border, as an arrow; their value stands beside it.
LOWEST, HIGHEST = -0.15, 0.1
COLOURS = {"none": "#6b7280", "gains": "#146b36", "loses": "#b3261e"}


def write_ablations(folder: Path, tables: Sequence[Table], caption: str, zero_shot: dict[str, float]) -> list[Path]:
    """Write the plot `ablations.svg` and the page `ablations.html`, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    plot, page = folder / "ablations.svg", folder / "ablations.html"
    drawing = draw(tables, caption)
    write_durably(plot, drawing.encode())
    context = {
        "caption": caption,
        "zero_shot": zero_shot,
        "drawing": drawing,
        "conclusions": conclusions(tables),
        "tables": [_rows(table) for table in tables],
    }
    write_page(page, render("ablations.html.jinja", context, folder=Path(__file__).parent))
    return [plot, page]


def _rows(table: Table) -> dict[str, object]:
    ways = list(next(iter(table.free.values())))
    metrics = list(table.free["chance"][ways[0]])
    rows: list[dict[str, object]] = []
    for name, found in table.free.items():
        rows.append({"name": name, "group": "without a connector", "mean": found, "spread": None, "effect": None})
    for variant, runs in table.runs.items():
        mean, spread = mean_and_spread(runs)
        effect = None if variant.name in (FULL, NULL) else table.effect(variant)
        group = variant.group or "connectors"
        rows.append({"name": variant.name, "group": group, "mean": mean, "spread": spread, "effect": effect})
    found = {"title": table.title, "texts": table.texts, "trained": table.trained}
    return {**found, "ways": ways, "metrics": metrics, "rows": rows}


def draw(tables: Sequence[Table], caption: str) -> str:
    """Return an SVG of every variant's effect on mean mAP with its 95 % interval, a panel for each set of texts."""
    width = LEFT + PLOT + RIGHT
    parts: list[str] = []
    top = 34
    for table in tables:
        top = _panel(parts, table, top)
    height = top + 16
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13.5" '
            'fill="#1f2328" role="img" aria-label="Effect of every variant on mean mAP">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            '<text x="16" y="24" font-size="17" font-weight="600">Effect on mean mAP against the full method of the '
            "same seed, 95 % interval over seeds</text>",
            *parts,
            f'<text x="16" y="{height - 8}" font-size="11.5" fill="#56606b">{escape(caption)}</text>',
            "</svg>",
            "",
        ]
    )


def _panel(parts: list[str], table: Table, top: int) -> int:
    """Draw a table from `top` on, and return where it ends."""

    def x(value: float) -> float:
        return LEFT + (min(max(value, LOWEST), HIGHEST) - LOWEST) / (HIGHEST - LOWEST) * PLOT

    title = escape(f"Connected by {table.title}")
    parts.append(f'<text x="16" y="{top + 22}" font-size="15" font-weight="600">{title}</text>')
    start, y, body = top + 30, top + 34, []
    for group, members in table.groups.items():
        shown = [variant for variant in members if variant.name not in (FULL, NULL)]
        if not shown:
            continue
        y += ROW + 5
        body.append(f'<text x="28" y="{y}" font-size="12" fill="#56606b">{escape(group)}</text>')
        for variant in shown:
            y += ROW
            effect, at = table.effect(variant), y - 4.5
            colour = COLOURS[effect.verdict.split()[0]]
            body.append(f'<text x="{LEFT - 14}" y="{y}" text-anchor="end">{escape(variant.name)}</text>')
            if LOWEST <= effect.mean <= HIGHEST:
                low, high = x(effect.low), x(effect.high)
                body.append(f'<path d="M{low:.1f} {at}H{high:.1f}" stroke="{colour}" stroke-width="2"/>')
                body.append(f'<circle cx="{x(effect.mean):.1f}" cy="{at}" r="4" fill="{colour}"/>')
            else:
                tip, away = x(effect.mean), 9 if effect.mean < 0 else -9
                body.append(f'<path d="M{tip:.1f} {at}l{away} -5v10z" fill="{colour}"/>')
            value = f"{effect.mean:+.3f} ± {effect.half_width:.3f}"
            body.append(f'<text x="{LEFT + PLOT + 14}" y="{y}" fill="{colour}">{value}</text>')
    end = y + 10
    for tick in (-0.15, -0.1, -0.05, 0.0, 0.05, 0.1):
        strong = ' stroke-width="1.5"' if tick == 0 else ""
        colour = "#1f2328" if tick == 0 else "#e1e4e8"
        parts.append(f'<path d="M{x(tick):.1f} {start}V{end}" stroke="{colour}"{strong}/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{end + 16}" text-anchor="middle" font-size="12">{tick:+.2f}</text>')
    parts += body
    return end + 30
