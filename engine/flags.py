"""
How does a dataclass become a command line? Flags with their ranges, exit codes, signals.

    flag(default, group, text, ...)      a field of a dataclass that says all about its flag
    add_flags(parser, fields)            the fields as flags, each in its group of --help
    check_ranges(config)                 the first value outside of its range, refused
    Parser                               answers an unknown flag with the one that was meant
    exits(code), program(main)           what can go wrong, as one sentence and an exit code

Exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 130 interrupted
(143 by SIGTERM); 141 nobody reads the output any more, as with `| head`.
"""

import argparse
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields
from difflib import SequenceMatcher
from pathlib import Path

import torch

# Words in the flags of other programs, and ours.
SYNONYMS = {"lr": "learning", "bs": "batch", "wd": "decay", "model": "encoder", "train": "corpus",
            "dataset": "corpus", "eval": "dev", "tau": "temperature", "temp": "temperature",
            "len": "tokens", "length": "tokens", "output": "out", "pooler": "pooling",
            "gpu": "device", "cuda": "device", "cpu": "device", "fp16": "precision",
            "bf16": "precision", "force": "overwrite"}


def flag(default, group: str, text: str, choices=None, *, several: bool = False,
         least: float = -math.inf, above: float = -math.inf, most: float = math.inf,
         below: float = math.inf, why: str = ""):
    """A field of a dataclass, and its flag.

    A number may be `least` and `most` themselves, but must be greater than `above` and less than
    `below`, for the reason `why`. `several` values make a list.
    """
    return field(default=default, metadata={
        "group": group, "help": text, "choices": choices, "several": several,
        "least": least, "above": above, "most": most, "below": below, "why": why})


@dataclass(frozen=True)
class Row:
    """A row of `--list`; published are averages of the seven STS tasks that we could check."""
    flags: str
    idea: str
    citation: str
    published: str


def dashed(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size, from_ -> --from, which Python reserves."""
    return "--" + name.rstrip("_").replace("_", "-")


def check_ranges(config) -> None:
    """Refuse the first number that is not finite or outside of its range, by its flag."""
    for f in fields(config):
        value, limit = getattr(config, f.name), f.metadata
        if isinstance(value, (int, float)) and not (
                math.isfinite(value) and limit["least"] <= value <= limit["most"]
                and limit["above"] < value < limit["below"]):
            raise ValueError(f"{dashed(f.name)}: expected {in_words(limit)}, found {value}")


def in_words(limit: Mapping) -> str:
    """A range in words, such as "0 or more and below 1"."""
    words = {"least": "{:g} or more", "above": "above {:g}", "most": "at most {:g}",
             "below": "below {:g}"}
    said = [text.format(limit[end]) for end, text in words.items() if math.isfinite(limit[end])]
    return (" and ".join(said) or "a finite number") + limit["why"]


def add_flags(parser: argparse.ArgumentParser, described: Iterable[Field],
              menus: dict[str, Iterable[str]] | None = None) -> dict:
    """Add a flag for every field, in its group of --help; returns the groups by name.

    `menus` has the choices that the module of the dataclass cannot know.
    """
    groups = {}
    for f in described:
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        shown = f" [{f.default}]" if f.default not in ("", "recipe") else ""
        many = {"nargs": "+", "action": OneOrMore} if f.metadata["several"] else {}
        choices = f.metadata["choices"] or (menus or {}).get(f.name)
        word = None if choices else {int: "N", float: "X", str: "NAME"}[f.type]
        groups[name].add_argument(
            dashed(f.name), dest=f.name, type=f.type, choices=choices, metavar=word,
            help=(f.metadata["help"] + shown).replace("%", "%%"), **many)
    return groups


class OneOrMore(argparse.Action):
    """Several values become a list; a single one stays what it is."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and answers an unknown flag with the one meant."""
    foreign: Iterable[str] = ()       # flags that exist, but not here

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        known = {flag for flag in self._option_string_actions if flag[:2] == "--"} | {*self.foreign}
        pairs = ((arg, meant(arg.partition("=")[0], known)) for arg in unknown if arg[:1] == "-")
        hints = [f"instead of {arg}, did you mean {flag}?" for arg, flag in pairs if flag]
        if unknown:
            self.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
        return found


def meant(flag: str, known: Iterable[str]) -> str:
    """The known flag that an unknown one is most like, or "": --lr -> --learning-rate."""
    typed = flag.strip("-").lower().replace("_", "-")
    words = {SYNONYMS.get(word, word) for word in typed.split("-")}

    def likeness(other: str) -> tuple[float, float]:
        theirs = {*other.strip("-").split("-")}
        return (len(words & theirs) / len(words | theirs),
                SequenceMatcher(None, typed, other.strip("-")).ratio())
    best = max(sorted(known), key=likeness)
    return best if likeness(best) > (0, 0.6) else ""


def seed_list(text: str) -> list[int]:
    """"0-2,7" -> [0, 1, 2, 7]; each seed once."""
    with suppress(ValueError):
        spans = [(int(first), int(last or first)) for first, _, last in (
            part.partition("-") for part in text.split(","))]
        if all(first <= last for first, last in spans):
            return sorted({seed for first, last in spans for seed in range(first, last + 1)})
    raise argparse.ArgumentTypeError(f"expected seeds such as 0-4 or 0,1,2, found {text!r}")


def count(text: str) -> int:
    """An argument that is a number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return value


def pick_device(name: str) -> torch.device:
    """The device of this name, from now on the current one; `auto` is cuda or cpu, never mps."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: this machine or this build of torch has none; "
                         "use --device auto or cpu") from None
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)         # name, memory and bfloat16 are asked of the current
    return device


def say_limits(device: torch.device) -> None:
    """Tell the user in a sentence what the device lacks, if anything."""
    if device.type == "mps":
        complain("NOTICE: --device mps trains in float32, as it lacks float64 and we use no "
                 "bfloat16 there; before torch 2.8 it also lacks an operation of the encoder")
    elif device.type == "cuda" and not wants_bf16("auto", device):
        complain("NOTICE: this GPU has no bfloat16, so --precision auto is float32")


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Train in bfloat16? `auto`: where the hardware has it, since emulated it is slow.

    Having it is no promise of speed: see `mini` on a processor with AMX in docs/PERFORMANCE.md.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                     or torch.cpu._is_amx_tile_supported())


def command() -> str:
    """This command line, to which --resume can be added."""
    kept = [arg for arg in sys.argv[1:] if arg not in ("--resume", "--overwrite")]
    spec = sys.modules["__main__"].__spec__
    as_module = spec is not None and spec.origin == sys.argv[0]
    return shlex.join(["python", *(["-m", spec.name] if as_module else sys.argv[:1]), *kept])


def complain(text: str) -> None:
    """Tell the user one sentence."""
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


@contextmanager
def exits(code: int):
    """Turn an error of the input into one sentence and this exit code."""
    try:
        yield
    except BrokenPipeError:                                       # no fault of the input
        raise
    except (OSError, ValueError) as error:
        complain(str(error))
        raise SystemExit(code) from None


def program(main: Callable[[], None], again: str = "") -> int:
    """Run main; the exit code says what went wrong, `again` is the flag to go on with."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:         # as nohup has it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of engine.interrupt's
    sys.stdout, sys.stderr = streams = [                          # None where it is closed
        stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr)]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")             # of letters that a console lacks
    try:
        code = outcome(main, f"; go on with:\n  {command()} {again}" if again else "")
    except BrokenPipeError:
        code = 128 + 13                                           # SIGPIPE, as others die by it
    for stream in streams:
        try:
            stream.flush()
        except OSError:                                           # Python would complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def outcome(main: Callable[[], None], advice: str) -> int:
    """Run main; its exit code, where an error gets a sentence."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()                                    # here a closed pipe is noticed
            sys.stderr.flush()
    except KeyboardInterrupt:
        complain(f"interrupted{advice}")
        return 130
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"{error}; what was saved before stands{advice}")
    except ImportError as error:
        complain(f"{error}: pip install -U -r requirements.txt")
    except FloatingPointError as error:
        complain(str(error))
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if lacks_memory(error):
            complain(said if said.startswith("out of memory") else
                     f"out of memory ({said[:80]}); what was saved before stands{advice}")
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            said = " ".join(str(error).partition("\n\n")[0].split())    # the reason comes second
            complain(f"--compile yes: torch cannot compile here ({said}): leave it out")
        else:
            raise
    else:
        return 0
    return 1


def lacks_memory(error: Exception) -> bool:
    """Is it a lack of memory? A processor's, and some of CUDA's, is known by its text alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        isinstance(error, RuntimeError) and re.search(
            "DefaultCPUAllocator|bad_alloc|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
            str(error)))


class Stop:
    """Remembers the first SIGINT or SIGTERM, so that the step in progress can end and be saved."""
    signal = 0

    def __call__(self, number: int, frame) -> None:
        if self.signal:                                           # asked twice: stop at once
            raise KeyboardInterrupt
        self.signal = number

    @contextmanager
    def listening(self):
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
