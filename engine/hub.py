"""
Where do files come from? A local folder first, then the Hugging Face Hub and its client's cache.

    data_file(names, folder)     a corpus          encoder_folder(name)      an encoder
    senteval_folder(folder)      the STS sets      file_sha256(path)         which file it was
"""

import hashlib
import lzma
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from engine.layouts import SETTINGS_FILES, VOCABULARY_FILES, index_of, modules, shards

HUB_DATASET = "princeton-nlp/datasets-for-simcse"
# Where STS/ may lie in a data folder; the third and fourth are SentEval's and SimCSE's own.
SENTEVAL = ["senteval/downstream/", "downstream/", "data/downstream/", "SentEval/data/downstream/",
            ""]
ON_THE_HUB = ["wiki1m_for_simcse.txt", "nli_for_simcse.csv", "senteval.tar"]


def local_folder(data: Path | None) -> Path | None:
    """The folder given by --data, else by MINCSE_DATA, else none."""
    folder = data or (Path(os.environ["MINCSE_DATA"]) if os.environ.get("MINCSE_DATA") else None)
    if folder and not folder.is_dir():
        origin = "--data" if data else "MINCSE_DATA"
        raise FileNotFoundError(f"{folder}: {origin} names this folder, but it "
                                + ("is a file" if folder.exists() else "does not exist"))
    return folder


def data_file(names: Sequence[str], data: Path | None) -> Path:
    """The first of these files in the local folder, else the one that the Hub has."""
    folder = local_folder(data)
    for name in names if folder else ():
        if found := sorted(folder.glob(name)):
            if len(found) > 1:
                raise ValueError(f"{folder / name}: expected one file, found {len(found)}: "
                                 "choose with --corpus FILE")
            return found[0]
    remote = [name for name in names if name in ON_THE_HUB]
    looked = f"{folder}, which has none of {', '.join(names)}" if folder else "any folder"
    if not remote:
        raise FileNotFoundError(f"{names[0]}: not on the Hub, and not in {looked}; name its folder "
                                "with --data or MINCSE_DATA")
    return from_hub(remote[0], f" ({looked})" if folder else "")


def from_hub(name: str, tried: str = "") -> Path:
    """A file of SimCSE's data set on the Hub, from its client's cache."""
    with hub_errors(f"{name} of {HUB_DATASET}",
                    instead=f"--data FOLDER or MINCSE_DATA=FOLDER{tried}"):
        from huggingface_hub import hf_hub_download  # here: it is slow to import
        return Path(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))


def encoder_folder(name: str) -> Path:
    """The folder of an encoder: the built-in `mini`, a local folder, or a Hub id."""
    folder = Path(__file__).parent.parent / "mini" if name == "mini" else Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        found = "a file" if folder.is_file() else "no such folder"
        raise FileNotFoundError(f"the encoder {name}: expected a folder, mini, or a Hub id such as "
                                f"bert-base-uncased, found {found}")
    return repository(name)


def repository(name: str) -> Path:
    """The folder of the cache with all that the Hub has of an encoder."""
    found = ask(name, "config.json") or ask(name, "adapter_config.json")
    if found is None:
        raise lacking(name, "config.json")
    folder, weights = found.parent, "model.safetensors"

    def get(path: Path) -> Path | None:
        return ask(name, path.relative_to(folder).as_posix(), folder)

    for file in SETTINGS_FILES:
        get(folder / file)
    inner, *after = [*modules(folder).values()] or [folder]
    for path in [*(inner / file for file in ("config.json", *SETTINGS_FILES)),
                 *(place / file for place in after for file in ("config.json", weights))]:
        get(path)
    if (folder / "adapter_config.json").is_file():                # refused by who reads it
        return folder
    if not get(inner / weights):
        if not get(index_of(inner / weights)):
            raise lacking(name, weights)
        for shard in shards(index_of(inner / weights)):
            get(shard)
    if not get(inner / "tokenizer.json") and not any(
            [get(inner / file) for file in VOCABULARY_FILES]):
        raise lacking(name, "tokenizer.json")
    return folder


def ask(name: str, file: str, folder: Path | None = None) -> Path | None:
    """A file of a repository, or None where the Hub says, or has said once, that it has none.

    `folder` is the commit in the cache, as soon as it is known: what lies there needs no network.
    """
    here = f"--encoder {folder} to do with what lies there" if folder else "--encoder FOLDER"
    with hub_errors(f"whether the encoder {name} has a {file}", instead=here):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        known = try_to_load_from_cache(name, file, revision=folder.name) if folder else None
        if known:                       # a path, or an object that stands for "there is none"
            return Path(known) if isinstance(known, str) else None
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError:                           # no connection
            raise
        except EntryNotFoundError:                                # the Hub was asked
            return None


def lacking(name: str, file: str) -> FileNotFoundError:
    """The error for a repository without a file that every encoder needs."""
    said = f"the encoder {name}: its repository on the Hub has no {file}"
    with suppress(Exception):                                     # it only adds to what is said
        from huggingface_hub import file_exists
        if file == "model.safetensors" and file_exists(name, "pytorch_model.bin"):
            said += (", but pytorch_model.bin, a pickle, never read: fetch it with python -c \""
                     "from huggingface_hub import snapshot_download as s; "
                     f"s('{name}', local_dir='FOLDER')\" and name that folder, which is "
                     "answered with the line that converts it")
    return FileNotFoundError(f"{said}; choose another, or pass --encoder FOLDER")


@contextmanager
def hub_errors(what: str, *, instead: str) -> Iterator[None]:
    """Turn whatever goes wrong between here and the Hub into one sentence."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what}: expected huggingface_hub 0.25 or newer ({error}): install "
                         "requirements.txt again") from None
    except Exception as error:                  # three libraries raise their own here
        server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise FileNotFoundError(
            f"{what}: not on this machine, nor from the Hub at {server} ({reason}); look at "
            f"HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN, or pass {instead}") from error


def senteval_folder(data: Path | None) -> Path:
    """The folder with STS/ and SICK/: here, in senteval.tar here, or in that of the Hub."""
    found = data_file([*(f"{inner}STS" for inner in SENTEVAL), "senteval.tar"], data)
    if found.is_dir():
        return found.parent
    archive, beside = found, found.parent
    if not os.access(beside, os.W_OK):                            # a data folder may be read-only
        beside = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mincse")
        beside.mkdir(parents=True, exist_ok=True)
    unpacked = beside / f"mincse-senteval-{file_sha256(archive)[:16]}"
    if not unpacked.is_dir():
        unpack(archive, unpacked)
    for sick in sorted(unpacked.rglob("SICK")):
        if (sick.parent / "STS").is_dir():
            return sick.parent
    raise ValueError(f"{archive}: expected folders STS and SICK side by side, found none")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack plain files only, and only into the folder, which appears when it is complete."""
    if not hasattr(tarfile, "data_filter"):
        raise ValueError(f"{archive}: expected Python 3.10.12, 3.11.4 or newer, to unpack safely, "
                         "found an older one: update it, or unpack the file and pass --data FOLDER")
    try:
        with tarfile.open(archive) as tar, \
                tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for member in tar.getmembers():
                path, plain = PurePosixPath(member.name), member.isfile() or member.isdir()
                if path.is_absolute() or ".." in path.parts or not plain:
                    raise ValueError(f"{archive}: expected plain files inside one folder, "
                                     f"found {member.name!r}; nothing was unpacked")
            inside = Path(temporary, "in")
            inside.mkdir()
            tar.extractall(inside, filter="data")
            os.rename(inside, folder)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, NotADirectoryError,
            IsADirectoryError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{archive}: damaged ({reason}); fetch the file again") from None


def file_sha256(path: Path) -> str:
    """The checksum that `sha256sum FILE` prints."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
