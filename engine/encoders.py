"""
How do encoders come in and go out? Folders as Hugging Face stores them.

    load(folder) -> SentenceEncoder       save(model, folder)
    load_masked_lm(folder, model)         save_masked_lm(model, head, folder)

What was saved loads here, in transformers and in sentence-transformers, with the same vectors. One
table for settings and one for tensors translate our names, both ways. A tensor that is missing or
left over is an error.
"""

import json
import math
import re
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from engine.files import packed, put
from model import ACTIVATIONS, Encoder, EncoderConfig, Head, MaskedLMHead, SentenceEncoder

SETTINGS = {                                                      # ours -> config.json's
    "model_type": "model_type", "vocab_size": "vocab_size", "width": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "inner": "intermediate_size",
    "positions": "max_position_embeddings", "types": "type_vocab_size",
    "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob",
    "eps": "layer_norm_eps", "pad_id": "pad_token_id", "activation": "hidden_act",
}
SUPPORTED = {
    "model_type": ["bert", "roberta"], "hidden_act": list(ACTIVATIONS), "is_decoder": [False],
    "position_embedding_type": ["absolute"], "add_cross_attention": [False],
}
ENCODER = [                                                       # ours -> model.safetensors'
    ("^words", "embeddings.word_embeddings"), ("^positions", "embeddings.position_embeddings"),
    ("^types", "embeddings.token_type_embeddings"), ("^norm", "embeddings.LayerNorm"),
    ("^layers", "encoder.layer"), ("attention.(query|key|value)", r"attention.self.\1"),
    ("attention.output", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"), ("inner", "intermediate.dense"),
    ("outer", "output.dense"), (r"\.norm", ".output.LayerNorm"),
]
MASKED_LM = {
    "bert": [("^", "cls.predictions."), ("dense", "transform.dense"),
             ("norm", "transform.LayerNorm"), ("words", "decoder.weight")],
    "roberta": [("^", "lm_head."), ("norm", "layer_norm"), ("words", "decoder.weight")],
}
POOLING_KEYS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
POOLER, DENSE = [("^", "pooler.dense.")], [("^", "linear.")]      # a kept head, in either library
DENSE_SETTINGS = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
CHAINS = [["Transformer", "Pooling", *more]
          for more in ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"])]
TODAY = [(r"\.gamma$", ".weight"), (r"\.beta$", ".bias"), (r"^(bert|roberta)\.", "")]
NOT_ENCODER = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")
COPIED = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"]


def read_config(folder: str | Path) -> EncoderConfig:
    """The numbers in config.json; refuses an encoder that ours does not compute."""
    path = Path(folder) / "config.json"
    found = read(path)
    for key, allowed in SUPPORTED.items():
        if found.get(key, allowed[0]) not in allowed:
            raise wrong(path, f"{key} to be {' or '.join(map(str, allowed))}", found[key])
    values = {f.name: found.get(SETTINGS[f.name], f.default) for f in fields(EncoderConfig)}
    for f in fields(EncoderConfig):
        if type(values[f.name]) not in (f.type, int):
            raise wrong(path, f"{SETTINGS[f.name]} ({f.type.__name__})",
                        found.get(SETTINGS[f.name], "nothing"))
    config = EncoderConfig(**values)
    check_numbers(config, path)
    return config


def check_numbers(config: EncoderConfig, path: Path) -> None:
    """Refuse numbers that no encoder can have."""
    expected = {name: ("1 or more", getattr(config, name) >= 1) for name in
                ("vocab_size", "width", "layers", "heads", "inner", "types", "usable_positions")}
    expected |= {name: ("from 0 to 1", 0 <= getattr(config, name) <= 1)
                 for name in ("dropout", "attention_dropout")}
    expected |= {"eps": ("above 0 and finite", 0 < config.eps < math.inf),
                 "pad_id": ("a number below vocab_size", 0 <= config.pad_id < config.vocab_size)}
    for name, (what, true) in expected.items():
        if not true:
            raise wrong(path, f"{SETTINGS.get(name, name)} to be {what}", getattr(config, name))
    if config.width % config.heads:
        raise wrong(path, "a hidden_size that num_attention_heads divides",
                    f"{config.width} and {config.heads}")


def translate(tensors: dict[str, Tensor], table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """The same tensors under other names."""
    for pattern, new in table:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def wrong(path: str | Path, expected: object, found: object) -> ValueError:
    """The error for a file that makes no encoder of ours."""
    return ValueError(f"{path}: expected {expected}, found {found}; choose another encoder")


def read(path: Path) -> dict | list:
    """The content of a JSON or safetensors file, refused where the file is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected an encoder as Hugging Face stores it,"
                                " with model.safetensors; choose another folder")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    if not isinstance(content, list if path.name == "modules.json" else dict):
        raise wrong(path, "settings of an encoder", content)
    return content


def fill(module: nn.Module, tensors: dict[str, Tensor], table: list[tuple[str, str]],
         path: Path) -> None:
    """Fill every tensor of the module from those of a file, and leave none of these over."""
    own = translate(module.state_dict(), table)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise wrong(path, "the tensors that config.json implies",
                    f"{missing or 'none'} missing and {extra or 'none'} left over")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise wrong(path, f"{name} of shape {[*own[name].shape]}", [*tensor.shape])
        if not tensor.is_floating_point():
            raise wrong(path, f"floating-point numbers in {name}", tensor.dtype)
        if not tensor.float().isfinite().all():
            raise wrong(path, f"finite numbers in {name}", "NaN or infinity")
        own[name].copy_(tensor)                                   # fp16 becomes fp32 here


def load(folder: str | Path, *, pooling: str | None = None,
         dropout: float | None = None) -> SentenceEncoder:
    """The encoder of a Hugging Face or sentence-transformers folder, pooled as the folder says.

    `pooling` overrides that; `dropout` overrides both rates, of hidden states and of attention.
    """
    folder = Path(folder)
    config, path = read_config(folder), folder / "model.safetensors"
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout)
    tensors = {name: tensor for name, tensor in translate(read(path), TODAY).items()
               if not name.startswith(NOT_ENCODER)}
    check_size(config, sum(tensor.numel() for tensor in tensors.values()), path)
    encoder = Encoder(config)
    fill(encoder, tensors, ENCODER, path)
    found = read_modules(folder, config.width) | ({"pooling": pooling} if pooling else {})
    files = {name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()}
    return SentenceEncoder(encoder, files=files, **found)


def check_size(config: EncoderConfig, found: int, path: Path) -> None:
    """Refuse an encoder that the file cannot fill before it is made: it could take all memory."""
    least = config.width * (config.vocab_size + config.positions + config.types
                            + config.layers * (4 * config.width + 2 * config.inner))
    if found < least:
        raise wrong(path, f"{least} numbers or more, as config.json implies", found)


def read_modules(folder: Path, width: int) -> dict:
    """The modules after the encoder, as sentence-transformers has them; without any, the mean."""
    found, limits, path = {}, folder / "sentence_bert_config.json", folder / "modules.json"
    if limits.is_file():
        most = found["max_tokens"] = read(limits).get("max_seq_length")
        if most is not None and (type(most) is not int or most < 3):
            raise wrong(limits, "max_seq_length to be 3 or more", most)
    if not path.is_file():
        return found | {"pooling": "mean"}
    modules = read(path)
    for module in modules:
        if not (isinstance(module, dict) and isinstance(module.get("type"), str)
                and isinstance(module.get("path"), str)):
            raise wrong(path, "modules with a type and a path", module)
    kinds = [module["type"].split(".")[-1] for module in modules]
    if kinds not in CHAINS:
        raise wrong(path, f"one of {CHAINS}", kinds)
    found["pooling"] = read_pooling(folder / modules[1]["path"] / "config.json")
    found["normalize"] = "Normalize" in kinds
    if "Dense" in kinds:
        dense = folder / modules[2]["path"]
        settings, weights = read(dense / "config.json"), dense / "model.safetensors"
        if not DENSE_SETTINGS.items() <= settings.items() or settings.get("use_residual"):
            raise wrong(dense / "config.json", DENSE_SETTINGS, settings)
        found |= {"head": Head(width), "keep_head": True}
        fill(found["head"], read(weights), DENSE, weights)
    return found


def read_pooling(path: Path) -> str:
    """The pooling: `"pooling_mode": "mean"` or, in older files, one of several booleans."""
    settings = read(path)
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    found = settings.get("pooling_mode", on)
    for pooling, key in POOLING_KEYS.items():
        if found in (pooling, [key]):
            return pooling
    raise wrong(path, "cls or mean pooling", found)


def load_masked_lm(folder: str | Path, model: SentenceEncoder) -> MaskedLMHead:
    """The head that the encoder was pre-trained with.

    Its decoder starts as a copy of the word embeddings, which SimCSE's code trains apart from them;
    `head.words = model.encoder.words.weight` ties the two again.
    """
    path, table = Path(folder) / "model.safetensors", MASKED_LM[model.config.model_type]
    found = {name: tensor for name, tensor in sorted(translate(read(path), TODAY).items())
             if name.startswith(("cls.predictions.", "lm_head."))}
    if not found:
        raise wrong(path, "a masked-LM head (cls.predictions or lm_head)", "none")
    words = model.encoder.words.weight.detach()
    head = MaskedLMHead(model.config, nn.Parameter(words.clone()))
    # A tied decoder is not in the file; an untied one is, with a bias that replaces the other.
    found = translate({"words": words}, table) | translate(found, [("decoder.bias", "bias")])
    fill(head, found, table, path)
    return head


def check_vocabulary(config: EncoderConfig, ids: Collection[int]) -> None:
    """Refuse a tokenizer with more words than the encoder, or far fewer (a few: rounding)."""
    if not 0.9 * config.vocab_size <= len(ids) <= config.vocab_size:
        raise wrong("tokenizer.json", f"90 to 100 % of the encoder's {config.vocab_size} entries",
                    len(ids))
    if max(ids) >= config.vocab_size:
        raise wrong("tokenizer.json", f"ids below the encoder's {config.vocab_size}", max(ids))


def save(model: SentenceEncoder, folder: str | Path) -> None:
    """Write a folder that loads here, in transformers and in sentence-transformers."""
    put(contents(model), Path(folder))


def contents(model: SentenceEncoder) -> dict[str, bytes | dict | list]:
    """Every file of the folder, by name; a head that only training uses is left out."""
    if model.pooling not in ("cls", "mean"):
        raise ValueError(f"expected cls or mean pooling, found {model.pooling}, which sentence-"
                         "transformers lacks; use it for evaluation only")
    config, width = json.loads(model.files.get("config.json", "{}")), model.config.width
    config |= {theirs: getattr(model.config, ours) for ours, theirs in SETTINGS.items()}
    config |= {"architectures": [model.config.model_type.capitalize() + "Model"],
               "torch_dtype": "float32", "dtype": "float32"}      # old and new readers differ
    head = model.head.state_dict() if model.head is not None and model.keep_head else {}
    chain = ["Transformer", "Pooling", *["Dense"] * bool(head), *["Normalize"] * model.normalize]
    files = model.files | {
        "config.json": config,
        "model.safetensors": translate(model.encoder.state_dict(), ENCODER),
        # sentence-transformers has moved its modules; new versions understand old addresses too.
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                          "type": f"sentence_transformers.models.{kind}"}
                         for i, kind in enumerate(chain)],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{key: model.pooling == pooling for pooling, key in POOLING_KEYS.items()},
            "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False},
        "sentence_bert_config.json": {"max_seq_length": model.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
    }
    if head:
        size = {"in_features": width, "out_features": width}
        files["2_Dense/config.json"] = size | DENSE_SETTINGS
        files["2_Dense/model.safetensors"] = translate(head, DENSE)
        files["model.safetensors"] |= translate(head, POOLER)     # transformers' pooler_output
    return files


def save_masked_lm(model: SentenceEncoder, head: MaskedLMHead, folder: str | Path) -> None:
    """Write encoder and tied head in float16 for transformers' AutoModelForMaskedLM."""
    kind = model.config.model_type
    files = {name: content for name, content in contents(model).items() if name in COPIED}
    files["config.json"] |= {"architectures": [kind.capitalize() + "ForMaskedLM"],
                             "tie_word_embeddings": True,
                             "torch_dtype": "float16", "dtype": "float16"}
    encoder = translate(model.encoder.state_dict(), [*ENCODER, ("^", f"{kind}.")])
    tied = translate(head.state_dict(), MASKED_LM[kind])
    del tied[next(name for name in tied if name.endswith("decoder.weight"))]
    files["model.safetensors"] = packed(encoder | tied, torch.float16)
    put(files, Path(folder))
