"""
Which encoder is better, and was it luck? Tables and figures of many runs.

    python -m tools.report runs/*                            # results.md, results.csv, figures
    python -m tools.report runs/* --baseline simcse          # which the others are compared with
    python -m tools.report runs/pretrained/*                 # held-out loss, of tools.pretrain's
    python -m tools.report runs/b/seed-* --against runs/a/seed-* --data FOLDER

A run is a folder with args.json and results.json, anywhere below the folders given. Runs that
differ in nothing but the seed form a group, which has a row in the table: mean and sample standard
deviation over its seeds. Scores are Spearman x 100 in the convention "all", of the best checkpoint
by the dev score. The figures need matplotlib; the tables do not.

Luck comes in two kinds. Another seed might have been trained: every table asks how often chance
alone would part the seeds so well (`sign_flip_p`). Other pairs of sentences might have been in the
test: with --against, the test is drawn again and again from its own pairs (`bootstrap`), for
encoders that are still there. A gain that is no more than luck in either sense is none.
"""

import argparse
import csv
import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from scipy.stats import rankdata
from tqdm import tqdm

from engine.files import write_text
from engine.flags import complain, count, exits, pick_device
from engine.hub import encoder_folder
from engine.run_folder import HARMLESS, lines
from engine.tables import markdown
from eval_sts import StsTest, open_encoder, read_test
from model import encode
from papers import METHODS

RECORDS = ("args.json", "env.json", "results.json", "metrics.jsonl")
USUAL = {"loss": "info-nce", "positives": "dropout"}     # a group is called after what is not usual
BLIND = ("seed", *HARMLESS)                              # settings that do not tell groups apart


# ---- runs and groups ------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """One seed, or a pre-training: its settings, where it ran, how it went, how it ended."""
    folder: Path
    config: dict
    command: str
    env: dict
    results: dict
    metrics: list[dict]


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, by seed."""
    name: str
    runs: list[Run]

    @property
    def averages(self) -> dict[int, float]:
        return {run.config["seed"]: run.results["test"]["avg"] for run in self.runs}


def find_runs(paths: list[Path]) -> list[Run]:
    """Every finished run in these folders and below; what else has an args.json is left out."""
    runs = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: expected a folder of runs, found no folder there")
        for folder in (args.parent for args in sorted(path.rglob("args.json"))):
            if missing := [name for name in RECORDS if not (folder / name).is_file()]:
                complain(f"{folder} is not in the table, as it has no {' and no '.join(missing)}")
            else:
                runs.append(read_run(folder))
    if not runs:
        raise ValueError(f"{' '.join(map(str, paths))}: expected a finished run "
                         f"({', '.join(RECORDS)}) in there, found none")
    return runs


def read_run(folder: Path) -> Run:
    """A finished run from its four records."""
    try:
        args, env, results = (json.loads((folder / name).read_text(encoding="utf-8"))
                              for name in RECORDS[:3])
        config = settings_of(args["config"])
        float(results["test"]["avg" if "method" in config else "held_out_loss"])
        return Run(folder, config, args["command"], env, results, lines(folder))
    except (KeyError, TypeError, ValueError) as error:            # no JSON is a ValueError, too
        raise ValueError(f"{folder}: expected the records of a run, found something else in one "
                         f"of {', '.join(RECORDS)} ({error!r})") from None


def settings_of(config: dict) -> dict:
    """What the method reads: an older version had more settings, and lacked what came later."""
    if "method" not in config:
        return config                                             # of a pre-training
    usual = asdict(METHODS[config["method"]].Config())
    # Of what is gone, only corpora all at once, and not one after the other, told runs apart.
    together = {"order": "together"} if config.get("order") == "together" else {}
    return {name: config.get(name, value) for name, value in usual.items()} | together


def groups_of(runs: list[Run]) -> list[Group]:
    """Runs that differ in nothing but the seed belong together; simcse comes first."""
    found = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if k not in BLIND})
        found.setdefault(key, []).append(run)
    names = group_names([json.loads(key) for key in found])
    groups = [Group(name, sorted(members, key=lambda run: run.config["seed"]))
              for name, members in zip(names, found.values())]
    return sorted(groups, key=lambda group: group.name.split(",")[0] != "simcse")


def group_names(configs: list[dict]) -> list[str]:
    """The method, then loss and positives if unusual, then what else tells it from its likes."""
    short = [" ".join([config["method"], *(config[k] for k, usual in USUAL.items()
                                           if config[k] != usual)]) for config in configs]
    names = []
    for name, config in zip(short, configs):
        likes = [other for other, its in zip(configs, short) if its == name]
        telling = [k for k in config if len({str(other.get(k)) for other in likes}) > 1]
        names.append(", ".join([name, *(f"{k} {shown(config[k])}" for k in telling)]))
    return names


def shown(value) -> str:
    """A setting in short: of files the last part of their names."""
    return " ".join(Path(str(one)).name for one in (value if isinstance(value, list) else [value]))


# ---- tables ---------------------------------------------------------------------------------

def paired(group: Group, baseline: Group) -> list[float]:
    """Differences of the averages, seed by seed, for the seeds that both have."""
    shared = group.averages.keys() & baseline.averages.keys()
    return [group.averages[seed] - baseline.averages[seed] for seed in sorted(shared)]


def rows_of(groups: list[Group], baseline: Group) -> list[list[str]]:
    """The table: a line per group, every task as mean, the average as mean ± deviation."""
    tasks = [task for task in groups[0].runs[0].results["test"] if task != "avg"]
    gains = {group.name: paired(group, baseline) for group in groups if group is not baseline}
    gains = {name: differences for name, differences in gains.items() if differences}
    chances = dict(zip(gains, holm([sign_flip_p(gain) for gain in gains.values()])))
    verdicts = {name: [f"{statistics.mean(gain):+.2f}", f"{chances[name]:.2f}"]
                for name, gain in gains.items()}
    short = baseline.name.split(",")[0]
    rows = [["", "seeds", "steps", *tasks, "average", f"against {short}", "p"]]
    for group in groups:
        tests = [run.results["test"] for run in group.runs]
        rows.append([group.name, str(len(tests)), str(group.runs[0].results["steps"]),
                     *(f"{statistics.mean(test[task] for test in tests):.2f}" for task in tasks),
                     spread([test["avg"] for test in tests]), *verdicts.get(group.name, ["", ""])])
    return rows


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; of one run the latter is not known."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def as_markdown(groups: list[Group], baseline: Group) -> str:
    """results.md: the table, how to read it, and where the runs were made."""
    notes = ('Spearman x 100, "all", mean over seeds; average: mean ± sample standard deviation. '
             "p: exact sign-flip test over paired seeds, Holm-corrected; with three seeds it "
             "cannot be below 0.25.")
    start = groups[0].runs[0].results["before"]["avg"]
    machines = sorted({f"{run.env['gpu'] or run.env['processor']}, {run.env['threads']} thread(s), "
                       f"torch {run.env['torch']}" for group in groups for run in group.runs})
    return "\n\n".join([markdown(rows_of(groups, baseline), first=str.ljust), notes,
                        f"Before training: {start:.2f} (same pooling, no head).",
                        f"Run on: {'; '.join(machines)}."]) + "\n"


def write_csv(groups: list[Group], path: Path) -> None:
    """results.csv: a line per run, with its scores and the command that runs it again."""
    rows = [{"group": group.name, "seed": run.config["seed"], "steps": run.results["steps"],
             **run.results["test"], "command": run.command}
            for group in groups for run in group.runs]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def curve(run: Run) -> list[tuple[float, float]]:
    """(million tokens, held-out loss) of a pre-training, from before step 1 to the last step."""
    start = {"tokens": 0, "held_out_loss": run.results["before"]["held_out_loss"]}
    return [(row["tokens"] / 1e6, row["held_out_loss"]) for row in (start, *run.metrics)
            if "held_out_loss" in row]


# ---- luck with seeds ------------------------------------------------------------------------

def sign_flip_p(differences: list[float]) -> float:
    """How often would chance give a mean difference of that size, were the two groups the same?

    Exact permutation test over paired seeds: each difference could as well have had the other sign.
    Two-sided; with n seeds the lowest possible value is 2 / 2^n, so three seeds never show more
    than 0.25.
    """
    size = abs(sum(differences))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences)))
            for signs in product((1, -1), repeat=len(differences))]
    return sum(s >= size - 1e-9 for s in sums) / len(sums)


def holm(values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that one false alarm among them is rare."""
    order, highest, corrected = sorted(range(len(values)), key=values.__getitem__), 0., {}
    for rank, i in enumerate(order):
        highest = max(highest, min(1., (len(values) - rank) * values[i]))
        corrected[i] = highest
    return [corrected[i] for i in range(len(values))]


# ---- luck with pairs of sentences -----------------------------------------------------------

@dataclass(frozen=True)
class Predictions:
    """One task: what people said of its P pairs, and the cosines of the encoders of either side."""
    sizes: list[int]                                              # pairs of every subset
    gold: np.ndarray                                              # (P,)
    ours: np.ndarray                                              # (E, P)
    theirs: np.ndarray                                            # (E, P), maybe of another E

    def gain(self, rows: np.ndarray | slice = np.s_[:]) -> float:
        """Mean Spearman of ours minus theirs, x 100, on these pairs; some may come repeatedly."""
        ours, theirs = (spearmans(self.gold[rows], side[:, rows]).mean()
                        for side in (self.ours, self.theirs))
        return 100 * (ours - theirs)

    def draw(self, rng: np.random.Generator) -> np.ndarray:       # -> (P,)
        """The pairs of a test drawn anew, each subset from its own."""
        starts = np.cumsum([0, *self.sizes])
        return np.concatenate([start + rng.integers(size, size=size)
                               for start, size in zip(starts, self.sizes)])


def spearmans(gold: np.ndarray, predicted: np.ndarray) -> np.ndarray:     # (P,), (E, P) -> (E,)
    """Spearman's ρ of every encoder; 0 of one that finds all pairs equally similar."""
    ranks = rankdata(np.vstack([gold, predicted]), axis=1)        # (1 + E, P)
    ranks -= ranks.mean(axis=1, keepdims=True)
    ranks /= np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), 1e-9)
    return ranks[1:] @ ranks[0]


def bootstrap(tasks: dict[str, Predictions], *, draws: int, seed: int = 0) -> dict[str, tuple]:
    """Task, and "avg" -> gain, the 95 % interval's lower and upper end, two-sided p.

    Paired: both sides are scored on the same drawn pairs. Every task is drawn on its own, the
    average is theirs. p is at least 1 / draws. Percentiles: Efron & Tibshirani 1993, ch. 13.
    """
    rng = np.random.default_rng(seed)
    gains = [[task.gain() for task in tasks.values()]]            # of the test as it is, then drawn
    for _ in tqdm(range(draws), disable=None, unit="draw"):
        gains.append([task.gain(task.draw(rng)) for task in tasks.values()])
    gains = np.column_stack([gains, np.mean(gains, axis=1)])      # (1 + draws, tasks + 1)
    drawn = gains[1:]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    p = 2 * np.minimum((drawn <= 0).mean(axis=0), (drawn >= 0).mean(axis=0))
    return dict(zip([*tasks, "avg"], zip(gains[0], low, high, p.clip(1 / draws, 1))))


def compare_encoders(test: StsTest, ours: list[str], theirs: list[str], *, draws: int) -> str:
    """A table of the gains of our encoders over theirs, all on the same pairs."""
    cosines = {name: predict(test, name) for name in {*ours, *theirs}}
    tasks = {task: Predictions([len(pairs) for pairs in subsets.values()],
                               np.array([gold for *_, gold in sum(subsets.values(), [])]),
                               *(np.array([cosines[name][task] for name in side])
                                 for side in (ours, theirs)))
             for task, subsets in test.tasks.items()}
    rows = [[name, *(f"{value:+.2f}" for value in values), f"{p:.4f}"]
            for name, (*values, p) in bootstrap(tasks, draws=draws).items()]
    return markdown([["", "gain", "from", "to", "p"], *rows], first=str.ljust)


def predict(test: StsTest, name: str) -> dict[str, list[float]]:
    """Task -> what an encoder predicts of its pairs: their cosines."""
    model, tokenizer = open_encoder(encoder_folder(name))
    sides = test.sides(partial(encode, model.to(pick_device("auto")), tokenizer))
    return {task: F.cosine_similarity(*sides(sum(subsets.values(), []))).tolist()
            for task, subsets in test.tasks.items()}


# ---- figures --------------------------------------------------------------------------------

# Okabe and Ito's colours, which readers with any colour vision tell apart; then dark ones.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C8D",
           "#80593D", "#666666", "#A50026", "#2F4B1F"]
MEASURED = "STS-B test"               # the sentences that alignment and uniformity are of


def draw_averages(axes, groups: list[Group]) -> None:
    """A dot per seed, a bar at the mean: how large is the gain beside the noise?"""
    axes.figure.set_size_inches(7, 0.8 + 0.38 * len(groups))
    axes.set(xlabel="average of the test tasks, Spearman x 100")
    for place, group in enumerate(reversed(groups)):
        values = list(group.averages.values())
        axes.plot(values, [place] * len(values), "o", color=PALETTE[0], alpha=0.75, markersize=5)
        axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="#000000")
    axes.set_yticks(range(len(groups)), [group.name for group in reversed(groups)])
    axes.grid(visible=False, axis="y")


def draw_dev(axes, groups: list[Group]) -> None:
    """The dev score over steps, mean over seeds."""
    axes.set(xlabel="step", ylabel="dev score, Spearman x 100")
    for group in groups:
        points = {}
        for row in (row for run in group.runs for row in run.metrics if "dev" in row):
            points.setdefault(row["step"], []).append(row["dev"]["avg"])
        axes.plot(points.keys(), [statistics.mean(scores) for scores in points.values()],
                  marker="o", markersize=3, label=group.name)


def draw_geometry(axes, groups: list[Group]) -> None:
    """Alignment against uniformity, lower is better on both; an arrow from before to after.

    The axes of SimCSE's figure 2 (Gao et al. 2021).
    """
    axes.set(xlabel=f"uniformity on {MEASURED}", ylabel=f"alignment on {MEASURED}")
    start = groups[0].runs[0].results["geometry_before"][MEASURED]
    start = start["uniformity"], start["alignment"]
    axes.plot(*start, "s", color="#000000")
    axes.annotate("before", start, xytext=(5, 5), textcoords="offset points")
    for group in groups:
        end = [statistics.mean(run.results["geometry"][MEASURED][key] for run in group.runs)
               for key in ("uniformity", "alignment")]
        [dot] = axes.plot(*end, "o", label=group.name)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "alpha": 0.4,
                                                  "color": dot.get_color()})


def draw_pretraining(axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Held-out loss of every pre-training over the tokens that it has read."""
    axes.figure.set_size_inches(6, 3)
    axes.set(xlabel="million tokens", ylabel="held-out masked-LM loss")
    for name, points in curves.items():
        axes.plot(*zip(*points), label=name)


def save_figures(groups: list[Group], curves: dict, folder: Path) -> None:
    """NAME.png of everything that there is to show, on a white ground, read anywhere."""
    if find_spec("matplotlib") is None:
        return complain("no figures, as matplotlib is missing: pip install matplotlib")
    from matplotlib.figure import Figure
    scored = [group for group in groups if any("dev" in row for row in group.runs[0].metrics)]
    measured = [group for group in groups if MEASURED in group.runs[0].results["geometry"]]
    for name, draw, shown in (
            ("averages", draw_averages, groups), ("dev", draw_dev, scored),
            ("geometry", draw_geometry, measured), ("pretraining", draw_pretraining, curves)):
        if shown:
            figure = Figure(figsize=(8.5, 4.5), layout="constrained")
            axes = figure.subplots()
            axes.set_prop_cycle(color=PALETTE)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            draw(axes, shown)
            if draw is not draw_averages:
                figure.legend(loc="outside right upper", frameon=False, fontsize=8)
            figure.savefig(folder / f"{name}.png", dpi=150)


# ---- the program ----------------------------------------------------------------------------

def pick_baseline(groups: list[Group], name: str) -> Group:
    """The group that the others are compared with, the first if none is named; check all of them.

    A table needs one test, as averages over other tasks are other numbers, and one run a seed.
    """
    asked = {group.runs[0].config["test"]: group.name for group in groups}
    if len(asked) > 1:
        raise ValueError("expected runs with the same --test, found "
                         + ", ".join(f"{test} in {name!r}" for test, name in asked.items()))
    for group in groups:
        if len(group.averages) < len(group.runs):
            raise ValueError("expected one run a seed, found a seed twice with the same settings "
                             f"among {', '.join(str(run.folder) for run in group.runs)}")
    named = {group.name: group for group in groups}
    if name and name not in named:
        raise ValueError(f"--baseline: expected one of {', '.join(map(repr, named))}, "
                         f"found {name!r}")
    return named[name] if name else groups[0]


def report(runs: list[Run], args: argparse.Namespace) -> None:
    """Print the tables, and write them and the figures."""
    groups = groups_of([run for run in runs if "method" in run.config])
    curves = {run.folder.name: curve(run) for run in runs if "method" not in run.config}
    text = ""
    if groups:
        with exits(2):
            text = as_markdown(groups, pick_baseline(groups, args.baseline))
    if curves:
        text += markdown([["", "million tokens", "held-out loss"],
                          *([name, f"{points[-1][0]:.1f}", f"{points[-1][1]:.3f}"]
                            for name, points in curves.items())], first=str.ljust) + "\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "results.md", text)
    if groups:
        write_csv(groups, args.out / "results.csv")
    save_figures(groups, curves, args.out)


def main(argv: list[str] | None = None) -> None:
    top = argparse.ArgumentParser(
        prog="report.py", usage="python -m tools.report RUN ... [--FLAG VALUE ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("runs", nargs="+", metavar="RUN", help="folder; with --against also a Hub id")
    group = top.add_argument_group("tables and figures")
    group.add_argument("--out", type=Path, default=Path("report"), help="folder for them [report]")
    group.add_argument("--baseline", default="", help="group to compare with [the first]")
    group = top.add_argument_group("comparison over the pairs of a test")
    group.add_argument("--against", nargs="+", metavar="RUN", help="encoders to compare with")
    group.add_argument("--test", default="sts", help="sts, stsb or a .tsv file [sts]")
    group.add_argument("--data", type=Path, help="folder with senteval/ (or MINCSE_DATA)")
    group.add_argument("--draws", type=count, default=1000, help="tests drawn [1000]")
    args = top.parse_args(argv)
    if args.against and args.test == "docs":
        top.error("--test: expected sts, stsb or a .tsv file of scored pairs, found docs")
    with exits(3):
        if args.against:
            test = read_test(args.test, args.data)
            return print(compare_encoders(test, args.runs, args.against, draws=args.draws))
        runs = find_runs([Path(name) for name in args.runs])
    report(runs, args)


if __name__ == "__main__":
    main()
