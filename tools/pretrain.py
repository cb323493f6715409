"""
Where does a pre-trained encoder come from? From plain text to a masked language model.

    python -m tools.pretrain --steps 300                              # built-in text, minutes
    python -m tools.pretrain --corpus wiki_docs --data FOLDER         # an encoder like mini
    python -m tools.pretrain --from bert-base-uncased --corpus my_texts.txt --learning-rate 1e-4

The words around a hidden word must tell it (Devlin et al. 2019). The folder of a run is an
`--encoder` of mincse.py. In reading order: from text to tokens, from counts to word embeddings,
`guess`, `train`, a run.

Ctrl-C or a signal (timeout -s INT 2h python -m tools.pretrain ...) saves and ends a session;
--resume goes on from the last save with the same numbers.
Exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 130 interrupted, saved.
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor
from tqdm import tqdm

import data
from engine import encoders, run_folder
from engine.files import write_json, write_text
from engine.flags import (Parser, Stop, add_flags, check_ranges, command, complain, exits, flag,
                          pick_device, program, wants_bf16)
from engine.hub import encoder_folder
from model import Encoder, EncoderConfig, MaskedLMHead, SentenceEncoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
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
    corpus: str = flag("docs", "data", "text: docs, wiki_docs or a .txt; blank lines end documents")
    data: str = flag("", "data", "folder with own copies of the data (or MINCSE_DATA)")
    max_tokens: int = flag(64, "data", "tokens of a sequence", least=8, most=POSITIONS)
    mask_rate: float = flag(0.2, "data", "share of the tokens to be guessed", above=0, below=1)
    steps: int = flag(15_000, "optimisation", "length of the run", least=1)
    batch_size: int = flag(64, "optimisation", "sequences a step", least=1)
    learning_rate: float = flag(1.2e-3, "optimisation", "peak of the learning rate", above=0)
    dropout: float = flag(0.0, "optimisation", "dropout while pre-training", least=0, below=1)
    weight_decay: float = flag(0.01, "optimisation", "decay of matrices in AdamW", least=0)
    clip: float = flag(1.0, "optimisation", "largest gradient norm", above=0)
    seed: int = flag(42, "optimisation", "seed of everything random", least=0)
    dev_every: int = flag(500, "output", "steps between saves, with a held-out score", least=1)
    out: str = flag("runs/pretrained", "output", "folder for the encoder")
    device: str = flag("auto", "system", "device: auto, cpu, cuda, mps")
    precision: str = flag("auto", "system", "number format; auto: bf16 where it is fast",
                          ["auto", "fp32", "bf16"])
    threads: int = flag(0, "system", "processor threads; 0: all", least=0)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of BERT's uncased WordPiece; a second training may number pieces anew."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    # Without a limit, the letters of the world's scripts take the place of English words.
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, limit_alphabet=1000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer.to_str()


def tokenizer_files(tokenizer_json: str, max_tokens: int) -> dict[str, bytes]:
    """The files from which transformers reads the tokenizer."""
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
             "model_max_length": max_tokens,
             **{f"{name[1:-1].lower()}_token": name for name in SPECIAL}}
    return {"tokenizer.json": tokenizer_json.encode(),
            "tokenizer_config.json": json.dumps(about).encode()}


def streams(corpus: data.Corpus, tokenizer: data.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the documents to train on and of those held out, [SEP] after each document.

    Every hundredth document is held out; of fewer than a thousand, ten are.
    """
    documents = corpus.documents or range(len(corpus))
    every = min(100, max(2, (documents[-1] + 1) // 10))
    end, pieces = tokenizer.whole.encode("").ids[-1], ([], [])
    small = np.min_scalar_type(tokenizer.vocab_size - 1)          # two bytes a token, mostly
    for start in range(0, len(corpus), 4096):
        texts = corpus.columns[0][start : start + 4096]
        rows = tokenizer.whole.encode_batch_fast(texts, add_special_tokens=False)
        for i, row in enumerate(rows, start=start):
            last = i + 1 == len(corpus) or documents[i + 1] != documents[i]
            held_out = documents[i] % every == every - 1
            pieces[held_out].append(np.array(row.ids + [end] * last, dtype=small))
    return tuple(np.concatenate(its_own or [np.empty(0, small)]) for its_own in pieces)


@dataclass(frozen=True)
class Sequences:
    """A stream cut into N sequences of T tokens, [CLS] and [SEP] around each: no padding."""
    stream: np.ndarray
    tokenizer: data.Tokenizer
    max_tokens: int                                               # T

    def __len__(self) -> int:
        return len(self.stream) // (self.max_tokens - 2)

    def __call__(self, rows: list[int]) -> Tensor:                # B numbers -> (B, T)
        inner = self.max_tokens - 2
        cut = self.stream[: len(self) * inner].reshape(-1, inner)[rows]           # (B, T - 2)
        first, last = (np.full((len(rows), 1), i) for i in self.tokenizer.whole.encode("").ids)
        return torch.from_numpy(np.concatenate([first, cut.astype(np.int64), last], axis=1))

    def masked(self, rows: list[int], *, rate: float, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, (B, T) each.

        A low rate teaches little a step, a high one leaves little to guess from (Wettig et al.
        2023). One masked token in five is another word or itself, as real sentences hold no [MASK].
        """
        return self.tokenizer.mask(self(rows), rate=rate, seed=seed)


def positive_pmi(stream: np.ndarray, vocab_size: int, window: int = 5) -> sparse.csr_matrix:
    """How much more often than by chance do two words meet within the window?      -> (V, V)

        max(0, log p(a, b) / (p(a) p(b)))       Church & Hanks 1990
    """
    counts = sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    for piece in np.array_split(stream.astype(np.int32), 1 + len(stream) // 2_000_000):
        for gap in range(1, window + 1):
            pairs = piece[:-gap], piece[gap:]
            counts += sparse.csr_matrix((np.ones(len(pairs[0]), np.float32), pairs), counts.shape)
    counts = (counts + counts.T).tocoo()
    of_word = np.asarray(counts.sum(axis=0)).ravel()                              # (V,)
    pmi = np.log(counts.data * of_word.sum() / (of_word[counts.row] * of_word[counts.col]))
    more = pmi > 0
    return sparse.csr_matrix((pmi[more], (counts.row[more], counts.col[more])), counts.shape)


def svd_embeddings(pmi: sparse.csr_matrix, width: int) -> np.ndarray:             # (V, D)
    """Word embeddings in which words that meet the same words point the same way.

    Truncated SVD (Levy, Goldberg & Dagan 2015): U √Σ, centred, every row of length 0.6 or, of a
    word that met no other, 0.
    """
    if width >= pmi.shape[0]:
        raise ValueError(f"--init svd: expected more than --width {width} word pieces, found "
                         f"{pmi.shape[0]}: use more text, a smaller --width, or --init random")
    # A symmetric matrix needs one side only: its singular values are its eigenvalues' sizes.
    values, vectors = eigsh(pmi, k=width, v0=np.ones(pmi.shape[0], pmi.dtype), tol=1e-2)
    x = vectors * np.sqrt(np.abs(values))
    met = pmi.getnnz(axis=1) > 0
    x[met] -= x[met].mean(axis=0)
    return 0.6 * x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) * met[:, None]


class MaskedLM(nn.Module):
    """An encoder, and a head that guesses words with the encoder's own word embeddings."""

    def __init__(self, model: SentenceEncoder, head: MaskedLMHead):
        super().__init__()
        self.model, self.head = model, head
        head.words = model.encoder.words.weight

    def guess(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:        # (B, T)s
        """Logits (M, V) and answers (M,) of the M masked tokens.

        The last layer and the head compute only these, as the head's V columns are costly.
        """
        *layers, last = self.model.encoder.layers
        x = self.model.encoder.embed(ids, torch.ones_like(ids, dtype=torch.bool))
        for layer in layers:
            x = layer(x, x)
        asked = (labels.flatten() != -100).nonzero()[:, 0]                        # (M,)
        x = last(replace(x, rows=x.rows[asked], places=asked), x)
        return self.head(x.rows).float(), labels.flatten()[asked]


def build(config: Config, tokenizer: data.Tokenizer, counted: np.ndarray | None) -> MaskedLM:
    """The model before step 1; its word embeddings start from the SVD of `counted` tokens."""
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
    files = tokenizer_files(tokenizer.json, POSITIONS)
    model = SentenceEncoder(encoder, pooling="cls", files=files)
    model.config = shape                  # config.json keeps the dropout that SimCSE needs
    if counted is not None:
        vectors = svd_embeddings(positive_pmi(counted, shape.vocab_size), config.width)   # (V, D)
        met = torch.from_numpy(vectors.any(axis=1))               # (V,), others stay as drawn
        encoder.words.weight.data[met] = torch.from_numpy(vectors).float()[met]
    return MaskedLM(model, MaskedLMHead(shape, encoder.words.weight))


def make_optimizer(lm: MaskedLM, config: Config) -> torch.optim.AdamW:
    """AdamW as BERT has it, whose decay spares biases and LayerNorms; the moments are RoBERTa's."""
    groups = [{"params": [p for p in lm.parameters() if (p.ndim > 1) is decays],
               "weight_decay": config.weight_decay * decays} for decays in (True, False)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def schedule(done: float) -> float:
    """Share of the peak rate: low at first, for post-norm (Xiong et al. 2020), and 0 at the end."""
    return max(0.0, min(done / WARM_UP, (1 - done) / (1 - WARM_UP)))


@dataclass(frozen=True)
class Job:
    """What a run trains, and with what."""
    config: Config
    lm: MaskedLM
    optimizer: torch.optim.AdamW
    text: Sequences
    held_out: Sequences
    device: torch.device


def train(job: Job, *, first: int) -> Iterator[tuple[int, Tensor]]:
    """Steps first, first + 1, ... to the last one. Yields (step, loss)."""
    config, lm, optimizer = job.config, job.lm, job.optimizer
    bf16 = wants_bf16(config.precision, job.device)
    order = data.batches(len(job.text), config.batch_size, seed=config.seed, epochs=sys.maxsize)
    batches = (job.text.masked(rows, rate=config.mask_rate, seed=data.step_seed(config.seed, step))
               for step, rows in enumerate(islice(order, first - 1, config.steps), start=first))
    for step, batch in enumerate(data.ahead(batches), start=first):
        torch.manual_seed(data.step_seed(config.seed, step))           # of dropout
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule((step - 0.5) / config.steps)
        ids, labels = (x.to(job.device, non_blocking=True) for x in batch)        # (B, T)s
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bf16):
            logits, answers = lm.guess(ids, labels)
        loss = F.cross_entropy(logits, answers, reduction="sum") / max(len(answers), 1)

        lm.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), config.clip)
        optimizer.step()
        yield step, loss.detach()


@torch.no_grad()
def held_out(lm: MaskedLM, text: Sequences) -> dict[str, float]:
    """Mean cross-entropy, and share of tokens guessed right, on text never trained on.

    The same 15 % of the same tokens are masked every time; in float32, without dropout.
    """
    lm.eval()
    total, right, count, most = 0.0, 0, 0, min(HELD_OUT, len(text))
    rows = [i * len(text) // most for i in range(most)]           # evenly spaced
    for start in range(0, most, 64):
        batch = text.masked(rows[start : start + 64], rate=HELD_OUT_RATE, seed=start)
        ids, labels = (x.to(lm.head.bias.device) for x in batch)
        logits, answers = lm.guess(ids, labels)
        total += F.cross_entropy(logits, answers, reduction="sum").item()
        right += (logits.argmax(dim=-1) == answers).sum().item()
        count += len(answers)
    lm.train()
    return {"held_out_loss": total / max(count, 1), "held_out_accuracy": right / max(count, 1)}


def prepare(config: Config, corpus: data.Corpus, device: torch.device, *, resumed: bool) -> Job:
    """Tokenizer, sequences, model and optimizer before step 1."""
    if len(corpus.columns) > 1:
        raise ValueError(f"{config.corpus}: expected one column, found {len(corpus.columns)}; "
                         "choose a .txt file")
    if config.from_:
        tokenizer = data.Tokenizer.read(encoder_folder(config.from_))
    elif resumed:
        tokenizer = data.Tokenizer((Path(config.out) / "tokenizer.json").read_text("utf-8"))
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


def run(config: Config, corpus: data.Corpus, device: torch.device, sources: dict) -> dict:
    """One run from its start, or its last save, to its results; saved as mincse.run is."""
    folder = Path(config.out)
    with exits(3):
        if done := run_folder.finished(folder):
            run_folder.drop_state(folder)                         # killed just before, it stands
            return done
        job = prepare(config, corpus, device, resumed=(folder / "state.pt").is_file())
        state = run_folder.load_state(folder, job.lm, job.optimizer)
    run_folder.clear_after(folder, state or run_folder.State())
    if state is None:
        about = {"corpus": corpus.name, "sha256": corpus.sha256, "tokens": len(job.text.stream),
                 "held out tokens": len(job.held_out.stream),
                 "vocabulary": job.text.tokenizer.vocab_size}
        run_folder.describe(folder, config, sources, command(), about)
        state = run_folder.State(before={"scores": held_out(job.lm, job.held_out)})
    with Stop().listening() as stop:
        state = fit(job, folder, state, stop)
    if stop.signal:
        complain(f"stopped at step {state.step} of {config.steps}, saved in {folder}; go on with:\n"
                 f"  {command()} --resume")
        raise SystemExit(128 + stop.signal)
    last, before = run_folder.lines(folder)[-1], state.before["scores"]
    results = {"before": before, "test": {name: last[name] for name in before},
               "steps": state.step, "tokens": last["tokens"]}
    write_text(folder / "README.md", card(config, folder, results))
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
        if logging or stop.signal:                                # before anything is saved
            found = loss.item() + scores.get("held_out_loss", 0.0)
            if not math.isfinite(found):
                raise FloatingPointError(f"the loss is {found} at step {step}: try a lower "
                                         "--learning-rate; what was saved before is kept")
        if logging:
            row = log.line(step, scores | {"tokens": step * config.batch_size * config.max_tokens})
            bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
        if scoring or stop.signal:
            with log.paused():
                save_all(job, folder, state)
        if stop.signal:
            break
    return state


def save_all(job: Job, folder: Path, state: run_folder.State) -> None:
    """The encoder, and all that a stopped run needs to go on exactly."""
    if not job.config.from_:              # positions never trained: the mean of the later ones
        table, trained = job.lm.model.encoder.positions.weight.data, job.config.max_tokens
        table[trained:] = table[trained // 2 : trained].mean(dim=0)             # (512, D)
    encoders.save_masked_lm(job.lm.model, job.lm.head, folder)
    run_folder.save_state(folder, state, job.lm, job.optimizer)


def card(config: Config, folder: Path, results: dict) -> str:
    """README.md of the folder."""
    test = results["test"]
    return f"""# {folder.name}

A masked language model that mincse trained with `{command()}`
in {results["steps"]:,} steps on {results["tokens"]:,} tokens of `{config.corpus}`.
On text never trained on, with {HELD_OUT_RATE:.0%} of the tokens masked: loss
**{test["held_out_loss"]:.3f}**, guessed right **{test["held_out_accuracy"]:.1%}**.
Load it with `python mincse.py --encoder FOLDER`. Limits: the biases of its corpus; positions beyond
{config.max_tokens} were not trained.
"""


def main(argv: list[str] | None = None) -> None:
    top = Parser(
        prog="pretrain.py", usage="python -m tools.pretrain [--FLAG VALUE ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    output = add_flags(top, fields(Config))["output"].add_mutually_exclusive_group()
    for name, text in (("--resume", "go on where the same command was stopped"),
                       ("--overwrite", "replace the run that the folder holds")):
        output.add_argument(name, action="store_true", default=False, help=text)
    given = vars(top.parse_args(argv))
    how = {name: given.pop(name) for name in ("resume", "overwrite")}
    config = Config(**given)
    with exits(2):
        check_ranges(config)
        if config.width % config.heads:
            raise ValueError(f"--width: expected a multiple of --heads, {config.heads}, found "
                             f"{config.width}")
        device, folder = pick_device(config.device), Path(config.out)
    with exits(3):
        corpus = data.read_corpus(config.corpus, Path(config.data) if config.data else None)
        sources = {"corpus": corpus.sha256}
        if config.from_:
            sources["from"] = run_folder.encoder_sha256(encoder_folder(config.from_))
        before = run_folder.started(folder) if how["resume"] else None
    with exits(2):
        run_folder.claim(folder, config, sources, before, **how)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.set_flush_denormal(True)        # a GELU gives tiny numbers, which are slow to multiply
    print(json.dumps(run(config, corpus, device, sources)["test"]))


if __name__ == "__main__":
    sys.exit(program(main, "--resume"))
