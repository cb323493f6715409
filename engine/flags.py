"""
How does a dataclass become a command line? Flags with their ranges, exit codes, signals.

    flag(default, group, text, ...)      a field of a dataclass that says all about its flag
    add_flags(parser, fields)            the fields as flags, each in its group of --help
    check_ranges(config)                 the first value outside of its range, refused
    exits(code), program(main)           what can go wrong, as one sentence and an exit code

Exit codes: 0 fine; 1 run-time failure; 2 usage; 3 data missing or damaged; 130 interrupted.
"""

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

import torch


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


def seed_range(text: str) -> list[int]:
    """"0-4" -> [0, 1, 2, 3, 4]."""
    first, _, last = text.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    if not seeds:
        raise ValueError
    return seeds


def count(text: str) -> int:
    """An argument that is a number of things, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return value


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is cuda or cpu, and not mps, which lacks float64."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: this machine or this build of torch has none; "
                         "use --device auto or cpu") from None
    return torch.device(name)


def wants_bf16(precision: str, device: torch.device) -> bool:
    """Train in bfloat16? `auto`: where the hardware has it, since emulated it is slow."""
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
    except (OSError, ValueError) as error:
        complain(str(error))
        raise SystemExit(code) from None


def program(main: Callable[[], None], again: str = "--resume") -> int:
    """Run main; the exit code says what went wrong, `again` is the flag to go on with."""
    try:
        main()
    except KeyboardInterrupt:
        complain(f"interrupted outside the training loop; go on with:\n  {command()} {again}")
        return 130
    except OSError as error:
        complain(f"{error}; what was saved before stands, go on with:\n  {command()} {again}")
    except (FloatingPointError, MemoryError) as error:
        complain(str(error))
    else:
        return 0
    return 1


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
