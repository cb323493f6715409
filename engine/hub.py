"""
Where do files come from? A local folder first, then the Hugging Face Hub and its client's cache.

    data_file(names, folder)     a corpus          encoder_folder(name)      an encoder
    senteval_folder(folder)      the STS sets      file_sha256(path)         which file it was
"""

import hashlib
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

HUB_DATASET = "princeton-nlp/datasets-for-simcse"
ON_THE_HUB = ["wiki1m_for_simcse.txt", "nli_for_simcse.csv", "senteval.tar"]

ENCODER_FILES = ["config.json", "tokenizer.json", "model.safetensors"]
ENCODER_EXTRAS = ["tokenizer_config.json", "modules.json", "sentence_bert_config.json",
                  "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]


def local_folder(data: Path | None) -> Path | None:
    """The folder given by --data, else by MINCSE_DATA, else none."""
    folder = data or (Path(os.environ["MINCSE_DATA"]) if os.environ.get("MINCSE_DATA") else None)
    if folder and not folder.is_dir():
        origin = "--data" if data else "MINCSE_DATA"
        raise FileNotFoundError(f"{folder}: {origin} names this folder, but it does not exist")
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
    if not remote:
        raise FileNotFoundError(f"{names[0]}: not on the Hub, and not in {folder or 'any folder'}; "
                                "name its folder with --data or MINCSE_DATA")
    return from_hub(remote[0])


def from_hub(name: str) -> Path:
    """A file of SimCSE's data set on the Hub, from its client's cache."""
    with hub_errors(f"{name} of {HUB_DATASET}", instead="--data FOLDER or MINCSE_DATA=FOLDER"):
        from huggingface_hub import hf_hub_download  # here: it is slow to import
        return Path(hf_hub_download(HUB_DATASET, name, repo_type="dataset"))


def encoder_folder(name: str) -> Path:
    """The folder of an encoder: the built-in `mini`, a local folder, or a Hub id."""
    folder = Path(__file__).parent.parent / "mini" if name == "mini" else Path(name)
    if folder.is_dir():
        return folder
    with hub_errors(f"the encoder {name}", instead="--encoder FOLDER"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        for file in ENCODER_FILES:
            path = Path(hf_hub_download(name, file))
        for file in ENCODER_EXTRAS:
            try:
                hf_hub_download(name, file)
            except LocalEntryNotFoundError:     # no connection, and no need to try it again
                break
            except EntryNotFoundError:          # this encoder comes without the file
                continue
    return path.parent


@contextmanager
def hub_errors(what: str, *, instead: str) -> Iterator[None]:
    """Turn whatever goes wrong between here and the Hub into one sentence."""
    try:
        yield
    except Exception as error:                  # three libraries raise their own here
        server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        raise FileNotFoundError(
            f"{what}: not on this machine, nor from the Hub at {server} ({reason}); look at "
            f"HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN, or pass {instead}") from error


def senteval_folder(data: Path | None) -> Path:
    """The folder with STS/ and SICK/: senteval/downstream here, else senteval.tar from the Hub."""
    folder = local_folder(data)
    if folder and (folder / "senteval" / "downstream").is_dir():
        return folder / "senteval" / "downstream"
    archive = from_hub("senteval.tar")
    unpacked = archive.parent / f"mincse-senteval-{file_sha256(archive)[:16]}"
    if not unpacked.is_dir():
        unpack(archive, unpacked)
    for sick in sorted(unpacked.rglob("SICK")):
        if (sick.parent / "STS").is_dir():
            return sick.parent
    raise ValueError(f"{archive}: expected folders STS and SICK side by side, found none")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack plain files only, and only into the folder, which appears when it is complete."""
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
