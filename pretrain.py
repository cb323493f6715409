"""
Where does a pre-trained encoder come from? From plain text to a masked language model, on a page.

    python pretrain.py --corpus wiki_docs --data FOLDER --out runs/mini     # from nothing
    python pretrain.py --from bert-base-uncased --corpus my_texts.txt       # go on, on one's own

A word is hidden, the words around it must tell which it was, and nobody had to label anything
(Devlin et al. 2019). [CLS], of which a sentence encoder is made, must tell them all (`bag_loss`).
`mincse.py --encoder FOLDER` goes on from what this program leaves. Read `guess` and `train` first.

Not here: vocabulary, sequences and first word vectors (words.py), the optimizer of the matrices
(muon.py), the encoder and its head (model.py), token masking (data.py), the folder (folders.py).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config as settings
import data
import folders
import runs
from config import dashed, flag
from eval_sts import Result, exits, pick_device
from inputs import wants_bf16
from mincse import Stop, command, program, step_seed
from model import Encoder, EncoderConfig, MaskedLMHead, SentenceEncoder
from muon import Muon, Together
from words import (Sequences, positive_pmi, streams, svd_embeddings, tokenizer_files,
                   train_tokenizer)

POSITIONS = 512                       # what readers expect of an encoder like BERT
HELD_OUT, HELD_OUT_RATE = 2048, 0.15  # sequences, and the share of them that is masked
COUNTED = 10_000_000                  # tokens, for `--init svd`: a minute or two on one core
WARM_UP = 0.03                        # share of the run
LOG_EVERY, SAVE_SECONDS = 50, 180


@dataclass(frozen=True)
class Config:
    from_: str = flag("", "what to train", "go on from this encoder, a folder or a Hub id")
    init: str = flag("svd", "what to train", "word embeddings at first", ["svd", "random"])
    vocab_size: int = flag(16384, "what to train", "word pieces")
    layers: int = flag(4, "what to train", "of the encoder")
    width: int = flag(256, "what to train", "of a token's vector; inside a layer four times that")
    heads: int = flag(4, "what to train", "of attention")
    corpus: str = flag("docs", "data", "docs, wiki_docs, or a .txt file (or .gz) with a blank line "
                       "between documents")
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    max_tokens: int = flag(64, "data", "tokens of a sequence")
    mask_rate: float = flag(0.2, "data", "share of the tokens that is to be guessed")
    steps: int = flag(15_000, "optimisation", "length of the run; the learning rate "
                      "ends at 0")
    minutes: float = flag(0.0, "optimisation", "length of the run instead, over all sessions")
    batch_size: int = flag(64, "optimisation", "sequences a step")
    optimizer: str = flag("muon", "optimisation", "of the layers' matrices; AdamW has the rest",
                          ["muon", "adamw"])
    learning_rate: float = flag(1.2e-3, "optimisation", "peak")
    dropout: float = flag(0.0, "optimisation", "while pre-training")
    weight_decay: float = flag(0.01, "optimisation", "AdamW's, of matrices; Muon's is 0.1")
    bag_weight: float = flag(1.0, "optimisation", "of [CLS] telling the words of its sequence")
    clip: float = flag(1.0, "optimisation", "largest gradient norm")
    seed: int = flag(42, "optimisation", "of everything random")
    dev_every: int = flag(500, "output", "steps between scores on held-out text")
    out: str = flag("runs/pretrained", "output", "folder for the encoder")
    device: str = flag("auto", "system", "auto, cpu, cuda, mps")
    precision: str = flag("auto", "system", "auto: bf16 where the processor is built for it",
                          ["auto", "fp32", "bf16"])
    threads: int = flag(0, "system", "processor threads; 0: all")


# ---- the model and its training -------------------------------------------------------------

class MaskedLM(nn.Module):
    """An encoder, and a head that guesses words with the encoder's own word embeddings.

    Tied, since reading a word and guessing it both need what it means: what one learns serves the
    other, and `mini` would be half as large again with a second table.
    """

    def __init__(self, model: SentenceEncoder, head: MaskedLMHead):
        super().__init__()
        self.model, self.head = model, head
        head.words = model.encoder.words.weight
        self.register_buffer("seconds", torch.zeros(()))                       # trained so far

    def guess(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At the M tokens asked for logits (M, V) and answers (M,); what [CLS] says, (B, V).

        Only they are computed in the last layer and in the head, whose V columns are costly.
        """
        *layers, last = self.model.encoder.layers
        x = self.model.encoder.embed(ids, torch.ones_like(ids, dtype=torch.bool))
        for layer in layers:
            x = layer(x, x)
        first = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)     # (B,)
        asked = (labels.flatten() != -100).nonzero()[:, 0]                        # (M,)
        places = torch.cat([first, asked])
        x = last(replace(x, rows=x.rows[places], places=places), x)
        summary, logits = self.head(x.rows).float().split([len(first), len(asked)])
        return logits, labels.flatten()[asked], summary


def bag_loss(summary: Tensor, ids: Tensor, labels: Tensor) -> Tensor:   # (B, V), (B, T), (B, T)
    """How well does [CLS] tell which words its sequence is made of, in whatever order?

        mean over the words of -log softmax(summary)[word]

    A masked LM asks nothing of [CLS], which becomes a place to look at for heads that look for
    nothing. But SimCSE starts from its vector. Asked for all the words at once, it has to gather
    what the whole is about. After DupMAE (Xiao et al. 2023), where [CLS] helps to rebuild the text
    and the other tokens tell its bag of words; to ask [CLS] for the bag is ours.
    """
    words = torch.where(labels == -100, ids, labels)[:, 1:-1]     # (B, T - 2), before masking
    return -summary.log_softmax(dim=1).gather(1, words).mean()


def build(config: Config, tokenizer: data.Tokenizer, counted: np.ndarray | None) -> MaskedLM:
    """The encoder before the first step; its word embeddings from that text, if there is any.

    Its config.json keeps BERT's dropout, which SimCSE's two views are made of.
    """
    if config.from_:
        folder = data.encoder_folder(config.from_)
        model = folders.load(folder, dropout=config.dropout)
        model.config = folders.read_config(folder)
        folders.check_vocabulary(model.config, tokenizer.whole.get_vocab().values())
        if config.max_tokens > model.config.usable_positions:
            raise ValueError(f"--max-tokens: expected at most {model.config.usable_positions}, the "
                             f"positions of {config.from_}, found {config.max_tokens}")
        return MaskedLM(model, folders.load_masked_lm(folder, model))
    torch.manual_seed(config.seed)
    shape = EncoderConfig("bert", tokenizer.vocab_size, config.width, config.layers, config.heads,
                          4 * config.width, positions=POSITIONS, pad_id=tokenizer.pad_id)
    encoder = Encoder(replace(shape, dropout=config.dropout, attention_dropout=config.dropout))
    model = SentenceEncoder(encoder, files=tokenizer_files(tokenizer.json, POSITIONS))
    model.config = shape
    if counted is not None:
        words = svd_embeddings(positive_pmi(counted, shape.vocab_size), config.width)
        met = torch.from_numpy(words.any(axis=1))
        encoder.words.weight.data[met] = torch.from_numpy(words).float()[met]
    return MaskedLM(model, MaskedLMHead(shape, encoder.words.weight))


def make_optimizer(lm: MaskedLM, config: Config) -> Together:
    """Muon for the matrices of the layers, AdamW for the rest; only matrices are pulled to 0."""
    inside = [p for p in lm.model.encoder.layers.parameters() if p.ndim > 1]
    mine = {id(p) for p in inside} if config.optimizer == "muon" else set()
    rest = [p for p in lm.parameters() if id(p) not in mine]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    if not mine:
        return Together(adamw)
    return Together(adamw, Muon(inside, config.learning_rate))


def schedule(done: float) -> float:
    """Share of the peak learning rate: up during the first 3 % of the run, then down to 0.

    With the norm after every sum (post-norm), gradients near the output are large at first, so the
    rate has to start low (Xiong et al. 2020). The loss then rests on a plateau for a while: the
    model knows how frequent each word is, and not yet that the words around it matter.
    """
    return max(0.0, min(done / WARM_UP, (1 - done) / (1 - WARM_UP)))


def train(lm: MaskedLM, optimizer: Together, text: Sequences, config: Config, *,
          first: int, device: torch.device, bf16: bool) -> Iterator[tuple[int, Tensor]]:
    """Steps first, first + 1, ... to the end of the budget. Yields (step, loss)."""
    order = data.batches(len(text), config.batch_size, seed=config.seed, epochs=sys.maxsize)
    batches = (text.masked(rows, rate=config.mask_rate, seed=step_seed(config, step))
               for step, rows in enumerate(islice(order, first - 1, None), start=first))
    now = time.perf_counter()
    for step, batch in enumerate(data.ahead(batches), start=first):
        done = (lm.seconds.item() / 60 / config.minutes if config.minutes else
                (step - 0.5) / config.steps)
        if done >= 1:
            return
        torch.manual_seed(step_seed(config, step))                # of dropout
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(done)
        ids, labels = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits, answers, summary = lm.guess(ids, labels)
        loss = F.cross_entropy(logits, answers, reduction="sum") / max(len(answers), 1)

        optimizer.zero_grad()
        (loss + config.bag_weight * bag_loss(summary, ids, labels)).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), config.clip)
        optimizer.step()
        before, now = now, time.perf_counter()
        lm.seconds += now - before                                # scores and saving included
        yield step, loss.detach()


@torch.no_grad()
def held_out(lm: MaskedLM, text: Sequences) -> dict[str, float]:
    """On text never trained on: mean cross-entropy, share of tokens guessed right, loss of [CLS].

    The same 15 % of the same tokens every time, BERT's 80/10/10; in float32, without dropout.
    """
    lm.eval()
    device, total, bag, right, count = lm.head.bias.device, 0.0, 0.0, 0, 0
    most = min(HELD_OUT, len(text))
    rows = [i * len(text) // most for i in range(most)]           # evenly spaced
    for start in range(0, most, 64):
        batch = text.masked(rows[start : start + 64], rate=HELD_OUT_RATE, seed=start)
        ids, labels = (part.to(device) for part in batch)
        logits, answers, summary = lm.guess(ids, labels)
        bag += bag_loss(summary, ids, labels).item() * len(ids) / most
        total += F.cross_entropy(logits, answers, reduction="sum").item()
        right += (logits.argmax(dim=-1) == answers).sum().item()
        count += len(answers)
    lm.train()
    return {"held_out_loss": total / max(count, 1), "held_out_accuracy": right / max(count, 1),
            "held_out_bag_loss": bag}


# ---- a run ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """What is trained, on what."""
    config: Config
    lm: MaskedLM
    optimizer: Together
    text: Sequences
    held_out: Sequences
    folder: Path
    device: torch.device

    def save(self, state: runs.State) -> None:
        """The encoder, and all that a stopped run needs to go on exactly."""
        if not self.config.from_:
            share_positions(self.lm.model.encoder, self.config.max_tokens)
        folders.save_masked_lm(self.lm.model, self.lm.head, self.folder)
        runs.save_state(self.folder, state, self.lm, self.optimizer)


@torch.no_grad()
def share_positions(encoder: Encoder, trained: int) -> None:
    """Positions beyond the longest sequence, never trained, are the mean of the later ones."""
    table = encoder.positions.weight                              # (512, D)
    table[trained:] = table[trained // 2 : trained].mean(dim=0)


def prepare(config: Config, device: torch.device, *, resumed: bool) -> tuple[Job, dict]:
    """Everything from outside is read here. Also returns what was read, for env.json."""
    folder = Path(config.out)
    corpus = data.read_corpus(config.corpus, Path(config.data) if config.data else None)
    if len(corpus.columns) > 1:
        raise ValueError(f"{config.corpus}: expected running text, one column, found "
                         f"{len(corpus.columns)}; choose a .txt file")
    if resumed:
        if json.loads((folder / "env.json").read_text())["corpus"]["sha256"] != corpus.sha256:
            raise ValueError(f"{config.corpus} has changed since this run began: start again with "
                             "--overwrite")
        tokenizer = data.Tokenizer.read(folder)
    elif config.from_:
        tokenizer = data.Tokenizer.read(data.encoder_folder(config.from_))
    else:
        tokenizer = data.Tokenizer(train_tokenizer(corpus.columns[0], config.vocab_size))
    text, other = (Sequences(stream, tokenizer, config.max_tokens)
                   for stream in streams(corpus, tokenizer))
    if len(text) < config.batch_size or not len(other):
        raise ValueError(f"{config.corpus}: expected text for {config.batch_size} sequences of "
                         f"{config.max_tokens} tokens and for 1 held out, found {len(text)} and "
                         f"{len(other)}: add text, or lower --batch-size or --max-tokens")
    counted = text.stream[:COUNTED] if config.init == "svd" and not resumed else None
    lm = build(config, tokenizer, counted).to(device).train()
    job = Job(config, lm, make_optimizer(lm, config), text, other, folder, device)
    return job, {"corpus": config.corpus, "sha256": corpus.sha256, "tokens": len(text.stream),
                 "held out tokens": len(other.stream), "vocabulary": tokenizer.vocab_size}


def fit(job: Job, state: runs.State, stop: Stop) -> runs.State:
    """Train to the end of the budget or to a signal, saving now and then."""
    config, log, saved = job.config, runs.Log(job.folder, job.config.batch_size), time.monotonic()
    loop = train(job.lm, job.optimizer, job.text, config, first=state.step + 1, device=job.device,
                 bf16=wants_bf16(config.precision, job.device))
    bar = tqdm(loop, total=None if config.minutes else config.steps, initial=state.step,
               disable=None, unit="step")
    for step, loss in bar:
        state, due = replace(state, step=step), step % config.dev_every == 0
        log.add(loss, learning_rate=job.optimizer.param_groups[0]["lr"])
        saving = due or stop.signal or time.monotonic() - saved > SAVE_SECONDS
        if saving or step % LOG_EVERY == 0:
            check_sound(step, loss.item())
        if due or step % LOG_EVERY == 0:
            line = log_line(job, log, step, scored=due)
            bar.set_postfix_str(line)
            if due:
                bar.write(f"step {step}: {line}", file=sys.stderr)
        if saving:
            with log.paused():
                job.save(state)
            saved = time.monotonic()
        if stop.signal:
            return state
    if log.steps:
        log_line(job, log, state.step, scored=True)
    return state


def check_sound(step: int, loss: float) -> None:
    """Nothing is saved after a loss that was no number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {step}: try a lower --learning-rate; "
                                 "what was saved before is kept")


def log_line(job: Job, log: runs.Log, step: int, *, scored: bool) -> str:
    """One object for metrics.jsonl; in short for the screen."""
    with log.paused():
        scores = held_out(job.lm, job.held_out) if scored else {}
    check_sound(step, scores.get("held_out_loss", 0.0))           # the last update may break it
    row = log.line(step, scores | {"tokens": step * job.config.batch_size * job.config.max_tokens,
                                   "seconds": job.lm.seconds.item()})
    return ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", *scores))


def finish(job: Job, state: runs.State) -> dict:
    """Save, score and describe the encoder."""
    job.save(state)
    size = job.config.batch_size * job.config.max_tokens
    results = {"before": state.before["scores"], "test": held_out(job.lm, job.held_out),
               "steps": state.step, "tokens": state.step * size,
               "seconds": job.lm.seconds.item()}
    points = curve(job.folder, results)
    drawn = draw({job.folder.name: points}, job.folder / "loss.png")
    runs.write_text(job.folder / "README.md", card(job, results, points, drawn=drawn))
    runs.write_json(job.folder / "results.json", results)         # last: it says "finished"
    runs.drop_state(job.folder, keep=False)
    return results


def curve(folder: Path, results: dict) -> list[tuple[int, float]]:
    """(tokens trained on, held-out loss) from before the first step to the last one."""
    points = {row["tokens"]: row["held_out_loss"] for row in runs.lines(folder)
              if "held_out_loss" in row}
    ends = {0: results["before"]["held_out_loss"],
            results["tokens"]: results["test"]["held_out_loss"]}
    return sorted((points | ends).items())


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> bool:
    """Held-out loss over millions of tokens; without matplotlib the card does with a table."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([tokens / 1e6 for tokens, _ in points], [loss for _, loss in points], label=name)
    axes.set(xlabel="million tokens", ylabel="held-out masked-LM loss")
    if len(curves) > 1:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return True


def card(job: Job, results: dict, points: list[tuple[int, float]], *, drawn: bool) -> str:
    """README.md of the folder: what was done, what came out, what it cannot do."""
    config, shape, about = job.config, job.lm.model.config, runs.environment()
    ran = json.loads((job.folder / "args.json").read_text())["command"]
    parameters = sum(p.numel() for p in job.lm.parameters())
    table = "\n".join(f"| {tokens / 1e6:.2f} | {loss:.3f} |" for tokens, loss in
                      [*points[: -1 : 1 + len(points) // 12], points[-1]])
    return f"""# {job.folder.name}

A masked language model trained with mincse {"on from " + config.from_ if config.from_ else
"from nothing"}: {shape.model_type}, {shape.layers} layers x {shape.width}, {shape.heads} heads,
{shape.vocab_size:,} word pieces, {parameters / 1e6:.1f} million parameters, in half precision.

- command: `{ran}`
- corpus: `{config.corpus}`, {len(job.text.stream) / 1e6:.1f} million tokens
- trained on: {results["tokens"] / 1e6:.1f} million tokens in {results["steps"]:,} steps, sequences
  of {config.max_tokens} tokens, {config.mask_rate:.0%} to be guessed
- time: {results["seconds"] / 60:.0f} minutes, {about["threads"]} threads of
  {about["gpu"] or about["processor"]}, torch {about["torch"]}
- on text never trained on, {HELD_OUT_RATE:.0%} of the tokens to be guessed (80/10/10): loss
  **{results["test"]["held_out_loss"]:.3f}**, guessed right
  **{results["test"]["held_out_accuracy"]:.1%}**
{chr(10) + "![loss](loss.png)" + chr(10) if drawn else ""}
| million tokens | held-out loss |
|--:|--:|
{table}

Load it with `transformers.AutoModelForMaskedLM`; `python mincse.py --encoder FOLDER` trains a
sentence encoder from it.

Limits: it knows what its corpus says, with the biases of that. Positions beyond
{config.max_tokens} were not trained here.
"""


# ---- the program ----------------------------------------------------------------------------

EXAMPLES = """examples:
  python pretrain.py --steps 300                                        built-in text, minutes
  python pretrain.py --corpus wiki_docs --data FOLDER --out runs/mini   an encoder like mini
  python pretrain.py --from bert-base-uncased --corpus my_texts.txt --learning-rate 1e-4

A session ends at Ctrl-C, at a signal (timeout -s INT 2h python pretrain.py ...) or with the
machine; --resume goes on from the last save, at most minutes old, as if nothing had happened.
exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 130 interrupted, saved
"""


def parser() -> argparse.ArgumentParser:
    """Every field of Config is a flag; what is not typed stays out of the result."""
    top = argparse.ArgumentParser(
        prog="pretrain.py", usage="python pretrain.py [--FLAG VALUE ...]", epilog=EXAMPLES,
        description="Train a masked language model on plain text.", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    groups = settings.add_flags(top, Config)
    for name in ("resume", "overwrite"):
        groups["output"].add_argument(f"--{name}", action="store_true",
                                      help=settings.OPTIONS[name])
    return top


def validate(given: dict) -> Config:
    """Refuse values outside their range, naming the flag."""
    config = Config(**given)
    above_0 = ("layers", "width", "heads", "steps", "batch_size", "learning_rate", "clip",
               "dev_every", "mask_rate")
    broken = [(name, "above 0") for name in above_0 if not getattr(config, name) > 0]
    from_0 = ("minutes", "weight_decay", "bag_weight", "seed", "threads")
    broken += [(name, "0 or more") for name in from_0 if not getattr(config, name) >= 0]
    broken += [(name, "below 1") for name in ("mask_rate", "dropout")
               if not 0 <= getattr(config, name) < 1]
    broken += settings.not_finite(vars(config))
    if not 8 <= config.max_tokens <= POSITIONS:
        broken.append(("max_tokens", f"8 to {POSITIONS}"))
    if config.heads > 0 and config.width % config.heads:
        broken.append(("width", f"a multiple of --heads, {config.heads}"))
    for name, expected in broken[:1]:
        raise ValueError(f"{dashed(name)}: expected {expected}, found {getattr(config, name)}")
    if config.minutes and "steps" in given:
        raise ValueError("--steps and --minutes both say how long the run is: give one of them")
    return config


def main(argv: list[str] | None = None) -> None:
    given = vars(parser().parse_args(argv))
    options = {name: given.pop(name, False) for name in ("resume", "overwrite")}
    with exits(2):
        config = validate(given)
        device, folder = pick_device(config.device), Path(config.out)
    with exits(3):
        before = runs.started(folder) if options["resume"] else None
    with exits(2):
        runs.claim(folder, config, {}, before, **options)
    with exits(3):
        results = runs.finished(folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)        # a GELU gives tiny numbers, which are slow to multiply
    if results is None:
        with exits(3):
            resumed = options["resume"] and (folder / "state.pt").is_file()
            job, about = prepare(config, device, resumed=resumed)
            state = runs.load_state(folder, job.lm, job.optimizer)
        results = run(job, state, about)
    print(json.dumps(results["test"]))


def run(job: Job, state: runs.State | None, about: dict) -> dict:
    """From the start, or from where a session ended, to the end or to a signal."""
    config = job.config
    print(", ".join(f"{name}: {value}" for name, value in about.items()), file=sys.stderr)
    if state is None:
        runs.describe(job.folder, config, {}, command(), about)
        state = runs.State(before=asdict(Result(held_out(job.lm, job.held_out))))
    with Stop().listening() as stop:
        state = fit(job, state, stop)
    if stop.signal:
        print(f"pretrain.py: stopped at step {state.step}, saved in {job.folder}; go on with:\n"
              f"  {command()} --resume", file=sys.stderr)
        raise SystemExit(128 + stop.signal)
    return finish(job, state)


if __name__ == "__main__":
    sys.exit(program(main))
