"""
What lies in the folder of an encoder? Its files, read or refused; what is none is named.

    read(path)       one JSON or safetensors file, or the shards of one
    home(folder)     where config.json, weights and tokenizer lie
    modules(folder)  what sentence-transformers does after the encoder
    way_on(path)     what lies there in place of a missing file, and what to do
"""

import json
import re
from pathlib import Path

import safetensors.torch
from torch import Tensor

ENCODER_FILES = ["config.json", "tokenizer.json", "model.safetensors"]
SETTINGS_FILES = ["tokenizer_config.json", "modules.json", "sentence_bert_config.json",
                  "sentence_roberta_config.json", "config_sentence_transformers.json",
                  "adapter_config.json"]
VOCABULARY_FILES = ["vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"]
TOKEN_SETTINGS = ("max_seq_length", "do_lower_case")
TODAYS_SETTINGS = {                   # which new versions of sentence-transformers write
    "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}}
CHAINS = [["Transformer", "Pooling", *more]
          for more in ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"])]
POINTER = b"version https://git-lfs.github.com/spec/"
CONVERT = ("pytorch_model.bin is a pickle, never read: convert it with cd {} && python -c \"import "
           "torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in "
           "torch.load('pytorch_model.bin', 'cpu', weights_only=True).items()}}, "
           "'model.safetensors', {{'format': 'pt'}})\"")
WEIGHTS = (".bin", ".h5", ".msgpack", ".onnx", ".gguf", ".pt", ".pth", ".ckpt", ".safetensors")
MERGE = ("an adapter (LoRA) of {0}: merge them with python -c \"from peft import "
         "AutoPeftModelForFeatureExtraction as A; A.from_pretrained('{1}').merge_and_unload()"
         ".save_pretrained('{1}-merged')\", copy the tokenizer of {0} to it, and name that folder")


def wrong(path: str | Path, expected: object, found: object) -> ValueError:
    """The error for a file that makes no encoder of ours."""
    return ValueError(f"{path}: expected {expected}, found {found}; choose another encoder")


def read(path: Path) -> dict | list:
    """The content of a JSON or safetensors file, refused where the file is missing or damaged.

    Weights may lie in several files, of which an index beside them tells.
    """
    if path.suffix == ".safetensors" and index_of(path).is_file() and not path.is_file():
        return {name: tensor for shard in shards(index_of(path))
                for name, tensor in unpacked(shard).items()}
    content = unpacked(path)
    if not isinstance(content, list if path.name == "modules.json" else dict):
        raise wrong(path, "settings of an encoder", content)
    return content


def unpacked(path: Path) -> dict[str, Tensor] | object:
    """What a single file holds, whatever it is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {way_on(path)}")
    refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            if not str(path).isprintable():                       # it opens no name but in UTF-8
                return safetensors.torch.load(path.read_bytes())
            return safetensors.torch.load_file(path)
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None


def refuse_pointer(path: Path) -> None:
    """Refuse what git leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a pointer of git-LFS, not the file: fetch that with git "
                             f"-C {path.parent} lfs pull")


def index_of(weights: Path) -> Path:
    """The file that lists where the tensors lie, of weights that are too large for one file."""
    return weights.with_name(weights.name + ".index.json")


def shards(index: Path) -> list[Path]:
    """The files over which the weights are spread, all beside their index."""
    names = read(index).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else ()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise wrong(index, "a weight_map from tensors to files beside it", names)
    return [index.with_name(name) for name in sorted(names)]


def modules(folder: Path) -> dict[str, Path]:
    """What modules.json lists, the encoder first, each with its folder; {} without such a file."""
    path = folder / "modules.json"
    found = read(path) if path.is_file() else []
    for module in found:
        if not (isinstance(module, dict) and isinstance(module.get("type"), str)
                and isinstance(module.get("path"), str)
                and not {"..", "/"} & set(Path(module["path"]).parts)):
            raise wrong(path, "modules with a type and a path", module)
    kinds = [re.sub(r"^sentence_transformers\..*?(\w+)$", r"\1", one["type"]) for one in found]
    kinds = [re.sub("^(BERT|RoBERTa)$", "Transformer", kind) for kind in kinds]   # early names
    if path.is_file() and kinds not in CHAINS:
        raise wrong(path, f"one of {CHAINS}", kinds)
    return {kind: folder / module["path"] for kind, module in zip(kinds, found)}


def home(folder: Path) -> Path:
    """The folder itself or, in early sentence-transformers, one inside it such as 0_BERT."""
    return modules(folder).get("Transformer", folder)


def sentence_settings(folder: Path) -> dict:
    """What sentence-transformers is told about tokens: max_seq_length and do_lower_case."""
    paths = [home(folder) / f"sentence_{kind}_config.json" for kind in ("bert", "roberta")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None or not modules(folder):                       # it looks there second
        return {}
    found = read(path)
    if odd := {key: value for key, value in found.items() if value and key not in TOKEN_SETTINGS
               and TODAYS_SETTINGS.get(key) != value}:
        raise wrong(path, f"no settings but {' and '.join(TOKEN_SETTINGS)}", odd)
    return found


def way_on(path: Path) -> str:
    """What lies in place of a missing file, and what to do."""
    folder, wants_config = path.parent, path.name == "config.json"
    if wants_config and (folder / "bert_config.json").is_file():
        return ("rename Google's bert_config.json to it, and add \"model_type\": \"bert\"; weights "
                "in .ckpt files must be converted with transformers 4")
    if wants_config and (inside := encoders_in(folder)):
        name = folder.name.removeprefix("models--").replace("--", "/")
        or_id = f", or the Hub id {name}" if folder.name.startswith("models--") else ""
        return f"{folder} only holds the folders of encoders: name one, such as {inside[0]}{or_id}"
    if index_of(folder / "model.safetensors").is_file():
        return "the index of the weights lists it: fetch it again"
    if path.suffix == ".safetensors" and (folder / "pytorch_model.bin").is_file():
        return CONVERT.format(folder)
    weights = [found.name for found in sorted(folder.glob("*")) if found.suffix in WEIGHTS]
    return ("expected an encoder as Hugging Face stores it, with model.safetensors"
            f"{', found ' if weights else ''}{', '.join(weights)}; choose another folder")


def encoders_in(folder: Path) -> list[Path]:
    """The encoders inside a folder of runs, of seeds or of the Hub's cache; the main one first."""
    main = folder / "refs" / "main"                               # the commit that the cache uses
    commit = main.read_text("utf-8").strip() if main.is_file() else ""
    found = [config.parent for pattern in ("snapshots/*/config.json", "*/config.json")
             for config in sorted(folder.glob(pattern)) if b"hidden_size" in config.read_bytes()]
    return sorted(found, key=lambda inside: inside.name != commit)
