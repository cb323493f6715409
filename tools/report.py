"""
Which encoder is better, and was it luck? Tables and figures of many runs.

    python -m tools.report runs/*                            # results.md, results.csv, figures
    python -m tools.report runs/* --baseline simcse          # the group to compare with
    python -m tools.report runs/pretrained/*                 # held-out loss, of tools.pretrain's
    python -m tools.report runs/b/seed-* --against runs/a/seed-* --data FOLDER

Runs that differ in nothing but the seed form a group, a row of the table: mean and sample standard
deviation over seeds. Scores are Spearman x 100 in the convention "all", of the best checkpoint by
the dev score. The figures need matplotlib.

Luck comes in two kinds: other seeds might have been trained (`t_test`, `sign_flip_p`), and other
pairs of sentences might have been in the test (--against, `bootstrap`).
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import argparse
import csv
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from scipy.stats import rankdata, t
from tqdm import tqdm

from engine.changes import can_draw
from engine.files import write_text
from engine.flags import Parser, complain, count, exits, pick_device, program
from engine.hub import encoder_folder
from engine.run_folder import HARMLESS, lines
from engine.tables import markdown
from eval_sts import StsTest, open_encoder, read_test
from model import encode
from papers import METHODS

RECORDS = ("args.json", "env.json", "results.json", "metrics.jsonl")
USUAL = {"loss": "info-nce", "positives": "dropout"}     # values that no group is named after
IGNORED = ("seed", *HARMLESS)                            # in which runs of a group may differ


@dataclass(frozen=True)
class Run:
    """The records of one seed, or of a pre-training."""
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
    """Every finished run in these folders and below; an unfinished one is named and left out."""
    runs = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: expected a folder of runs, found no folder there")
        for folder in (args.parent for args in sorted(path.rglob("args.json"))):
            if missing := [name for name in RECORDS if not (folder / name).is_file()]:
                complain(f"{folder} is not in the table: it has no {' and no '.join(missing)}")
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
    except (KeyError, TypeError, ValueError) as error:            # damaged JSON is a ValueError
        raise ValueError(f"{folder}: expected the records of a run in {', '.join(RECORDS)}, found "
                         f"something else ({error!r})") from None


def settings_of(config: dict) -> dict:
    """The settings that the method has today; records of an older version have others too."""
    if "method" not in config:
        return config                                             # of a pre-training
    usual = asdict(METHODS[config["method"]].Config())
    return {name: config.get(name, value) for name, value in usual.items()}


def groups_of(runs: list[Run]) -> list[Group]:
    """Runs that differ in nothing but the seed form a group; simcse comes first."""
    found = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if k not in IGNORED})
        found.setdefault(key, []).append(run)
    names = group_names([json.loads(key) for key in found])
    groups = [Group(name, sorted(members, key=lambda run: run.config["seed"]))
              for name, members in zip(names, found.values())]
    return sorted(groups, key=lambda group: group.name.split(",")[0] != "simcse")


def group_names(configs: list[dict]) -> list[str]:
    """The method, an unusual loss or positives, then the settings that tell equal names apart."""
    short = [" ".join([config["method"], *(config[k] for k, usual in USUAL.items()
                                           if config[k] != usual)]) for config in configs]
    names = []
    for name, config in zip(short, configs):
        same = [other for other, its in zip(configs, short) if its == name]
        telling = [k for k in config if len({str(other.get(k)) for other in same}) > 1]
        names.append(", ".join([name, *(f"{k} {shown(config[k])}" for k in telling)]))
    return names


def shown(value) -> str:
    """A setting in short: of files the last part of their names."""
    return " ".join(Path(str(one)).name for one in (value if isinstance(value, list) else [value]))


def paired(group: Group, baseline: Group) -> list[float]:
    """Differences of the averages, for every seed that both groups have."""
    shared = group.averages.keys() & baseline.averages.keys()
    return [group.averages[seed] - baseline.averages[seed] for seed in sorted(shared)]


def table_of(groups: list[Group], baseline: Group) -> list[list[str]]:
    """A line per group: the mean of every task, then mean ± deviation of the average."""
    tasks = [task for task in groups[0].runs[0].results["test"] if task != "avg"]
    luck = luck_of(gains_of(groups, baseline))
    rows = [["", "seeds", "steps", *tasks, "average", f"against {baseline.name.split(',')[0]}",
             "95 % interval", "p (t, Holm)", "p (exact)"]]
    for group in groups:
        tests = [run.results["test"] for run in group.runs]
        rows.append([group.name, str(len(tests)), str(group.runs[0].results["steps"]),
                     *(f"{statistics.mean(test[task] for test in tests):.2f}" for task in tasks),
                     spread([test["avg"] for test in tests]), *luck.get(group.name, [""] * 4)])
    return rows


def gains_of(groups: list[Group], baseline: Group) -> dict[str, list[float]]:
    """The paired differences of every other group that has a seed in common with the baseline."""
    return {group.name: gain for group in groups
            if group is not baseline and (gain := paired(group, baseline))}


def luck_of(gains: dict[str, list[float]]) -> dict[str, list[str]]:
    """Cells of the table by group: mean difference, its interval, p of either test."""
    tests = [t_test(gain) for gain in gains.values()]
    corrected = holm([p for p, *_ in tests])
    return {name: [f"{statistics.mean(gain):+.2f}", f"{low:+.2f} to {high:+.2f}", f"{p:.3f}",
                   f"{sign_flip_p(gain):.3f}"]
            for (name, gain), (_, low, high), p in zip(gains.items(), tests, corrected)}


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation, which needs two values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def as_markdown(groups: list[Group], baseline: Group) -> str:
    """results.md: the table, how to read it, and on which machines the runs were made."""
    notes = ('Spearman x 100, "all", mean over seeds; average: mean ± sample standard deviation. '
             "Paired seeds: 95 % interval of the mean difference, p of a t-test with Holm's "
             "correction, p of an exact sign-flip test without, which n seeds keep at 2 / 2^n or "
             f"above. {could_be_seen([*gains_of(groups, baseline).values()])}").strip()
    start = groups[0].runs[0].results["before"]["avg"]
    machines = sorted({f"{run.env['gpu'] or run.env['processor']}, {run.env['threads']} thread(s), "
                       f"torch {run.env['torch']}" for group in groups for run in group.runs})
    return "\n\n".join([markdown(table_of(groups, baseline), first=str.ljust), notes,
                        f"Before training: {start:.2f} (same pooling, no head).",
                        f"Run on: {'; '.join(machines)}."]) + "\n"


def write_csv(groups: list[Group], path: Path) -> None:
    """results.csv: scores and command of every run."""
    rows = [{"group": group.name, "seed": run.config["seed"], "steps": run.results["steps"],
             **run.results["test"], "command": run.command}
            for group in groups for run in group.runs]
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def curve(run: Run) -> list[tuple[float, float]]:
    """(million tokens, held-out loss) of a pre-training from before step 1 to the last step."""
    start = {"tokens": 0, "held_out_loss": run.results["before"]["held_out_loss"]}
    return [(row["tokens"] / 1e6, row["held_out_loss"]) for row in (start, *run.metrics)
            if "held_out_loss" in row]


def t_test(differences: list[float]) -> tuple[float, float, float]:
    """Two-sided p of a paired t-test, and the 95 % interval of the mean difference.

    t = mean / (s / √n) of n normal differences with n - 1 degrees of freedom (Student 1908).
    """
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return 1.0, -math.inf, math.inf                           # one seed says nothing
    error = statistics.stdev(differences) / math.sqrt(n)
    p = 2 * float(t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    reach = float(t.ppf(0.975, n - 1)) * error
    return p, mean - reach, mean + reach


def could_be_seen(gains: list[list[float]]) -> str:
    """A sentence on the smallest true difference that four of five such studies would find.

        δ = (t_0.975 + t_0.8) s / √n     two-sided at 5 %, 80 % power, n - 1 degrees of freedom

    s is pooled over the comparisons, n the fewest seeds of one; "" where none has two. Bloom 1995;
    the exact value is 5 % larger for three seeds, 1 % for six.
    """
    gains = [gain for gain in gains if len(gain) > 1]
    if not gains:
        return ""
    squares = sum((len(gain) - 1) * statistics.variance(gain) for gain in gains)
    s, n = math.sqrt(squares / sum(len(gain) - 1 for gain in gains)), min(map(len, gains))
    smallest = (t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)) * s / math.sqrt(n)
    return (f"With {n} paired seeds, whose differences deviate by {s:.2f}, the smallest difference "
            f"that could have been seen is {smallest:.2f} (one comparison alone, 80 % power, "
            "two-sided at 5 %).")


def sign_flip_p(differences: list[float]) -> float:
    """The share of sign flips whose mean difference is as large, were both groups the same.

    Exact two-sided permutation test; p is at least 2 / 2^n over n paired seeds.
    """
    signs = np.array(list(product((1, -1), repeat=len(differences))))     # (2^n, n), first all 1
    sums = np.abs(signs @ differences)
    return float(np.mean(sums >= sums[0] - 1e-9))


def holm(values: list[float]) -> list[float]:
    """p-values of several comparisons, corrected so that one false alarm among them is rare."""
    scaled = np.sort(values) * np.arange(len(values), 0, -1)
    return np.maximum.accumulate(scaled.clip(max=1))[np.argsort(np.argsort(values))].tolist()


@dataclass(frozen=True)
class Predictions:
    """Human scores of a task's P pairs, and the cosines of the E encoders of either side."""
    sizes: list[int]                                              # pairs of every subset
    gold: np.ndarray                                              # (P,)
    ours: np.ndarray                                              # (E, P)
    theirs: np.ndarray                                            # (E, P), maybe of another E

    def gain(self, rows: np.ndarray | slice = np.s_[:]) -> float:
        """100 x (mean Spearman of ours - mean Spearman of theirs) on these pairs."""
        ours, theirs = (spearmans(self.gold[rows], side[:, rows]).mean()
                        for side in (self.ours, self.theirs))
        return 100 * (ours - theirs)

    def draw(self, rng: np.random.Generator) -> np.ndarray:       # -> (P,)
        """The pairs of a new test; each subset is drawn with replacement from its own."""
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

    Both sides are scored on the same drawn pairs; p is at least 1 / draws. Percentiles: Efron &
    Tibshirani 1993, ch. 13.
    """
    rng = np.random.default_rng(seed)
    drawn = [[task.gain(task.draw(rng)) for task in tasks.values()]
             for _ in tqdm(range(draws), disable=None, unit="draw")]
    gains = np.array([[task.gain() for task in tasks.values()], *drawn])
    gains = np.column_stack([gains, gains.mean(axis=1)])          # (1 + draws, tasks + 1)
    low, high = np.percentile(gains[1:], [2.5, 97.5], axis=0)
    p = 2 * np.minimum((gains[1:] <= 0).mean(axis=0), (gains[1:] >= 0).mean(axis=0))
    return dict(zip([*tasks, "avg"], zip(gains[0], low, high, p.clip(1 / draws, 1))))


def compare_encoders(test: StsTest, ours: list[str], theirs: list[str], *, draws: int) -> str:
    """A table of the gains of our encoders over theirs, all on the same pairs."""
    cosines = {}                                                  # encoder -> task -> (P,)
    for name in {*ours, *theirs}:
        model, tokenizer = open_encoder(encoder_folder(name))
        sides = test.sides(partial(encode, model.to(pick_device("auto")), tokenizer))
        cosines[name] = {task: F.cosine_similarity(*sides(sum(subsets.values(), []))).tolist()
                         for task, subsets in test.tasks.items()}
    tasks = {task: Predictions([*map(len, subsets.values())],
                               np.array([gold for *_, gold in sum(subsets.values(), [])]),
                               *(np.array([cosines[name][task] for name in side])
                                 for side in (ours, theirs)))
             for task, subsets in test.tasks.items()}
    rows = [[name, *(f"{value:+.2f}" for value in values), f"{p:.4f}"]
            for name, (*values, p) in bootstrap(tasks, draws=draws).items()]
    return markdown([["", "gain", "from", "to", "p"], *rows], first=str.ljust)


# Okabe and Ito's colours, which readers with any colour vision tell apart; then dark ones.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C8D",
           "#80593D", "#666666", "#A50026", "#2F4B1F"]
MEASURED = "STS-B test"               # sentences of alignment and uniformity


def draw_averages(axes, groups: list[Group]) -> None:
    """A dot per seed and a bar at the mean: how large is the gain beside the noise?"""
    axes.figure.set_size_inches(7, 0.8 + 0.38 * len(groups))
    axes.set(xlabel="average of the test tasks, Spearman x 100")
    for place, group in enumerate(reversed(groups)):
        values = [*group.averages.values()]
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
        axes.plot(points.keys(), list(map(statistics.mean, points.values())), marker="o",
                  markersize=3, label=group.name)


def draw_geometry(axes, groups: list[Group]) -> None:
    """Arrows from before to after on the axes of SimCSE's figure 2; lower is better on both."""
    axes.set(xlabel=f"uniformity on {MEASURED}", ylabel=f"alignment on {MEASURED}")
    before = groups[0].runs[0].results["geometry_before"][MEASURED]
    start = before["uniformity"], before["alignment"]
    axes.plot(*start, "s", color="#000000")
    axes.annotate("before", start, xytext=(5, 5), textcoords="offset points")
    for group in groups:
        end = [statistics.mean(run.results["geometry"][MEASURED][key] for run in group.runs)
               for key in ("uniformity", "alignment")]
        [dot] = axes.plot(*end, "o", label=group.name)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "alpha": 0.4,
                                                  "color": dot.get_color()})


def draw_pretraining(axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Held-out loss of every pre-training over the tokens read."""
    axes.figure.set_size_inches(6, 3)
    axes.set(xlabel="million tokens", ylabel="held-out masked-LM loss")
    for name, points in curves.items():
        axes.plot(*zip(*points), label=name)


def save_figures(groups: list[Group], curves: dict, folder: Path) -> None:
    """NAME.png of every figure that the runs have data for."""
    if not can_draw("figures"):
        return
    from matplotlib.figure import Figure
    scored = [group for group in groups if any("dev" in row for row in group.runs[0].metrics)]
    measured = [group for group in groups if MEASURED in group.runs[0].results["geometry"]]
    for name, draw, content in (
            ("averages", draw_averages, groups), ("dev", draw_dev, scored),
            ("geometry", draw_geometry, measured), ("pretraining", draw_pretraining, curves)):
        if content:
            figure = Figure(figsize=(8.5, 4.5), layout="constrained")
            axes = figure.subplots()
            axes.set_prop_cycle(color=PALETTE)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            draw(axes, content)
            if draw is not draw_averages:
                figure.legend(loc="outside right upper", frameon=False, fontsize=8)
            figure.savefig(folder / f"{name}.png", dpi=150)


def pick_baseline(groups: list[Group], name: str) -> Group:
    """The group of this name, or the first; groups that no table can compare are refused."""
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
        raise ValueError(f"--baseline: expected one of {str([*named])[1:-1]}, found {name!r}")
    return named[name] if name else groups[0]


def main(argv: list[str] | None = None) -> None:
    top = Parser(prog="report.py", description=__doc__,
                 formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("runs", nargs="+", metavar="RUN", help="folder; with --against also a Hub id")
    top.add_argument("--out", type=Path, default=Path("report"), help="folder for tables [report]")
    top.add_argument("--baseline", default="", help="group to compare with [the first]")
    top.add_argument("--against", nargs="+", metavar="RUN", help="encoders to compare with")
    top.add_argument("--test", default="sts", help="sts, stsb or a .tsv file [sts]")
    top.add_argument("--data", type=Path, help="folder with senteval/ (or MINCSE_DATA)")
    top.add_argument("--draws", type=count, default=1000, help="tests drawn [1000]")
    args, tables = top.parse_args(argv), []
    if args.against and args.test == "docs":
        top.error("--test: expected sts, stsb or a .tsv file of scored pairs, found docs")
    with exits(3):
        if args.against:
            test = read_test(args.test, args.data)
            return print(compare_encoders(test, args.runs, args.against, draws=args.draws))
        runs = find_runs([Path(name) for name in args.runs])
    groups = groups_of([run for run in runs if "method" in run.config])
    curves = {run.folder.name: curve(run) for run in runs if "method" not in run.config}
    if groups:
        with exits(2):
            tables.append(as_markdown(groups, pick_baseline(groups, args.baseline)))
    if curves:
        rows = [[name, f"{points[-1][0]:.1f}", f"{points[-1][1]:.3f}"]
                for name, points in curves.items()]
        tables.append(markdown([["", "million tokens", "held-out loss"], *rows], first=str.ljust)
                      + "\n")
    print("".join(tables))
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "results.md", "".join(tables))
    if groups:
        write_csv(groups, args.out / "results.csv")
    save_figures(groups, curves, args.out)


if __name__ == "__main__":
    sys.exit(program(main))
