"""
mincse: train a sentence encoder with one command, and score it honestly.

    python mincse.py                                  # built-in encoder, corpus and test: minutes
    python mincse.py --encoder bert-base-uncased --corpus wiki1m --test sts      # SimCSE's Table 5

Read `train` first, which is the algorithm, then `run`, which does it once. What a paper changes
stands on its page in papers/. Nothing in engine/ is needed to understand either.
"""

if __name__ == "__main__":
    import engine.interrupt           # noqa: F401  first: Ctrl-C while torch is imported

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

import data
from data import Corpus, Tokenizer, step_seed
from engine import results, run_folder
from engine.doctor import doctor, doctor_text
from engine.encoders import contents, load, save
from engine.flags import (Stop, check_ranges, command, complain, exits, pick_device, program,
                          say_limits, wants_bf16)
from engine.hub import encoder_folder
from engine.pieces import Pieces, within_memory
from engine.rehearsal import rehearse
from engine.run_folder import Log, State
from eval_sts import Encode, Result, StsTest, TwinTest, open_encoder, read_test
from model import SentenceEncoder, encode, places_of, sent
from papers import METHODS, check, parse, refuse_idle
from papers.settings import Config, count_steps, resolve
from papers.simcse import Encoded, SimCSE, measures

LOG_EVERY = 10                        # steps between the lines of metrics.jsonl
SAVE_EVERY = 600                      # seconds between two saves of the state
SEED_STEP = 1000                      # between the seeds of two turns: --seeds 0-4 stay below it
DRY_ROWS = 2048                       # rows that a dry run looks at


# ---- the training loop ----------------------------------------------------------------------

class Batch(NamedTuple):
    """V columns of B texts as one block of tokens."""
    ids: Tensor                       # (V·B, T)
    mask: Tensor                      # (V·B, T)
    places: Tensor                    # (R,) of the real tokens among all V·B·T
    rows: Tensor                      # (B,) row numbers in the corpus
    columns: int                      # V


def train(model: SentenceEncoder, method: SimCSE, optimizer: torch.optim.Optimizer,
          batches: Iterator[Batch], config: Config, *, steps: int, first: int = 1,
          bf16: bool = False) -> Iterator[tuple[int, Tensor, Encoded]]:
    """Take the steps from `first` to `steps`; yields (step, loss, what was compared) of each."""
    device, trained = next(model.parameters()).device, nn.ModuleList([model, method])

    def last_layers(ids: Tensor, mask: Tensor, places: Tensor | None = None) -> list[Tensor]:
        return model.layers(ids, mask, places)[-method.layers_read :]               # (V·B, T, D)s

    for step, batch in enumerate(batches, start=first):
        torch.manual_seed(step_seed(config.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - (step - 1) / steps)
        model.train()                                             # the caller may have scored it

        # One pass encodes all views. Each row draws its own dropout, so that SimCSE's anchor and
        # positive differ although text and weights are the same.
        ids, mask, places, rows = (sent(x, device) for x in batch[:4])
        pieces = Pieces(batch.columns, config.micro_batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = pieces(last_layers, ids, mask, places=places)                  # (V·B, T, D)s
            vectors = model.embed(hidden, mask).float()           # (V·B, D)
        out = Encoded(columns=list(vectors.chunk(batch.columns)), step=step, steps=steps, rows=rows,
                      ids=ids, mask=mask, places=places, hidden=hidden, bf16=bf16, pieces=pieces)
        loss = method.loss(out)

        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), config.clip)
        optimizer.step()
        yield step, loss.detach(), out


def make_batches(method: SimCSE, tokenizer: Tokenizer, config: Config,
                 plan: list[tuple[int, Sequence[int]]], *, first: int = 1) -> Iterator[Batch]:
    """The batches of a plan from step `first` on; seed and step alone decide what is in one."""
    order = data.row_order(plan, config.batch_size, seed=config.seed)
    for step, rows in enumerate(islice(order, first - 1, None), start=first):
        columns = method.views(rows, random.Random(f"{config.seed} {step}"))
        ids, mask = tokenizer([text for column in columns for text in column],
                              max_tokens=config.max_tokens)
        yield Batch(ids, mask, places_of(mask), torch.tensor(rows), len(columns))


# ---- what a run needs -----------------------------------------------------------------------

@dataclass(frozen=True)
class Inputs:
    """Everything that a run reads, checked; all its seeds share it."""
    corpora: list[Corpus]             # one, or several to learn in turn
    tokenizer: Tokenizer
    folder: Path                      # of the encoder
    dev: StsTest | TwinTest | None
    test: StsTest | TwinTest
    config: Config                    # all defaults and recipes filled in
    doctor: dict                      # a report on each corpus, for env.json
    device: torch.device

    @property
    def corpus(self) -> Corpus:
        return self.corpora[0]


def read_inputs(given: dict) -> Inputs:
    """Read and check everything from outside, before the first step."""
    method = METHODS[given.get("method", "simcse")]
    asked = method.Config(**given)
    with exits(2):
        check_ranges(asked)
        device = pick_device(asked.device)
        say_limits(device)
    with exits(3):
        own = Path(asked.data) if asked.data else None
        corpora = [data.read_corpus(name, own) for name in results.names_of(asked.corpus)]
        folder = encoder_folder(asked.encoder)
        model, tokenizer = open_encoder(folder, pooling=given.get("pooling"), head=asked.head)
        config = resolve(method, given, model.config, columns=len(corpora[0].columns), own=model)
        test = read_test(config.test, own)
        dev = None if config.dev == "none" else read_test(config.dev, own, split="dev")
        doctors = [doctor(each, tokenizer, max_tokens=config.max_tokens) for each in corpora]
    with exits(2):
        refuse_idle(given, config)
        check(config, corpora, model.config)
    print(*map(doctor_text, doctors), sep="\n", file=sys.stderr)
    if config.positives.startswith("switch-case") and not tokenizer.cased:
        complain(f"NOTICE: --positives {config.positives} is off: to the uncased tokenizer of "
                 f"{config.encoder} both cases are the same")
    about = doctors[0] | ({"later": doctors[1:]} if doctors[1:] else {})
    return Inputs(corpora, tokenizer, folder, dev, test, config, about, device)


@dataclass(frozen=True)
class Job:
    """All that the training of one seed needs."""
    config: Config
    inputs: Inputs
    model: SentenceEncoder
    method: SimCSE
    optimizer: torch.optim.Optimizer
    steps: int
    bf16: bool

    @property
    def networks(self) -> nn.ModuleDict:
        """Everything that is trained and saved."""
        return nn.ModuleDict({"model": self.model, "method": self.method})

    @property
    def encode(self) -> Encode:
        """Scores are computed in float32, whatever the precision of training."""
        return partial(encode, self.model, self.inputs.tokenizer)

    @property
    def encode_corpus(self) -> Encode:
        """What a method looks at a whole corpus with: in the precision of training."""
        return partial(self.encode, precision=torch.bfloat16 if self.bf16 else torch.float32)


def build(inputs: Inputs, config: Config) -> Job:
    """Model, method and optimizer of one seed, before the first step."""
    torch.manual_seed(config.seed)                                # the head's weights
    model = load(inputs.folder, pooling=config.pooling, dropout=config.dropout)
    method = METHODS[config.method](inputs.corpus, config, model=model)
    if config.head != "own":
        model.head = method.head(model.config.width) if config.head != "none" else None
        model.keep_head = config.head == "keep"
    nn.ModuleList([model, method]).to(inputs.device)
    if config.compile == "yes":
        model.encoder.compile(dynamic=True)                       # texts differ in length
    return Job(config, inputs, model, method, make_optimizer(model, method, config),
               count_steps(config, len(inputs.corpus)), wants_bf16(config.precision, inputs.device))


def make_optimizer(model: SentenceEncoder, method: SimCSE, config: Config) -> torch.optim.AdamW:
    parameters = nn.ModuleList([model, method]).parameters()
    return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, fused=True)


# ---- a run ----------------------------------------------------------------------------------

def run(inputs: Inputs, config: Config, folder: Path, *, resume: bool = False,
        overwrite: bool = False, start: Result | None = None) -> dict:
    """Train and score one seed; `start` is the score of its untrained encoder, where it is known.

    The state is saved before the first step, every ten minutes, after the last step, and when the
    run is asked to stop. A better model waits in a hidden folder; once the new state.pt names its
    step, its files move into place. Each move is atomic: a killed run goes on from a state and a
    model that belong together, on a processor to the bit. results.json is written last.
    """
    with exits(3):
        job, sources = build(inputs, config), run_folder.sources(inputs)
        before = run_folder.started(folder) if resume else None
    with exits(2):
        run_folder.claim(folder, config, sources, before, resume=resume, overwrite=overwrite)
    with exits(3):
        if done := run_folder.finished(folder):
            run_folder.drop_state(folder)                         # it stands if killed just before
            return done
        state = run_folder.load_state(folder, job.networks, job.optimizer)
    run_folder.clear_after(folder, state or State())
    if state is None:
        run_folder.describe(folder, config, sources, command(), inputs.doctor)
        with exits(3):
            state = State(before=asdict(before_training(job, start)))
        run_folder.save_state(folder, state, job.networks, job.optimizer)
    with Stop().listening() as stop:
        state = (fit_turns if job.method.turns else fit)(job, folder, state, stop)
    if stop.signal:
        if not state.best_step:
            save(job.model, folder)                               # the last, as none was chosen
        complain(f"stopped at step {state.step} of {job.method.turns or job.steps}, state saved in "
                 f"{folder}; go on with:\n  {command()} --resume")
        raise SystemExit(128 + stop.signal)
    return finish(job, folder, state)


def before_training(job: Job, start: Result | None) -> Result:
    """Prepare the method and score the encoder, without the head, which knows nothing yet."""
    head, job.model.head = job.model.head, job.model.head if job.config.head == "own" else None
    job.method.prepare(job.encode_corpus)
    start = start or job.inputs.test.score(job.encode)
    job.model.head = head
    return start


def fit(job: Job, folder: Path, state: State, stop: Stop) -> State:
    """Train to the end or to a signal; without dev, the last model is the best."""
    log, config = Log(folder, job.config.batch_size), job.config
    due = time.monotonic() + SAVE_EVERY
    loop = steps_of(job, batches_by_round(job, first=state.step + 1), first=state.step + 1)
    bar = tqdm(loop, total=job.steps, initial=state.step, disable=None, unit="step")
    for step, loss, out in bar:
        state, scores = replace(state, step=step), {}
        log.add(loss, step=step, rows=out.rows, learning_rate=job.optimizer.param_groups[0]["lr"])
        scoring = step % config.dev_every == 0 or step == job.steps
        logging = scoring or step % LOG_EVERY == 0
        saving = stop.signal or step == job.steps or logging and time.monotonic() > due
        if logging or saving:
            log.check(job.inputs.corpus)                          # before anything is saved
        if scoring if job.inputs.dev else saving:
            with log.paused():
                state, scores = keep_best(job, folder, state)
        if logging:
            row = log.line(step, measures(out) | job.method.logs() | scores)
            log.warn_of_collapse(row, job.steps)
            bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
        if saving:
            with log.paused():
                run_folder.save_state(folder, state, job.networks, job.optimizer)
            due = time.monotonic() + SAVE_EVERY
        if saving and stop.signal:                                # else at the next step
            break
    return state


def steps_of(job: Job, batches: Iterator[Batch], *, first: int = 1
             ) -> Iterator[tuple[int, Tensor, Encoded]]:
    """`train` on what a job holds."""
    loop = train(job.model, job.method, job.optimizer, batches, job.config, steps=job.steps,
                 first=first, bf16=job.bf16)
    return within_memory(loop, job.config)


def batches_by_round(job: Job, *, first: int) -> Iterator[Batch]:
    """The batches from step `first` on; those of a round are made when its `refresh` is done.

    A run that goes on in the middle of a round has the result of `refresh` in its state.
    """
    method, plan, begin = job.method, job.method.rounds(job.steps), 1
    for count, rows in plan:
        end = begin + count                                       # the next round's first step
        if 1 < begin and first <= begin:
            method.refresh(job.encode_corpus, rows)
        if first < end:
            now = max(first, begin)
            batches = make_batches(method, job.inputs.tokenizer, job.config, plan, first=now)
            yield from data.ahead(islice(batches, end - now))
        begin = end


def keep_best(job: Job, folder: Path, state: State) -> tuple[State, dict]:
    """Score on dev, if there is one, and let the model wait for the next save if it is better."""
    result = job.inputs.dev.score(job.encode) if job.inputs.dev else None
    score = result.scores["avg"] if result else state.best
    if not state.best_step or not result or score > state.best:
        run_folder.hold_best(folder, contents(job.model), state.step)
        state = replace(state, best_step=state.step, best=score)
    return state, {"dev": result.scores, "dev_geometry": result.geometry} if result else {}


def fit_turns(job: Job, folder: Path, state: State, stop: Stop) -> State:
    """`fit` for a paper that calls `train` in turns (fedrcl, pnr): each counts as one step."""
    try:
        for row in job.method.outer_loop(job, partial(train_on, job, stop), first=state.step + 1):
            state, scores = keep_best(job, folder, replace(state, step=state.step + 1))
            run_folder.add_line(folder, {"step": state.step, **row, **scores})
            run_folder.save_state(folder, state, job.networks, job.optimizer)
    except KeyboardInterrupt:                                     # the turn begins again later
        if not stop.signal:
            raise
    return state


def train_on(job: Job, stop: Stop, rows: Sequence[int], *, number: int, steps: int,
             learning_rate: float) -> float:
    """Train on these rows with a new optimizer and schedule; the mean loss of the steps."""
    config = replace(job.config, seed=job.config.seed + SEED_STEP * number,
                     learning_rate=learning_rate)
    batches = data.ahead(make_batches(job.method, job.inputs.tokenizer, config, [(steps, rows)]))
    turn = replace(job, config=config, steps=steps,
                   optimizer=make_optimizer(job.model, job.method, config))
    losses = []
    for _, loss, _ in tqdm(steps_of(turn, batches), total=steps, disable=None, leave=False):
        losses.append(loss)
        if stop.signal:
            raise KeyboardInterrupt
    return run_folder.mean_loss(losses)


def finish(job: Job, folder: Path, state: State) -> dict:
    """Score the best model as it lies on the disk, and write the results."""
    try:
        best = load(folder).to(job.inputs.device)
        after = job.inputs.test.score(partial(encode, best, job.inputs.tokenizer))
    except Exception as error:
        complain(f"trained and saved in {folder}, but the final evaluation failed: {error}; "
                 f"try: python eval_sts.py {folder} --test {job.config.test}")
        raise SystemExit(4) from None
    more = job.method.report(job, run_folder.lines(folder)) if job.method.turns else ("", {})
    flips = job.inputs.test.flips(state.before.get("answers"), after.answers)
    return results.conclude(folder, best, job.config, state, asdict(after), more, flips)


def run_seeds(inputs: Inputs, seeds: list[int], folder: Path, *, resume: bool, overwrite: bool
              ) -> str:
    """Run every seed in a folder of its own; the text of mean and spread over them."""
    found, start = {}, None
    for seed in seeds:
        found[seed] = run(inputs, replace(inputs.config, seed=seed), folder / f"seed-{seed}",
                          resume=resume, overwrite=overwrite, start=start)
        start = Result(found[seed]["before"], mean=found[seed]["before_mean"],
                       geometry=found[seed]["geometry_before"])
        print(f"seed {seed}: average {found[seed]['test']['avg']:.2f}", file=sys.stderr)
    return results.summarise(folder, inputs.config, found)


# ---- the program ----------------------------------------------------------------------------

def dry_run(inputs: Inputs) -> str:
    """Three steps, a score, a save and a reload on the first rows; the text of the plan."""
    least = max(DRY_ROWS, 4 * inputs.config.batch_size)
    few = [corpus.part(range(min(len(corpus), least))) for corpus in inputs.corpora]
    with exits(3):
        job = build(replace(inputs, corpora=few), inputs.config)
    loop = steps_of(job, batches_by_round(job, first=1), first=1)
    return rehearse(job, loop, rows=len(inputs.corpus),
                    steps=job.method.steps_of_run(inputs.config, inputs.corpora))


def main(argv: list[str] | None = None) -> None:
    given = vars(parse(argv))
    resume, overwrite, dry, seeds = (given.pop(name) for name in (
        "resume", "overwrite", "dry_run", "seeds"))
    if given.get("threads", 0) > 0:                               # less is refused below
        torch.set_num_threads(given["threads"])
    inputs = read_inputs(given)
    if dry:
        return print(dry_run(inputs))
    config = inputs.config
    folder = Path(config.out) if config.out else results.default_folder(config)
    if seeds:
        return print(run_seeds(inputs, seeds, folder, resume=resume, overwrite=overwrite))
    run(inputs, config, folder, resume=resume, overwrite=overwrite)
    print((folder / "results.md").read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(program(main, "--resume"))
