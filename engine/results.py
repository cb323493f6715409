"""What does a run report? Its plan; then results.json, tables, a model card, a verdict."""

import math
import statistics
from pathlib import Path

from engine.files import write_json, write_text
from engine.run_folder import State, drop_state
from engine.tables import table

# Lowest, highest and mean average of seven STS tasks over 50 seeds each of unsupervised SimCSE on
# wiki1m, from the results of hppRC/simple-simcse.
REFERENCE = {
    "bert-base-uncased": (73.16, 76.70, 75.11), "bert-large-uncased": (70.31, 77.28, 74.95),
    "roberta-base": (74.17, 75.14, 74.60), "roberta-large": (75.64, 77.69, 76.71),
}


def default_folder(config) -> Path:
    """runs/METHOD-ENCODER-CORPUS, with loss and positives where they are not the defaults."""
    usual = ("info-nce", "dropout")
    extra = [name for name in (config.loss, config.positives) if name not in usual]
    corpus = "-".join(Path(name).name.split(".")[0] for name in names_of(config.corpus))
    return Path("runs") / "-".join([config.method, *extra, Path(config.encoder).name, corpus])


def names_of(corpus: str | list[str]) -> list[str]:
    """The corpora of a run as a list: one, or several to learn in turn."""
    return [corpus] if isinstance(corpus, str) else corpus


def plan(*, steps: int, seconds: float, scores_every: int, scoring: float, preparing: float,
         turns: int, memory: str, same: bool) -> str:
    """The text of --dry-run: how long a run takes, as a few of its steps suggest."""
    scored = -(-steps // scores_every) if scores_every else 0
    minutes = (preparing + turns * (steps * seconds + (scored + 2) * scoring)) / 60
    again = f", {turns} times" if turns > 1 else ""
    return "\n".join([f"steps: {steps} at {seconds:.3f} s{again}",
                      f"dev scores: {scored}, at {scoring:.1f} s",
                      f"before the first step: {preparing / 60:.1f} minutes, by its first rows",
                      f"expected time: {minutes:.1f} minutes", f"peak memory: {memory}",
                      f"saved and reloaded with equal vectors: {'yes' if same else 'NO'}"])


def conclude(folder: Path, config, state: State, after: dict, more: tuple[str, dict]) -> dict:
    """Write results.json, results.md and the model card; returns the results.

    `more` is what a paper adds to results.md and to results.json.
    """
    before = state.before
    results = {"before": before["scores"], "test": after["scores"], "before_mean": before["mean"],
               "mean": after["mean"], "geometry_before": before["geometry"],
               "geometry": after["geometry"], "pairs": after["pairs"], "subsets": after["subsets"],
               "dev": {} if config.dev == "none" else {"avg": state.best},
               "best_step": state.best_step, "steps": state.step, **more[1]}
    text = before_and_after(config, results) + (f"\n{more[0]}" if more[0] else "")
    write_text(folder / "results.md", text)
    write_text(folder / "README.md", model_card(folder, config, text))
    write_json(folder / "results.json", results)                  # last: it says "finished"
    drop_state(folder)
    return results


def before_and_after(config, results: dict) -> str:
    """The text of results.md: the scores by each convention, and the geometry."""
    rows = {"before": results["before"], "after": results["test"]}
    if results["mean"]:
        rows = {f"{name}, all": row for name, row in rows.items()}
        rows |= {"before, mean": results["before_mean"], "after, mean": results["mean"]}
    chosen = (f"step {results['best_step']} of {results['steps']}, the best on {config.dev} dev"
              if config.dev != "none" else f"step {results['steps']}, the last")
    title = f"{experiment(config)}, seed {config.seed}, {config.pooling} pooling: {chosen}"
    shapes = [f"{name}, before and after: " + ", ".join(
        f"{measure} {results['geometry_before'][name][measure]:.3f} {value:.3f}"
        for measure, value in after.items()) for name, after in results["geometry"].items()]
    return "\n\n".join([title, table(rows), *shapes]) + "\n"


def experiment(config) -> str:
    """The experiment in one line."""
    taught = f" taught by {config.teacher}" if getattr(config, "teacher", "") else ""
    return (f"{config.method} with {config.loss} and {config.positives}{taught}, from "
            f"{config.encoder} on {', '.join(names_of(config.corpus))}, test {config.test}")


def model_card(folder: Path, config, text: str) -> str:
    """The README.md of the folder, with the lines that load it elsewhere."""
    place = ("`pooler_output`" if config.head == "keep" else
             "the vector of the first token of the last layer" if config.pooling == "cls" else
             "the mean of the last layer over the real tokens")
    return f"""# {folder.name}

A sentence encoder trained with mincse.

{text}
Load it with any of:

```python
from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer("{folder}").encode(["A man plays a guitar."])
```
```python
from pathlib import Path                       # in a clone of mincse
from eval_sts import open_encoder
from model import encode
vectors = encode(*open_encoder(Path("{folder}")), ["A man plays a guitar."])
```

In `transformers.AutoModel` take {place}.
"""


def summarise(folder: Path, config, results: dict[int, dict]) -> str:
    """Write mean and spread over seeds as results.json and results.md; returns the latter."""
    tests = [result["test"] for result in results.values()]
    columns = {task: [test[task] for test in tests] for task in tests[0]}
    deviation = statistics.stdev if len(tests) > 1 else lambda scores: math.nan
    spread = {"mean": statistics.mean, "standard deviation": deviation, "lowest": min,
              "highest": max}
    rows = {name: {task: f(scores) for task, scores in columns.items()}
            for name, f in spread.items()}
    before = next(iter(results.values()))["before"]
    text = "\n\n".join([f"{experiment(config)}, {len(results)} seeds",
                        table({"before": before} | rows), *verdict(config, rows["mean"])]) + "\n"
    write_text(folder / "results.md", text)
    write_json(folder / "results.json", {"seeds": {str(k): v["test"] for k, v in results.items()},
                                         "test": rows["mean"], "before": before, "spread": rows})
    return text


def verdict(config, mean: dict[str, float]) -> list[str]:
    """The mean against 50 public seeds of the same experiment; [] for any other experiment."""
    done = (config.method, config.loss, config.positives, config.corpus, config.test)
    usual = ("simcse", "info-nce", "dropout", "wiki1m", "sts")
    if done != usual or config.encoder not in REFERENCE:
        return []
    low, high, middle = REFERENCE[config.encoder]
    place = "inside" if low <= mean["avg"] <= high else "outside"
    return [f"The mean average {mean['avg']:.2f} lies {place} the range of 50 public runs of "
            f"simple-simcse, {low:.2f} to {high:.2f} (mean {middle:.2f})."]
