"""
PNR: learn one corpus after the other; the previous model is a teacher and gives negatives, too.

Unlike SimCSE: the corpora are learned in turn, a task each. From the second on, a frozen copy of
the model from before the task is the teacher, and its vectors of the other sentences of the batch
are negatives as well, the "pseudo-negatives".
    __init__    the predictor, from vectors of the present model to those of the previous one
    outer_loop  the tasks, and after each how well every corpus is known
    loss        SimCSE with pseudo-negatives, and distillation with pseudo-negatives
    report      the table of what was known when, and how much of it was forgotten

Cha, Cho, Moon: ICML 2024, arXiv 2306.05101, on images; nothing is published on text. The loss is
that of their MoCo code, with the batch in place of the queue. In their SimCLR code a sentence's own
vectors are among its pseudo-negatives, and the gradient of the second term reaches z', too. Ours:
the previous model works without dropout, so it has one view where theirs has two; only the first
view is the anchor; the predictor has LayerNorm; and forgetting is measured in our way.

Baselines: `--pseudo-weight 0` is distillation alone, `--distillation-weight 0` is SimCSE with
pseudo-negatives. Both at 0 are plain fine-tuning: SimCSE on each corpus in turn, bit for bit.
A step costs 1.2 times SimCSE's, for one forward pass of the previous model.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

import torch
import torch.nn as nn
from torch import Tensor

from data import Corpus
from engine.encoders import load
from engine.flags import Row, flag
from engine.tables import table
from eval_sts import TwinTest
from losses import info_nce
from model import SentenceEncoder
from papers import settings
from papers.corpus import LEAST, hold_out
from papers.simcse import Encoded, SimCSE, frozen


@dataclass(frozen=True)
class Config(settings.Config):
    pseudo_weight: float = flag(1.0, "pnr", "weight w of pseudo-negatives (their code)", least=0)
    distillation_weight: float = flag(1.0, "pnr", "weight λ of distillation (their code)", least=0)


class PNR(SimCSE):
    """loss = L(z, z'; f) + λ · L(g(z), f; z'), or SimCSE as long as there is no previous model

    L(a, p; o): InfoNCE of a among all p and, as further negatives, the o of the other sentences.
    z, z': two views now. f: what the previous model makes of the sentence. g: the predictor.
    """
    Config = Config
    rows = [Row("--method pnr --corpus A B",
                "the model of the last corpus as teacher and as negatives",
                "Cha, Cho, Moon: PNR. ICML 2024, arXiv 2306.05101",
                "none on text: theirs are of images")]
    columns_taken = (1,)
    losses_taken = ("info-nce",)
    in_turn = True

    @classmethod
    def check(cls, config, corpora, shape):
        least, columns = max(config.batch_size, LEAST), ["test", *short_names(corpora)]
        if len(set(columns)) < len(columns):                      # of the report's table
            raise ValueError("--corpus: expected files of different names, none of them called "
                             f"test, found {' '.join(columns[1:])}")
        for corpus, task in zip(corpora, tasks_of(corpora)[0]):
            if len(corpus.columns) > 1:
                raise ValueError("--corpus: expected sentences without labels, found "
                                 f"{len(corpus.columns)} columns in {corpus.name}")
            if len(task) < least:
                raise ValueError(f"--corpus: expected at least {least} sentences in {corpus.name} "
                                 f"beside its probe, new to the run, found {len(task)}: use more")
        if config.dev != "none":
            raise ValueError("--method pnr keeps the last step of each task, found --dev "
                             f"{config.dev}: use --dev none")

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        self.previous, self.turns = None, len(settings.names_of(config.corpus))
        width = model.config.width
        # LayerNorm: the BatchNorm of the authors takes mean and variance from the batch, so that a
        # prediction would depend on the other sentences, the more the smaller the batch.
        with torch.random.fork_rng(devices=[]):                   # the head is drawn as in SimCSE
            self.predictor = nn.Sequential(nn.Linear(width, 4 * width), nn.LayerNorm(4 * width),
                                           nn.ReLU(), nn.Linear(4 * width, width))

    def outer_loop(self, job, train_on: Callable, *, first: int) -> Iterator[dict]:
        """The tasks from number `first` on. Each starts with all that the one before left."""
        config, (tasks, probes) = self.config, tasks_of(job.inputs.corpora)
        # As many steps for all, or a large corpus would count for more than a small one.
        steps = settings.count_steps(config, min(map(len, tasks)))
        for number in range(first, len(tasks) + 1):
            if number > 1:
                self.remember(job.model)
            self.corpus = tasks[number - 1]
            loss = train_on(range(len(self.corpus)), number=number - 1, steps=steps,
                            learning_rate=config.learning_rate)
            # The terms are those of the last step.
            yield {"loss": loss, **self.logs(), "scores": scores_of(job, probes)}

    @classmethod
    def steps_of_run(cls, config, corpora):
        shortest = min(map(len, tasks_of(corpora)[0]))
        return len(corpora) * settings.count_steps(config, shortest)

    def remember(self, model: SentenceEncoder) -> None:
        """Freeze a copy of the model, head included: the loss compares what comes out of it."""
        if self.config.pseudo_weight or self.config.distillation_weight:
            previous = deepcopy(model)
            previous.keep_head = True
            self.previous = frozen(previous)

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        if self.previous is None:
            return self.contrast(out)
        batch, (anchor, now) = len(out.anchor), out.columns
        with torch.autocast(out.ids.device.type, torch.bfloat16, enabled=out.bf16):
            before = self.previous(out.ids[:batch], out.mask[:batch]).to(now.dtype)     # (B, D)
        nce = partial(pseudo_negative_nce, temperature=self.config.temperature,
                      pseudo_weight=self.config.pseudo_weight)
        loss = nce(anchor, now, before)
        self.terms = {"plasticity_loss": loss.detach()}
        if self.config.distillation_weight:
            stability = nce(self.predictor(anchor), before, now.detach())
            self.terms["stability_loss"] = stability.detach()
            loss = loss + self.config.distillation_weight * stability
        return loss

    def report(self, job, rows: list[dict]) -> tuple[str, dict]:
        """What was known of every corpus before and after each task."""
        inputs, (_, probes) = job.inputs, tasks_of(job.inputs.corpora)
        given = load(inputs.folder, pooling=job.config.pooling).to(inputs.device)
        matrix = {"before": scores_of(replace(job, model=given), probes),
                  **{f"after {task}": row["scores"] for task, row in zip(probes, rows)}}
        average, lost = what_is_left([[matrix[f"after {task}"][name] for name in probes]
                                      for task in probes])
        return ("A step above is a corpus. A column of a corpus: 100 x MRR of finding the second "
                f"half of its held-out sentences by the first; test: {job.config.test}.\n\n"
                f"{table(matrix)}\n\nOver the corpora: average {average:.2f}, forgetting "
                f"{lost:.2f}.\n", {"matrix": matrix, "average": average, "forgetting": lost})


def pseudo_negative_nce(anchor: Tensor, positive: Tensor, others: Tensor, *,
                        temperature: float = 0.05, pseudo_weight: float = 1.0) -> Tensor:
    """InfoNCE where every other sentence is a negative twice, by two vectors.    (B, D)s -> ()

        loss = mean_i  -log  exp(s(a_i, p_i)) / (Σ_j exp(s(a_i, p_j)) + w Σ_{j≠i} exp(s(a_i, o_j)))
        s(a, b) = cos(a, b) / τ
    """
    own = torch.eye(len(anchor), dtype=anchor.dtype, device=anchor.device)
    weight = torch.cat([torch.ones_like(own), pseudo_weight * (1 - own)], dim=1)    # (B, 2B)
    return info_nce(anchor, torch.cat([positive, others]), temperature=temperature, weight=weight)


def tasks_of(corpora: Sequence[Corpus]) -> tuple[list[Corpus], dict[str, TwinTest]]:
    """What each corpus trains on, and its probe; a sentence belongs to the first that has it."""
    seen, tasks, probes = set(), [], {}
    for name, corpus in zip(short_names(corpora), corpora):
        texts = corpus.columns[0]
        fresh = [row for row, text in enumerate(texts) if text not in seen]
        long = [row for row in fresh if len(texts[row].split()) >= 8]   # halves that say something
        probe, _ = hold_out(texts, long if len(long) >= LEAST else fresh)
        asked = {texts[row] for row in probe}
        tasks.append(corpus.part([row for row in fresh if texts[row] not in asked]))
        probes[name] = halves([texts[row] for row in probe])
        seen.update(texts)
    return tasks, probes


def short_names(corpora: Sequence[Corpus]) -> list[str]:
    """wiki1m, or the file's name without its folder."""
    return [corpus.name.rpartition("/")[2].split(".")[0] for corpus in corpora]


def halves(texts: Sequence[str]) -> TwinTest:
    """Find the second half of a sentence by its first: a measure for any text without labels."""
    middle = {text: (len(text.split()) + 1) // 2 for text in texts}       # equal ones count once
    return TwinTest([(text, " ".join(text.split()[:cut]), " ".join(text.split()[cut:]))
                     for text, cut in middle.items()])


def scores_of(job, probes: dict[str, TwinTest]) -> dict[str, float]:
    """100 x MRR of each probe, and the MRR or else the average of the run's test."""
    scores = {name: probe.score(job.encode).scores["mrr"] for name, probe in probes.items()}
    test = job.inputs.test.score(job.encode).scores
    return scores | {"test": test.get("mrr", test["avg"])}


def what_is_left(matrix: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Average and forgetting after T tasks; matrix[k][d] is the score on corpus d after task k.

        forgetting = mean_{d < T}  max_{d <= k < T} matrix[k][d] - matrix[T][d]
    """
    *before, last = matrix
    lost = [max(row[d] for row in before[d:]) - last[d] for d in range(len(before))]
    return mean(last), mean(lost)
