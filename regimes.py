"""
What if training is not one run? Outer loops: every stage is a whole run of mincse.py's.

    federated   --method fedrcl --clients 8    rounds: clients train apart, their weights are
                                               averaged (FedAvg), and the mean goes out again
    continual   --method pnr --corpus A B      one corpus after the other; what is still known of
                                               the first is measured after each

A loop hands `train_stage` the inputs and the settings of a stage, gets back what was learned, and
yields the figures of a round or task with the model in `job.parts`; mincse.py scores it and saves.
Optimizer, schedule and warm-up start anew in each stage. A stopped stage goes on where it was.

Read `average` and `federated`, then `transfer` and `continual`.
Not here: the losses (losses.py), the methods' classes (methods.py), the training (mincse.py).
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

import devices
from config import Config, names
from data import Corpus
from eval_sts import Encode, Result, StsTest, TwinTest, average as mean_score, table
from folders import load
from losses import class_cosines, participation_ratio
from model import Encoder, SentenceEncoder, encode

PROBE = 512                           # sentences held out of a corpus, at most a tenth of it
LEAST = 20                            # sentences that a probe is drawn from
ROUND_DECAY = 0.998                   # of the learning rate, from round to round (their scripts)
SEED_STEP = 1000                      # stages draw apart from each other, and --seeds 0-4 too


@dataclass(frozen=True)
class Regime:
    """`stages` trains and yields figures, `report` makes text and results.json's part of them."""
    stages: Callable
    report: Callable
    count: Callable[[Config], int]


def of(config: Config) -> Regime | None:
    """The outer loop that the settings ask for, if any."""
    return FEDERATED if config.clients else CONTINUAL if len(names(config.corpus)) > 1 else None


def part(corpus: Corpus, rows: Sequence[int]) -> Corpus:
    """Some rows of a corpus, as one of its own."""
    rows = list(rows)
    return replace(corpus, columns=[[column[row] for row in rows] for column in corpus.columns],
                   documents=[corpus.documents[row] for row in rows] if corpus.documents else None,
                   teacher=None if corpus.teacher is None else corpus.teacher[rows])


def hold_out(texts: Sequence[str], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """(probe, rest) of these rows: the same for every seed, and no text on both sides."""
    count = min(PROBE, len(rows) // 10)
    probe = sorted(random.Random("probe").sample(list(rows), count))
    asked = {texts[row] for row in probe}
    return probe, [row for row in rows if texts[row] not in asked]


def or_nan(value: float | None) -> float:
    """A figure as metrics.jsonl has it: what JSON had to leave out was no number."""
    return math.nan if value is None else value


# ---- federated ------------------------------------------------------------------------------

def balanced_dirichlet(labels: Tensor, clients: int, *, alpha: float, seed: int
                       ) -> list[list[int]]:                      # (N,) -> C lists of N / C rows
    """Deal the rows out: each client prefers classes of its own, p ~ Dirichlet(α).

    One after the other draws N / C of what is left, a row of class k with a chance ∝ p_k; where
    its classes run out, any row. α = 0.1: about two of six classes each; α = 100: all alike.
    """
    rng, free = numpy.random.default_rng(seed), numpy.arange(len(labels))
    y, size, shards = labels.numpy(), len(labels) // clients, []
    for _ in range(clients):
        liking = rng.dirichlet(numpy.full(int(y.max()) + 1, alpha))                 # (K,)
        # The highest of log p + Gumbel noise are a weighted draw without repeats.
        key = numpy.log(numpy.maximum(liking[y[free]], 1e-300)) + rng.gumbel(size=len(free))
        taken = numpy.argsort(-key)[:size]
        shards.append(sorted(free[taken].tolist()))
        free = numpy.delete(free, taken)
    return shards


def average(states: Sequence[dict[str, Tensor]], counts: Sequence[int]) -> dict[str, Tensor]:
    """FedAvg: θ = Σ_c n_c θ_c / Σ_c n_c for every tensor of floats; others as the first has them.

    McMahan et al. 2017. In double precision, so that the mean of equal models is exactly that.
    """
    mean = dict(states[0])
    for name, tensor in mean.items():
        if tensor.is_floating_point():
            total = sum(n * state[name].double() for state, n in zip(states, counts))
            mean[name] = (total / sum(counts)).to(tensor.dtype)
    return mean


def taking_part(config: Config, number: int) -> list[int]:
    """The clients of a round: of seed and round alone, so the same whatever the loss."""
    count = max(1, int(config.client_share * config.clients))
    rng = random.Random(f"{config.seed} round {number}")
    return sorted(rng.sample(range(config.clients), count))


@dataclass(frozen=True)
class Drift:
    """How far a client went: mean cosine distance from the global model, on fixed sentences."""
    texts: list[str]
    origin: Tensor                                                # (N, D)

    def score(self, encode: Encode) -> Result:
        away = 1 - F.cosine_similarity(encode(self.texts), self.origin).mean().item()
        return Result({"drift": away, "avg": away})


def federated(job, train_stage: Callable, *, first: int) -> Iterator[dict]:
    """Rounds first.. of local training and averaging. `job.parts` is the global model."""
    config, inputs = job.config, job.inputs
    texts, labels = inputs.corpus.columns[0], job.parts["method"].labels.cpu()
    probe, rest = hold_out(texts, range(len(texts)))
    shards = [[rest[place] for place in shard] for shard in balanced_dirichlet(
        labels[rest], config.clients, alpha=config.alpha, seed=config.seed)]
    asked = [texts[row] for row in probe]
    for number in range(first, config.rounds + 1):
        begin, test = snapshot(job), Drift(asked, job.encode(asked))
        trained = []
        for client in taking_part(config, number):
            rows, turn = shards[client], (number - 1) * config.clients + client
            local = replace(inputs, corpus=part(inputs.corpus, rows), test=test, dev=None,
                            start=begin | {"method.labels": labels[rows]}, known={})
            rate = config.learning_rate * ROUND_DECAY ** (number - 1)
            own = replace(config, seed=config.seed + SEED_STEP * turn, learning_rate=rate,
                          dev="none")
            trained.append((*train_stage(local, own, f"round-{number}-client-{client}"),
                            len(rows)))
        states, results, counts = zip(*trained)
        job.parts.load_state_dict(average(states, counts) | {"method.labels": labels})
        yield {"loss": sum(result["loss"] for result in results) / len(results),
               "drift": sum(result["test"]["drift"] for result in results) / len(results),
               **collapse(job.encode(asked), labels[probe]),
               "class_accuracy": accuracy(job, asked, labels[probe])}


def snapshot(job) -> dict[str, Tensor]:
    """The parts as they are now, in memory of their own."""
    return {name: tensor.detach().cpu().clone() for name, tensor in job.parts.state_dict().items()}


def collapse(x: Tensor, labels: Tensor) -> dict[str, float]:      # (N, D), (N,)
    """Is a class a point? Do the embeddings fill the space?"""
    same, between = class_cosines(x, labels)
    return {"same_class_cosine": same, "between_class_cosine": between,
            "participation_ratio": participation_ratio(x)}


@torch.no_grad()
def accuracy(job, texts: Sequence[str], labels: Tensor) -> float:
    """Percent of held-out sentences whose class the global classifier tells."""
    scores = job.parts["method"].classifier(job.encode(texts).to(job.inputs.device))
    return 100 * (scores.argmax(dim=1).cpu() == labels).float().mean().item()


def federated_report(job, rows: list[dict]) -> tuple[str, dict]:
    """A line a round. Curves of a federation swing: the last round alone says little."""
    texts, labels = job.inputs.corpus.columns[0], job.parts["method"].labels.cpu()
    probe, _ = hold_out(texts, range(len(texts)))
    before = collapse(at_start(job)([texts[row] for row in probe]), labels[probe])
    shown = ["drift", *before, "class_accuracy"]
    lines = {f"round {row['step']}": {name: or_nan(row[name]) for name in shown}
             | ({"dev": or_nan(row["dev"]["avg"])} if "dev" in row else {}) for row in rows}
    size = sum(t.numel() * t.element_size() for t in job.parts.parameters()) / 2**20
    takers = len(taking_part(job.config, 1))
    text = "\n\n".join([
        f"A step above is a round. Of {job.config.clients} clients {takers} train in a round, and "
        f"{2 * takers * size:.0f} MiB of weights go to and fro.",
        table(lines, digits=3),
        "On held-out sentences of the corpus, before training: "
        + ", ".join(f"{name} {value:.3f}" for name, value in before.items()) + "."])
    return text + "\n", {"rounds": rows, "at_start": before}


def at_start(job) -> Encode:
    """What the encoder said before all training."""
    model = load(job.inputs.folder, pooling=job.config.pooling).to(job.inputs.device)
    return partial(encode, model, job.inputs.tokenizer)


# ---- continual ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Probes:
    """One number a domain: 100 x MRR of halves, the average of any other test."""
    tests: dict[str, StsTest | TwinTest]

    def score(self, encode: Encode) -> Result:
        found = {name: test.score(encode).scores for name, test in self.tests.items()}
        scores = {name: each.get("mrr", each["avg"]) for name, each in found.items()}
        return Result(scores | {"avg": mean_score(scores)})


def halves(texts: Sequence[str]) -> TwinTest:
    """Find the second half of a sentence by its first: a measure for any text without labels."""
    middle = {text: (len(text.split()) + 1) // 2 for text in texts}
    return TwinTest([(text, " ".join(text.split()[:cut]), " ".join(text.split()[cut:]))
                     for text, cut in middle.items()])


def tasks_of(corpora: Sequence[Corpus]) -> tuple[list[Corpus], dict[str, TwinTest]]:
    """What each corpus trains on, and its probe; a sentence belongs to the first that has it."""
    seen, tasks, probes = set(), [], {}
    for name, corpus in zip(short_names(corpora), corpora):
        texts = corpus.columns[0]
        fresh = [row for row, text in enumerate(texts) if text not in seen]
        long = [row for row in fresh if len(texts[row].split()) >= 8]   # halves that say something
        probe, _ = hold_out(texts, long if len(long) >= LEAST else fresh)
        asked = {texts[row] for row in probe}
        tasks.append(part(corpus, [row for row in fresh if texts[row] not in asked]))
        probes[name] = halves([texts[row] for row in probe])
        seen.update(texts)
    return tasks, probes


def short_names(corpora: Sequence[Corpus]) -> list[str]:
    """wiki1m, or the file's name without its folder."""
    return [corpus.name.rpartition("/")[2].split(".")[0] for corpus in corpora]


def continual(job, train_stage: Callable, *, first: int) -> Iterator[dict]:
    """Tasks first.., a corpus each. A task starts with all parts that the one before left."""
    config, inputs = job.config, job.inputs
    tasks, probes = tasks_of([inputs.corpus, *inputs.later])
    test = Probes(probes | {"test": inputs.test})
    # The same budget for all, or a large corpus would count for more.
    steps = config.steps or config.epochs * (min(map(len, tasks)) // config.batch_size)
    if config.order == "together":
        tasks, steps = [union(tasks)], steps * len(tasks)
    for number in range(first, len(tasks) + 1):
        task = replace(inputs, corpus=tasks[number - 1], test=test,
                       start=snapshot(job) if number > 1 else None)
        own = replace(config, seed=config.seed + SEED_STEP * (number - 1), steps=steps)
        state, results = train_stage(task, own, f"task-{number}")
        job.parts.load_state_dict(state)
        yield {"loss": results["loss"], "before": results["before"], "after": results["test"]}


def union(corpora: Sequence[Corpus]) -> Corpus:
    """All of their sentences as one corpus."""
    texts = [text for corpus in corpora for text in corpus.columns[0]]
    return replace(corpora[0], columns=[texts], documents=None)


def transfer(matrix: Sequence[Sequence[float]], chance: Sequence[float]) -> dict[str, float]:
    """What a sequence of T tasks left: a[k][d] is the score on domain d after task k.

    average: mean of the last row. forgetting: best before the last task, minus the last; lower
    is better, below 0 nothing was lost. backward: the last minus that right after the domain's own
    task. forward: that right before its own task, minus `chance`, a random encoder's score.
    plasticity: that right after the own task. Means over d < T, d < T, d > 1 and all d.
    """
    T, last = len(matrix), matrix[-1]
    early, late = range(T - 1), range(1, T)

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)
    return {"average": mean(last),
            "forgetting": mean(max(matrix[k][d] for k in range(d, T - 1)) - last[d] for d in early),
            "backward": mean(last[d] - matrix[d][d] for d in early),
            "forward": mean(matrix[d - 1][d] - chance[d] for d in late),
            "plasticity": mean(matrix[d][d] for d in range(T))}


def continual_report(job, rows: list[dict]) -> tuple[str, dict]:
    """The matrix of scores after each task, and what it says."""
    _, probes = tasks_of([job.inputs.corpus, *job.inputs.later])
    torch.manual_seed(0)
    unknowing = SentenceEncoder(Encoder(job.model.config), pooling=job.config.pooling)
    ask = partial(encode, unknowing.to(job.inputs.device), job.inputs.tokenizer)
    chance = Probes(probes | {"test": job.inputs.test}).score(ask).scores
    learned = ["all of them"] if job.config.order == "together" else list(probes)
    matrix = {f"after {name}": row["after"] for name, row in zip(learned, rows)}
    lines = {"random weights": chance, "before": rows[0]["before"], **matrix}
    lines = {name: {task: or_nan(row[task]) for task in (*probes, "test")}
             for name, row in lines.items()}
    scores = [[lines[name][task] for task in probes] for name in matrix]
    measures = ({"average": sum(scores[0]) / len(probes)} if len(learned) == 1 else
                transfer(scores, [chance[task] for task in probes]))
    text = "\n\n".join([
        "A step above is a corpus. A column of a corpus: 100 x MRR of finding the second half of "
        f"its held-out sentences by the first; test: {job.config.test}.",
        table(lines), "Over the corpora: "
        + ", ".join(f"{name} {value:.2f}" for name, value in measures.items()) + "."])
    return text + "\n", {"matrix": lines, "transfer": measures}


# ---- the menu -------------------------------------------------------------------------------

FEDERATED = Regime(federated, federated_report, lambda config: (
    config.rounds * len(taking_part(config, 1))))
CONTINUAL = Regime(continual, continual_report, lambda config: (
    1 if config.order == "together" else len(names(config.corpus))))


def check(config: Config, corpora: Sequence[Corpus]) -> None:
    """Refuse what no regime can do, in one sentence."""
    given = names(config.corpus)
    if config.clients and config.method != "fedrcl":
        raise ValueError(f"--clients {config.clients}: --method {config.method} has no classes to "
                         "split by: use --method fedrcl (plain FedAvg: --scl-weight 0 "
                         "--penalty-weight 0)")
    if config.method == "pnr" and len(given) == 1:
        raise ValueError(f"--method pnr learns one corpus after the other, found {given[0]} "
                         "alone: give --corpus two names or more, or use --method simcse")
    if of(config) and devices.world() > 1:
        raise ValueError("a federation or a sequence of corpora is one process, found "
                         f"{devices.world()}: start it with python, not torchrun")
    if config.clients:
        check_clients(config, corpora[0])
    if len(given) > 1:
        check_sequence(config, corpora)


def check_clients(config: Config, corpus: Corpus) -> None:
    """Every client must fill a batch."""
    share = len(hold_out(corpus.columns[0], range(len(corpus)))[1]) // config.clients
    if share < config.batch_size:
        raise ValueError(f"--clients {config.clients}: expected at least --batch-size "
                         f"{config.batch_size} sentences for each, found {share}: use fewer "
                         "clients, a smaller batch or a larger corpus")


def check_sequence(config: Config, corpora: Sequence[Corpus]) -> None:
    """A sequence is of different corpora of sentences, and each task ends with its last step."""
    title = f"--corpus {' '.join(names(config.corpus))}"
    if config.method not in ("pnr", "simcse"):
        raise ValueError(f"{title}: --method {config.method} takes one corpus: use --method pnr, "
                         "or simcse as its baseline")
    if config.order == "together" and config.method == "pnr":
        raise ValueError("--order together: --method pnr learns one corpus after the other: use "
                         "--method simcse, whose result bounds what a sequence can keep")
    if config.dev != "none":
        raise ValueError(f"{title}: a sequence keeps the last step of each task, found --dev "
                         f"{config.dev}: use --dev none")
    if len(set(short_names(corpora))) < len(corpora):
        raise ValueError(f"{title}: expected corpora of different names, found one twice")
    for corpus in corpora:
        if len(corpus.columns) > 1:
            raise ValueError(f"{title}: expected sentences without labels, found "
                             f"{len(corpus.columns)} columns in {corpus.name}")
    for name, task in zip(short_names(corpora), tasks_of(corpora)[0]):
        if len(task) < max(config.batch_size, LEAST):
            raise ValueError(f"{title}: expected at least {max(config.batch_size, LEAST)} "
                             f"sentences in {name} beside its probe that no corpus before it has, "
                             f"found {len(task)}: use a smaller --batch-size or more text")
