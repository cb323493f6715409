"""
FedRCL: a class attracts its sentences, but must not become a point, while clients train apart.

In federated learning the texts stay with their owners, the clients. Each trains a copy of the
model, and a server averages the copies, which drift apart where they saw different classes.
Attraction within a class keeps them together; a penalty on close pairs keeps it from one point.

Unlike SimCSE: the positives of a sentence are the others of its class, on several layers.
    prepare     the class of every sentence: its k-means cluster, by the encoder as it was given
    views       the sentence, once
    loss        telling the class, attraction within a class, penalty on pairs that are too close
    outer_loop  with --clients: rounds of local training and averaging (FedAvg)
    report      a line a round: drift of the clients, collapse of the classes

In the style of Seo, Kim, Kim, Han: CVPR 2024, arXiv 2401.04928, on images with labels; nothing is
published on text. Their code compares the least similar sentence of the class with the two most
similar ones of other classes, penalizes only if even this least similar one is too close, and
lowers the learning rate with every local epoch. Ours: the formula over all pairs, as in their
abstract; clusters as classes; layers as levels; AdamW; a rate that falls within a round, too.
A step costs about half of SimCSE's, since each sentence is encoded once.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import Corpus
from engine.flags import Row, flag
from engine.tables import table
from losses import cosine
from model import POOLINGS
from papers import settings
from papers.corpus import LEAST, assign, hold_out, kmeans, unit
from papers.simcse import Encoded, SimCSE


@dataclass(frozen=True)
class Config(settings.Config):
    classes: int = flag(20, "fedrcl", "clusters of the corpus that serve as classes (ours)",
                        least=2, why=", since with one there is nothing to tell apart")
    levels: int = flag(3, "fedrcl", "layers compared, evenly spaced; 1: the last (ours)", least=1)
    scl_weight: float = flag(1.0, "fedrcl", "weight w of attraction (their code)", least=0)
    penalty_weight: float = flag(1.0, "fedrcl", "weight β of the penalty (their code)", least=0)
    penalty_threshold: float = flag(0.7, "fedrcl", "cosine λ where the penalty begins (their code)",
                                    least=0, most=1)
    clients: int = flag(0, "fedrcl", "clients, half of them in a round (ours); 0: no federation",
                        least=0)
    rounds: int = flag(20, "fedrcl", "rounds of local training and averaging (ours)", least=1)
    alpha: float = flag(0.1, "fedrcl", "concentration of the Dirichlet split, one of theirs: the "
                        "lower, the fewer classes a client has", above=0)


class FedRCL(SimCSE):
    """loss = CE(class of x) + mean over levels of (w · contrast + β · penalty)"""
    Config = Config
    rows = [Row("--method fedrcl --clients 8",
                "a class attracts but must not collapse, client by client",
                "Seo, Kim, Kim, Han: FedRCL. CVPR 2024, arXiv 2401.04928",
                "none on text: theirs are of images")]
    recipes = {"any": dict(head="none", steps=0)}                 # an epoch, also of a client
    columns_taken = (1,)
    losses_taken = ("info-nce",)
    needs = {"rounds": "clients", "alpha": "clients"}
    toy = dict(levels=2, classes=4)

    @classmethod
    def check(cls, config, corpora, shape):
        if config.head != "none":
            raise ValueError(f"--method fedrcl compares layers without a head, found --head "
                             f"{config.head}: use --head none")
        if config.levels > shape.layers:
            raise ValueError(f"--levels: expected at most {shape.layers}, the layers of "
                             f"{config.encoder}, found {config.levels}")
        if config.clients:
            texts, share = corpora[0].columns[0], rows_of_client(config, corpora[0])
            if len(texts) < LEAST or share < config.batch_size:
                raise ValueError(f"--clients: expected {LEAST} sentences and {config.batch_size} a "
                                 f"client, found {len(texts)} and {share}: use fewer clients")

    @classmethod
    def steps_of_run(cls, config, corpora):
        if not config.clients:
            return super().steps_of_run(config, corpora)
        clients = len(taking_part(1, config.clients, seed=config.seed))
        return config.rounds * clients * settings.count_steps(
            config, rows_of_client(config, corpora[0]))

    def __init__(self, corpus, config, *, model):
        super().__init__(corpus, config, model=model)
        self.turns = config.rounds if config.clients else 0
        self.pool, depth = POOLINGS[model.pooling], model.config.layers
        # A level is a layer, counted from the last, -1: of 12 layers and 3 levels 4, 8 and 12.
        self.levels = [round(depth * level / config.levels) - depth - 1
                       for level in range(1, config.levels + 1)]
        self.layers_read = -self.levels[0]
        self.classifier = nn.Linear(model.config.width, config.classes)
        self.register_buffer("labels", torch.zeros(len(corpus), dtype=torch.long))   # (N,)

    def prepare(self, encode: Callable) -> None:
        """Give every sentence a class: the number of its cluster."""
        x = encode(self.corpus.columns[0], pooling="mean", max_tokens=self.config.max_tokens)
        # Directions from the mean: all vectors of an encoder without training share one direction.
        x = x.to(self.labels.device)
        x = unit(x.float() - x.float().mean(dim=0))               # (N, D)
        centres = kmeans(x, self.config.classes, seed=self.config.seed)
        self.labels.copy_(assign(x, centres)[0])

    def views(self, rows: list[int], rng: random.Random) -> list[list[str]]:
        return [[self.view(self.corpus.columns[0][row], rng) for row in rows]]

    def loss(self, out: Encoded) -> Tensor:                       # -> ()
        config, labels = self.config, self.labels[out.rows]
        levels = [self.pool([out.hidden[level]], out.mask).to(out.anchor.dtype)
                  for level in self.levels]                       # (B, D)s
        ce_loss = F.cross_entropy(self.classifier(levels[-1]), labels)
        contrast, penalty = relaxed_contrast(                     # (levels, A), (levels, B)
            torch.stack([cosine(x, x) for x in levels]), labels,
            temperature=config.temperature, threshold=config.penalty_threshold)
        # Where no two sentences of the batch share a class, there is nothing to attract.
        contrast = (contrast.sum(dim=-1) / max(contrast.shape[-1], 1)).mean()
        penalty = penalty.mean(dim=-1).mean()
        self.terms = {"ce_loss": ce_loss.detach(), "contrast": contrast.detach(),
                      "penalty": penalty.detach()}
        return ce_loss + config.scl_weight * contrast + config.penalty_weight * penalty

    def outer_loop(self, job, train_on: Callable, *, first: int) -> Iterator[dict]:
        """FedAvg from round `first` on. Between two rounds `job.networks` are the server's."""
        config, texts, labels = self.config, self.corpus.columns[0], self.labels.cpu()
        probe, rest = hold_out(texts, range(len(texts)))          # nobody trains on the probe
        asked, classes = [texts[row] for row in probe], labels[probe]
        shards = deal_out(rest, labels, config.clients, alpha=config.alpha, seed=config.seed)
        steps, origin = settings.count_steps(config, len(shards[0])), job.encode(asked)   # (P, D)
        for number in range(first, config.rounds + 1):
            server = snapshot(job.networks)
            rate = config.learning_rate * 0.998 ** (number - 1)   # their scripts
            states, losses, drifts = [], [], []
            for client in taking_part(number, config.clients, seed=config.seed):
                job.networks.load_state_dict(server)
                draws = (number - 1) * config.clients + client    # each client has its own
                losses.append(train_on(shards[client], number=draws, steps=steps,
                                       learning_rate=rate))
                drifts.append(1 - F.cosine_similarity(job.encode(asked), origin).mean().item())
                states.append(snapshot(job.networks))
            job.networks.load_state_dict(fed_avg(states))
            before, origin = origin, job.encode(asked)
            yield {"loss": mean(losses), "drift": mean(drifts), **collapse(origin, classes),
                   "at_start": collapse(before, classes)}

    def report(self, job, rows: list[dict]) -> tuple[str, dict]:
        """A line a round, since the curves of a federation swing: the last alone says little."""
        names = ["drift", *rows[0]["at_start"]]
        found = {"before": rows[0]["at_start"], **{f"round {row['step']}": row for row in rows}}
        shown = {title: {name: row.get(name, math.nan) for name in names}
                 for title, row in found.items()}
        return (f"A step above is a round, in which half of {self.config.clients} clients train. "
                "Measured on held-out sentences of the corpus:\n\n"
                f"{table(shown, digits=3)}\n", {"rounds": rows})


def relaxed_contrast(s: Tensor, labels: Tensor, *, temperature: float = 0.05,
                     threshold: float = 0.7) -> tuple[Tensor, Tensor]:
    """Attraction within a class, and the penalty on close pairs, from the cosines of a batch.

        (..., B, B), (B,) -> (..., A), (..., B)

        contrast_i = mean_{j in P_i} -log  exp(s_ij / τ) / Σ_{k≠i} exp(s_ik / τ)
        penalty_i  = log(exp(1 / τ) + Σ_{j in P_i, s_ij > λ} exp(s_ij / τ)) - 1 / τ

    P_i: the others of the batch with its label; the A anchors that have any make the contrast.
    """
    same = (labels[:, None] == labels).fill_diagonal_(False)      # (B, B)
    own = torch.eye(len(labels), dtype=torch.bool, device=s.device)
    count = same.sum(dim=1)                                       # (B,)
    surprise = (s / temperature).masked_fill(own, -math.inf).logsumexp(dim=-1)
    contrast = surprise - (s * same).sum(dim=-1) / count.clamp(min=1) / temperature
    # Shifted by 1, so that nothing near exp(20) is ever computed; the 1 itself stands at (i, i).
    excess = ((s - 1) / temperature).masked_fill(~(same & (s > threshold)), -math.inf)
    contrast = contrast.index_select(-1, count.nonzero()[:, 0])   # one wait for the GPU, not six
    return contrast, excess.masked_fill(own, 0).logsumexp(dim=-1)


def rows_of_client(config: Config, corpus: Corpus) -> int:
    texts = corpus.columns[0]
    return len(hold_out(texts, range(len(texts)))[1]) // config.clients


def deal_out(rows: Sequence[int], labels: Tensor, clients: int, *, alpha: float, seed: int
             ) -> list[list[int]]:
    """Every client gets R / C of the R rows, and prefers classes of its own: p ~ Dirichlet(α).

    One client after the other draws from what is left, a row of class k with a chance ∝ p_k; where
    its classes run out, any row. α = 0.1: about two of six classes each; α = 100: all of them.
    """
    rng, free, y = np.random.default_rng(seed), np.array(rows), labels.numpy()      # y: (N,)
    size, classes, shards = len(rows) // clients, int(y[free].max()) + 1, []
    for _ in range(clients):
        liking = rng.dirichlet(np.full(classes, alpha))
        # The highest of log p + Gumbel noise are a weighted draw without repeats.
        key = np.log(np.maximum(liking[y[free]], 1e-300)) + rng.gumbel(size=len(free))
        taken = np.argsort(-key)[:size]
        shards.append(sorted(free[taken].tolist()))
        free = np.delete(free, taken)
    return shards


def taking_part(number: int, clients: int, *, seed: int) -> list[int]:
    """Half of the clients, drawn by seed and round alone: the same ones whatever the loss."""
    rng = random.Random(f"{seed} round {number}")
    return sorted(rng.sample(range(clients), max(1, clients // 2)))


def snapshot(networks: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, in memory of their own."""
    return {name: tensor.detach().cpu().clone() for name, tensor in networks.state_dict().items()}


def fed_avg(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """FedAvg (McMahan et al. 2017): the mean of floats; all else as the first client has it."""
    # In double precision, so that the mean of equal models is exactly that model.
    return {name: (sum(state[name].double() for state in states) / len(states)).to(tensor.dtype)
            if tensor.is_floating_point() else tensor for name, tensor in states[0].items()}


def collapse(x: Tensor, labels: Tensor) -> dict[str, float]:      # (N, D), (N,)
    """Mean cosines within and between classes, and how many directions the embeddings fill.

        participation ratio = (Σ λ)² / Σ λ² in 1..D,   λ the eigenvalues of the covariance
    """
    s, differ = cosine(x, x), labels[:, None] != labels           # (N, N)s
    x = F.normalize(x, dim=-1)
    covariance = (x - x.mean(dim=0)).mT @ (x - x.mean(dim=0))     # (D, D)
    ratio = covariance.trace().square() / covariance.square().sum()
    return {"same_class_cosine": s[(~differ).fill_diagonal_(False)].mean().item(),
            "between_class_cosine": s[differ].mean().item(),
            "participation_ratio": ratio.item()}
