"""
Which parameters does a sentence encoder not need? Attention heads and FFN neurons, scored, pruned.

    python pruning.py runs/simcse --corpus wiki1m --test sts --sparsity 0 10 30 50 70
    python pruning.py runs/simcse --criteria contribution signed random --retrain 500

Every head and every neuron gets a gate of 1. How much alignment and uniformity would move with it
is what the unit contributes; of all layers together, the least goes first. In the style of
SparseCSE (An, Zhang, Song 2023): that these two measures decide, and that the smallest
contributions are removed, is in its abstract. Units, gates and score are those of StarK, taken to
be by the same group; retraining and the comparisons are ours.

`score` measures, `CRITERIA` rank, `remove` prunes. No mask is kept: all weights of a removed unit
are 0, on both sides, and then so is their gradient. So a pruned folder loads everywhere, and any
training leaves the unit removed. It is no faster, as the matrices keep their size.
"""

import argparse
import csv
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import mincse
import runs
from eval_sts import (StsTest, TwinTest, count, exits, markdown, open_encoder, pick_device, plain,
                      read_test, spearman)
from folders import load, save
from losses import alignment, uniformity
from model import Encoder, SentenceEncoder, encode

Units = dict[str, Tensor]             # "heads": (L, H), "neurons": (L, F)


# ---- gates ----------------------------------------------------------------------------------

def readers(encoder: Encoder, kind: str) -> list[nn.Linear]:
    """The matrix of each layer that reads what its heads, or its neurons, have to say."""
    return [layer.attention.output if kind == "heads" else layer.outer for layer in encoder.layers]


def ones(encoder: Encoder) -> Units:
    """A gate for each unit. Embeddings, norms and a head on top are never pruned."""
    config, device = encoder.config, encoder.words.weight.device
    return {"heads": torch.ones(config.layers, config.heads, device=device),
            "neurons": torch.ones(config.layers, config.inner, device=device)}


@contextmanager
def gated(encoder: Encoder, gates: Units) -> Iterator[None]:
    """While it lasts, what a unit says is multiplied by its gate before the next matrix reads it.

    A head speaks after softmax(q kᵀ) v, a neuron after its activation.
    """
    def hold(gate: Tensor, module: nn.Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x, = inputs                                               # (R, H · D/H) or (R, F)
        return (x * gate.repeat_interleave(x.shape[-1] // len(gate)),)

    handles = [module.register_forward_pre_hook(partial(hold, gate))
               for kind, layers in gates.items()
               for module, gate in zip(readers(encoder, kind), layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- what a unit contributes ----------------------------------------------------------------

def slopes(loss: Tensor, gates: Units) -> Units:
    """d loss / d gate; to first order, the loss changes by minus that when a unit goes."""
    return dict(zip(gates, torch.autograd.grad(loss, list(gates.values()))))


def score(model: SentenceEncoder, tokenizer: Callable, sentences: Sequence[str], *, seed: int,
          batch_size: int = 64, max_tokens: int = 32) -> list[dict[str, Units]]:
    """Slopes of both losses, summed over batches: "alignment", "uniformity" and both "signed".

    One set of sums for even batches and one for odd ones, to compare. Alignment is that of two
    dropout passes, uniformity that of one without. The absolute value is taken of a batch, as in
    StarK's code, so scores belong to a batch size. No weight changes.
    """
    if not model.config.dropout + model.config.attention_dropout:
        raise ValueError("expected an encoder with dropout in its config.json, found a rate of 0: "
                         "two passes would agree, and alignment would have no slope")
    gates = {kind: gate.requires_grad_() for kind, gate in ones(model.encoder).items()}
    device, was_training = gates["heads"].device, model.training
    halves = [{}, {}]
    try:
        with gated(model.encoder, gates):
            starts = range(0, len(sentences) - batch_size + 1, batch_size)
            for number, start in enumerate(tqdm(starts, disable=None, desc="score", unit="batch")):
                torch.manual_seed(seed * 1_000_003 + number)
                ids, mask = (x.to(device) for x in tokenizer(sentences[start : start + batch_size],
                                                             max_tokens=max_tokens))
                model.train()
                aligned = slopes(alignment(model(ids, mask), model(ids, mask)), gates)
                model.eval()
                spread = slopes(uniformity(model(ids, mask)), gates)
                add(halves[number % 2], "alignment", aligned)
                add(halves[number % 2], "uniformity", spread)
    finally:
        model.train(was_training)
    return halves


def add(sums: dict[str, Units], name: str, found: Units) -> None:
    """The absolute slopes of a batch join one sum, the signed ones another."""
    for key, units in ((name, {k: x.abs() for k, x in found.items()}), (f"signed {name}", found)):
        before = sums.get(key, {})
        sums[key] = {k: x + before.get(k, 0) for k, x in units.items()}


def both_halves(halves: list[dict[str, Units]]) -> dict[str, Units]:
    """The sums over all batches."""
    first, second = halves
    return {name: {kind: x + second[name][kind] for kind, x in units.items()}
            for name, units in first.items()}


def blend(a: Units, u: Units, *, weight: float = 0.5) -> Units:
    """S = λ A + (1 - λ) U, each of length 1 in every layer, or the last layers would decide all."""
    unit = {kind: [x / (x.norm(dim=1, keepdim=True) + 1e-7) for x in (a[kind], u[kind])]
            for kind in a}
    return {kind: weight * x + (1 - weight) * y for kind, (x, y) in unit.items()}


# ---- ranking: what is lowest goes first -----------------------------------------------------

def contribution(model: SentenceEncoder, sums: dict[str, Units], weight: float, seed: int) -> Units:
    """SparseCSE's: the size of the slopes. A unit that does much harm ranks high, too."""
    return blend(sums["alignment"], sums["uniformity"], weight=weight)


def signed(model: SentenceEncoder, sums: dict[str, Units], weight: float, seed: int) -> Units:
    """First goes what both losses should fall without, to first order."""
    slope = blend(sums["signed alignment"], sums["signed uniformity"], weight=weight)
    return {kind: -x for kind, x in slope.items()}


def magnitude(model: SentenceEncoder, sums: dict[str, Units], weight: float, seed: int) -> Units:
    """The norm of the weights that read the unit: the usual yardstick, without any data."""
    def norms(weight: Tensor, count: int) -> Tensor:              # (D, H · D/H) -> (H,)
        return weight.detach().unflatten(1, (count, -1)).norm(dim=(0, 2))

    return {kind: torch.stack([norms(module.weight, x.shape[1])
                               for module in readers(model.encoder, kind)])
            for kind, x in ones(model.encoder).items()}


def by_chance(model: SentenceEncoder, sums: dict[str, Units], weight: float, seed: int) -> Units:
    """The control: whatever a criterion knows must beat this."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.rand(x.shape, generator=generator)
            for kind, x in ones(model.encoder).items()}


CRITERIA = {"contribution": contribution, "signed": signed, "magnitude": magnitude,
            "random": by_chance}


# ---- pruning --------------------------------------------------------------------------------

def masks(importance: Units, sparsity: float) -> Units:
    """1 where a unit stays, 0 for the lowest `sparsity` percent of all layers' in one ranking.

    Heads and neurons apart, as their scores differ in scale. Halves round up; of equal units the
    first goes first, so that a higher sparsity removes the same and more.
    """
    kept = {}
    for kind, x in importance.items():
        count = math.floor(sparsity / 100 * x.numel() + 0.5)
        lowest = x.flatten().argsort(stable=True)[:count]
        kept[kind] = torch.ones(x.numel()).index_fill(0, lowest.cpu(), 0).view(x.shape)
    return kept


@torch.no_grad()
def remove(encoder: Encoder, kept: Units) -> None:
    """Set every weight of the units with a 0 to 0: what makes the unit, and what reads it.

    Biases of the readers stay, they belong to the layer. At 0 on both sides no gradient comes
    through, so that the unit stays removed in whatever training follows.
    """
    for layer, heads, neurons in zip(encoder.layers, kept["heads"], kept["neurons"]):
        attention = layer.attention
        width = attention.output.in_features // len(heads)
        for keep, makers, reader in (
                (heads.repeat_interleave(width), (attention.query, attention.key, attention.value),
                 attention.output), (neurons, (layer.inner,), layer.outer)):
            gone = (keep == 0).to(reader.weight.device)
            reader.weight[:, gone] = 0
            for maker in makers:
                maker.weight[gone], maker.bias[gone] = 0, 0


def pruned(model: SentenceEncoder, kept: Units) -> SentenceEncoder:
    """A copy without these units."""
    copy = deepcopy(model)
    remove(copy.encoder, kept)
    return copy


# ---- the program ----------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pruning.py", description="Prune a sentence encoder, and score what is left of it.",
        allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a run, or of any encoder")
    parser.add_argument("--sparsity", type=percent, nargs="+", default=[0, 10, 30, 50, 70],
                        metavar="PERCENT", help="of heads and of neurons [0 10 30 50 70]")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, metavar="NAME",
                        default=["contribution", "random"],
                        help=f"{', '.join(CRITERIA)} [contribution random]")
    parser.add_argument("--units", nargs="+", choices=["heads", "neurons"],
                        default=["heads", "neurons"], help="what is removed [both]")
    parser.add_argument("--weight", type=float, default=0.5,
                        help="λ of alignment, the rest of uniformity (StarK) [0.5]")
    parser.add_argument("--random-draws", type=count, default=3, metavar="N",
                        help="of the control [3]")
    parser.add_argument("--corpus", default="docs", help="gives the sentences for scores [docs]")
    parser.add_argument("--sentences", type=int, default=10_000, metavar="N", help="[10000]")
    parser.add_argument("--retrain", type=int, default=0, metavar="STEPS",
                        help="train what is left as the run was trained [0: not]")
    parser.add_argument("--rewind", action="store_true",
                        help="retrain from where the run began, at its learning rate; otherwise "
                             "from where it ended, at a tenth")
    parser.add_argument("--test", default="docs", help="docs, stsb, sts or a .tsv file [docs]")
    parser.add_argument("--split", default="test", choices=["dev", "test"],
                        help="of stsb; choose a sparsity on dev [test]")
    parser.add_argument("--data", type=Path, help="folder with own copies of the data")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, dropout, control [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    parser.add_argument("--threads", type=count, default=0, help="processor threads [all]")
    parser.add_argument("--out", type=Path, help="folder to write to [RUN-pruned]")
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    return parser.parse_args(argv)


def percent(text: str) -> float:
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"expected 0 to below 100, found {text}")
    return value


def check(args: argparse.Namespace) -> None:
    """Refuse what makes no sense, naming the flag."""
    for name, fits, expected in (
            ("weight", 0 <= args.weight <= 1, "0 to 1"),
            ("retrain", args.retrain >= 0, "0 or more"),
            ("sentences", args.sentences >= 4, "4 or more, since batches of 2 are compared")):
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, found "
                             f"{getattr(args, name)}")
    if args.rewind and not args.retrain:
        raise ValueError("--rewind says how to retrain: use it with --retrain STEPS")
    if args.retrain and not (args.run / "args.json").is_file():
        raise ValueError(f"--retrain trains as {args.run} was trained, but it has no args.json: "
                         "use a run of mincse.py, or leave --retrain out")


def claim(folder: Path, args: argparse.Namespace) -> None:
    """Make the folder ours; what others left there is never touched."""
    path, settings = folder / "args.json", {
        name: str(value) for name, value in vars(args).items()
        if name not in ("resume", "overwrite", "threads", "device")}
    if folder.is_dir() and any(folder.iterdir()):
        before = json.loads(path.read_text()) if path.is_file() else {}
        if "pruning" not in before:
            raise ValueError(f"{folder} exists and holds no pruning: choose another --out")
        if not (args.resume or args.overwrite):
            raise ValueError(f"{folder} holds a pruning: --resume goes on with it, --overwrite "
                             "replaces it, --out FOLDER leaves it alone")
        if args.resume and before["pruning"] != settings:
            raise ValueError(f"{folder} was begun with other settings: go on with\n"
                             f"  {before['command']} --resume")
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, {"command": mincse.command(), "pruning": settings})


def sentences_of(args: argparse.Namespace) -> list[str]:
    """Some of the corpus by chance, as few as asked for."""
    texts = data.read_corpus(args.corpus, args.data).columns[0]
    if len(texts) < 4:
        raise ValueError(f"{args.corpus}: expected 4 sentences or more, found {len(texts)}")
    return random.Random(args.seed).sample(texts, min(len(texts), args.sentences))


def agreement(halves: list[dict[str, Units]], weight: float) -> str:
    """Do both halves of the sentences rank the units alike? Below 0.9, more would help."""
    first, second = (blend(half["alignment"], half["uniformity"], weight=weight)
                     for half in halves)
    found = {kind: spearman(x.flatten().tolist(), second[kind].flatten().tolist()) / 100
             for kind, x in first.items()}
    return ", ".join(f"{kind} {rho:.2f}" for kind, rho in found.items())


def measure(model: SentenceEncoder, tokenizer: Callable, test: StsTest | TwinTest) -> dict:
    """What the test says: the average, every task, and the shape of the space."""
    result = test.score(partial(encode, model, tokenizer))
    shape = next(iter(result.geometry.values()), {})
    return {"avg": result.scores["avg"], **shape, "scores": result.scores}


def sweep(args: argparse.Namespace, model: SentenceEncoder, tokenizer: Callable,
          test: StsTest | TwinTest, sums: dict[str, Units]) -> Iterator[dict]:
    """A row for the dense encoder, then one for each criterion, sparsity and draw."""
    cases = [("dense", 0, 0)] + [
        (criterion, sparsity, draw) for criterion in args.criteria
        for sparsity in sorted({*args.sparsity} - {0})
        for draw in range(args.random_draws if criterion == "random" else 1)]
    for criterion, sparsity, draw in tqdm(cases, disable=None, desc="prune", unit="model"):
        kept = ones(model.encoder)
        if sparsity:
            importance = CRITERIA[criterion](model, sums, args.weight, args.seed + draw)
            kept |= masks({kind: importance[kind] for kind in args.units}, sparsity)
        row = {"criterion": criterion, "sparsity": sparsity, "draw": draw}
        row |= {f"{kind} left": int(x.sum()) for kind, x in kept.items()}
        row["layers left"] = {kind: x.sum(dim=1).int().tolist() for kind, x in kept.items()}
        left = pruned(model, kept)
        row |= measure(left, tokenizer, test)
        name = f"{criterion}-{sparsity:g}" + f"-{draw}" * (criterion == "random")
        if criterion != "random" or args.retrain:
            save(left, args.out / name)
        if args.retrain:
            row["retrained"] = retrained(args, kept, args.out / name)["test"]["avg"]
        yield row


def retrained(args: argparse.Namespace, kept: Units, folder: Path) -> dict:
    """Train a pruned folder as the run was trained; the results of that run."""
    given = json.loads((args.run / "args.json").read_text())["config"]
    if args.rewind:
        start = data.encoder_folder(given["encoder"])
        model = load(start, pooling=given["pooling"])
        remove(model.encoder, kept)
        folder = folder.with_name(f"{folder.name}-rewound")
        save(model, folder)
    else:
        given["learning_rate"] /= 10
    out = folder.with_name(f"{folder.name}-retrained")
    given |= {"encoder": str(folder), "out": str(out), "steps": args.retrain, "test": args.test,
              "device": args.device, "threads": args.threads}
    given |= {"data": str(args.data)} if args.data else {}
    inputs = mincse.read_inputs(given)
    return mincse.run(inputs, inputs.config, out, {
        "resume": args.resume, "overwrite": args.overwrite, "keep_state": False})


# ---- showing --------------------------------------------------------------------------------

def averaged(rows: list[dict]) -> list[dict]:
    """The draws of the control as one row, with the standard deviation of its average."""
    groups = {}
    for row in rows:
        groups.setdefault((row["criterion"], row["sparsity"]), []).append(row)
    found = []
    for members in groups.values():
        numbers = [name for name, value in members[0].items() if isinstance(value, (int, float))]
        mean = {name: sum(row[name] for row in members) / len(members) for name in numbers}
        found.append(members[0] | mean | {
            "spread": runs.deviation([row["avg"] for row in members]), "draws": len(members)})
    return found


COLUMNS = {"heads left": "{:.0f}", "neurons left": "{:.0f}", "avg": "{:.2f}", "spread": "{:.2f}",
           "alignment": "{:.3f}", "uniformity": "{:.3f}", "retrained": "{:.2f}"}


def table(rows: list[dict]) -> str:
    """A line for each criterion and sparsity; `spread` is over the draws of the control."""
    columns = [name for name in COLUMNS if name in rows[0]]
    lines = [["criterion", "sparsity", *columns]]
    for row in rows:
        cells = [COLUMNS[name].format(row[name]) if math.isfinite(row[name]) else "-"
                 for name in columns]
        lines.append([row["criterion"], f"{row['sparsity']:g} %", *cells])
    return markdown(lines)


def write_results(args: argparse.Namespace, rows: list[dict], agree: str) -> str:
    """results.json and results.csv hold every draw, results.md the table, which is returned."""
    text = (f"{args.run} pruned, {args.test} average; contributions on {args.corpus}, halves "
            f"agree: {agree}\n\n{table(averaged(rows))}\n")
    runs.write_text(args.out / "results.md", text)
    runs.write_json(args.out / "results.json", {"agreement": agree, "rows": rows})
    with runs.replacing(args.out / "results.csv") as fresh, fresh.open("w", newline="") as file:
        names = [name for name, value in rows[0].items() if not isinstance(value, dict)]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(map(plain, rows))
    return text


def figure(rows: list[dict], path: Path) -> str:
    """Sparsity against the average, a line for each criterion; says where it is, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no figure, since matplotlib is not installed: pip install matplotlib"
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    dense, *others = averaged(rows)
    plot, axes = plt.subplots(figsize=(6, 4))
    for measure in (name for name in ("avg", "retrained") if name in dense):
        for criterion in dict.fromkeys(row["criterion"] for row in others):
            points = [dense, *(row for row in others if row["criterion"] == criterion)]
            axes.plot([row["sparsity"] for row in points], [row[measure] for row in points],
                      marker="o", linestyle="-" if measure == "avg" else "--",
                      label=criterion + ", retrained" * (measure != "avg"))
    axes.set(xlabel="heads and neurons removed, %", ylabel="average score")
    axes.legend()
    plot.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(plot)
    return f"figure: {path}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out = args.out or args.run.with_name(f"{args.run.name}-pruned")
    if args.threads:
        torch.set_num_threads(args.threads)
    with exits(2):
        check(args)
        device = pick_device(args.device)
    with exits(3):
        test = read_test(args.test, args.data, split=args.split)
        sentences = sentences_of(args)
        model, tokenizer = open_encoder(data.encoder_folder(str(args.run)))
    with exits(2):
        if args.retrain and model.keep_head and not args.rewind:
            raise ValueError(f"--retrain begins with a new head, but {args.run} keeps the one it "
                             "has: use --rewind, which trains all anew")
        claim(args.out, args)
    with exits(3):
        halves = score(model.to(device), tokenizer, sentences, seed=args.seed,
                       batch_size=min(64, len(sentences) // 2))
    rows = list(sweep(args, model, tokenizer, test, both_halves(halves)))
    print(write_results(args, rows, agreement(halves, args.weight)))
    print(figure(rows, args.out / "sparsity.png"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(mincse.program(main))
