"""
Where does a pre-trained encoder come from? From plain text to a masked language model.

    python -m tools.pretrain --steps 300                              # built-in text, minutes
    python -m tools.pretrain --corpus wiki_docs --data FOLDER         # an encoder like mini
    python -m tools.pretrain --from bert-base-uncased --corpus my_texts.txt --learning-rate 1e-4

A word is hidden, the words around it must tell which it was, and nobody had to label anything
(Devlin et al. 2019). [CLS], of which a sentence encoder is made, must tell them all: `bag_loss`.
The folder that a run leaves is an `--encoder` of mincse.py. Read `guess` and `train` first;
words.py has vocabulary and sequences.

A session ends at Ctrl-C or a signal (timeout -s INT 2h python -m tools.pretrain ...), which saves,
or with the machine; --resume goes on from the last save, or score, as if nothing had happened.
Exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 130 interrupted, saved.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from data import step_seed
from engine import encoders, run_folder
from engine.files import write_json, write_text
from engine.flags import (
    Stop, add_flags, check_ranges, command, complain, exits, flag, pick_device, program, wants_bf16,
)
from engine.hub import encoder_folder
from model import Encoder, EncoderConfig, MaskedLMHead, SentenceEncoder
from tools.words import (
    Sequences, positive_pmi, streams, svd_embeddings, tokenizer_files, train_tokenizer,
)

POSITIONS = 512                       # what readers expect of an encoder like BERT
COUNTED = 10_000_000                  # tokens, for `--init svd`: a minute or two on one core
WARM_UP = 0.03                        # share of the run
HELD_OUT, HELD_OUT_RATE = 2048, 0.15  # sequences, and the share of their tokens that is masked
LOG_EVERY = 50                        # steps between the lines of metrics.jsonl


@dataclass(frozen=True)
class Config:
    from_: str = flag("", "what to train", "encoder to go on from, a folder or a Hub id")
    init: str = flag("svd", "what to train", "word embeddings before step 1", ["svd", "random"])
    vocab_size: int = flag(16384, "what to train", "word pieces", least=1)
    layers: int = flag(4, "what to train", "layers of the encoder", least=1)
    width: int = flag(256, "what to train", "width D; inside a layer four times that", least=1)
    heads: int = flag(4, "what to train", "heads of attention", least=1)
    corpus: str = flag("docs", "data", "docs, wiki_docs, or a .txt; blank lines end documents")
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    max_tokens: int = flag(64, "data", "tokens of a sequence", least=8, most=POSITIONS)
    mask_rate: float = flag(0.2, "data", "share of the tokens to be guessed", above=0, below=1)
    steps: int = flag(15_000, "optimisation", "length of the run", least=1)
    batch_size: int = flag(64, "optimisation", "sequences a step", least=1)
    optimizer: str = flag("muon", "optimisation", "optimizer of the layers' matrices, muon with "
                          "torch 2.9 or newer; AdamW has the rest", ["muon", "adamw"])
    learning_rate: float = flag(1.2e-3, "optimisation", "peak: see `schedule`", above=0)
    dropout: float = flag(0.0, "optimisation", "dropout while pre-training", least=0, below=1)
    weight_decay: float = flag(0.01, "optimisation", "AdamW's, of matrices; Muon's is 0.1", least=0)
    bag_weight: float = flag(1.0, "optimisation", "weight of `bag_loss`: [CLS] tells all", least=0)
    clip: float = flag(1.0, "optimisation", "largest gradient norm", above=0)
    seed: int = flag(42, "optimisation", "seed of everything random", least=0)
    dev_every: int = flag(500, "output", "steps between saves, with a held-out score", least=1)
    out: str = flag("runs/pretrained", "output", "folder for the encoder")
    device: str = flag("auto", "system", "auto, cpu, cuda, mps")
    precision: str = flag("auto", "system", "auto: bf16 where the processor is built for it",
                          ["auto", "fp32", "bf16"])
    threads: int = flag(0, "system", "processor threads; 0: all", least=0)


# ---- the model and its training -------------------------------------------------------------

class MaskedLM(nn.Module):
    """An encoder, and a head that guesses words with the encoder's own word embeddings.

    Reading a word and guessing it both need what it means, so they share one table: what one
    learns serves the other, and `mini` would be half as large again with a second table.
    """

    def __init__(self, model: SentenceEncoder, head: MaskedLMHead):
        super().__init__()
        self.model, self.head = model, head
        head.words = model.encoder.words.weight

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
    """The encoder before step 1; where `counted` tokens are given, its words come from their SVD.

    Its config.json keeps BERT's dropout, which SimCSE's two views are made of.
    """
    if config.from_:
        folder = encoder_folder(config.from_)
        model = encoders.load(folder, dropout=config.dropout)
        model.config = encoders.read_config(folder)
        encoders.check_vocabulary(model.config, tokenizer.whole.get_vocab().values())
        if config.max_tokens > model.config.usable_positions:
            raise ValueError(f"--max-tokens: expected at most {model.config.usable_positions}, the "
                             f"positions of {config.from_}, found {config.max_tokens}")
        return MaskedLM(model, encoders.load_masked_lm(folder, model))
    torch.manual_seed(config.seed)
    shape = EncoderConfig("bert", tokenizer.vocab_size, config.width, config.layers, config.heads,
                          4 * config.width, positions=POSITIONS, pad_id=tokenizer.pad_id)
    encoder = Encoder(replace(shape, dropout=config.dropout, attention_dropout=config.dropout))
    model = SentenceEncoder(encoder, files=tokenizer_files(tokenizer.json, POSITIONS))
    model.config = shape
    if counted is not None:
        vectors = svd_embeddings(positive_pmi(counted, shape.vocab_size), config.width)   # (V, D)
        met = torch.from_numpy(vectors.any(axis=1))               # (V,), others stay as drawn
        encoder.words.weight.data[met] = torch.from_numpy(vectors).float()[met]
    return MaskedLM(model, MaskedLMHead(shape, encoder.words.weight))


class Together:
    """Optimizers, each for its own parameters, that step and are saved as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:
        return {p: kept for optimizer in self.optimizers for p, kept in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, saved: list[dict]) -> None:
        for optimizer, its_own in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(its_own)


def make_optimizer(lm: MaskedLM, config: Config) -> Together:
    """Muon for the matrices of the layers, AdamW for the rest, of which matrices are pulled to 0.

    The gradient of a matrix mostly points in a few directions, and Adam, which scales every entry
    on its own, goes there too. Muon (Jordan et al. 2024) moves all directions by the same amount:
    what is rare is learned as fast as what is frequent. Scaled to the size of Adam's steps, it
    takes the same learning rate (Liu et al. 2025, "Muon is scalable", section 2.2). Word embeddings
    are a lookup table and no map from vector to vector, so AdamW keeps them.
    """
    inside = [p for p in lm.model.encoder.layers.parameters() if p.ndim > 1]
    muons = set(inside) if config.optimizer == "muon" else set()
    rest = [p for p in lm.parameters() if p not in muons]
    groups = [{"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    if not muons:
        return Together(adamw)
    return Together(adamw, torch.optim.Muon(inside, momentum=0.95, weight_decay=0.1,
                                            adjust_lr_fn="match_rms_adamw"))


def schedule(done: float) -> float:
    """Share of the peak learning rate: up during the first 3 % of the run, then down to 0.

    With the norm after every sum (post-norm), gradients near the output are large at first, so the
    rate has to start low (Xiong et al. 2020).
    """
    return max(0.0, min(done / WARM_UP, (1 - done) / (1 - WARM_UP)))


@dataclass(frozen=True)
class Job:
    """What is trained, on what."""
    config: Config
    lm: MaskedLM
    optimizer: Together
    text: Sequences
    held_out: Sequences
    device: torch.device


def train(job: Job, *, first: int) -> Iterator[tuple[int, Tensor]]:
    """Steps first, first + 1, ... to the last one. Yields (step, loss)."""
    config, lm, optimizer = job.config, job.lm, job.optimizer
    bf16 = wants_bf16(config.precision, job.device)
    order = data.batches(len(job.text), config.batch_size, seed=config.seed, epochs=sys.maxsize)
    batches = (job.text.masked(rows, rate=config.mask_rate, seed=step_seed(config.seed, step))
               for step, rows in enumerate(islice(order, first - 1, config.steps), start=first))
    for step, batch in enumerate(data.ahead(batches), start=first):
        torch.manual_seed(step_seed(config.seed, step))           # of dropout
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule((step - 0.5) / config.steps)
        ids, labels = (x.to(job.device, non_blocking=True) for x in batch)        # (B, T)s
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
            logits, answers, summary = lm.guess(ids, labels)
        loss = F.cross_entropy(logits, answers, reduction="sum") / max(len(answers), 1)

        lm.zero_grad()
        (loss + config.bag_weight * bag_loss(summary, ids, labels)).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), config.clip)
        optimizer.step()
        yield step, loss.detach()


@torch.no_grad()
def held_out(lm: MaskedLM, text: Sequences) -> dict[str, float]:
    """On text never trained on: mean cross-entropy, share of tokens guessed right, loss of [CLS].

    The same 15 % of the same tokens every time, BERT's 80/10/10; in float32, without dropout.
    """
    lm.eval()
    total, right, bag, count = 0.0, 0, 0.0, 0
    most = min(HELD_OUT, len(text))
    rows = [i * len(text) // most for i in range(most)]           # evenly spaced
    for start in range(0, most, 64):
        batch = text.masked(rows[start : start + 64], rate=HELD_OUT_RATE, seed=start)
        ids, labels = (x.to(lm.head.bias.device) for x in batch)
        logits, answers, summary = lm.guess(ids, labels)
        total += F.cross_entropy(logits, answers, reduction="sum").item()
        right += (logits.argmax(dim=-1) == answers).sum().item()
        bag += bag_loss(summary, ids, labels).item() * len(ids) / most
        count += len(answers)
    lm.train()
    return {"held_out_loss": total / max(count, 1), "held_out_accuracy": right / max(count, 1),
            "held_out_bag_loss": bag}


# ---- a run ----------------------------------------------------------------------------------

def prepare(config: Config, corpus: data.Corpus, device: torch.device, *, resumed: bool) -> Job:
    """Tokenizer, sequences, model and optimizer before step 1."""
    if len(corpus.columns) > 1:
        raise ValueError(f"{config.corpus}: expected running text, one column, found "
                         f"{len(corpus.columns)}; choose a .txt file")
    if resumed or config.from_:
        folder = Path(config.out) if resumed else encoder_folder(config.from_)
        tokenizer = data.Tokenizer.read(folder)
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
    return Job(config, lm, make_optimizer(lm, config), text, other, device)


def begin(job: Job, folder: Path, corpus: data.Corpus, sources: dict) -> run_folder.State:
    """Write down what is trained on what, and score the start."""
    about = {"corpus": corpus.name, "sha256": corpus.sha256, "tokens": len(job.text.stream),
             "held out tokens": len(job.held_out.stream),
             "vocabulary": job.text.tokenizer.vocab_size}
    print(", ".join(f"{name}: {value}" for name, value in about.items()), file=sys.stderr)
    run_folder.describe(folder, job.config, sources, command(), about)
    return run_folder.State(before={"scores": held_out(job.lm, job.held_out)})


def run(job: Job, folder: Path, state: run_folder.State) -> dict:
    """From the state to the end, where the encoder is described, or to a signal."""
    with Stop().listening() as stop:
        state = fit(job, folder, state, stop)
    if stop.signal:
        complain(f"stopped at step {state.step} of {job.config.steps}, saved in {folder}; go on "
                 f"with:\n  {command()} --resume")
        raise SystemExit(128 + stop.signal)
    last, before = run_folder.lines(folder)[-1], state.before["scores"]
    results = {"before": before, "test": {name: last[name] for name in before},
               "steps": state.step, "tokens": last["tokens"]}
    write_text(folder / "README.md", card(job, folder, results))
    write_json(folder / "results.json", results)                  # last: it says "finished"
    run_folder.drop_state(folder)
    return results


def fit(job: Job, folder: Path, state: run_folder.State, stop: Stop) -> run_folder.State:
    """Train to the end or to a signal. A save follows every score, the last step's too."""
    config, log = job.config, run_folder.Log(folder, job.config.batch_size)
    bar = tqdm(train(job, first=state.step + 1), total=config.steps, initial=state.step,
               disable=None, unit="step")
    for step, loss in bar:
        state, scores = replace(state, step=step), {}
        log.add(loss, learning_rate=job.optimizer.param_groups[0]["lr"])
        scoring = step % config.dev_every == 0 or step == config.steps
        logging = scoring or step % LOG_EVERY == 0
        if scoring:
            with log.paused():
                scores = held_out(job.lm, job.held_out)
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in
                                                   scores.items()), file=sys.stderr)
        if logging or stop.signal:                                # before anything is saved
            found = loss.item() + scores.get("held_out_loss", 0.0)
            if not math.isfinite(found):                          # of the batch, or once updated
                raise FloatingPointError(f"the loss is {found} at step {step}: try a lower "
                                         "--learning-rate; what was saved before is kept")
        if logging:
            log.line(step, scores | {"tokens": step * config.batch_size * config.max_tokens})
        if scoring or stop.signal:
            with log.paused():
                save_all(job, folder, state)
        if stop.signal:
            break
    return state


def save_all(job: Job, folder: Path, state: run_folder.State) -> None:
    """The encoder, and all that a stopped run needs to go on exactly.

    Positions beyond the longest sequence, never trained, are the mean of the later ones.
    """
    if not job.config.from_:
        table, trained = job.lm.model.encoder.positions.weight.data, job.config.max_tokens
        table[trained:] = table[trained // 2 : trained].mean(dim=0)             # (512, D)
    encoders.save_masked_lm(job.lm.model, job.lm.head, folder)
    run_folder.save_state(folder, state, job.lm, job.optimizer)


def card(job: Job, folder: Path, results: dict) -> str:
    """README.md of the folder: what was done, what came out, what it cannot do."""
    shape, test = job.lm.model.config, results["test"]
    start = f"on from {job.config.from_}" if job.config.from_ else "from nothing"
    return f"""# {folder.name}

A masked language model trained with mincse {start}: {shape.model_type}, {shape.layers} layers x
{shape.width}, {shape.vocab_size:,} word pieces. It has read {results["tokens"] / 1e6:.1f} million
tokens of `{job.config.corpus}` in {results["steps"]:,} steps (the command is in args.json).

On text never trained on, {HELD_OUT_RATE:.0%} of the tokens to be guessed (80/10/10): loss
**{test["held_out_loss"]:.3f}**, guessed right **{test["held_out_accuracy"]:.1%}**.

`python mincse.py --encoder FOLDER` trains a sentence encoder from it. Limits: it knows what its
corpus says, with the biases of that. Positions beyond {job.config.max_tokens} were not trained.
"""


# ---- the program ----------------------------------------------------------------------------

def parse(argv: list[str] | None) -> dict:
    """What was typed: fields of Config, then --resume and --overwrite."""
    top = argparse.ArgumentParser(
        prog="pretrain.py", usage="python -m tools.pretrain [--FLAG VALUE ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    output = add_flags(top, fields(Config))["output"]
    output.add_argument("--resume", action="store_true", default=False,
                        help="go on where the same command was stopped")
    output.add_argument("--overwrite", action="store_true", default=False,
                        help="replace the run that the folder holds")
    return vars(top.parse_args(argv))


def check_optimizer(config: Config) -> None:
    """Refuse what no range tells."""
    if config.width % config.heads:
        raise ValueError(f"--width: expected a multiple of --heads, {config.heads}, found "
                         f"{config.width}")
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"--optimizer muon: expected torch 2.9 or newer, found "
                         f"{torch.__version__}: use --optimizer adamw, or a newer torch")


def main(argv: list[str] | None = None) -> None:
    given = parse(argv)
    resume, overwrite = given.pop("resume"), given.pop("overwrite")
    config = Config(**given)
    with exits(2):
        check_ranges(config)
        check_optimizer(config)
        device, folder = pick_device(config.device), Path(config.out)
    with exits(3):
        corpus = data.read_corpus(config.corpus, Path(config.data) if config.data else None)
        sources = {"corpus": corpus.sha256}
        if config.from_:
            sources["from"] = run_folder.encoder_sha256(encoder_folder(config.from_))
        before = run_folder.started(folder) if resume else None
    with exits(2):
        run_folder.claim(folder, config, sources, before, resume=resume, overwrite=overwrite)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)        # a GELU gives tiny numbers, which are slow to multiply
    with exits(3):
        if done := run_folder.finished(folder):
            run_folder.drop_state(folder)                         # killed just before, it stands
            return print(json.dumps(done["test"]))
        job = prepare(config, corpus, device, resumed=(folder / "state.pt").is_file())
        state = run_folder.load_state(folder, job.lm, job.optimizer)
    run_folder.clear_after(folder, state or run_folder.State())
    results = run(job, folder, state or begin(job, folder, corpus, sources))
    print(json.dumps(results["test"]))


if __name__ == "__main__":
    sys.exit(program(main))
