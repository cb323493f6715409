"""
How fast is it here?

    python bench.py                              # a Markdown table in some minutes
    python bench.py --data FOLDER                # on Wikipedia, with the seven STS tasks
    python bench.py --device cuda --encoder bert-base --only train --batch-size 512 --steps 50
    python bench.py --only methods --encoder mini    # a step of each paper beside one of SimCSE

Beside sentence-transformers and its SimCSE recipe where that is installed (with `datasets` and
`accelerate`, which its trainer needs): same weights, [CLS] pooling, sentences, batch size, threads.
Each library has a process of its own, so that the peak of memory is its own, and the two take
turns, so that a machine that is busy for a while slows both. A figure is the median of its turns,
a ratio that of two medians.

    same     both in `--precision`, both cut at `--max-tokens`
    usual    what each does if told the batch size only: precision auto and 32 tokens here, float32
             and as many tokens as the encoder has positions there

The share is that of the machine's matrix rate: FLOPs of matrix products, as torch counts them in
ours, per second, over the FLOP/s of one large product in that precision.
Only functions that a run uses are measured; there is no second training loop here.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import mincse
import runs
from docs import doc_sentences
from eval_sts import count, exits, open_encoder, pick_device, read_test
from folders import read_config, save
from inputs import wants_bf16
from model import Encoder, SentenceEncoder, encode
from papers import METHODS

ROOT = Path(__file__).parent
# Shapes with random weights and the vocabulary of `mini`: the speed is that of trained ones.
SHAPES = {"bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                        "intermediate_size": 3072}}
Turn = Callable[[], None]
# What both are given: the command line's values; of a line of the table, `what` (a name in OURS),
# `usual`, `settings` of training, `encoder` (a folder), `corpus` (a file of one sentence a line).
Task = argparse.Namespace


def sentences_of(task: Task) -> list[str]:
    return list(data.read_corpus(str(task.corpus)).columns[0])


# ---- ours -----------------------------------------------------------------------------------
# Each calls `turn` after warming up and after every turn; ours return how many sentences and FLOPs
# that is.

def train_ours(task: Task, turn: Turn) -> tuple[int, int]:
    given = {} if task.usual else {"max_tokens": task.max_tokens, "precision": task.precision}
    inputs = mincse.read_inputs(given | task.settings | {
        "encoder": str(task.encoder), "corpus": str(task.corpus), "batch_size": task.batch_size,
        "steps": task.steps * (task.turns + 1) + 1, "device": task.device})
    job = mincse.build(inputs, inputs.config)
    mincse.prepare(job)
    loop = mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1)
    for _ in range(task.turns + 1):
        for _ in range(task.steps):
            next(loop)
        turn()
    return task.steps * task.batch_size, task.steps * flops_of(partial(next, loop))


def encode_ours(task: Task, turn: Turn) -> tuple[int, int]:
    vectors_of, texts = encoder_of(task), sentences_of(task)
    for _ in range(task.turns + 1):
        vectors_of(texts)
        turn()
    return len(texts), flops_of(partial(vectors_of, texts))


def evaluate_ours(task: Task, turn: Turn) -> tuple[int, int]:
    # Without alignment and uniformity, which theirs does not tell.
    vectors_of, test = encoder_of(task), replace(read_test("sts", task.data), geometry_of={})
    vectors_of(sentences_of(task)[:256])
    turn()
    for _ in range(task.turns):
        test.score(vectors_of)
        turn()
    pairs = sum(len(pairs) for subsets in test.tasks.values() for pairs in subsets.values())
    return pairs, 0                                               # counting would take as long


def encoder_of(task: Task) -> Callable:
    """N sentences -> (N, D), as `eval_sts.py` encodes them."""
    model, tokenizer = open_encoder(task.encoder)
    return partial(encode, model.to(task.device), tokenizer, batch_size=task.batch_size,
                   max_tokens=task.max_tokens,
                   precision=torch.bfloat16 if task.precision == "bf16" else torch.float32)


def flops_of(work: Callable) -> int:
    """The matrix products of one call, as torch counts them: two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# ---- theirs ---------------------------------------------------------------------------------

def model_of(task: Task):
    """The same weights as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(task.encoder), device=task.device)
    if not task.usual:
        model.max_seq_length = task.max_tokens
    if task.what != "train" and task.precision == "bf16":
        model.bfloat16()
    return model


def train_theirs(task: Task, turn: Turn) -> None:
    """Their recipe of unsupervised SimCSE: every sentence with itself, in-batch negatives."""
    from datasets import Dataset
    from sentence_transformers import (SentenceTransformerTrainer as Trainer,
                                       SentenceTransformerTrainingArguments as Arguments)
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_end(self, _, state, *__, **___):
            if state.global_step % task.steps == 0:
                turn()

    model, texts = model_of(task), sentences_of(task)
    with tempfile.TemporaryDirectory() as folder:
        arguments = Arguments(
            folder, per_device_train_batch_size=task.batch_size, report_to="none",
            max_steps=task.steps * (task.turns + 1), use_cpu=task.device == "cpu",
            bf16=task.precision == "bf16" and not task.usual, dataloader_drop_last=True,
            save_strategy="no", disable_tqdm=True)
        Trainer(model, arguments, train_dataset=Dataset.from_dict({"a": texts, "b": texts}),
                loss=MultipleNegativesRankingLoss(model), callbacks=[Turns()]).train()


def encode_theirs(task: Task, turn: Turn) -> None:
    model, texts = model_of(task), sentences_of(task)
    for _ in range(task.turns + 1):
        model.encode(texts, batch_size=task.batch_size, show_progress_bar=False)
        turn()


def evaluate_theirs(task: Task, turn: Turn) -> None:
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator as Evaluator
    model, tasks = model_of(task), read_test("sts", task.data).tasks
    tests = [Evaluator(*zip(*sum(subsets.values(), [])), batch_size=task.batch_size,
                       write_csv=False) for subsets in tasks.values()]
    model.encode(sentences_of(task)[:256], show_progress_bar=False)
    turn()
    for _ in range(task.turns):
        for test in tests:
            test(model)
        turn()


OURS = {"train": train_ours, "encode": encode_ours, "evaluate": evaluate_ours}
THEIRS = {"train": train_theirs, "encode": encode_theirs, "evaluate": evaluate_theirs}


# ---- taking turns ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Figures:
    """What one library needed."""
    seconds: float                                                # of a turn, the median
    memory: str                                                   # the peak of its process
    done: tuple[int, int] | None                                  # sentences and FLOPs of a turn


def play(pipe, work: Callable, task: Task) -> None:
    """A process of its own: sends the seconds of each stretch, waits for its turn before the next.

    The first stretch is loading and warming up.
    """
    torch.set_num_threads(task.threads)
    sys.stdout = sys.stderr                                       # the table stays alone there
    started = time.perf_counter()

    def turn():
        nonlocal started
        finish(task.device)
        pipe.send(time.perf_counter() - started)
        pipe.recv()
        started = time.perf_counter()

    done = work(task, turn)
    pipe.send((mincse.peak_memory(torch.device(task.device)), done))


def finish(device: str) -> None:
    """On a GPU, what was launched is not yet computed."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(*sides: tuple[Callable, Task]) -> list[Figures]:
    """Several pieces of work, turn about: A B A B ..."""
    context, players = multiprocessing.get_context("spawn"), []
    for work, task in sides:
        pipe, end = context.Pipe()
        process = context.Process(target=play, args=(end, work, task), daemon=True)
        process.start()
        end.close()                                               # or a dead one is waited for
        players.append((pipe, process))
    seconds = [[pipe.recv()] for pipe, _ in players]              # both are ready
    for _ in range(sides[0][1].turns):
        for taken, (pipe, _) in zip(seconds, players):
            pipe.send("go")
            taken.append(pipe.recv())
    figures = []
    for taken, (pipe, process) in zip(seconds, players):
        pipe.send("end")
        figures.append(Figures(statistics.median(taken[1:]), *pipe.recv()))
        process.join()
    return figures


def they_are_here(what: str) -> bool:
    needed = ["sentence_transformers"] + ["datasets", "accelerate"] * (what == "train")
    return all(find_spec(package) for package in needed)


# ---- what needs one process only ------------------------------------------------------------

def import_seconds(module: str) -> float:
    """In a fresh interpreter, its own start left out."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                                capture_output=True, text=True).stdout)


def import_line(turns: int) -> str:
    taken = [(import_seconds("torch"), import_seconds("mincse")) for _ in range(turns)]
    torchs, ours = map(statistics.median, zip(*taken))
    return f"`import mincse`: {ours:.2f} s, `import torch`: {torchs:.2f} s, {ours / torchs:.2f} x"


def corpus_line(name: str, folder: Path | None) -> str:
    started = time.perf_counter()
    rows = len(data.read_corpus(name, folder))
    seconds = time.perf_counter() - started
    return f"corpus `{name}`: {rows:,} sentences read in {seconds:.1f} s"


def matrix_rate(device: str, precision: str) -> float:
    """FLOP/s of one large product: what a step of nothing but matrix products would reach."""
    size = 8192 if device == "cuda" else 2048
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, taken = torch.randn(size, size, device=device, dtype=kind), []
    for _ in range(12):
        started = time.perf_counter()
        a @ a
        finish(device)
        taken.append(time.perf_counter() - started)
    return 2 * size**3 / min(taken)                               # what disturbs only slows


# ---- the table ------------------------------------------------------------------------------

def make_encoder(name: str, folder: Path) -> Path:
    """`mini` with [CLS] pooling in float32, or a shape with random weights."""
    made = folder / Path(name).name
    if name not in SHAPES:
        save(open_encoder(data.encoder_folder(name), pooling="cls")[0], made)
        return made
    settings = json.loads((ROOT / "mini" / "config.json").read_text()) | SHAPES[name]
    files = {"config.json": json.dumps(settings).encode(),
             "tokenizer.json": (ROOT / "mini" / "tokenizer.json").read_bytes()}
    made.mkdir()
    (made / "config.json").write_bytes(files["config.json"])
    save(SentenceEncoder(Encoder(read_config(made)), pooling="cls", files=files), made)
    return made


def write_corpus(args: argparse.Namespace, path: Path) -> Path:
    """The first sentences of Wikipedia, or the built-in ones."""
    lines = (data.read_lines(data.data_file(data.CORPORA["wiki1m"], args.data)) if args.data
             else doc_sentences())
    path.write_text("".join(line.strip() + "\n" for line in islice(lines, args.sentences)))
    return path


def row_of(task: Task, rate: float) -> list[str]:
    """A line of the table, measured; without the other library its columns are missing."""
    works = [OURS, THEIRS] if they_are_here(task.what) else [OURS]
    ours, *others = compare(*((work[task.what], task) for work in works))
    sentences, flops = ours.done
    row = [f"{task.what}, {'usual' if task.usual else 'same'}", task.encoder.name,
           f"{sentences / ours.seconds:.0f}",
           f"{flops / ours.seconds / rate:.0%}" if flops else "-", ours.memory]
    return row + [cell for theirs in others for cell in (
        f"{sentences / theirs.seconds:.0f}", theirs.memory,
        f"{theirs.seconds / ours.seconds:.2f}")]


COLUMNS = ["sentences (pairs) a second", "encoder", "mincse", "share", "memory",
           "sentence-transformers", "memory", "ratio"]


def method_row(name: str, task: Task) -> list[str]:
    """A paper's steps beside SimCSE's; its work before the first step is not in the turns."""
    settings = {"method": name}
    if METHODS[name].reads_teacher:
        settings["teacher"] = str(task.encoder)
    its, plain = compare((train_ours, Task(**vars(task) | {"settings": settings})),
                         (train_ours, task))
    return [name, task.encoder.name, f"{its.done[0] / its.seconds:.0f}", its.memory,
            f"{its.seconds / plain.seconds:.2f}"]


# Those that read plain sentences, and need no head that the measured folders lack (diffcse's).
TIMED = [name for name in METHODS
         if name not in ("infocse", "diffcse", "core-tuning", "fedrcl", "pnr")]
METHOD_COLUMNS = ["method", "encoder", "sentences a second", "memory", "time against simcse's"]


def print_table(head: list[str], rows: Iterator[list[str]]) -> None:
    """Line by line, as they are measured; what was not is a dash."""
    for cells in chain([head, ["---", "---", *["--:"] * (len(head) - 2)]], rows):
        cells = [*cells, *["-"] * (len(head) - len(cells))]
        print("| " + " | ".join(cells) + " |", flush=True)


def lines_of(task: Task) -> Iterator[Task]:
    """What the first table has a line for."""
    for what, usual in (("train", True), ("train", False), ("encode", False), ("evaluate", False)):
        # On 26,126 sentences a large shape would be busy for most of an hour.
        small = task.data and task.encoder.name not in SHAPES
        if what in task.only and (what != "evaluate" or small):
            yield Task(**vars(task) | {"what": what, "usual": usual})


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = argparse.ArgumentParser(description="Measure speed and memory on this machine.")
    top.add_argument("--encoder", nargs="+", default=["mini", "bert-base"],
                     help="mini, bert-base (random weights), a folder or a Hub id [mini bert-base]")
    top.add_argument("--only", nargs="+", choices=["import", "corpus", *OURS, "methods"],
                     default=["import", "corpus", *OURS], help="[all but methods]")
    top.add_argument("--data", type=Path, help="folder with wiki1m and senteval/ [built-in docs]")
    top.add_argument("--batch-size", type=count, default=64, help="[64]")
    top.add_argument("--max-tokens", type=count, default=32, help="where both cut, if `same` [32]")
    top.add_argument("--precision", choices=["fp32", "bf16"], help="of both, if `same` [auto]")
    top.add_argument("--device", default="auto", help="auto, cpu, cuda [auto]")
    top.add_argument("--threads", type=count, default=torch.get_num_threads(), help="[all]")
    top.add_argument("--turns", type=count, default=3, help="of each library [3]")
    top.add_argument("--steps", type=count, default=4, help="of training in a turn [4]")
    top.add_argument("--sentences", type=count, default=1000, help="to train on and encode [1000]")
    return top.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    args.device = device.type
    args.precision = args.precision or ("bf16" if wants_bf16("auto", device) else "fp32")
    torch.set_num_threads(args.threads)
    machine, rate = runs.environment(), matrix_rate(args.device, args.precision)
    print(f"{machine['gpu'] if device.type == 'cuda' else machine['processor']}, {args.threads} "
          f"thread{'s' * (args.threads > 1)}, torch {machine['torch']}, {args.precision}: "
          f"{rate / 1e12:.2f} TFLOP/s in a large matrix product. Batches of {args.batch_size}.\n")
    if "import" in args.only:
        print(import_line(args.turns))
    if "corpus" in args.only:
        print(corpus_line("wiki1m" if args.data else "docs", args.data))
    print()
    with tempfile.TemporaryDirectory() as folder, exits(3):
        corpus = write_corpus(args, Path(folder) / "sentences.txt")
        tasks = [Task(**vars(args) | {"encoder": make_encoder(name, Path(folder)),
                                      "corpus": corpus, "usual": True, "settings": {}})
                 for name in args.encoder]
        if {*args.only} & {*OURS}:
            print_table(COLUMNS, (row_of(line, rate) for task in tasks for line in lines_of(task)))
        if "methods" in args.only:
            print_table(METHOD_COLUMNS, (method_row(name, task) for task in tasks
                                         for name in TIMED))


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        sys.exit("bench.py: one of the measured processes ended early; its message is above")
