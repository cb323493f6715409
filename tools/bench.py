"""
How fast is it here?

    python -m tools.bench                            # a Markdown table in some minutes
    python -m tools.bench --data FOLDER              # on Wikipedia, with the seven STS tasks
    python -m tools.bench --device cuda --encoder bert-base --only train --batch-size 512 --steps 50
    python -m tools.bench --only methods --encoder mini    # a step of each paper beside SimCSE's

Beside sentence-transformers and its SimCSE recipe where that is installed (with `datasets` and
`accelerate`, which its trainer needs): same weights, [CLS] pooling, sentences, batch size, threads.
Each library has a process of its own, so that the peak of memory is its own, and the two take
turns, so that a machine that is busy for a while slows both. A time is the median of its turns,
a ratio that of two medians.

    same     both in `--precision`, both cut at `--max-tokens`
    usual    what each does if told the batch size only: precision auto and 32 tokens here, float32
             and as many tokens as the encoder has positions there
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import torch

import data
import mincse
from engine.docs import doc_sentences
from engine.encoders import read_config, save
from engine.flags import count, exits, pick_device, wants_bf16
from engine.hub import data_file, encoder_folder
from engine.pieces import peak_memory
from engine.run_folder import environment
from engine.texts import read_lines
from eval_sts import Encode, open_encoder, read_test
from model import Encoder, SentenceEncoder, encode
from papers import METHODS

ROOT = Path(__file__).parent.parent
# Shapes with random weights and the vocabulary of `mini`: the speed is that of trained ones.
SHAPES = {"bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                        "intermediate_size": 3072}}
Turn = Callable[[], None]             # ends the turn: its time is taken, the other side plays


@dataclass(frozen=True)
class Task:
    """What is measured: a line of the table, for both libraries."""
    what: str                                                     # train, encode or evaluate
    usual: bool                                                   # told the batch size only
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


# ---- ours: each returns the sentences, or pairs, of a turn ----------------------------------

def train_ours(task: Task, turn: Turn) -> int:
    given = task.given
    own = {} if task.usual else {"max_tokens": given.max_tokens, "precision": given.precision}
    inputs = mincse.read_inputs(own | task.settings | {
        "encoder": str(task.encoder), "corpus": str(task.corpus), "batch_size": given.batch_size,
        "steps": given.steps * (given.turns + 1), "device": given.device})
    job = mincse.build(inputs, inputs.config)
    job.method.prepare(job.encode)
    loop = mincse.steps_of(job, mincse.batches_by_round(job, first=1), first=1)

    def work():
        for _ in range(given.steps):                              # nothing of a step is kept
            next(loop)

    task.repeat(work, turn)
    return given.steps * given.batch_size


def encode_ours(task: Task, turn: Turn) -> int:
    task.repeat(partial(encoder_of(task), task.sentences), turn)
    return len(task.sentences)


def evaluate_ours(task: Task, turn: Turn) -> int:
    # Without alignment and uniformity, which theirs does not tell.
    test = replace(read_test("sts", task.given.data), geometry_of={})
    task.repeat(partial(test.score, encoder_of(task)), turn)
    return sum(len(pairs) for subsets in test.tasks.values() for pairs in subsets.values())


def encoder_of(task: Task) -> Encode:
    """N sentences -> (N, D), as `eval_sts.py` encodes them."""
    model, tokenizer = open_encoder(task.encoder)
    return partial(encode, model.to(task.given.device), tokenizer,
                   batch_size=task.given.batch_size, max_tokens=task.given.max_tokens,
                   precision=torch.bfloat16 if task.given.precision == "bf16" else torch.float32)


# ---- theirs ---------------------------------------------------------------------------------

def model_of(task: Task):
    """The same weights as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(task.encoder), device=task.given.device)
    if not task.usual:
        model.max_seq_length = task.given.max_tokens
    if task.what != "train" and task.given.precision == "bf16":
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


OURS = {"train": train_ours, "encode": encode_ours, "evaluate": evaluate_ours}
THEIRS = {"train": train_theirs, "encode": encode_theirs, "evaluate": evaluate_theirs}


# ---- taking turns ---------------------------------------------------------------------------

def play(pipe, work: Callable, task: Task) -> None:
    """A process of its own: sends the seconds of each stretch, waits for its turn before the next.

    The first stretch is loading and warming up. At the end come peak memory and what `work`
    returns.
    """
    torch.set_num_threads(task.given.threads)
    sys.stdout = sys.stderr                                       # the table stays alone there
    started = time.perf_counter()

    def turn():
        nonlocal started
        if task.given.device == "cuda":
            torch.cuda.synchronize()                              # launched is not yet computed
        pipe.send(time.perf_counter() - started)
        pipe.recv()
        started = time.perf_counter()

    sentences = work(task, turn)
    pipe.send((peak_memory(torch.device(task.given.device)), sentences))


def compare(turns: int, *sides: tuple[Callable, Task]) -> list[tuple[float, str, int | None]]:
    """Seconds of a turn, peak memory, sentences: of pieces of work, turn about: A B A B ..."""
    context, pipes = multiprocessing.get_context("spawn"), []
    for work, task in sides:
        pipe, end = context.Pipe()
        context.Process(target=play, args=(end, work, task), daemon=True).start()
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


# ---- the table ------------------------------------------------------------------------------

def make_encoder(name: str, folder: Path) -> Path:
    """`mini` with [CLS] pooling in float32, or a shape with random weights."""
    made = folder / Path(name).name
    if name not in SHAPES:
        save(open_encoder(encoder_folder(name), pooling="cls")[0], made)
        return made
    made.mkdir()
    shape = json.loads((ROOT / "mini" / "config.json").read_text()) | SHAPES[name]
    (made / "config.json").write_text(json.dumps(shape))
    shutil.copy(ROOT / "mini" / "tokenizer.json", made)
    save(SentenceEncoder(Encoder(read_config(made)), pooling="cls"), made)
    return made


def write_corpus(given: argparse.Namespace, path: Path) -> Path:
    """The first sentences of Wikipedia, or the built-in ones."""
    lines = (read_lines(data_file(data.CORPORA["wiki1m"], given.data)) if given.data
             else doc_sentences())
    path.write_text("".join(line.strip() + "\n" for line in islice(lines, given.sentences)))
    return path


def lines_of_table(task: Task) -> Iterator[Task]:
    """What the first table has a line for."""
    for what, usual in (("train", True), ("train", False), ("encode", False), ("evaluate", False)):
        # On 26,126 sentences a large shape would be busy for most of an hour.
        small = task.given.data and task.encoder.name not in SHAPES
        if what in task.given.only and (what != "evaluate" or small):
            yield replace(task, what=what, usual=usual)


COLUMNS = ["sentences (pairs) a second", "encoder", "mincse", "memory", "sentence-transformers",
           "memory", "ratio"]


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
METHOD_COLUMNS = ["method", "encoder", "sentences a second", "memory", "time against simcse's"]


def method_row(name: str, task: Task) -> list[str]:
    """A paper's steps beside SimCSE's; its work before the first step is not in the turns."""
    settings = {"method": name}
    if hasattr(METHODS[name].Config, "teacher"):
        settings["teacher"] = str(task.encoder)
    (its, memory, sentences), (plain, *_) = compare(
        task.given.turns, (train_ours, replace(task, settings=settings)), (train_ours, task))
    return [name, task.encoder.name, f"{sentences / its:.0f}", memory, f"{its / plain:.2f}"]


def print_table(head: list[str], rows: Iterable[list[str]]) -> None:
    """Line by line, as they are measured."""
    for cells in chain([head, ["---", "---", *["--:"] * (len(head) - 2)]], rows):
        print("| " + " | ".join(cells) + " |", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = argparse.ArgumentParser(prog="bench.py", description="Measure speed and memory here.")
    top.add_argument("--encoder", nargs="+", default=["mini", "bert-base"],
                     help="mini, bert-base (random weights), a folder or a Hub id [mini bert-base]")
    top.add_argument("--only", nargs="+", choices=[*OURS, "methods"], default=[*OURS],
                     help="[all but methods]")
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
    given = parse(argv)
    with exits(2):
        device = pick_device(given.device)
    given.device = device.type
    given.precision = given.precision or ("bf16" if wants_bf16("auto", device) else "fp32")
    torch.set_num_threads(given.threads)
    machine = environment()
    print(f"{machine['gpu'] if device.type == 'cuda' else machine['processor']}, {given.threads} "
          f"thread(s), torch {machine['torch']}, {given.precision}, batches of "
          f"{given.batch_size}.\n")
    with tempfile.TemporaryDirectory() as folder, exits(3):
        corpus = write_corpus(given, Path(folder) / "sentences.txt")
        tasks = [Task("train", True, make_encoder(name, Path(folder)), corpus, given)
                 for name in given.encoder]
        if {*given.only} & {*OURS}:
            print_table(COLUMNS, (row_of(line) for task in tasks for line in lines_of_table(task)))
        if "methods" in given.only:
            print_table(METHOD_COLUMNS, (method_row(name, task) for task in tasks
                                         for name in TIMED))


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        sys.exit("bench.py: one of the measured processes ended early; its message is above")
