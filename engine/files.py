"""
How is a file written so that it is never half there? Beside its place, then renamed.

    write(path, content)    one file                put(files, folder)    several, all or none
    replacing(path)         one, by hand            read_json             what `write_json` wrote
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from engine.tables import plain


def put(files: dict[str, bytes | dict | list], folder: Path) -> None:
    """Write all of the files into the folder, or none."""
    stage(files, folder / ".saving")
    settle(folder / ".saving", folder)


def stage(files: dict[str, bytes | dict | list], waiting: Path) -> None:
    """Write every file into a folder beside, from which `settle` takes them to their places."""
    shutil.rmtree(waiting, ignore_errors=True)                    # left by a killed program
    try:
        for name, content in files.items():
            (waiting / name).parent.mkdir(parents=True, exist_ok=True)
            write(waiting / name, content)
    except BaseException:
        shutil.rmtree(waiting, ignore_errors=True)
        raise


def settle(waiting: Path, folder: Path) -> None:
    """Move staged files to their places; stopped halfway, it can be done again."""
    for path in sorted(waiting.rglob("*")):
        place = folder / path.relative_to(waiting)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
    shutil.rmtree(waiting)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; only when that file is whole on the disk does it replace `path`."""
    fresh = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            yield fresh
            with fresh.open("rb+") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in the error, as that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: not written ({error.strerror or error})") from None


def write(path: Path, content: bytes | dict | list) -> None:
    """Write a file: bytes as they are, tensors as float32, settings as JSON."""
    if path.suffix == ".safetensors" and isinstance(content, dict):
        content = packed(content, torch.float32)
    elif not isinstance(content, bytes):
        content = json.dumps(content, indent=2).encode()
    with replacing(path) as fresh:
        fresh.write_bytes(content)


def packed(tensors: dict[str, Tensor], precision: torch.dtype) -> bytes:
    """The bytes of a .safetensors file, with the metadata that transformers requires."""
    tensors = {name: tensor.to("cpu", precision).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; a file's name with other bytes is escaped, as JSON does it."""
    write(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, *keys: str) -> dict:
    """The content of a file of a run, which must have an object under each of these keys."""
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        found = json.loads(path.read_bytes())
        if all(isinstance(found[key], dict) for key in keys):
            return found
    raise ValueError(f"{path}: expected what a run of this program wrote, with {' and '.join(keys)}"
                     ", found something else: start again with --overwrite")
