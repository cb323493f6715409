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
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from engine.files import packed, put
from engine.layouts import MERGE, home, modules, read, sentence_settings, wrong
from engine.tokenizer_files import optional, rules_of
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
DENSE_USUAL = {"use_residual": False, "module_input_name": "sentence_embedding",
               "module_output_name": "sentence_embedding"}
TODAY = [(r"\.gamma$", ".weight"), (r"\.beta$", ".bias"), (r"^(bert|roberta)\.", "")]
NOT_ENCODER = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")
# Byte for byte: older libraries cannot read a tokenizer.json that a newer one has written.
COPIED = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
          "config_sentence_transformers.json"]


def read_config(folder: str | Path) -> EncoderConfig:
    """The numbers in config.json; refuses an encoder that ours does not compute."""
    path = home(Path(folder)) / "config.json"
    if (adapter := path.with_name("adapter_config.json")).is_file():
        raise ValueError(f"{adapter} is that of " + MERGE.format(
            read(adapter).get("base_model_name_or_path"), path.parent))
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


def in_thirds(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, what makes query, key and value at once split into a folder's three."""
    found = {}
    for name, tensor in tensors.items():
        parts = ["query", "key", "value"] if "query_key_value" in name else [""]
        found |= {name.replace("query_key_value", part): rows
                  for part, rows in zip(parts, tensor.chunk(len(parts)))}
    return found


def fill(module: nn.Module, tensors: dict[str, Tensor], table: list[tuple[str, str]],
         path: Path) -> None:
    """Fill every tensor of the module from those of a file, and leave none of these over."""
    own = translate(in_thirds(module.state_dict()), table)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        missing, extra = (some[:20] + ["..."] * (len(some) > 20) for some in (missing, extra))
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


def load(folder: str | Path, *, pooling: str | None = None, dropout: float | None = None,
         tell: Callable[[str], None] = lambda notice: None) -> SentenceEncoder:
    """The encoder of a Hugging Face or sentence-transformers folder, pooled as the folder says.

    A folder without a word on pooling is pooled by cls. `pooling` overrides that, and "pooler" is
    cls with the tanh layer in the file on top. `dropout` overrides both rates, of hidden states and
    of attention. What the user should know about it goes to `tell`.
    """
    folder, inner = Path(folder), home(Path(folder))
    config, path = read_config(folder), inner / "model.safetensors"
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout)
    tensors, heads = without_heads(read(path))
    parts = {name: x for name, x in tensors.items() if not name.startswith(NOT_ENCODER)}
    check_size(config, sum(tensor.numel() for tensor in parts.values()), path)
    encoder = Encoder(config)
    fill(encoder, parts, ENCODER, path)
    found = read_modules(folder, config.width)
    stated = found.setdefault("pooling", None)
    if unused := [name for name in heads if (name, pooling) != ("mlp", "pooler")]:
        tell(f"NOTICE: {path}: the encoder is taken without what stands on it: {', '.join(unused)}"
             + ("; --pooling pooler scores with mlp" if "mlp" in unused else ""))
    if pooling and stated not in (None, pooling):
        tell(f"NOTICE: --pooling {pooling} takes the place of {folder}'s own, {stated}")
    elif not (pooling or stated):
        tell(f"NOTICE: {folder} does not say how to pool: cls is assumed; choose with --pooling")
    if pooling == "pooler":
        found |= {"head": Head(config.width), "keep_head": True}
        fill(found["head"], {name: x for name, x in tensors.items()
                             if name.startswith("pooler.dense.")}, POOLER, path)
    found["pooling"] = {"pooler": "cls"}.get(pooling, pooling or stated or "cls")
    files = {name: (place / name).read_bytes() for place in (folder, inner) for name in COPIED
             if (place / name).is_file()}
    files["sentence_bert_config.json"] = json.dumps(sentence_settings(folder)).encode()
    if "tokenizer.json" not in files and not files.keys().isdisjoint(("vocab.txt", "merges.txt")):
        files["tokenizer.json"] = json.dumps(rules_of(folder)).encode()
    return SentenceEncoder(encoder, files=files, **found)


def without_heads(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of BERT under today's names, and the names of what stands on it.

    A model beyond BERT has bert. or roberta. before BERT's names. The training head of
    SimCSE's own code, mlp, becomes the pooler, as in the models that it published.
    """
    alone = not any(name.startswith(("bert.", "roberta.")) for name in tensors)
    heads = set() if alone else {name.split(".")[0] for name in tensors
                                 if not name.startswith(("bert.", "roberta.", *NOT_ENCODER))}
    kept = {name: x for name, x in tensors.items() if name.split(".")[0] not in heads}
    mlp = {name: x for name, x in tensors.items() if name.startswith("mlp.dense.") and not alone}
    return translate(kept, TODAY) | translate(mlp, [("^mlp", "pooler")]), sorted(heads)


def check_size(config: EncoderConfig, found: int, path: Path) -> None:
    """Refuse an encoder that the file cannot fill before it is made: it could take all memory."""
    least = config.width * (config.vocab_size + config.positions + config.types
                            + config.layers * (4 * config.width + 2 * config.inner))
    if found < least:
        raise wrong(path, f"{least} numbers or more, as config.json implies", found)


def read_modules(folder: Path, width: int) -> dict:
    """What follows the encoder, as sentence-transformers has it; no pooling if none is stated."""
    chain, path = modules(folder), folder / "config_sentence_transformers.json"
    prompts = optional(path)
    if prompt := (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name")):
        raise wrong(path, "default_prompt_name to be null, as nothing is put before a sentence",
                    repr(prompt))
    found = {"max_tokens": token_limit(folder), "normalize": "Normalize" in chain}
    if "Pooling" in chain:
        found["pooling"] = read_pooling(chain["Pooling"] / "config.json")
    if "Dense" in chain:
        settings, weights = (chain["Dense"] / name for name in ("config.json", "model.safetensors"))
        expected, said = DENSE_SETTINGS | DENSE_USUAL, read(settings)
        if any(said.get(key, value) != value for key, value in expected.items()):
            raise wrong(settings, DENSE_SETTINGS, said)
        found |= {"head": Head(width), "keep_head": True}
        fill(found["head"], read(weights), DENSE, weights)
    return found


def token_limit(folder: Path) -> int | None:
    """The tokens at which sentence-transformers cuts a sentence, where the folder says."""
    for path, key, said in (
            (folder, "max_seq_length", sentence_settings(folder)),
            (home(folder), "model_max_length", optional(home(folder) / "tokenizer_config.json"))):
        if (most := said.get(key)) is not None:
            if type(most) not in (int, float) or not 3 <= most:
                raise wrong(path, f"{key} to be 3 or more", most)
            return int(min(most, 10**9))                          # 10**30 stands for none
    return None


def read_pooling(path: Path) -> str:
    """The pooling: `"pooling_mode": "mean"` or, in older files, one of several booleans."""
    settings = read(path)
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    found = settings.get("pooling_mode", on)
    if settings.get("include_prompt") is False:
        raise wrong(path, "a pooling of all tokens, those of a prompt too", "include_prompt false")
    for pooling, key in POOLING_KEYS.items():
        if found in (pooling, [key]):
            return pooling
    raise wrong(path, "cls or mean pooling", found)


def load_masked_lm(folder: str | Path, model: SentenceEncoder) -> MaskedLMHead:
    """The head that the encoder was pre-trained with.

    Its decoder starts as a copy of the word embeddings, which SimCSE's code trains apart from them;
    `head.words = model.encoder.words.weight` ties the two again.
    """
    path, table = home(Path(folder)) / "model.safetensors", MASKED_LM[model.config.model_type]
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
    """Refuse a tokenizer with an id that the encoder has no embedding for."""
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
    said = json.loads(model.files.get("sentence_bert_config.json", "{}"))
    files = {
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
        **model.files,
        "config.json": config,
        "model.safetensors": translate(in_thirds(model.encoder.state_dict()), ENCODER),
        # sentence-transformers has moved its modules; new versions understand old addresses too.
        "modules.json": [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                          "type": f"sentence_transformers.models.{kind}"}
                         for i, kind in enumerate(chain)],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{key: model.pooling == pooling for pooling, key in POOLING_KEYS.items()},
            "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False},
        "sentence_bert_config.json": {"max_seq_length": model.max_tokens,
                                      "do_lower_case": bool(said.get("do_lower_case"))},
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
    files = contents(model)
    files["config.json"] |= {"architectures": [kind.capitalize() + "ForMaskedLM"],
                             "tie_word_embeddings": True,
                             "torch_dtype": "float16", "dtype": "float16"}
    encoder = translate(in_thirds(model.encoder.state_dict()), [*ENCODER, ("^", f"{kind}.")])
    tied = translate(head.state_dict(), MASKED_LM[kind])
    del tied[next(name for name in tied if name.endswith("decoder.weight"))]
    files["model.safetensors"] = packed(encoder | tied, torch.float16)
    put(files, Path(folder))
