"""
What did training change? Some answers before and after, and a picture of the path between.

    answers    what a test noted of every question, in order: {"ranks": [...], "found": [...]};
               ranks of the right answer, and the first answer; of pairs the rank alone
    change     how much nearer to the right rank an answer came; of one that got worse below 0
"""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from engine.files import replacing
from engine.flags import complain

BETTER, WORSE = 3, 1                  # examples that are shown
LONGEST = 90                          # letters of a line
# Both ends can be told from a white page and from a black one, and by any colour vision.
FROM, MIDDLE, TO, INK = "#2f81f7", "#a371f7", "#f0883e", "#808891"


def ranks_of(values: list[float]) -> list[float]:
    """The rank of every value, 1 is the largest; ties have their average rank."""
    from scipy.stats import rankdata                              # 0.4 s to import: only if used
    return rankdata([-value for value in values]).tolist()


def twin_flips(twins: list[tuple[str, str, str]], before: dict, after: dict) -> str:
    """Questions whose first answer became right, or wrong, by the ranks that lie between."""
    changes = [then - now if 1 in (then, now) else 0
               for then, now in zip(before["ranks"], after["ranks"])]
    blocks = [[("asked", question), ("before", then), ("after", now)]
              for (_, question, _), then, now in zip(twins, before["found"], after["found"])]
    return flips("Answered wrongly before and rightly after", "The other way round", changes,
                 blocks)


def pair_flips(tasks: list[list[tuple[str, str, float]]], before: dict, after: dict) -> str:
    """Pairs whose rank came nearer to that of their human score, as a share of their task."""
    changes, blocks, first = [], [], 0
    for pairs in tasks:
        rows = slice(first, first := first + len(pairs))
        goals = ranks_of([score for *_, score in pairs])
        for (left, right, score), goal, then, now in zip(pairs, goals, before["ranks"][rows],
                                                         after["ranks"][rows]):
            changes.append((abs(then - goal) - abs(now - goal)) / len(pairs))
            blocks.append([(f"{score:.2f}", left), ("", right), (
                "rank", f"{then:.0f} before, {now:.0f} after, {goal:.0f} by its human score, "
                        f"of {len(pairs)}")])
    return flips("Came nearest to the rank of their human score", "Went farthest from it",
                 changes, blocks)


def flips(better: str, worse: str, changes: list[float],
          blocks: list[list[tuple[str, str]]]) -> str:
    """The largest changes as Markdown; of equal ones the first in the test."""
    text = []
    for title, sign, count in ((better, 1, BETTER), (worse, -1, WORSE)):
        moved = [i for i, change in enumerate(changes) if sign * change > 0]
        chosen = sorted(moved, key=lambda i: -sign * changes[i])[:count]
        text += [f"{title}:"] if chosen else []
        text += ["\n".join(f"    {name:<8}{shortened(line)}" for name, line in blocks[i])
                 for i in chosen]
    return "\n\n".join(text)


def shortened(text: str) -> str:
    """The text, cut after a word to LONGEST letters at most."""
    if len(text) <= LONGEST:
        return text
    return text[: LONGEST - 3].rsplit(" ", 1)[0] + " ..."


def path_of(lines: list[dict]) -> list[dict[str, float]]:
    """Step, alignment and uniformity along a run: on dev with its score, else of the batches."""
    on_dev = [{"step": row["step"], "dev score": row["dev"]["avg"], **next(iter(found.values()))}
              for row in lines if (found := row.get("dev_geometry"))]
    return [row for row in on_dev or lines
            if all(math.isfinite(row.get(name, math.nan)) for name in ("alignment", "uniformity"))]


def can_draw(what: str) -> bool:
    """Is matplotlib at hand? If not, the user is told what will be missing."""
    found = find_spec("matplotlib") is not None
    if not found:
        complain(f"NOTICE: no {what} without matplotlib: pip install matplotlib")
    return found


def draw_path(folder: Path, title: str, lines: list[dict], results: dict) -> None:
    """geometry.png: alignment against uniformity over the steps, as in SimCSE's figure 2."""
    if len(way := path_of(lines)) < 2:
        return None
    if not can_draw("geometry.png"):
        return None
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    axes, colours = figure.subplots(), LinearSegmentedColormap.from_list("way", [FROM, MIDDLE, TO])

    by, what = (("dev score", "on dev") if "dev score" in way[0] else
                ("step", "batches as the loss sees them, with dropout and head"))
    points = np.array([[row["uniformity"], row["alignment"]] for row in way])     # (P, 2)
    shade = np.array([row[by] for row in way], dtype=float)                       # (P,)
    pieces = np.stack([points[:-1], points[1:]], axis=1)                          # (P - 1, 2, 2)
    axes.add_collection(LineCollection(pieces, array=shade[1:], cmap=colours, linewidth=2))
    dots = axes.scatter(*points.T, c=shade, cmap=colours, s=30, zorder=3, label=what)
    name_ends(axes, points[[0, -1]], [f"step {way[0]['step']}", f"step {way[-1]['step']}"])

    name, score = next(iter(results["geometry"]), ""), "mrr" if "mrr" in results["test"] else "avg"
    ends = np.array([[results[when].get(name, {}).get(measure, math.nan) for measure in (
        "uniformity", "alignment")] for when in ("geometry_before", "geometry")], dtype=float)
    if np.isfinite(ends).all():
        axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "-|>", "color": INK})
        axes.scatter(*ends.T, marker="s", c=INK, s=30, zorder=3, label=f"{name}, before and after")
        name_ends(axes, ends, [f"before: {score} {results['before'][score]:.1f}",
                               f"after: {score} {results['test'][score]:.1f}"])
    dress(figure, title, dots, by)
    with replacing(folder / "geometry.png") as fresh:
        figure.savefig(fresh, format="png", dpi=150, transparent=True)


def name_ends(axes, points: np.ndarray, names: list[str]) -> None:                # (2, 2)
    """Write a name beside either end of a way, on its outer side."""
    outer = 1 if points[1, 0] > points[0, 0] else -1
    for place, name, side in zip(points, names, (-outer, outer)):
        axes.annotate(name, place, xytext=(9 * side, 0), textcoords="offset points", color=INK,
                      ha="left" if side > 0 else "right", va="center")


def dress(figure, title: str, dots, by: str) -> None:
    """Axes, legend and colours, to be read on a white page and on a black one."""
    axes, bar = figure.axes[0], figure.colorbar(dots, pad=0.02)
    axes.margins(x=0.28, y=0.1)
    axes.set_title(title, color=INK, loc="left")
    axes.set_xlabel("\N{LEFTWARDS ARROW} uniformity (lower is better)", color=INK)
    axes.set_ylabel("\N{LEFTWARDS ARROW} alignment (lower is better)", color=INK)
    axes.grid(alpha=0.2, color=INK)
    for one in (axes, bar.ax):
        one.tick_params(colors=INK)
        one.spines[:].set_visible(False)
    bar.set_label(by, color=INK)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
