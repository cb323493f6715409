"""
SparseCSE: heads and neurons that hardly change alignment and uniformity are removed.

    python -m papers.sparsecse runs/simcse --corpus wiki1m --test stsb --sparsity 10 30 50 70

Unlike SimCSE: nothing is trained. A trained encoder is measured, cut, and scored again.
    measure   how steeply do alignment and uniformity change with each head and neuron?
    CRITERIA  in which order do heads and neurons go?
    remove    all weights of a head or neuron become 0
    sweep     every criterion at every sparsity, beside the whole encoder

In the style of An, Zhang, Song: arXiv 2311.03881. Their abstract has the two measures, and that the
smallest contributions go; their code was not found. Gates, score and ranking follow the code of
StarK (Yang, Zhang, Song: EMNLP 2022, arXiv 2210.03923), taken to be by the same group; it shrinks
the matrices, where we fill in zeros. Ours: two dropout passes as the pairs of alignment, and all
criteria but `contribution`.

Measuring 10,000 sentences costs 1.5 % of an epoch of SimCSE on wiki1m. A pruned encoder loads
wherever a run does; it is no faster, as its matrices keep their size. What is removed stays so when
the encoder is trained on, as zeros on both sides of a head or neuron have no gradient.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from data import read_corpus
from engine.encoders import save
from engine.files import write_json, write_text
from engine.flags import Parser, Row, command, count, exits, pick_device, program
from engine.hub import encoder_folder
from engine.tables import table
from eval_sts import Encode, Result, open_encoder, read_test, spearman
from losses import alignment, uniformity
from model import Encoder, SentenceEncoder, encode

# A number for each unit: a unit is a head or one of the F neurons of a layer. More axes may lead.
Units = dict[str, Tensor]             # "heads": (L, H), "neurons": (L, F)


class SparseCSE:
    """What `--list` says of it: a program, not a --method."""
    rows = [Row("python -m papers.sparsecse RUN",
                "heads and neurons that matter least to alignment and uniformity are removed",
                "An, Zhang, Song: SparseCSE. arXiv 2311.03881",
                "none verified; units and score are those of StarK, taken to be by the same group")]


def matrices(encoder: Encoder, kind: str) -> list[tuple[nn.Linear, nn.Linear]]:
    """Of each layer, the matrix that reads its heads or neurons, and the one that makes them."""
    if kind == "neurons":
        return [(layer.outer, layer.inner) for layer in encoder.layers]
    attentions = [layer.attention for layer in encoder.layers]
    return [(x.output, x.query_key_value) for x in attentions]


def ones(encoder: Encoder) -> Units:
    """A gate of 1 for each unit; embeddings, norms and a head on top have none, so they stay."""
    shape, new = encoder.config, encoder.words.weight.new_ones
    return {"heads": new(shape.layers, shape.heads), "neurons": new(shape.layers, shape.inner)}


@contextmanager
def gated(encoder: Encoder, gates: Units) -> Iterator[None]:
    """Multiply every unit by its gate before the next matrix reads it."""
    def hold(gate: Tensor, module: nn.Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x, = inputs                                               # (R, H · D/H) or (R, F)
        return (x * gate.repeat_interleave(x.shape[-1] // len(gate)),)

    with ExitStack() as hooks:
        for kind, layers in gates.items():
            for (reader, _), gate in zip(matrices(encoder, kind), layers):
                hooks.enter_context(reader.register_forward_pre_hook(partial(hold, gate)))
        yield


def gradients(losses: Sequence[Tensor], gates: Units) -> Units:   # -> (2, L, H), (2, L, F)
    """d loss / d gate of each loss: to first order, what it falls by when the unit goes."""
    each = [torch.autograd.grad(loss, list(gates.values())) for loss in losses]
    return {kind: torch.stack(both) for kind, both in zip(gates, zip(*each))}


def measure(model: SentenceEncoder, tokenizer: Callable, sentences: Sequence[str], *,
            batch_size: int = 64, max_tokens: int = 32) -> Units:
    """Slopes of alignment and uniformity, by batch: (batches, 2, L, H), (batches, 2, L, F)."""
    if not model.config.dropout + model.config.attention_dropout:
        raise ValueError("expected an encoder with dropout in its config.json, found a rate of 0")
    gates = {kind: gate.requires_grad_() for kind, gate in ones(model.encoder).items()}
    device, found = gates["heads"].device, []
    with gated(model.encoder, gates):
        for number in trange(len(sentences) // batch_size, disable=None, desc="measure"):
            torch.manual_seed(number)
            batch = sentences[number * batch_size :][:batch_size]
            ids, mask = (x.to(device) for x in tokenizer(batch, max_tokens=max_tokens))
            model.train()
            aligned = alignment(model(ids, mask), model(ids, mask))   # two dropout masks
            model.eval()
            found.append(gradients([aligned, uniformity(model(ids, mask))], gates))
    return {kind: torch.stack([slopes[kind].cpu() for slopes in found]) for kind in gates}


def blend(both: Units, *, weight: float = 0.5) -> Units:          # (2, L, ...)s -> (L, ...)s
    """λ A + (1 - λ) U of the numbers A of alignment and U of uniformity; λ as in StarK's script."""
    # Both get length 1 in every layer, or the last layers would decide all.
    unit = {kind: x / (x.norm(dim=-1, keepdim=True) + 1e-7) for kind, x in both.items()}
    return {kind: weight * a + (1 - weight) * u for kind, (a, u) in unit.items()}


def contribution(slopes: Units) -> Units:                         # (..., 2, L, H) -> (L, H)
    """The criterion of SparseCSE: absolute slopes, so that a unit that hurts ranks high, too."""
    # |a| + |u|, each of length 1, and not |a + u|, the slope of a summed loss: there slopes of
    # opposite sign cancel, and the measure of larger scale decides.
    return blend({kind: x.abs().sum(dim=0) for kind, x in slopes.items()})


def signed(slopes: Units) -> Units:
    """The unit without which both losses should fall most has the lowest number."""
    return blend({kind: -x.sum(dim=0) for kind, x in slopes.items()})


def at_random(slopes: Units) -> Units:
    """The control, which knows nothing."""
    return {kind: torch.rand(x.shape[-2:]) for kind, x in slopes.items()}


# A criterion gives every unit a number; the units with the lowest numbers go first.
CRITERIA = {"contribution": contribution, "signed": signed, "random": at_random}


def agreement(slopes: Units) -> str:
    """Rank correlation of contributions by even and by odd batches; below 0.9, measure more."""
    halves = [contribution({kind: x[first::2] for kind, x in slopes.items()}) for first in (0, 1)]
    rho = {kind: spearman(*(half[kind].flatten().tolist() for half in halves)) for kind in slopes}
    return ", ".join(f"{kind} {percent / 100:.2f}" for kind, percent in rho.items())


def masks(importance: Units, sparsity: float) -> Units:
    """Gates of 0 for the lowest `sparsity` percent of heads and of neurons, over all layers."""
    kept = {}
    for kind, x in importance.items():
        lowest = x.cpu().flatten().argsort(stable=True)[: int(sparsity / 100 * x.numel() + 0.5)]
        kept[kind] = torch.ones(x.numel()).index_fill(0, lowest, 0).view(x.shape)
    return kept


@torch.no_grad()
def remove(model: SentenceEncoder, kept: Units) -> SentenceEncoder:
    """A copy without the units of gate 0: all weights that make or read them are 0, too."""
    model = deepcopy(model)
    for kind, layers in kept.items():
        for (reader, maker), keep in zip(matrices(model.encoder, kind), layers):
            gone = (keep.to(reader.weight) == 0).repeat_interleave(reader.in_features // len(keep))
            reader.weight[:, gone] = 0                            # its bias is of the whole layer
            gone = gone.repeat(len(maker.weight) // len(gone))    # query, key and value of a head
            maker.weight[gone], maker.bias[gone] = 0, 0
    return model


def sweep(args: argparse.Namespace, model: SentenceEncoder, tokenizer: Callable,
          score: Callable[[Encode], Result], slopes: Units) -> Iterator[tuple[str, dict]]:
    """A title and mean scores for the whole encoder, then for each criterion and sparsity."""
    cases = product(args.criteria, sorted({*args.sparsity} - {0}))
    for criterion, sparsity in tqdm([("dense", 0), *cases], disable=None, desc="prune"):
        title, draws = f"{criterion}-{sparsity:g}", []
        for draw in range(args.random_draws if criterion == "random" else 1):
            torch.manual_seed(draw)
            importance = CRITERIA.get(criterion, contribution)(slopes)   # any, to remove nothing
            left = remove(model, masks(importance, sparsity))
            result = score(partial(encode, left, tokenizer))
            geometry = next(iter(result.geometry.values()), {})   # a test may have none
            draws.append({"average": result.scores["avg"], **geometry})
        if criterion not in ("dense", "random"):
            save(left, args.out / title)
        yield title, {**{name: fmean(row[name] for row in draws) for name in draws[0]},
                      "spread": stdev(row["average"] for row in draws) if draws[1:] else math.nan}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m papers.sparsecse",
                    description=__doc__.strip().partition("\n")[0])
    add = parser.add_argument
    add("run", help="the folder of a run, or any encoder")
    add("--sparsity", type=float, nargs="+", default=[10, 30, 50, 70], metavar="PERCENT",
        help="share of heads and of neurons that goes [10 30 50 70]")
    add("--criteria", nargs="+", choices=CRITERIA, default=["contribution", "random"],
        metavar="NAME", help=f"{', '.join(CRITERIA)} [contribution random]")
    add("--random-draws", type=count, default=3, metavar="N", help="draws of random [3]")
    add("--corpus", default="docs", help="source of the sentences measured [docs]")
    add("--sentences", type=count, default=10_000, metavar="N", help="of them, measured [10000]")
    add("--test", default="docs", help="docs, stsb, sts or a .tsv file [docs]")
    add("--data", type=Path, help="folder with own copies of the data (or MINCSE_DATA)")
    add("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--out", type=Path, help="empty folder to write to [RUN-pruned]")
    add("--overwrite", action="store_true", help="replace files that --out holds")
    args = parser.parse_args(argv)
    if not all(0 <= percent < 100 for percent in args.sparsity):
        parser.error(f"--sparsity: expected 0 to below 100, found {args.sparsity}")
    if args.sentences < 4:
        parser.error(f"--sentences: expected 4 or more, for two batches, found {args.sentences}")
    args.out = args.out or Path(f"{Path(args.run)}-pruned")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with exits(2):
        device = pick_device(args.device)
        if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
            raise ValueError(f"{args.out} is not empty: choose another --out, or --overwrite")
    with exits(3):
        test = read_test(args.test, args.data)
        texts = read_corpus(args.corpus, args.data).columns[0]
        if len(texts) < 4:
            raise ValueError(f"{args.corpus}: expected 4 sentences or more, found {len(texts)}")
        sentences = random.Random(0).sample(texts, min(len(texts), args.sentences))
        model, tokenizer = open_encoder(encoder_folder(args.run))
        slopes = measure(model.to(device), tokenizer, sentences,
                         batch_size=min(64, len(sentences) // 2))
    args.out.mkdir(parents=True, exist_ok=True)
    agree, rows = agreement(slopes), {}
    for title, scores in sweep(args, model, tokenizer, test.score, slopes):
        rows[title] = scores                                      # a stopped sweep leaves its rows
        text = (f"{args.run} pruned by so many percent, {args.test} average; contributions on "
                f"{args.corpus}, halves agree: {agree}\n\n{table(rows, digits=3)}\n")
        write_text(args.out / "results.md", text)
        write_json(args.out / "results.json", dict(command=command(), agreement=agree, rows=rows))
    print(text)


if __name__ == "__main__":
    sys.exit(program(main, "--overwrite"))
