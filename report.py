"""
Tables and figures from the files that runs leave.

    python report.py runs/*                              # results.md, results.csv, four figures
    python report.py runs/* --baseline simcse --out report
    python report.py runs/* --keep results               # copies the records, not the weights
    python report.py runs/pretrained/*                   # held-out loss, of pretrain.py's runs

A run is a folder with args.json and results.json, anywhere below the folders given. Runs that
differ in nothing but the seed form a group, which has a row in the table: mean and sample standard
deviation over its seeds. Read `groups_of` first, then `rows_of`, then the figures.

Scores are Spearman x 100 in the convention "all", of the best checkpoint by the dev score. The
figures need matplotlib; the tables do not.
"""

import argparse
import csv
import io
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from config import Config
from eval_sts import exits, markdown
from pretrain import curve, draw
from runs import HARMLESS, deviation, write_text
from significance import holm, sign_flip_p

RECORDS = ("args.json", "env.json", "results.json", "metrics.jsonl")
NO_FIGURES = "report.py: no figures, as matplotlib is missing: pip install matplotlib"
NAMED = ("method", "loss", "positives")              # what a group is called after, if unusual
USUAL = ("simcse", "info-nce", "dropout")
BLIND = ("seed", *HARMLESS)                          # settings that do not tell groups apart


# ---- runs and groups ------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """One seed: its settings, where it ran, how it went, how it ended."""
    folder: Path
    config: dict
    command: str
    env: dict
    results: dict
    metrics: list[dict]

    @property
    def average(self) -> float:
        return self.results["test"]["avg"]


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, by seed."""
    name: str
    runs: list[Run]

    @property
    def averages(self) -> dict[int, float]:
        return {run.config["seed"]: run.average for run in self.runs}


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """One sentence instead of a traceback for records that are damaged or of something else."""
    try:
        yield
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: expected the records of a run ({', '.join(RECORDS)}), found "
                         f"something else in one of them ({error!r})") from None


def read_run(folder: Path) -> Run | None:
    """A finished run from its four records; None if another program left them."""
    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")
    with reading(folder):
        args = json.loads(read("args.json"))
        if "pruning" in args or "mask_rate" in args["config"]:
            return None
        env, results = json.loads(read("env.json")), json.loads(read("results.json"))
        lines = read("metrics.jsonl").splitlines()
        # What a run of an older version did not know yet stands at its default.
        run = Run(folder, asdict(Config()) | args["config"], args["command"], env, results,
                  [json.loads(line) for line in lines])
        float(run.average), run.config["seed"], env["corpus"]["sha256"]
        return run


def pretrained(paths: list[Path]) -> dict[str, list[tuple[int, float]]]:
    """The curve of every finished run of pretrain.py in these folders and below, by its name."""
    curves = {}
    for args in (args for path in paths for args in sorted(path.rglob("args.json"))):
        results = args.parent / "results.json"
        with reading(args.parent):
            settings = json.loads(args.read_text(encoding="utf-8")).get("config", {})
            if "mask_rate" in settings and results.is_file():
                found = json.loads(results.read_text(encoding="utf-8"))
                curves[args.parent.name] = curve(args.parent, found)
    return curves


def find_runs(paths: list[Path]) -> list[Run]:
    """Every finished run in these folders and below. Others are named and left out."""
    runs = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: expected a folder of runs, found "
                                    f"{'a file' if path.exists() else 'nothing'} there")
        for args in sorted(path.rglob("args.json")):
            finished = (args.parent / "results.json").is_file()
            if finished and (run := read_run(args.parent)):
                runs.append(run)
            else:
                why = "is of pruning.py or pretrain.py" if finished else "is not finished"
                print(f"report.py: {args.parent} {why}: not in the table", file=sys.stderr)
    return runs


def groups_of(runs: list[Run]) -> list[Group]:
    """Runs that differ in nothing but the seed belong together; simcse comes first."""
    found = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if k not in BLIND})
        found.setdefault(key, []).append(run)
    names = names_of([json.loads(key) for key in found])
    groups = [Group(name, sorted(members, key=lambda run: run.config["seed"]))
              for name, members in zip(names, found.values())]
    return sorted(groups, key=lambda group: group.name.split(",")[0] != USUAL[0])


def names_of(configs: list[dict]) -> list[str]:
    """The method, then loss and positives if unusual, then what else tells it from its likes."""
    short = [" ".join([config["method"], *(config[k] for k, usual in zip(NAMED[1:], USUAL[1:])
                                           if config[k] != usual)]) for config in configs]
    names = []
    for name, config in zip(short, configs):
        alike = [other for other, its in zip(configs, short) if its == name]
        telling = [k for k in config if len({str(other.get(k)) for other in alike}) > 1]
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
    short = baseline.name.split(",")[0]
    lines = [["", "seeds", "steps", *tasks, "average", "against " + short, "p"]]
    others = [group for group in groups if group is not baseline and paired(group, baseline)]
    chances = dict(zip((group.name for group in others),
                       holm([sign_flip_p(paired(group, baseline)) for group in others])))
    for group in groups:
        tests = [run.results["test"] for run in group.runs]
        averages = [test["avg"] for test in tests]
        gain = f"{statistics.mean(paired(group, baseline)):+.2f}" if group in others else ""
        chance = f"{chances[group.name]:.2f}" if group in others else ""
        lines.append([group.name, str(len(tests)), str(group.runs[0].results["steps"]),
                      *(f"{statistics.mean(test[task] for test in tests):.2f}" for task in tasks),
                      spread(averages), gain, chance])
    return lines


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; of one run the latter is not known."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {deviation(values):.2f}" if len(values) > 1 else mean


def as_markdown(groups: list[Group], baseline: Group) -> str:
    """results.md: the table, how to read it, and what each line was."""
    notes = ("Spearman x 100, \"all\", mean over seeds; average: mean ± sample standard deviation. "
             "p: exact sign-flip test over paired seeds, Holm-corrected; with three seeds it "
             "cannot be below 0.25.")
    start = groups[0].runs[0].results["before"]["avg"]
    commands = [f"- {group.name}: `{group.runs[0].command}`" for group in groups]
    machines = sorted({f"{run.env['gpu'] or run.env['processor']}, {run.env['threads']} thread(s), "
                       f"torch {run.env['torch']}" for group in groups for run in group.runs})
    return "\n\n".join([markdown(rows_of(groups, baseline), first=str.ljust), notes,
                        f"Before training: {start:.2f} (same pooling, no head).",
                        "\n".join(commands), "Run on: " + "; ".join(machines) + "."]) + "\n"


def as_csv(groups: list[Group]) -> str:
    """results.csv: a line per run, with what is needed to run it again."""
    file = io.StringIO()
    tasks = list(groups[0].runs[0].results["test"])
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["group", "seed", "steps", "best_step", "dev", "before", *tasks,
                     "corpus_sha256", "command"])
    for group in groups:
        for run in group.runs:
            found = run.results
            scores = [found["before"]["avg"], *(found["test"][task] for task in tasks)]
            writer.writerow([group.name, run.config["seed"], found["steps"], found["best_step"],
                             found["dev"].get("avg", ""), *(f"{score:.4f}" for score in scores),
                             run.env["corpus"]["sha256"], run.command])
    return file.getvalue()


# ---- figures --------------------------------------------------------------------------------

def figures(groups: list[Group]) -> dict:
    """Name -> matplotlib figure. White ground and dark lines, so that they are read anywhere."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False,
                                "axes.spines.right": False, "figure.constrained_layout.use": True,
                                "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
                                "svg.hashsalt": "mincse"})
    drawn = {"averages": draw_averages(groups), "dev": draw_dev(groups),
             "geometry": draw_geometry(groups), "curves": draw_curves(groups)}
    return {name: figure for name, figure in drawn.items() if figure}


# Okabe and Ito's colours, which readers with any colour vision tell apart; then dark ones.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F3C8D",
           "#80593D", "#666666", "#A50026", "#2F4B1F"]


def draw_averages(groups: list[Group]):
    """A dot per seed, a bar at the mean: how large is the gain beside the noise?"""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.38 * len(groups)))
    for place, group in enumerate(reversed(groups)):
        values = list(group.averages.values())
        axes.plot(values, [place] * len(values), "o", color=PALETTE[0], alpha=0.75, markersize=5)
        axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="#000000")
    axes.set_yticks(range(len(groups)), [group.name for group in reversed(groups)])
    axes.set_xlabel("average of the test tasks, Spearman x 100")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_dev(groups: list[Group]):
    """The dev score over steps, mean over seeds; None where no run has one."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    for group in groups:
        points = {}
        for row in (row for run in group.runs for row in run.metrics if "dev" in row):
            points.setdefault(row["step"], []).append(row["dev"]["avg"])
        if points:
            axes.plot(points.keys(), [statistics.mean(scores) for scores in points.values()],
                      marker="o", markersize=3, label=group.name)
    axes.set_xlabel("step")
    axes.set_ylabel("dev score, Spearman x 100")
    axes.grid(alpha=0.3)
    if not axes.lines:
        return None
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw_curves(groups: list[Group]):
    """Loss, and the cosines of positives and negatives, over steps; first seed of every group."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4))
    for ax, key, label in zip(axes, ("loss", "positive_cosine", "negative_cosine"),
                              ("loss", "cosine of positives", "cosine of negatives")):
        for group in groups:
            rows = [row for row in group.runs[0].metrics if key in row]   # a federation has few
            ax.plot([row["step"] for row in rows], [row[key] for row in rows], label=group.name)
        ax.set_xlabel("step")
        ax.set_ylabel(label)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False, fontsize=8)
    return figure


def draw_geometry(groups: list[Group], where: str = "STS-B test"):
    """Alignment against uniformity, lower is better on both; an arrow from before to after.

    The axes of SimCSE's figure 2 (Gao et al. 2021), on the sentences of STS-B.
    """
    groups = [group for group in groups if where in group.runs[0].results["geometry"]]
    if not groups:
        return None
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8.5, 4.5))
    start = groups[0].runs[0].results["geometry_before"][where]
    axes.plot(start["uniformity"], start["alignment"], "s", color="#000000")
    axes.annotate("before", (start["uniformity"], start["alignment"]), xytext=(5, 5),
                  textcoords="offset points")
    for i, group in enumerate(groups):
        x, y = (statistics.mean(run.results["geometry"][where][key] for run in group.runs)
                for key in ("uniformity", "alignment"))
        axes.annotate("", (x, y), (start["uniformity"], start["alignment"]),
                      arrowprops={"arrowstyle": "->", "color": PALETTE[i % len(PALETTE)],
                                  "alpha": 0.4})
        axes.plot(x, y, "o", color=PALETTE[i % len(PALETTE)], label=group.name)
    axes.set_xlabel(f"uniformity on {where}")
    axes.set_ylabel(f"alignment on {where}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


# ---- the program ----------------------------------------------------------------------------

def keep(runs: list[Run], folder: Path) -> None:
    """Copy the records behind published figures: everything but weights and tokenizers."""
    for run in runs:
        place = folder / run.folder.parent.name / run.folder.name
        place.mkdir(parents=True, exist_ok=True)
        for name in RECORDS:
            shutil.copyfile(run.folder / name, place / name)


def pick_baseline(groups: list[Group], name: str) -> Group:
    """The group that the others are compared with."""
    for group in groups:
        if group.name == name:
            return group
    raise ValueError(f"--baseline: expected one of {', '.join(repr(g.name) for g in groups)}, "
                     f"found {name!r}")


def check_tests(groups: list[Group]) -> None:
    """A table needs one test: averages over other tasks are other figures."""
    asked = {group.runs[0].config["test"]: group.name for group in groups}
    if len(asked) > 1:
        raise ValueError("expected runs with the same --test, found "
                         + ", ".join(f"{test} in {name!r}" for test, name in asked.items())
                         + ": report them one by one")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder [report]")
    parser.add_argument("--baseline", default="", help="group to compare with [the first]")
    parser.add_argument("--keep", type=Path, help="also copy the records of all runs to there")
    args = parser.parse_args(argv)
    with exits(3):
        runs, curves = find_runs(args.folders), pretrained(args.folders)
        if not runs and not curves:
            raise ValueError(f"{' '.join(map(str, args.folders))}: expected a finished run "
                             "(args.json and results.json) in there, found none")
    if curves:
        args.out.mkdir(parents=True, exist_ok=True)
        print(markdown([["", "million tokens", "held-out loss"],
                        *([name, f"{points[-1][0] / 1e6:.1f}", f"{points[-1][1]:.3f}"]
                          for name, points in curves.items())], first=str.ljust))
        if not draw(curves, args.out / "pretraining.png"):
            print(NO_FIGURES, file=sys.stderr)
    if runs:
        tables(runs, args)


def tables(runs: list[Run], args: argparse.Namespace) -> None:
    """results.md, results.csv, figures, and the records if they are to be kept."""
    groups = groups_of(runs)
    with exits(2):
        baseline = pick_baseline(groups, args.baseline or groups[0].name)
        check_tests(groups)
    args.out.mkdir(parents=True, exist_ok=True)
    text = as_markdown(groups, baseline)
    write_text(args.out / "results.md", text)
    write_text(args.out / "results.csv", as_csv(groups))
    if args.keep:
        keep(runs, args.keep)
    print(text)
    try:
        drawn = figures(groups)
    except ImportError:
        return print(NO_FIGURES, file=sys.stderr)
    for name, figure in drawn.items():
        for kind in ("png", "svg"):
            figure.savefig(args.out / f"{name}.{kind}", dpi=150, facecolor="white",
                           metadata={"Date": None} if kind == "svg" else None)


if __name__ == "__main__":
    main()
