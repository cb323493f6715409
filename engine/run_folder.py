"""
What does a run leave? A folder that explains itself, and from which a stopped run goes on.

    args.json       every setting; the command     env.json      machine, versions, corpus
    metrics.jsonl   one object a line              results.json  scores before and after
    state.pt        until the end, for --resume    results.md, README.md     at the end
    config.json, model.safetensors, ...            the best model so far

A better model waits in .best-STEP until state.pt, which names that step, is on the disk: so state
and model belong together whenever the run is killed.
"""

import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from engine.files import (naming, read_json, replacing, settle, stage, write_json,
                          write_text)
from engine.flags import complain, dashed, lacks_memory, pick_device
from engine.hub import encoder_folder, file_sha256
from engine.layouts import ENCODER_FILES, SETTINGS_FILES, VOCABULARY_FILES
from engine.tables import plain

# What --overwrite removes at once; args.json stays until it is replaced, to mark the folder.
OWN_FILES = ("results.json", "results.md", "metrics.jsonl", "state.pt", "model.safetensors",
             "README.md", "bad-batch.json", "geometry.png")
# Settings that may differ when a run goes on. Smaller pieces draw other dropout, nothing else.
HARMLESS = ("out", "device", "threads", "data", "micro_batch")


def sources(inputs) -> dict[str, str]:
    """The sha256 of everything that a run reads, by its flag."""
    found = {"corpus": " ".join(corpus.sha256 for corpus in inputs.corpora),
             "encoder": encoder_sha256(inputs.folder)}
    for flag in ("generator", "teacher"):
        if name := getattr(inputs.config, flag, ""):
            found[flag] = (file_sha256(Path(name)) if Path(name).is_file()
                           else encoder_sha256(encoder_folder(name)))
    for name in ("dev", "test"):
        found[name] = hashlib.sha256(repr(getattr(inputs, name)).encode()).hexdigest()
    return found


def encoder_sha256(folder: Path) -> str:
    """One sha256 of all files that make an encoder."""
    paths = [folder / name for name in ENCODER_FILES + SETTINGS_FILES + VOCABULARY_FILES]
    paths += [path for kind in ("*/*.json", "*/*.txt", "*/*.safetensors", "model-*.safetensors")
              for path in sorted(folder.glob(kind))]
    found = [f"{path.name} {file_sha256(path)}" for path in paths if path.is_file()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def started(folder: Path) -> dict | None:
    """The settings and sources recorded in args.json, or None where there is none."""
    path = folder / "args.json"
    return read_json(path, "config", "sources") if path.is_file() else None


def finished(folder: Path) -> dict | None:
    """The results recorded in results.json, or None where the run has not ended."""
    path = folder / "results.json"
    return read_json(path, "before", "test") if path.is_file() else None


def claim(folder: Path, config, sources: dict, before: dict | None, *, resume: bool,
          overwrite: bool) -> None:
    """Make the folder, or take it over; refuse one that holds another run or something else."""
    if folder.is_file():
        raise ValueError(f"--out {folder}: expected a folder, found a file: choose another name")
    held = {path.name for path in folder.glob("*")} - {"args.json.tmp"}   # killed as it began
    if held and "args.json" not in held:
        raise ValueError(f"{folder} exists and holds no run of this program: choose another --out")
    if held and not (resume or overwrite):
        state = "a finished run" if "results.json" in held else "an unfinished run"
        raise ValueError(f"{folder} holds {state}: --resume goes on with it, --overwrite replaces "
                         "it, --out FOLDER leaves it alone")
    if held and resume:
        check_same(folder, before, config, sources)
    if overwrite and not resume:
        for name in OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def check_same(folder: Path, before: dict, config, sources: dict) -> None:
    """Refuse to go on with other settings than the run was started with, or on other data."""
    for name, now in asdict(config).items():
        then = before["config"].get(name)
        if name not in HARMLESS and then != now:
            raise ValueError(f"{folder} was started with {dashed(name)} {then}, found {now}: go on "
                             f"with\n  {before.get('command')} --resume")
    for name, now in sources.items():
        then = before["sources"].get(name)
        if then != now:
            raise ValueError(f"{folder} was started with another {dashed(name)} of the same name "
                             f"(sha256 {then}, found {now}): bring it back, or use --overwrite")


def describe(folder: Path, config, sources: dict, command: str, doctor: dict) -> None:
    """Write args.json and env.json: what is run, and on what."""
    write_json(folder / "args.json",
               {"command": command, "config": asdict(config), "sources": sources})
    write_json(folder / "env.json",
               {"corpus": doctor, **environment(pick_device(config.device))})


def environment(device: torch.device) -> dict:
    """The machine, the GPU if the run is on one, and the versions of the packages."""
    packages = ("torch", "numpy", "scipy", "tokenizers", "safetensors")
    return {"python": platform.python_version(), "processor": processor(),
            "platform": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            **{name: version(name) for name in packages}}


def processor() -> str:
    """The processor's name where the system tells it."""
    about = Path("/proc/cpuinfo")                                 # Linux
    text = about.read_text("utf-8", errors="replace") if about.is_file() else ""
    name = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    return name[1] if name else platform.processor()


@dataclass(frozen=True)
class State:
    """How far a run is, beside its tensors."""
    step: int = 0
    best: float = -math.inf                                       # dev score of the model on disk
    best_step: int = 0                                            # 0: none on disk yet
    before: dict = field(default_factory=dict)                    # test result of the start


def save_state(folder: Path, state: State, networks: nn.ModuleDict, optimizer: Optimizer) -> None:
    """Write all that a run needs to go on exactly; random draws depend on seed and step alone."""
    everything = {"state": asdict(state), "networks": networks.state_dict(),
                  "optimizer": optimizer.state_dict()}
    with replacing(folder / "state.pt") as fresh, fresh.open("wb") as file:
        try:
            torch.save(everything, file)
        except RuntimeError as error:                             # torch's; it hides a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    settle_best(folder, state)


def load_state(folder: Path, networks: nn.ModuleDict, optimizer: Optimizer) -> State | None:
    """Fill networks and optimizer from state.pt, or None without it; never unpickles code."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    try:
        if zipfile.ZipFile(path).testzip():                       # torch does not look
            raise ValueError("a wrong checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = State(**saved["state"])
        networks.load_state_dict(saved["networks"])
        optimizer.load_state_dict(saved["optimizer"])
        check_state(state, optimizer)
    except Exception as error:
        if lacks_memory(error):
            raise MemoryError(f"out of memory while {path} was read, which is left as it is") \
                from None
        raise ValueError(f"{path}: expected the state of this run, found {str(error)[:80]!r}: "
                         "go on with the version of mincse that saved it, or start again with "
                         "--overwrite") from None
    return state


def check_state(state: State, optimizer: Optimizer) -> None:
    """Refuse what torch accepts: it reads moments of any shape, even past their end."""
    if not (type(state.step) is type(state.best_step) is int and 0 <= state.best_step <= state.step
            and type(state.best) is float and isinstance(state.before.get("scores"), dict)):
        raise ValueError(f"step {state.step}, best {state.best} at {state.best_step}")
    for parameter, moments in optimizer.state.items():
        if any(x.ndim and x.shape != parameter.shape for x in moments.values()):
            raise ValueError("moments of another shape than their parameter")


def drop_state(folder: Path) -> None:
    """Remove state.pt: a finished run does not need it."""
    (folder / "state.pt").unlink(missing_ok=True)


def clear_after(folder: Path, state: State) -> None:
    """Remove what was written after the state, since training comes to it again."""
    settle_best(folder, state)
    log = folder / "metrics.jsonl"
    if log.is_file():
        lines = log.read_text("utf-8", errors="replace").splitlines(keepends=True)
        write_text(log, "".join(line for line in lines if step_of(line) <= state.step))


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for what is no whole line."""
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        step = json.loads(line)["step"]
        if type(step) is int and line.endswith("}\n"):
            return step
    return math.inf


def waiting(folder: Path, step: int) -> Path:
    """Where the model of a step waits until the state that names it is on the disk."""
    return folder / f".best-{step}"


def hold_best(folder: Path, files: dict, step: int) -> None:
    """Write the model of a step, to wait for the next state; better than all that wait, if any."""
    for path in folder.glob(".best-*"):
        shutil.rmtree(path)
    stage(files, waiting(folder, step))


def settle_best(folder: Path, state: State) -> None:
    """Move the model that the state calls the best to its place; remove any other that waits."""
    for path in folder.glob(".best-*"):
        if path == waiting(folder, state.best_step):
            settle(path, folder)
        else:
            shutil.rmtree(path)


class Log:
    """Writes metrics.jsonl; loss and speed are means since the line before, without scoring."""

    def __init__(self, folder: Path, batch_size: int):
        self.folder, self.batch_size, self.warned = folder, batch_size, False
        self.restart()

    def restart(self) -> None:
        self.steps, self.since = [], time.perf_counter()

    def add(self, loss: Tensor, **facts) -> None:
        self.steps.append({"loss": loss, **facts})                # .item() would wait for the GPU

    def check(self, corpus) -> None:
        """End the run at the first loss that is no number, and keep its batch."""
        for step in self.steps:
            loss = float(step["loss"])
            if not math.isfinite(loss):
                path, rows = self.folder / "bad-batch.json", step["rows"].tolist()
                texts = [[column[row] for column in corpus.columns] for row in rows]
                write_json(path, {**step, "loss": str(loss), "rows": rows, "texts": texts})
                raise FloatingPointError(
                    f"the loss is {loss} at step {step['step']}: try a lower --learning-rate than "
                    f"{step['learning_rate']:.2g}; {path} has the batch; earlier saves are kept")

    @contextmanager
    def paused(self):
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def line(self, step: int, measures: dict) -> dict:
        """Write a line of metrics.jsonl, and return it."""
        loss = mean_loss([step["loss"] for step in self.steps])
        speed = len(self.steps) * self.batch_size / (time.perf_counter() - self.since)
        row = {"step": step, "loss": loss, **measures,
               "learning_rate": self.steps[-1]["learning_rate"], "sentences_per_second": speed}
        add_line(self.folder, row)
        self.restart()
        return row

    def warn_of_collapse(self, row: dict, steps: int) -> None:
        """Warn once, but not at the start, where RoBERTa's vectors are all close."""
        cosines = [row.get(name, 0) for name in ("negative_cosine", "lowest_positive_cosine")]
        collapsed = row["uniformity"] > -0.05 and min(cosines) > 0.99
        if collapsed and not self.warned and row["step"] >= min(100, steps // 10):
            self.warned = True
            complain(f"WARNING: collapse at step {row['step']}: all vectors are close (uniformity "
                     f"{row['uniformity']:.3f}): try a lower --learning-rate, or --pooling mean")


def mean_loss(losses: list[Tensor]) -> float:
    """The mean loss of some steps, which must be a number."""
    mean = sum(map(float, losses)) / len(losses)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the mean loss of {len(losses)} steps is {mean}: try a lower "
                                 "--learning-rate; what was saved before is kept")
    return mean


def add_line(folder: Path, row: dict) -> None:
    """Append a line to metrics.jsonl."""
    path = folder / "metrics.jsonl"
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(row)) + "\n")


def lines(folder: Path) -> list[dict]:
    """All lines of metrics.jsonl, with NaN again for null."""
    back = partial(json.loads, object_hook=lambda row: {
        name: math.nan if value is None else value for name, value in row.items()})
    return list(map(back, (folder / "metrics.jsonl").read_text("utf-8").splitlines()))
