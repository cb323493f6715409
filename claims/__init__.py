"""
Does a paper's mechanism do what the paper says? One page a claim, tried on planted truth.

    python -m claims.ifnd                 # a minute or two: the claim, what was planted, a table
    python -m claims.simcse --figure FILE # the same with a picture, where a page has `curves`
    python -m claims                      # all of them, and docs/CLAIMS.md

A page says in its docstring what the paper claims and what was planted. Its `measure` makes the
table of one seed, and `SHOWS` says which row must exceed which. What a page measures is
done by the paper's own page, and trained by `mincse.train` with that paper's defaults.
"""

import sys

if sys.argv[:1] == ["-m"]:            # python -m claims.ifnd imports this before itself
    import engine.interrupt           # noqa: F401

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import NamedTuple

from scipy.stats import ttest_1samp
from torch import Tensor

from data import Corpus
from engine.changes import can_draw
from engine.docs import doc_sentences
from engine.flags import Parser, exits, pick_device, program, seed_list
from engine.hub import encoder_folder
from engine.tables import markdown
from eval_sts import Encode, Result, open_encoder
from mincse import Inputs, Job, batches_by_round, before_training, build, steps_of
from model import encode
from papers import METHODS, check
from papers.settings import resolve
from papers.simcse import Encoded

Rows = dict[str, dict[str, float]]    # row of a table -> column -> value
CHANCE = 0.05                         # p above which a difference may be luck


# ---- what a page is made of -----------------------------------------------------------------

class Shows(NamedTuple):
    """What a table must show for the claim to come true: `more` exceeds `less` in a column."""
    column: str
    more: str
    less: str


class Curves(NamedTuple):
    """A picture: points (x, y) by the name of their curve."""
    x: str
    y: str
    points: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Trial:
    """One seed of a measurement; a `size` below 1 makes it smaller, for tests."""
    seed: int
    size: float = 1.0
    encoder: str = "mini"

    def scaled(self, count: int) -> int:
        """So many sentences or steps in full size, fewer in a smaller one."""
        return max(1, round(count * self.size))

    @property
    def rng(self) -> random.Random:
        """A new random source, which draws the same each time."""
        return random.Random(self.seed)

    @property
    def encode(self) -> Encode:
        """The function of the encoder as it was given, N sentences -> (N, D)."""
        return partial(encode, *open_encoder(encoder_folder(self.encoder), pooling="cls"))

    def sentences(self, count: int) -> list[str]:
        """Sentences of the built-in corpus."""
        return self.rng.sample(doc_sentences(), count)

    def job(self, method: str, *columns: Sequence[str], documents: Sequence[int] | None = None,
            later: Sequence[str] = (), **given) -> Job:
        """A run of mincse on these texts before its first step; `given` are typed settings.

        `later` is a second corpus, for a paper that learns several in turn.
        """
        folder = encoder_folder(self.encoder)
        model, tokenizer = open_encoder(folder, pooling="cls")
        corpora = [Corpus("planted", list(columns), documents, f"planted {self.seed}", blank=0)]
        corpora += [Corpus("later", [later], None, f"later {self.seed}", blank=0)] if later else []
        given = {"method": method, "encoder": self.encoder, "seed": self.seed, "precision": "fp32",
                 "corpus": [corpus.name for corpus in corpora]} | given
        config = resolve(METHODS[method], given, model.config, columns=len(columns))
        check(config, corpora, model.config)
        inputs = Inputs(corpora, tokenizer, folder, None, None, config, {}, pick_device("auto"))
        job = build(inputs, config)
        before_training(job, Result({}))                          # a score that nobody asks for
        return job

    def trained(self, method: str, *columns: Sequence[str], **given) -> Job:
        """The same after its last step."""
        job = self.job(method, *columns, **given)
        for _ in steps(job):
            pass
        return job


def steps(job: Job) -> Iterator[tuple[int, Tensor, Encoded]]:
    """Train, and yield (step, loss, what was compared) after each step."""
    return steps_of(job, batches_by_round(job, first=1))


# ---- is it luck? ----------------------------------------------------------------------------

def p_value(differences: Sequence[float]) -> float:
    """Of a two-sided t-test that the differences over seeds are 0 in the mean."""
    if len(set(differences)) == 1:                                # no spread, no t
        return float(differences[0] == 0)
    return float(ttest_1samp(differences, 0).pvalue)


@dataclass(frozen=True)
class Found:
    """The tables of all seeds, and what they took."""
    page: ModuleType
    tables: list[Rows]
    seconds: float                    # of one core

    def differences(self, shows: Shows) -> list[float]:
        return [rows[shows.more][shows.column] - rows[shows.less][shows.column]
                for rows in self.tables]

    def holds(self, shows: Shows) -> bool:
        """Does the row that must be greater exceed the other, by more than chance?"""
        found = self.differences(shows)
        return statistics.mean(found) > 0 and p_value(found) < CHANCE

    @property
    def held(self) -> str:
        """How many of the statements hold."""
        return f"{sum(map(self.holds, self.page.SHOWS))} of {len(self.page.SHOWS)}"

    def table(self) -> str:
        """Mean and standard deviation over seeds."""
        columns = list(dict.fromkeys(name for row in self.tables[0].values() for name in row))
        lines = [[name, *(self.cell(name, column) for column in columns)]
                 for name in self.tables[0]]
        return markdown([["", *columns], *lines], first=str.ljust)

    def cell(self, row: str, column: str) -> str:
        if column not in self.tables[0][row]:
            return ""
        values = [rows[row][column] for rows in self.tables]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(set(values)) > 1 else ""
        return f"{statistics.mean(values):.2f}{deviation}"

    def findings(self) -> str:
        """A line for each thing that the table must show."""
        lines = []
        for shows in self.page.SHOWS:
            found = self.differences(shows)
            lines.append(f"- {'shown' if self.holds(shows) else 'NOT shown'}: {shows.column}, "
                         f"*{shows.more}* above *{shows.less}* by {statistics.mean(found):.2f} "
                         f"(p = {p_value(found):.2g}, {len(found)} seeds)")
        return "\n".join(lines)

    def text(self) -> str:
        return f"{self.page.__doc__.strip()}\n\n{self.table()}\n\n{self.findings()}\n"


def find(page: ModuleType, seeds: Sequence[int], *, size: float = 1.0, encoder: str = "mini"
         ) -> Found:
    """Measure a page with each seed."""
    start = process_time()
    tables = [page.measure(Trial(seed, size, encoder)) for seed in seeds]
    return Found(page, tables, process_time() - start)


def draw(page: ModuleType, trial: Trial, path: Path) -> None:
    """Save the curves of a page as a picture."""
    if not can_draw(path.name):
        return
    from matplotlib.figure import Figure
    curves = page.curves(trial)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.points.items():
        axes.plot(*zip(*points), marker="o", markersize=4, label=name)
    axes.set(xlabel=curves.x, ylabel=curves.y)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


# ---- the program ----------------------------------------------------------------------------

def parse(description: str, *, figure: bool = False) -> argparse.Namespace:
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(figure=None)
    if figure:
        parser.add_argument("--figure", metavar="FILE", help="draw the first seed's curves (.png, "
                            ".svg or .pdf; needs matplotlib)")
    parser.add_argument("--encoder", default="mini", help="mini, a folder, or a Hub id [mini]")
    parser.add_argument("--seeds", type=seed_list, default=[*range(5, 8)], metavar="A-B",
                        help="seeds of the measurements, two or more [5-7]")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error(f"--seeds: expected two or more, found {args.seeds[0]} alone")
    return args


def show(name: str) -> None:
    """The program of a page, by the name of its module: print what was found, and leave."""
    page = sys.modules[name]

    def main() -> None:
        args = parse(page.__doc__, figure=hasattr(page, "curves"))
        with exits(3):
            Path(encoder_folder(args.encoder))
        if args.figure:
            with exits(2):
                draw(page, Trial(args.seeds[0], encoder=args.encoder), Path(args.figure))
        found = find(page, args.seeds, encoder=args.encoder)
        print(found.text(), f"{found.seconds:.0f} seconds of a core", sep="\n")
    sys.exit(program(main))
