"""
mincse: train a sentence encoder with one command, and score it honestly.

    python mincse.py                                  # built-in encoder, corpus and test: minutes
    python mincse.py --encoder bert-base-uncased --corpus wiki1m --test sts      # SimCSE's Table 5

Read `train` first: it is the algorithm box, and all the rest serves it.

    config.py     what can be set               inputs.py    what is read and built from it
    methods.py    views and loss of a paper     model.py     encoder, poolings, heads
    data.py       texts, tokens, batches        eval_sts.py  scores
    devices.py    pieces, several devices       runs.py      the folder that a run leaves
    regimes.py    several runs in a row

Order of a run: read everything and check it, score the start, train while the best model by the
dev score is kept on disk, score the best.
"""

import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config as settings
import data
import devices
import regimes
import runs
from config import Config
from devices import Pieces
from eval_sts import Result, exits
from folders import contents, load, save, stage
from inputs import Inputs, Job, build, count_steps, read_inputs
from losses import alignment, cosine, uniformity
from methods import Encoded, SimCSE
from model import MaskedLMHead, SentenceEncoder, encode

LOG_EVERY = 10                        # steps between the lines of metrics.jsonl
DRY_ROWS = 2048                       # rows that a dry run looks at


# ---- the training loop ----------------------------------------------------------------------

@dataclass(frozen=True)
class Batch:
    """V columns of B texts as one block of tokens, and the same masked where that is asked for."""
    ids: Tensor                       # (V·B, T)
    mask: Tensor                      # (V·B, T)
    columns: int                      # V
    rows: Tensor                      # (B,) row numbers in the corpus
    masked: Tensor | None = None      # (V·B, T)
    labels: Tensor | None = None      # (V·B, T)

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device, non_blocking=True)
                 for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def make_batches(method: SimCSE, tokenizer: data.Tokenizer, config: Config, *, steps: int,
                 first: int) -> Iterator[Batch]:
    """The batches of steps first..steps. Each is a function of seed and step: nothing to save."""
    order = row_order(method, config, steps)
    for step, rows in enumerate(islice(order, first - 1, steps), start=first):
        columns = method.views(rows, random.Random(f"{config.seed} {step}"))
        ids, mask = tokenizer([text for column in columns for text in column],
                              max_tokens=config.max_tokens)
        batch = Batch(ids, mask, len(columns), torch.tensor(rows))
        if config.mlm_weight:
            masked, labels = data.mask_tokens(
                ids, mask_id=tokenizer.mask_id, special_ids=tokenizer.special_ids,
                vocab_size=tokenizer.vocab_size, rate=config.mlm_rate,
                generator=torch.Generator().manual_seed(step_seed(config, step)))
            batch = replace(batch, masked=masked, labels=labels)
        yield batch


def row_order(method: SimCSE, config: Config, steps: int) -> Iterator[list[int]]:
    """The rows of every step: those of its round in random order, anew in every pass over them.

    Where the next round has the same rows, their order goes on.
    """
    for rows, rounds in groupby(method.rounds(steps), key=itemgetter(1)):
        count = sum(count for count, _ in rounds)
        epochs = -(-count // (len(rows) // config.batch_size))
        order = data.batches(len(rows), config.batch_size, seed=config.seed, epochs=epochs)
        for places in islice(order, count):
            yield [rows[place] for place in places]


def step_seed(config: Config, step: int) -> int:
    """Dropout and token masks of a step depend on nothing else, so that a resumed run is exact."""
    return config.seed * 1_000_003 + step


def masked_lm_loss(model: SentenceEncoder, lm_head: MaskedLMHead, batch: Batch,
                   pieces: Pieces = Pieces()) -> Tensor:
    """Cross-entropy of the masked tokens, in a second forward pass (SimCSE, section 2)."""
    def surprise(ids: Tensor, mask: Tensor, labels: Tensor) -> list[Tensor]:        # -> (V·B, T)
        asked = labels != -100                                                      # (V·B, T)
        words = lm_head(model.encoder(ids, mask)[-1][asked]).float()
        each = F.cross_entropy(words, labels[asked], reduction="none")
        return [each.new_zeros(mask.shape).masked_scatter(asked, each)]

    [wrong] = pieces(surprise, batch.masked, batch.mask, batch.labels)              # (V·B, T)
    return wrong.sum() / (batch.labels != -100).sum().clamp(min=1)   # none masked: 0, not NaN


def train(parts: nn.ModuleDict, optimizer: torch.optim.Optimizer, batches: Iterator[Batch],
          config: Config, *, steps: int, first: int, device: torch.device, bf16: bool
          ) -> Iterator[tuple[int, Tensor, Encoded]]:
    """Steps first..steps. Yields (step, loss, what was compared); the caller logs and saves."""
    model, method = parts["model"], parts["method"]

    def last_layers(ids: Tensor, mask: Tensor) -> list[Tensor]:   # (V·B, T)s -> (V·B, T, D)s
        return model.layers(ids, mask)[-method.layers_read :]

    for step, batch in enumerate(batches, start=first):
        torch.manual_seed(step_seed(config, step))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - (step - 1) / steps)
        model.train()                                             # the caller may have scored it

        batch = batch.to(device)
        pieces = Pieces(batch.columns, config.micro_batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = pieces(last_layers, batch.ids, batch.mask)   # (V·B, T, D)s
            vectors = model.embed(hidden, batch.mask).float()     # (V·B, D)
            extra = (config.mlm_weight * masked_lm_loss(model, parts["lm_head"], batch, pieces)
                     if config.mlm_weight else 0)
        out = Encoded(list(vectors.chunk(batch.columns)), step, steps, batch.rows, batch.ids,
                      batch.mask, hidden, bf16, pieces)
        loss = method.loss(out) + extra

        optimizer.zero_grad()
        loss.backward()
        devices.average_gradients(parts)
        nn.utils.clip_grad_norm_(parts.parameters(), config.clip)
        optimizer.step()
        yield step, loss.detach(), out


@torch.no_grad()
def figures(out: Encoded) -> dict[str, float]:
    """What the batch looked like to the loss: on embeddings with dropout and the training head."""
    if len(out.columns) == 1:                                     # labels instead of positives
        return {"uniformity": uniformity(out.anchor).item()}
    likeness = cosine(out.anchor, out.positive)                   # (B, B)
    own = likeness.diagonal()
    others = (likeness.sum() - own.sum()) / (likeness.numel() - len(own))
    return {"alignment": alignment(out.anchor, out.positive).item(),
            "uniformity": uniformity(out.anchor).item(), "positive_cosine": own.mean().item(),
            "lowest_positive_cosine": own.min().item(), "negative_cosine": others.item()}


# ---- a run ----------------------------------------------------------------------------------

class Stop:
    """Remembers the first SIGINT or SIGTERM, so that the step in progress can end and be saved."""

    def __init__(self):
        self.signal = 0

    def __call__(self, number: int, frame) -> None:
        if self.signal and devices.world() == 1:                  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def listening(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


def batches_by_round(job: Job, *, first: int) -> Iterator[Batch]:
    """The batches of steps first.. made early, but none of a round before its `refresh`.

    A run that goes on in the middle of a round finds what `refresh` left in its state.
    """
    method, tokenizer, begin = job.parts["method"], job.inputs.tokenizer, 1
    for count, rows in method.rounds(job.steps):
        end = begin + count                                       # the next round's first step
        if 1 < begin and first <= begin:
            method.refresh(job.encode, rows)
            devices.equalize(method)
        if first < end:
            now = max(first, begin)
            batches = make_batches(method, tokenizer, job.config, steps=job.steps, first=now)
            yield from data.ahead(islice(batches, end - now))
        begin = end


def fit(job: Job, folder: Path, state: runs.State, stop: Stop) -> runs.State:
    """Train to the end or to a signal; the best model so far is always on disk in `folder`."""
    log = runs.Log(folder, job.config.batch_size)
    loop = steps_of(job, batches_by_round(job, first=state.step + 1), first=state.step + 1)
    bar = tqdm(loop, total=job.steps, initial=state.step, disable=None, unit="step")
    for step, loss, out in bar:
        state = devices.once(keep_books, job, log, replace(state, step=step), loss, out)
        bar.set_postfix(log.shown, refresh=False)
        if number := devices.highest(stop.signal):                # whichever process was asked
            stop.signal = number
            devices.once(save_sound_state, job, log, state)
            break
    return state


def steps_of(job: Job, batches: Iterator[Batch], *, first: int
             ) -> Iterator[tuple[int, Tensor, Encoded]]:
    """The training loop of a job, on whatever devices it has."""
    loop = train(job.parts, job.optimizer, batches, job.config, steps=job.steps, first=first,
                 device=job.inputs.device, bf16=job.bf16)
    return devices.within_memory(loop, job.config)


def keep_books(job: Job, log: runs.Log, state: runs.State, loss: Tensor, out: Encoded
               ) -> runs.State:
    """After a step, where it is time for it: a score, a line in the log, a saved state."""
    step, scores = state.step, {}
    log.add(loss, step=step, rows=out.rows, learning_rate=job.optimizer.param_groups[0]["lr"])
    due = step % job.config.dev_every == 0 or step == job.steps
    if not (due or step % LOG_EVERY == 0):
        return state
    log.check(job.inputs.corpus)                                  # before anything is saved
    if due:
        with log.paused():
            state, scores = keep_best(job, log.folder, state)
    log.line(step, figures(out) | job.parts["method"].logs() | scores)
    log.warn_of_collapse(job.steps)
    if due:
        save_sound_state(job, log, state)
    return state


def save_sound_state(job: Job, log: runs.Log, state: runs.State) -> None:
    """No state after a loss that was no number: a run that goes on from it is lost."""
    log.check(job.inputs.corpus)
    with log.paused():
        runs.save_state(log.folder, state, job.parts, job.optimizer)


def keep_best(job: Job, folder: Path, state: runs.State) -> tuple[runs.State, dict]:
    """Score on dev; a better model is staged, until the state is saved. Without dev, any is."""
    if job.inputs.dev is None:
        stage(contents(job.model), runs.waiting(folder, state.step))
        return replace(state, best_step=state.step), {}
    result = job.inputs.dev.score(job.encode)
    score, figures = result.scores["avg"], {"dev": result.scores, "dev_geometry": result.geometry}
    if state.best_step and not score > state.best:
        return state, figures
    stage(contents(job.model), runs.waiting(folder, state.step))
    return replace(state, best=score, best_step=state.step), figures


def take_up(inputs: Inputs, config: Config, folder: Path, options: dict
            ) -> tuple[Job, runs.State, dict | None]:
    """One seed's job and where its folder says that it is, and its results if it has ended."""
    with exits(3):
        job, sources = build(inputs, config), runs.sources(inputs)
        before = runs.started(folder) if options["resume"] else None
    with exits(2):
        devices.once(runs.claim, folder, config, sources, before, resume=options["resume"],
                     overwrite=options["overwrite"])
    with exits(3):
        if done := runs.finished(folder):                         # killed just before, state stands
            devices.once(runs.drop_state, folder, keep=options["keep_state"])
            return job, runs.State(), done
        state = runs.load_state(folder, job.parts, job.optimizer)
    devices.once(runs.clear_after, folder, state or runs.State())
    if state is None:
        devices.once(runs.describe, folder, config, sources, command(), inputs.doctor)
        start = inputs.known.get("start") or devices.once(score_start, job)
        state = runs.State(before=asdict(start))
        prepare(job)
    return job, state, None


def run(inputs: Inputs, config: Config, folder: Path, options: dict) -> dict:
    """One seed from start to finish. Returns its results; runs.py says what it leaves."""
    job, state, done = take_up(inputs, config, folder, options)
    if done:
        return done
    with Stop().listening() as stop:
        if state.step < job.steps:
            state = fit(job, folder, state, stop)
    if stop.signal:
        print(f"mincse.py: stopped at step {state.step} of {job.steps}, state saved in {folder}; "
              f"go on with:\n  {command()} --resume", file=sys.stderr)
        raise SystemExit(128 + stop.signal)
    return devices.once(finish, job, folder, state, keep_state=options["keep_state"])


def prepare(job: Job) -> None:
    """Before the first step; of several processes each does it, and has the same to the bit."""
    method, known = job.parts["method"], job.inputs.known
    if "prepared" in known:
        method.load_state_dict(known["prepared"])
    else:
        method.prepare(job.encode, job.config.seed)
    if method.static:
        known["prepared"] = method.state_dict()
    devices.equalize(method)


def score_start(job: Job) -> Result:
    """The encoder as it was given: same pooling, no head, since that knows nothing yet."""
    head, job.model.head = job.model.head, None
    result = job.inputs.test.score(job.encode)
    job.model.head = head
    return result


def run_stages(inputs: Inputs, config: Config, folder: Path, options: dict) -> dict:
    """One seed of a regime: several runs, one after the other, each a step of this one."""
    regime = regimes.of(config)
    job, state, done = take_up(inputs, config, folder, options)
    if done:
        return done
    runs.save_state(folder, state, job.parts, job.optimizer)
    for row in regime.stages(job, partial(run_stage, folder), first=state.step + 1):
        state, scores = keep_best(job, folder, replace(state, step=state.step + 1))
        runs.add_line(folder, {"step": state.step, **row, **scores})
        runs.save_state(folder, state, job.parts, job.optimizer)
        shutil.rmtree(folder / runs.STAGES)
    more = regime.report(job, runs.lines(folder))
    return finish(job, folder, state, keep_state=options["keep_state"], more=more)


def run_stage(folder: Path, inputs: Inputs, config: Config, name: str) -> tuple[dict, dict]:
    """A run inside a run: all parts as it left them, and its results with its last loss."""
    folder = folder / runs.STAGES / name
    results = run(inputs, config, folder, {"resume": True, "overwrite": False, "keep_state": True})
    saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return saved["parts"], results | {"loss": runs.lines(folder)[-1]["loss"]}


def finish(job: Job, folder: Path, state: runs.State, *, keep_state: bool,
           more: tuple[str, dict] = ("", {})) -> dict:
    """Score the best model as it lies on disk, and write the results."""
    try:
        best = load(folder).to(job.inputs.device)
        after = job.inputs.test.score(partial(encode, best, job.inputs.tokenizer))
    except Exception as error:
        print(f"mincse.py: trained and saved in {folder}, but the final evaluation failed: {error}"
              f"; try: python eval_sts.py {folder} --test {job.config.test}", file=sys.stderr)
        raise SystemExit(4) from None
    return runs.conclude(folder, job.config, state, after, keep_state=keep_state, more=more)


def command() -> str:
    """This command line, to be typed again, with --resume after it."""
    kept = [arg for arg in sys.argv if arg not in ("--resume", "--overwrite")]
    return f"{devices.launcher()} {shlex.join(kept)}"


def run_all(inputs: Inputs, config: Config, folder: Path, options: dict) -> dict:
    """One seed, in one run or in the several of a regime."""
    return (run_stages if regimes.of(config) else run)(inputs, config, folder, options)


def run_seeds(inputs: Inputs, seeds: list[int], folder: Path, options: dict) -> str:
    """One sub-folder per seed, then the spread over them."""
    results = {}
    for seed in seeds:
        config = replace(inputs.config, seed=seed)
        results[seed] = run_all(inputs, config, folder / f"seed-{seed}", options)
        inputs.known["start"] = runs.start_of(results[seed])
        print(f"seed {seed}: average {results[seed]['test']['avg']:.2f}", file=sys.stderr)
    return devices.once(runs.summarise, folder, inputs.config, results)


# ---- before it gets serious -----------------------------------------------------------------

def dry_run(inputs: Inputs) -> str:
    """Three steps, one dev score, a save and a reload: what can break has broken by then.

    On the first rows only, as some papers look at the whole corpus before the first step.
    """
    config = replace(inputs.config, steps=count_steps(inputs, inputs.config))
    rows = range(min(len(inputs.corpus), max(DRY_ROWS, 4 * config.batch_size)))
    with exits(3):
        job = build(replace(inputs, corpus=regimes.part(inputs.corpus, rows)), config)
    started = time.perf_counter()
    prepare(job)
    stamps = [time.perf_counter()]
    preparing = (stamps[0] - started) * len(inputs.corpus) / len(rows)
    for _, loss, _ in steps_of(job, islice(batches_by_round(job, first=1), 3), first=1):
        loss.item()                                               # waits until the step is done
        stamps.append(time.perf_counter())
    started = time.perf_counter()
    (inputs.dev or inputs.test).score(job.encode)
    scoring = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        save(job.model, Path(folder))
        again = load(Path(folder)).to(inputs.device)
        texts = inputs.corpus.columns[0][:8]
        same = torch.equal(job.encode(texts), encode(again, inputs.tokenizer, texts))
    return plan(job, preparing=preparing, seconds=stamps[-1] - stamps[-2], scoring=scoring,
                reloaded=same)


def plan(job: Job, *, preparing: float, seconds: float, scoring: float, reloaded: bool) -> str:
    """What the run would do, from what three steps took."""
    config = job.config
    scored = -(-job.steps // config.dev_every) if job.inputs.dev else 0
    tokens = job.steps * config.batch_size * min(job.inputs.doctor["mean tokens"],
                                                 config.max_tokens)
    regime = regimes.of(config)
    stages = [f"stages: {regime.count(config)}; below, one on all of {job.inputs.corpus.name}"
              ] if regime else []
    return "\n".join([
        *stages,
        f"steps: {job.steps} of {config.batch_size} rows, at {seconds:.3f} s",
        f"tokens: about {tokens / 1e6:.1f} million per column",
        f"dev scores: {scored}, at {scoring:.1f} s",
        f"before the first step: {preparing / 60:.1f} minutes, by its first rows",
        f"expected time: {(preparing + job.steps * seconds + (scored + 2) * scoring) / 60:.1f} "
        "minutes",
        f"peak memory: {peak_memory(job.inputs.device)}",
        f"saved and reloaded with equal vectors: {'yes' if reloaded else 'NO'}"])


def peak_memory(device: torch.device) -> str:
    """The most that this process held so far, on the device that it computes on."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return "not known on Windows"
    unit = 1 if sys.platform == "darwin" else 1024                # macOS counts in bytes
    return f"{getrusage(RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def announce(inputs: Inputs) -> None:
    """What was read, and what does nothing with it."""
    for doctor in (inputs.doctor, *inputs.doctor.get("later", ())):
        print("\n".join(data.doctor_lines(doctor)), file=sys.stderr)
    if inputs.config.positives.startswith("switch-case") and not inputs.tokenizer.cased:
        print(f"mincse.py: NOTICE: --positives {inputs.config.positives} is off: to the uncased "
              f"tokenizer of {inputs.config.encoder} both cases are the same", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    devices.join()
    given = vars(settings.parser().parse_args(argv))
    options = {name: given.pop(name, False) for name in settings.OPTIONS}
    if options["list"]:
        return print(settings.listing())
    if given.get("threads", 0) > 0:                               # less is refused below
        torch.set_num_threads(given["threads"])
    seeds = given.pop("seeds", None)
    with exits(2):
        if seeds and "seed" in given:
            raise ValueError("--seed and --seeds both say which runs are made: give one of them")
    with devices.first_ahead():
        inputs = read_inputs(given)
    announce(inputs)
    if options["dry_run"]:
        return print(dry_run(inputs))
    folder = Path(inputs.config.out) if inputs.config.out else runs.default_folder(inputs.config)
    if seeds:
        return print(run_seeds(inputs, seeds, folder, options))
    run_all(inputs, inputs.config, folder, options)
    print((folder / "results.md").read_text())


def program(main: Callable[[], None] = main) -> int:
    """main with an exit code for what can happen at any moment."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted outside the training loop; go on with:\n"
              f"  {command()} --resume", file=sys.stderr)
        return 130
    except devices.LostContact as error:
        devices.complain(f"{error}; go on from the last saved state with:\n  {command()} --resume")
        return 1
    except OSError as error:
        devices.complain(f"{error}; what was saved before stands, go on with:\n"
                         f"  {command()} --resume")
        return 1
    except (FloatingPointError, MemoryError) as error:
        devices.complain(str(error))
        return 1
    finally:
        devices.leave()
    return 0


if __name__ == "__main__":
    sys.exit(program())
