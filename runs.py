"""
What does a run leave? A folder that explains itself, and from which a stopped run goes on.

    args.json       every setting; the command     env.json      machine, versions, corpus
    metrics.jsonl   one object a line              results.json  scores before and after
    results.md      the same as tables             README.md     model card
    state.pt        for --resume, removed at the end
    config.json, model.safetensors, ...            the best model, written by folders.save

A file is written beside its place and then renamed, so none is ever half there. A better model
waits in .best-STEP until state.pt, which names that step, is on the disk: killed at any moment,
state and model belong together. Lines of metrics.jsonl that the state does not know of come again.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import data
from config import Config, dashed, names
from eval_sts import Result, plain, table
from folders import naming, replacing, settle, write

STAGES = "stages"                     # folder of the runs inside a run (regimes.py), while it goes
# What --overwrite removes at once. args.json stays until it is replaced: without it, nobody could
# tell that the folder is ours.
OWN_FILES = ("results.json", "results.md", "metrics.jsonl", "state.pt", "model.safetensors",
             "README.md", "bad-batch.json")
# May differ when a run goes on elsewhere. Smaller pieces draw other dropout, nothing else.
HARMLESS = ("out", "device", "threads", "data", "micro_batch")

# Lowest, highest and mean average of seven STS tasks over 50 seeds each of unsupervised SimCSE on
# wiki1m, from the results of hppRC/simple-simcse.
REFERENCE = {
    "bert-base-uncased": (73.16, 76.70, 75.11), "bert-large-uncased": (70.31, 77.28, 74.95),
    "roberta-base": (74.17, 75.14, 74.60), "roberta-large": (75.64, 77.69, 76.71),
}


# ---- files ----------------------------------------------------------------------------------

def write_text(path: Path, text: str) -> None:
    write(path, text.encode())


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, *keys: str) -> dict:
    """What a run wrote: an object with these keys, an object under each."""
    try:
        found = json.loads(path.read_bytes())
        if all(isinstance(found[key], dict) for key in keys):
            return found
    except (ValueError, RecursionError, TypeError, KeyError):
        pass
    raise ValueError(f"{path}: expected what a run of this program wrote, with {' and '.join(keys)}"
                     ", found something else: start again with --overwrite")


def default_folder(config: Config) -> Path:
    """runs/METHOD-ENCODER-CORPUS, with the loss and the positives where they are not the usual."""
    extra = [config.loss] * (config.loss != "info-nce")
    extra += [config.positives] * (config.positives != "dropout")
    corpus = "-".join(Path(name).name.split(".")[0] for name in names(config.corpus))
    return Path("runs") / "-".join([config.method, *extra, Path(config.encoder).name, corpus])


def sources(inputs) -> dict[str, str]:
    """The sha256 of all that a run reads, by its flag; a teacher that `prepare` asked is done."""
    config, corpora = inputs.config, (inputs.corpus, *inputs.later)
    found = {"corpus": " ".join(corpus.sha256 for corpus in corpora),
             "encoder": encoder_sha256(inputs.folder)}
    if config.generator:
        found["generator"] = encoder_sha256(data.encoder_folder(config.generator))
    if inputs.corpus.teacher is not None:
        teacher = Path(config.teacher)
        found["teacher"] = (data.file_sha256(teacher) if teacher.is_file() else
                            encoder_sha256(data.encoder_folder(config.teacher)))
    for name in ("dev", "test"):
        found[name] = hashlib.sha256(repr(getattr(inputs, name)).encode()).hexdigest()
    return found


def encoder_sha256(folder: Path) -> str:
    """Of all files that make an encoder."""
    paths = [folder / name for name in data.ENCODER_FILES + data.ENCODER_EXTRAS]
    found = [f"{path.name} {data.file_sha256(path)}" for path in paths if path.is_file()]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def started(folder: Path) -> dict | None:
    """With what the folder's run was started, if it holds one."""
    path = folder / "args.json"
    return read_json(path, "config", "sources") if path.is_file() else None


def finished(folder: Path) -> dict | None:
    """The results of the folder's run, if it has ended."""
    path = folder / "results.json"
    return read_json(path, "before", "test") if path.is_file() else None


def claim(folder: Path, config: Config, sources: dict, before: dict | None, *, resume: bool,
          overwrite: bool) -> None:
    """Make the folder ours, `before` being its `started`.

    Refuses a folder that holds another run or something else altogether.
    """
    if folder.is_file():
        raise ValueError(f"--out {folder}: expected a folder, found a file: choose another name")
    # Killed as it began, a run left nothing but half of its first file.
    held = folder.is_dir() and any(path.name != "args.json.tmp" for path in folder.iterdir())
    if held and not (folder / "args.json").is_file():
        raise ValueError(f"{folder} exists and holds no run of this program: choose another --out")
    if held and not (resume or overwrite):
        state = "a finished run" if (folder / "results.json").is_file() else "an unfinished run"
        raise ValueError(f"{folder} holds {state}: --resume goes on with it, --overwrite replaces "
                         "it, --out FOLDER leaves it alone")
    if held and resume:
        check_same(folder, before, config, sources)
    if overwrite and not resume:
        for name in OWN_FILES:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / STAGES, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def check_same(folder: Path, before: dict, config: Config, sources: dict) -> None:
    """A run goes on only with the settings that it was started with, and on the same data."""
    for name, now in asdict(config).items():
        if name not in HARMLESS and before["config"].get(name) != now:
            raise ValueError(f"{folder} was started with {dashed(name)} "
                             f"{before['config'].get(name)}, found {now}: go on with\n"
                             f"  {before.get('command')} --resume")
    for name, now in sources.items():
        if before["sources"].get(name) != now:
            raise ValueError(f"{folder} was started with another {dashed(name)} of the same name: "
                             f"expected the content with sha256 {before['sources'].get(name)}, "
                             f"found {now}: bring it back, or start again with --overwrite")


def describe(folder: Path, config: Config, sources: dict, command: str, doctor: dict) -> None:
    """args.json and env.json: what is run, and on what."""
    write_json(folder / "args.json",
               {"command": command, "config": asdict(config), "sources": sources})
    write_json(folder / "env.json", {"corpus": doctor, **environment()})


def environment() -> dict:
    """Machine and versions: what a figure needs beside it."""
    packages = ("torch", "numpy", "scipy", "tokenizers", "safetensors")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "platform": system, "processor": processor(),
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            **{name: version(name) for name in packages}}


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- while it runs --------------------------------------------------------------------------

@dataclass(frozen=True)
class State:
    """How far a run is, beside its tensors."""
    step: int = 0
    best: float = -math.inf                                       # dev score of the model on disk
    best_step: int = 0                                            # 0: none on disk yet
    before: dict = field(default_factory=dict)                    # test result of the start


def save_state(folder: Path, state: State, parts: nn.ModuleDict,
               optimizer: torch.optim.Optimizer) -> None:
    """All that a run needs to go on exactly: random draws are functions of seed and step."""
    everything = {"state": asdict(state), "parts": parts.state_dict(),
                  "optimizer": optimizer.state_dict()}
    with replacing(folder / "state.pt") as fresh, fresh.open("wb") as file:
        try:
            torch.save(everything, file)
        except RuntimeError as error:                             # torch's; it hides a full disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    settle_best(folder, state)


def load_state(folder: Path, parts: nn.ModuleDict,
               optimizer: torch.optim.Optimizer) -> State | None:
    """Fill parts and optimizer from state.pt; None where there is none. Never unpickles code."""
    path = folder / "state.pt"
    if not path.is_file():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = State(**saved["state"])
        parts.load_state_dict(saved["parts"])
        optimizer.load_state_dict(saved["optimizer"])
        check_state(state, optimizer)
    except Exception as error:
        raise ValueError(f"{path}: expected the state of this run, found something else "
                         f"({str(error)[:80]!r}): start again with --overwrite") from None
    return state


def clear_after(folder: Path, state: State) -> None:
    """What a killed run left that its state does not know of: it comes again."""
    settle_best(folder, state)
    drop_lines_after(folder / "metrics.jsonl", state.step)


def check_state(state: State, optimizer: torch.optim.Optimizer) -> None:
    """What torch would not notice: it reads moments of any shape, even past their end."""
    if not (type(state.step) is type(state.best_step) is int and 0 <= state.best_step <= state.step
            and type(state.best) is float):
        raise ValueError(f"step {state.step}, best {state.best} at {state.best_step}")
    Result(**state.before)
    for parameter, moments in optimizer.state.items():
        names = ["memory"] if "memory" in moments else ["exp_avg", "exp_avg_sq"]   # Muon, AdamW
        if any(moments[name].shape != parameter.shape for name in names):
            raise ValueError("moments of another shape than their parameter")


def waiting(folder: Path, step: int) -> Path:
    """Where the model of a step waits until the state that names it is on the disk."""
    return folder / f".best-{step}"


def settle_best(folder: Path, state: State) -> None:
    """The model that the state calls the best takes its place; another was never decided on."""
    for path in folder.glob(".best-*"):
        if path == waiting(folder, state.best_step):
            settle(path, folder)
        else:
            shutil.rmtree(path)


def drop_lines_after(path: Path, step: int) -> None:
    """Nor may a line be kept that was never finished."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if step_of(line) <= step))


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for what is no whole line."""
    try:
        step = json.loads(line)["step"] if line.endswith("}\n") else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return math.inf
    return step if type(step) is int else math.inf


COLLAPSE = ("mincse.py: WARNING: collapse at step {step}: all sentences look alike (uniformity "
            "{uniformity:.3f}, negatives have a cosine of {negative_cosine:.3f}), so there is "
            "nothing left to learn from: try a lower --learning-rate, or --pooling mean")


class Log:
    """metrics.jsonl: loss and speed are means since the line before, scoring time left out."""

    def __init__(self, folder: Path, batch_size: int):
        self.folder, self.batch_size = folder, batch_size
        self.shown, self.row, self.warned = {}, {}, False
        self.restart()

    def restart(self) -> None:
        self.steps, self.since = [], time.perf_counter()

    def add(self, loss: Tensor, **facts) -> None:
        self.steps.append({"loss": loss, **facts})                # no .item(): no waiting

    def check(self, corpus: data.Corpus) -> None:
        """The first loss that is no number ends the run; its batch is kept for a look at it."""
        losses = [float(step["loss"]) for step in self.steps]
        for at, (loss, step) in enumerate(zip(losses, self.steps)):
            if math.isfinite(loss):
                continue
            rows = step["rows"].tolist()
            path = self.folder / "bad-batch.json"
            write_json(path, {**step, "loss": str(loss), "rows": rows, "losses_before": losses[:at],
                              "texts": [[column[row] for column in corpus.columns]
                                        for row in rows]})
            raise FloatingPointError(
                f"the loss is {loss} at step {step['step']}, with a learning rate of "
                f"{step['learning_rate']:.2g}: {path} has the rows of its batch; try a lower "
                "--learning-rate; what was saved before is kept")

    @contextmanager
    def paused(self):
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def line(self, step: int, figures: dict) -> dict:
        loss = sum(float(step["loss"]) for step in self.steps) / len(self.steps)
        speed = len(self.steps) * self.batch_size / (time.perf_counter() - self.since)
        rate = self.steps[-1]["learning_rate"]
        self.shown = {"loss": f"{loss:.4f}"}
        self.row = row = {"step": step, "loss": loss, **figures, "learning_rate": rate,
                          "sentences_per_second": speed}
        add_line(self.folder, row)
        self.restart()
        return row

    def warn_of_collapse(self, steps: int) -> None:
        """Once, and not at the start: RoBERTa's sentences all look alike until it has learned."""
        cosines = [self.row.get(name, 0) for name in ("negative_cosine", "lowest_positive_cosine")]
        alike = self.row["uniformity"] > -0.05 and min(cosines) > 0.99
        if alike and not self.warned and self.row["step"] >= min(100, steps // 10):
            self.warned = True
            print(COLLAPSE.format(**self.row), file=sys.stderr)


def add_line(folder: Path, row: dict) -> None:
    """One more line of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    with naming(path), path.open("a") as file:
        file.write(json.dumps(plain(row)) + "\n")


def lines(folder: Path) -> list[dict]:
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- at the end -----------------------------------------------------------------------------

def conclude(folder: Path, config: Config, state: State, after: Result, *, keep_state: bool,
             more: tuple[str, dict] = ("", {})) -> dict:
    """Write results.json, results.md and the model card; returns the results.

    `more`: what else there is to say, for readers and for results.json.
    """
    before = state.before
    results = {"before": before["scores"], "test": after.scores, "before_mean": before["mean"],
               "mean": after.mean, "geometry_before": before["geometry"],
               "geometry": after.geometry, "pairs": after.pairs, "subsets": after.subsets,
               "dev": {} if config.dev == "none" else {"avg": state.best},
               "best_step": state.best_step, "steps": state.step, **more[1]}
    text = "\n".join([as_markdown(config, results), *more[:1] * bool(more[0])])
    write_text(folder / "results.md", text)
    write_text(folder / "README.md", model_card(folder, config, text))
    write_json(folder / "results.json", results)                  # last: it says "finished"
    drop_state(folder, keep=keep_state)
    return results


def start_of(results: dict) -> Result:
    """What a run found before its first step."""
    return Result(results["before"], mean=results["before_mean"],
                  geometry=results["geometry_before"])


def drop_state(folder: Path, *, keep: bool) -> None:
    """A finished run needs it no more."""
    if not keep:
        (folder / "state.pt").unlink(missing_ok=True)


def as_markdown(config: Config, results: dict) -> str:
    """Before and after, under the conventions that the test has."""
    rows = {"before": results["before"], "after": results["test"]}
    if results["mean"]:
        rows = {f"{name}, all": row for name, row in rows.items()}
        rows |= {"before, mean": results["before_mean"], "after, mean": results["mean"]}
    chosen = (f"step {results['best_step']} of {results['steps']}, the best on {config.dev} dev"
              if config.dev != "none" else f"step {results['steps']}, the last")
    shapes = []
    for name, after in results["geometry"].items():
        before = results["geometry_before"][name]
        shapes.append(f"{name}, before and after: " + ", ".join(
            f"{measure} {before[measure]:.3f} {after[measure]:.3f}" for measure in after))
    title = f"{experiment(config)}, seed {config.seed}, {config.pooling} pooling: {chosen}"
    return "\n\n".join([title, table(rows), *shapes]) + "\n"


def experiment(config: Config) -> str:
    """What was done, in one line."""
    taught = f" taught by {config.teacher}" if config.teacher else ""
    return (f"{config.method} with {config.loss} and {config.positives}{taught}, from "
            f"{config.encoder} on {', '.join(names(config.corpus))}, test {config.test}")


def model_card(folder: Path, config: Config, text: str) -> str:
    """README.md of the folder, with the lines that load it elsewhere."""
    return f"""# {folder.name}

A sentence encoder trained with mincse.

{text}
Load it with any of:

```python
from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer("{folder}").encode(["A man plays a guitar."])
```
```python
import data, folders, model                     # mincse
encoder, tokenizer = folders.load("{folder}"), data.Tokenizer.read("{folder}")
vectors = model.encode(encoder, tokenizer, ["A man plays a guitar."])
```

In `transformers.AutoModel` take {in_transformers(config)}.
"""


def in_transformers(config: Config) -> str:
    """Where the sentence vector is, for those who use the plain encoder."""
    if config.head == "keep":
        return "`pooler_output`"
    return ("the vector of the first token of the last layer" if config.pooling == "cls" else
            "the mean of the last layer over the real tokens")


def summarise(folder: Path, config: Config, results: dict[int, dict]) -> str:
    """Mean and spread over seeds, as results.json and results.md of the parent folder."""
    tests = [result["test"] for result in results.values()]
    columns = {task: [test[task] for test in tests] for task in tests[0]}
    spread = {"mean": statistics.mean, "standard deviation": deviation, "lowest": min,
              "highest": max}
    rows = {name: {task: f(scores) for task, scores in columns.items()}
            for name, f in spread.items()}
    before = next(iter(results.values()))["before"]
    text = "\n\n".join([f"{experiment(config)}, {len(results)} seeds",
                        table({"before": before} | rows), *verdict(config, rows["mean"])]) + "\n"
    write_text(folder / "results.md", text)
    write_json(folder / "results.json", {"seeds": {str(k): v["test"] for k, v in results.items()},
                                         "test": rows["mean"], "before": before, "spread": rows})
    return text


def deviation(scores: list[float]) -> float:
    """Sample standard deviation; of a single run it is not known."""
    return statistics.stdev(scores) if len(scores) > 1 else math.nan


def verdict(config: Config, mean: dict[str, float]) -> list[str]:
    """Is the mean inside what 50 public seeds of the same experiment gave? Nothing elsewhere."""
    usual = (config.method, config.loss, config.positives, config.corpus, config.test)
    known = REFERENCE.get(config.encoder)
    if usual != ("simcse", "info-nce", "dropout", "wiki1m", "sts") or known is None:
        return []
    low, high, middle = known
    place = "inside" if low <= mean["avg"] <= high else "outside"
    return [f"The mean average {mean['avg']:.2f} lies {place} the range of 50 public runs of "
            f"simple-simcse, {low:.2f} to {high:.2f} (mean {middle:.2f})."]
