"""What does a run report? Its plan; then results.json, tables, a model card, a verdict."""

import json
import math
import statistics
from pathlib import Path

from engine.changes import draw_path, shortened
from engine.files import write_json, write_text
from engine.run_folder import State, drop_state, lines
from engine.tables import table
from model import SentenceEncoder

# Lowest, highest and mean average of seven STS tasks over 50 seeds each of unsupervised SimCSE on
# wiki1m, from the results of hppRC/simple-simcse.
REFERENCE = {
    "bert-base-uncased": (73.16, 76.70, 75.11), "bert-large-uncased": (70.31, 77.28, 74.95),
    "roberta-base": (74.17, 75.14, 74.60), "roberta-large": (75.64, 77.69, 76.71),
}
ENGLISH = {"docs", "wiki1m", "nli"}   # corpora


def default_folder(config) -> Path:
    """runs/METHOD-ENCODER-CORPUS, with loss and positives where they are not the defaults."""
    usual = ("info-nce", "dropout")
    extra = [name for name in (config.loss, config.positives) if name not in usual]
    corpus = "-".join(Path(name).name.split(".")[0] for name in names_of(config.corpus))
    return Path("runs") / "-".join([config.method, *extra, Path(config.encoder).name, corpus])


def names_of(corpus: str | list[str]) -> list[str]:
    """The corpora of a run as a list: one, or several to learn in turn."""
    return [corpus] if isinstance(corpus, str) else corpus


def conclude(folder: Path, model: SentenceEncoder, config, state: State, after: dict,
             more: tuple[str, dict], flips: str) -> dict:
    """Write results.json, results.md, the model card and the picture; returns the results.

    `more` is what a paper adds to results.md and to results.json.
    """
    before = state.before
    results = {"before": before["scores"], "test": after["scores"], "before_mean": before["mean"],
               "mean": after["mean"], "geometry_before": before["geometry"],
               "geometry": after["geometry"], "pairs": after["pairs"], "subsets": after["subsets"],
               "dev": {} if config.dev == "none" else {"avg": state.best},
               "best_step": state.best_step, "steps": state.step, **more[1]}
    text = before_and_after(config, results) + (f"\n{more[0]}" if more[0] else "")
    write_text(folder / "results.md", text + (f"\n{flips}\n" if flips else ""))
    write_text(folder / "README.md", model_card(folder, model, config, text))
    draw_path(folder, shortened(experiment(config)), lines(folder), results)
    write_json(folder / "results.json", results)                  # last: it says "finished"
    drop_state(folder)
    return results


def before_and_after(config, results: dict) -> str:
    """The text of results.md: the scores by each convention, and the geometry."""
    rows = {"before": results["before"], "after": results["test"]}
    if results["mean"]:
        rows = {f"{name}, all": row for name, row in rows.items()}
        rows |= {"before, mean": results["before_mean"], "after, mean": results["mean"]}
    chosen = (f"step {results['best_step']} of {results['steps']}, the best on "
              f"{known_as(config.dev)} dev"
              if config.dev != "none" else f"step {results['steps']}, the last")
    title = f"{experiment(config)}, seed {config.seed}, {config.pooling} pooling: {chosen}"
    shapes = [f"{name}, before and after: " + ", ".join(
        f"{measure} {results['geometry_before'][name][measure]:.3f} {value:.3f}"
        for measure, value in after.items()) for name, after in results["geometry"].items()]
    if config.dev == config.test != "stsb":                       # which has pairs for either
        shapes.append("The pairs of the test also chose the checkpoint: on others, expect less.")
    return "\n\n".join([title, table(rows), *shapes]) + "\n"


def experiment(config) -> str:
    """The experiment in one line."""
    teacher = getattr(config, "teacher", "")
    taught = f" taught by {known_as(teacher)}" if teacher else ""
    return (f"{config.method} with {config.loss} and {config.positives}{taught}, from "
            f"{known_as(config.encoder)} on {', '.join(map(known_as, names_of(config.corpus)))}, "
            f"test {known_as(config.test)}")


def known_as(name: str) -> str:
    """The name of a file or folder without the path on this machine; any other name as it is."""
    path = Path(name).absolute()
    return path.name if path.exists() or Path(name).is_absolute() else name


VECTORS = {                                                       # pooling -> transformers
    "cls": "model(**tokens).last_hidden_state[:, 0]",
    "mean": "(model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)",
    "pooler": "model(**tokens).pooler_output",
}


def model_card(folder: Path, model: SentenceEncoder, config, text: str) -> str:
    """README.md of the folder: what the Hub reads, the scores, lines that need no mincse."""
    facts = []
    if {*names_of(config.corpus)} <= ENGLISH:
        facts.append("language: en")
    if config.encoder != "mini" and not Path(config.encoder).exists():
        facts.append(f"base_model: {json.dumps(config.encoder)}")
    code = [f"vectors = {VECTORS['pooler' if model.keep_head else model.pooling]}"]
    if model.pooling == "mean":
        code.insert(0, 'mask = tokens["attention_mask"][:, :, None]')
    if model.normalize:
        code.append("vectors = vectors / vectors.norm(dim=1, keepdim=True)")
    return "\n".join(["---", *facts, f"""library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- sentence-similarity
- feature-extraction
---

# {folder.absolute().name}

A sentence encoder trained with mincse.

{text}
Load it in its folder, or with its path or its name on the Hub in place of the dot:

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(".")
vectors = model.encode(["A man plays a guitar."])
```
```python
from transformers import AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained("."), AutoTokenizer.from_pretrained(".")
tokens = tokenizer(["A man plays a guitar."], padding=True, truncation=True,
                   max_length={model.max_tokens}, return_tensors="pt")""", *code, "```", ""])


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
