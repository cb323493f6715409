"""How are scores shown? Markdown tables, and JSON without NaN."""

import math


def table(rows: dict[str, dict[str, float]], *, digits: int = 2) -> str:
    """Markdown: one row per name, one column per task, and the average of several tasks."""
    tasks = list(next(iter(rows.values())))
    tasks = tasks if len(tasks) > 3 else [task for task in tasks if task != "avg"]
    return markdown([["", *tasks], *([name, *(f"{row[task]:.{digits}f}" for task in tasks)]
                                     for name, row in rows.items())])


def markdown(lines: list[list[str]], *, first=str.rjust) -> str:
    """Cells as a Markdown table; the first line is its head, `first` justifies the first column."""
    lines = [lines[0], ["---", *("--:" for _ in lines[0][1:])], *lines[1:]]
    width = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("| " + " | ".join([first(line[0], width[0]), *(
        cell.rjust(w) for cell, w in zip(line[1:], width[1:]))]) + " |" for line in lines)


def scores_text(result, *, verbose: bool = False) -> str:
    """A Result as Markdown: a line for each convention, then the geometry."""
    rows = {"all": result.scores} | ({"mean": result.mean} if result.mean else {})
    blocks = [table(rows if result.mean else {"doc twins": result.scores})]
    if verbose:
        blocks += [f"{task}\n\n{table({'rho': scores})}" for task, scores in result.subsets.items()]
    blocks += [f"{shape_text(found)} on {name}" for name, found in result.geometry.items()]
    return "\n\n".join(blocks + remarks(result.scores, result.geometry))


def shape_text(*shapes: dict[str, float]) -> str:
    """Alignment and uniformity, of several encoders one after the other."""
    return ", ".join(f"{measure} " + " ".join(f"{shape[measure]:.3f}" for shape in shapes)
                     for measure in shapes[0] if not math.isnan(shapes[0][measure]))


def remarks(scores: dict[str, float], geometry: dict[str, dict[str, float]]) -> list[str]:
    """Why a score or an alignment has no value, in a sentence each."""
    return [text for text, found in (
        ("nan: to this encoder all pairs are equally similar, so they have no ranks.", scores),
        ("Alignment is that of pairs scored above 4; here are none.",
         {name: shape["alignment"] for name, shape in geometry.items()})
    ) if any(map(math.isnan, found.values()))]


def plain(value):
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
