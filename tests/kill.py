"""
Kills a training run with SIGKILL again and again, and resumes it: nothing may be lost.

    python tests/kill.py --times 50

Every other kill comes at a random moment, the others just before a random change of a file in the
run's folder, where a moment seldom falls. After each one all files must parse, and the model must
be the one whose dev score the state remembers. Once a run has come through, its folder must be that
of a run which nobody disturbed. The children are forked, as imports take seconds: not on Windows.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path

import scipy.stats                                                # noqa: F401
import torch
import torch._dynamo                                              # noqa: F401
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import mincse                                                     # noqa: E402
from conftest import make_tiny                                    # noqa: E402
from data import Tokenizer                                        # noqa: E402
from eval_sts import read_test                                    # noqa: E402
from engine.encoders import load                                  # noqa: E402
from model import encode                                          # noqa: E402

mincse.SAVE_EVERY = 0.05              # seconds: some dev scores are followed by a save, others not
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def child(argv: list[str], out: Path, *, seconds: float = 0, change: int = 0) -> int | None:
    """Run mincse.py in a child, killed after so long or before so many changes of its folder.

    Returns its exit code, or None where it was killed.
    """
    pid = os.fork()
    if not pid:
        be_the_program([*argv, "--out", str(out), "--resume"], out, change)
    if seconds:
        timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
        timer.start()
    status = os.waitpid(pid, 0)[1]
    if seconds:
        timer.cancel()
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def be_the_program(argv: list[str], out: Path, change: int) -> None:
    """In the child: mincse.py as typed, but for a hook. Never returns."""
    code = 99
    try:
        said = os.open(out.with_name("said.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["mincse.py", *argv]
        if change:
            sys.addaudithook(partial(kill_before, [change], str(out)))
        code = mincse.program(mincse.main)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_before(left: list[int], out: str, event: str, arguments: tuple) -> None:
    """An audit hook: SIGKILL to oneself when the last of so many changes is about to happen."""
    if event in CHANGES and str(arguments[0]).startswith(out):
        reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        left[0] -= not reading
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)


def check(out: Path, dev, scratch: Path) -> None:
    """What a kill may leave: whole files, or those whose names say that they are not."""
    for path in out.rglob("*"):
        first = path.relative_to(out).parts[0]
        if path.is_dir() or path.suffix == ".tmp" or first.startswith(".best-"):
            continue
        read = {".json": json.loads, ".jsonl": lambda text: [*map(json.loads, text.splitlines())],
                ".md": str.strip, ".safetensors": None, ".pt": None}[path.suffix]
        assert read is None or read(path.read_text()) is not None, f"{path} is not whole"
    if (out / "model.safetensors").exists():
        assert all(tensor.isfinite().all()
                   for tensor in load_file(out / "model.safetensors").values())
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)["state"]
        if not state["best_step"]:
            return
        shutil.copytree(out, scratch, dirs_exist_ok=True)
        if (waiting := out / f".best-{state['best_step']}").exists():
            shutil.copytree(waiting, scratch, dirs_exist_ok=True)
        score = dev.score(partial(encode, load(scratch), Tokenizer.read(scratch))).scores["avg"]
        assert score == state["best"], f"{out} holds a model of score {score}, not {state}"
        shutil.rmtree(scratch)


def result(out: Path) -> dict:
    """All that must not depend on kills. Only speeds may differ."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"weights": (out / "model.safetensors").read_bytes(),
            "results": (out / "results.json").read_text(),
            "metrics": [line | {"sentences_per_second": 0} for line in lines],
            "files": sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))}


def setting(folder: Path) -> tuple[list[str], Path]:
    """A tiny run that saves often and improves often: its command line and its dev pairs."""
    make_tiny(folder / "tiny")
    rng = random.Random(0)
    words = "dog cat owl elk bee cow ant fox runs sees eats reads sings sleeps digs waits".split()
    lines = [" ".join(rng.choices(words, k=6)) for _ in range(128)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    (folder / "pairs.tsv").write_text("".join(
        f"{a}\t{b}\t{rng.random():.3f}\n" for a, b in zip(lines, lines[1:])))
    flags = {"encoder": folder / "tiny", "corpus": folder / "corpus.txt", "pooling": "mean",
             "dev": folder / "pairs.tsv", "test": folder / "pairs.tsv", "dev-every": 3,
             "steps": 15, "batch-size": 8, "learning-rate": 1e-3, "threads": 1}
    return [str(text) for name, value in flags.items() for text in ("--" + name, value)], \
        folder / "pairs.tsv"


def kill_often(times: int, seed: int, folder: Path) -> int:
    """So many kills, and as many runs as survive them. Returns how many those were."""
    argv, pairs = setting(folder)
    dev, rng = read_test(str(pairs)), random.Random(seed)
    started = time.perf_counter()
    assert child(argv, folder / "whole") == 0, (folder / "said.txt").read_text()
    seconds = time.perf_counter() - started
    whole = result(folder / "whole")
    kills = survived = 0
    while kills < times or (folder / f"run-{survived}").exists():
        out, last = folder / f"run-{survived}", kills >= times
        how = ({} if last else {"seconds": rng.uniform(0, seconds)} if kills % 2 else
               {"change": rng.randint(1, 250)})
        code = child(argv, out, **how)
        assert code in (0, None), (folder / "said.txt").read_text()
        if code is None:
            kills += 1
            check(out, dev, folder / "scratch")
            print(f"kill {kills}: {how}", file=sys.stderr)
        else:
            wrong = [name for name, value in result(out).items() if value != whole[name]]
            assert not wrong, f"{wrong} of {out} differ from those of {folder / 'whole'}"
            shutil.rmtree(out)
            survived += 1
    return survived


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="kills [50]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args()
    torch.set_num_threads(1)                                      # before the first fork
    with tempfile.TemporaryDirectory() as folder:
        survived = kill_often(args.times, args.seed, Path(folder))
    print(f"{args.times} kills: {survived} runs ended as one that nobody disturbed")
