"""
How fast is it here?

    python -m tools.bench                            # a Markdown table in some minutes
    python -m tools.bench --data FOLDER              # on Wikipedia, with the seven STS tasks
    python -m tools.bench --device cuda              # bert-base's shape, and what an epoch takes
    python -m tools.bench --only methods --encoder mini    # a step of each paper beside SimCSE's

sentence-transformers is measured too where it is installed (with `datasets` and `accelerate` for
training): same weights, [CLS] pooling, sentences, batch size, threads. Each library has a process
and so a memory peak of its own; they take turns, so that a busy machine slows both. A time is the
median of the turns.

    same     both in `--precision`, both cut at `--max-tokens`
    usual    told the batch size only: precision auto and 32 tokens here, float32 and as many tokens
             as the encoder has positions there
    epoch    batches of 64 and of 512: a million sentences, and the matrix products of a step
             against those that a large product does in its time
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import argparse
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from timeit import repeat

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import mincse
from engine.docs import doc_sentences
from engine.encoders import read_config, save
from engine.files import write_json, write_text
from engine.flags import Parser, count, exits, pick_device, program, wants_bf16
from engine.hub import data_file, encoder_folder
from engine.pieces import peak_memory
from engine.run_folder import environment
from engine.tables import markdown
from engine.texts import read_lines
from eval_sts import Encode, open_encoder, read_test
from model import Encoder, SentenceEncoder, encode
from papers import METHODS

ROOT = Path(__file__).parent.parent
# Shapes with random weights, which are as fast as trained ones; `mini` has the words, and the
# vocabulary is filled up.
SHAPES = {"bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                        "intermediate_size": 3072, "vocab_size": 30522}}
Turn = Callable[[], None]             # ends a turn: takes its time, lets the other library work


@dataclass(frozen=True)
class Task:
    """A line of the table: what is measured, for both libraries."""
    what: str                                                     # train, encode or evaluate
    usual: bool                                                   # see the top of this page
    encoder: Path
    corpus: Path                                                  # one sentence a line
    given: argparse.Namespace                                     # the command line
    settings: dict = field(default_factory=dict)                  # of a paper

    @property
    def sentences(self) -> list[str]:
        return list(data.read_corpus(str(self.corpus)).columns[0])

    def repeat(self, work: Callable[[], object], turn: Turn) -> None:
        """Once for warming up, then once a turn."""
        for _ in range(self.given.turns + 1):
            work()
            turn()


def steps_ours(task: Task) -> Iterator:
    """The loop that trains: as many steps as all turns have."""
    given = task.given
    own = {} if task.usual else {"max_tokens": given.max_tokens, "precision": given.precision}
    inputs = mincse.read_inputs(own | task.settings | {
        "encoder": str(task.encoder), "corpus": str(task.corpus), "batch_size": given.batch_size,
        "steps": given.steps * (given.turns + 1), "device": given.device})
    job = mincse.build(inputs, inputs.config)
    job.method.prepare(job.encode_corpus)
    return mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1)


def train_ours(task: Task, turn: Turn) -> int:
    given, loop = task.given, steps_ours(task)
    task.repeat(lambda: deque(islice(loop, given.steps), maxlen=0), turn)     # keeps no step
    return given.steps * given.batch_size


def encode_ours(task: Task, turn: Turn) -> int:
    task.repeat(partial(encoder_of(task), task.sentences), turn)
    return len(task.sentences)


def evaluate_ours(task: Task, turn: Turn) -> int:
    # Theirs computes no alignment and uniformity.
    test = replace(read_test("sts", task.given.data), geometry_of={})
    task.repeat(partial(test.score, encoder_of(task)), turn)
    return sum(len(pairs) for subsets in test.tasks.values() for pairs in subsets.values())


def encoder_of(task: Task) -> Encode:
    """N sentences -> (N, D), as eval_sts.py encodes them."""
    model, tokenizer = open_encoder(task.encoder)
    return partial(encode, model.to(task.given.device), tokenizer,
                   batch_size=task.given.batch_size, max_tokens=task.given.max_tokens,
                   precision=torch.bfloat16 if task.given.precision == "bf16" else torch.float32)


def model_of(task: Task):
    """A SentenceTransformer of the same weights."""
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(task.encoder), device=task.given.device)
    if not task.usual:
        model.max_seq_length = task.given.max_tokens
    if task.what != "train" and task.given.precision == "bf16":
        model.bfloat16()
    return model


def train_theirs(task: Task, turn: Turn) -> None:
    """Their recipe of SimCSE: every sentence is its own positive, the others its negatives."""
    from datasets import Dataset
    from sentence_transformers import (SentenceTransformerTrainer as Trainer,
                                       SentenceTransformerTrainingArguments as Arguments)
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            if state.global_step % given.steps == 0:
                turn()

    model, texts, given = model_of(task), task.sentences, task.given
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            folder, per_device_train_batch_size=given.batch_size, report_to="none",
            max_steps=given.steps * (given.turns + 1), use_cpu=given.device == "cpu",
            bf16=given.precision == "bf16" and not task.usual, dataloader_drop_last=True,
            save_strategy="no", disable_tqdm=True)
        Trainer(model, arguments, train_dataset=Dataset.from_dict({"a": texts, "b": texts}),
                loss=MultipleNegativesRankingLoss(model), callbacks=[Turns()]).train()


def encode_theirs(task: Task, turn: Turn) -> None:
    task.repeat(partial(model_of(task).encode, task.sentences, batch_size=task.given.batch_size,
                        show_progress_bar=False), turn)


def evaluate_theirs(task: Task, turn: Turn) -> None:
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator as Evaluator
    model = model_of(task)
    tests = [Evaluator(*zip(*sum(subsets.values(), [])), batch_size=task.given.batch_size,
                       write_csv=False)
             for subsets in read_test("sts", task.given.data).tasks.values()]
    task.repeat(lambda: [test(model) for test in tests], turn)


def wait(device: str) -> None:
    """What was launched on a GPU is not yet computed."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


OURS = {"train": train_ours, "encode": encode_ours, "evaluate": evaluate_ours}
THEIRS = {"train": train_theirs, "encode": encode_theirs, "evaluate": evaluate_theirs}


def play(pipe, work: Callable, task: Task) -> None:
    """A process that sends the seconds of loading and warming up, then of every turn.

    At the end come peak memory and what `work` returns.
    """
    torch.set_num_threads(task.given.threads)
    sys.stdout = sys.stderr                                       # the table stays alone there
    started = time.perf_counter()

    def turn():
        nonlocal started
        wait(task.given.device)
        pipe.send(time.perf_counter() - started)
        pipe.recv()
        started = time.perf_counter()

    sentences = work(task, turn)
    pipe.send((peak_memory(torch.device(task.given.device)), sentences))


def compare(turns: int, *sides: tuple[Callable, Task]) -> list[tuple[float, str, int | None]]:
    """Median seconds of a turn, peak memory and sentences of every side; they take turns."""
    context, pipes = multiprocessing.get_context("spawn"), []
    for work, task in sides:
        pipe, end = context.Pipe()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for this process only
        context.Process(target=play, args=(end, work, task), daemon=True).start()
        signal.signal(signal.SIGINT, before)
        end.close()                                               # or a dead one is waited for
        pipes.append(pipe)
    for pipe in pipes:
        pipe.recv()                                               # all are ready
    seconds = [[] for _ in pipes]
    for _ in range(turns):
        for taken, pipe in zip(seconds, pipes):
            pipe.send("go")
            taken.append(pipe.recv())
    for pipe in pipes:
        pipe.send("end")
    return [(statistics.median(taken), *pipe.recv()) for taken, pipe in zip(seconds, pipes)]


def make_encoder(name: str, folder: Path) -> Path:
    """A folder with [CLS] pooling in float32: a shape with random weights, or any encoder."""
    made = folder / Path(name).name
    if name not in SHAPES:
        model = open_encoder(encoder_folder(name), pooling="cls")[0]
    else:
        made.mkdir()
        shape = json.loads((ROOT / "mini" / "config.json").read_bytes()) | SHAPES[name]
        write_json(made / "config.json", shape)
        words = json.loads((ROOT / "mini" / "tokenizer.json").read_bytes())
        words["model"]["vocab"] |= {f"[unused{number}]": number for number in range(
            len(words["model"]["vocab"]), shape["vocab_size"])}
        write_json(made / "tokenizer.json", words)
        model = SentenceEncoder(Encoder(read_config(made)), pooling="cls")
    save(model, made)
    return made


def table_lines(task: Task) -> list[Task]:
    """The lines of the first table for one encoder."""
    # On the 26,126 sentences of the STS tasks a large shape would be busy for most of an hour.
    small = task.given.data and task.encoder.name not in SHAPES
    lines = [("train", True), ("train", False), ("encode", False), ("evaluate", False)]
    return [replace(task, what=what, usual=usual) for what, usual in lines
            if what in task.given.only and (what != "evaluate" or small)]


def row_of(task: Task) -> list[str]:
    """A line of the table, measured; without the other library its columns are dashes."""
    works = [OURS, THEIRS] if they_are_here(task.what) else [OURS]
    (seconds, memory, sentences), *others = compare(
        task.given.turns, *((work[task.what], task) for work in works))
    row = [f"{task.what}, {'usual' if task.usual else 'same'}", task.encoder.name,
           f"{sentences / seconds:.0f}", memory]
    for theirs, their_memory, _ in others:
        return [*row, f"{sentences / theirs:.0f}", their_memory, f"{theirs / seconds:.2f}"]
    return [*row, "-", "-", "-"]


def they_are_here(what: str) -> bool:
    needed = ["sentence_transformers"] + ["datasets", "accelerate"] * (what == "train")
    return all(find_spec(package) for package in needed)


# Those that read plain sentences, and need no head that the measured folders lack (diffcse's).
TIMED = [name for name in METHODS
         if name not in ("infocse", "diffcse", "core-tuning", "fedrcl", "pnr")]


def method_row(name: str, task: Task) -> list[str]:
    """The steps of a paper beside SimCSE's; its work before the first step is not in the turns."""
    teacher = {"teacher": str(task.encoder)} if hasattr(METHODS[name].Config, "teacher") else {}
    (its, memory, sentences), (plain, *_) = compare(
        task.given.turns, (train_ours, replace(task, settings={"method": name, **teacher})),
        (train_ours, task))
    return [name, task.encoder.name, f"{sentences / its:.0f}", memory, f"{its / plain:.2f}"]


def epoch_row(size: int, task: Task) -> list[str]:
    """Training with batches of this size, as a share of what the processor can do."""
    task = replace(task, given=argparse.Namespace(**vars(task.given) | {"batch_size": size}))
    [(seconds, memory, sentences)] = compare(task.given.turns, (train_ours, task))
    with FlopCounterMode(display=False) as counter:
        next(steps_ours(task))
    share = counter.get_total_flops() * task.given.steps / seconds / matrix_rate(task.given)
    return [str(size), task.encoder.name, f"{sentences / seconds:.0f}",
            f"{1e6 * seconds / sentences:.0f} s", f"{share:.0%}", memory]


def matrix_rate(given: argparse.Namespace) -> float:
    """Additions and multiplications a second of a large matrix product."""
    size = 8192 if given.device.startswith("cuda") else 1024
    x = torch.randn(size, size, device=given.device, dtype=(
        torch.bfloat16 if given.precision == "bf16" else torch.float32))
    seconds = repeat(lambda: (x @ x, wait(given.device)), number=4, repeat=5)
    return 4 * 2 * size**3 / min(seconds)


# Other defaults on a GPU, to which `mini` is too little work.
ON_GPU = {"encoder": ["bert-base"], "only": [*OURS, "epoch"], "steps": 50, "sentences": 20_000}


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = Parser(prog="bench.py", description="Measure speed and memory here.")
    top.add_argument("--encoder", nargs="+", default=["mini", "bert-base"],
                     help="mini, bert-base (random weights), folders or Hub ids [mini bert-base]")
    top.add_argument("--only", nargs="+", choices=[*OURS, "methods", "epoch"],
                     default=[*OURS], help="lines to measure [all but methods and epoch]")
    top.add_argument("--data", type=Path, help="folder with wiki1m and senteval/ [built-in docs]")
    top.add_argument("--precision", choices=["fp32", "bf16"], help="number format of `same` [auto]")
    top.add_argument("--device", default="auto", help="device: auto, cpu, cuda [auto]")
    for name, default, text in (
            ("--batch-size", 64, "sentences of a batch"), ("--turns", 3, "turns of each library"),
            ("--max-tokens", 32, "tokens of a sentence, if `same`"),
            ("--steps", 4, "steps of training in a turn"),
            ("--sentences", 1000, "sentences to train on and encode"),
            ("--threads", torch.get_num_threads(), "processor threads")):
        top.add_argument(name, type=count, default=default, help=f"{text} [{default}]")
    if top.parse_args(argv).device.startswith("cuda"):
        top.set_defaults(**ON_GPU)
    return top.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    given = parse(argv)
    with exits(2):
        device = pick_device(given.device)
    given.device = str(device)
    given.precision = given.precision or ("bf16" if wants_bf16("auto", device) else "fp32")
    torch.set_num_threads(given.threads)
    machine = environment(device)
    print(f"{machine['gpu' if device.type == 'cuda' else 'processor']}, {given.threads} thread(s), "
          f"torch {machine['torch']}, {given.precision}, batches of {given.batch_size}.\n")
    with tempfile.TemporaryDirectory() as folder, exits(3):
        corpus = Path(folder) / "sentences.txt"
        lines = (read_lines(data_file(data.CORPORA["wiki1m"], given.data)) if given.data
                 else doc_sentences())
        write_text(corpus, "".join(line.strip() + "\n" for line in islice(lines, given.sentences)))
        tasks = [Task("train", True, make_encoder(name, Path(folder)), corpus, given)
                 for name in given.encoder]
        if {*given.only} & {*OURS}:
            head = ["sentences (pairs) a second", "encoder", "mincse", "memory",
                    "sentence-transformers", "memory", "ratio"]
            print(markdown([head, *(row_of(line) for task in tasks for line in table_lines(task))]))
        if "methods" in given.only:
            head = ["method", "encoder", "sentences a second", "memory", "time against simcse's"]
            print(markdown([head, *(method_row(name, task) for task in tasks for name in TIMED)]))
        if "epoch" in given.only:
            head = ["batch", "encoder", "sentences a second", "a million", "of matrix rate",
                    "memory"]
            rows = [epoch_row(size, task) for task in tasks for size in (64, 512)]
            print(markdown([head, *rows]))


if __name__ == "__main__":
    try:
        sys.exit(program(main))
    except EOFError:
        sys.exit("bench.py: one of the measured processes ended early; its message is above")
