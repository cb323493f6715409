"""
Sentence encoders: BERT and RoBERTa in plain PyTorch, and the folders they live in.

    ids     (B, T)     token numbers of B sentences, padded on the right to T
    mask    (B, T)     True at a token, False at padding
    hidden  (B, T, D)  one vector a token, L + 1 times: the embeddings, then every layer
    x       (B, D)     one vector a sentence, pooled from the hidden states

BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) compute the same; only their positions
start at different numbers. Read from `SelfAttention` to `encode`; what follows, `load` and `save`,
is about other people's names for the same things.
Not here: tokenizing and downloading (data.py), what the vectors are trained for (losses.py).
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@dataclass(frozen=True)
class EncoderConfig:
    """The numbers that make an encoder; the defaults are BERT's, for config.json leaves some out.

    `SETTINGS`, below, has their names there.
    """

    model_type: str                                               # "bert" or "roberta"
    vocab_size: int
    width: int
    layers: int
    heads: int
    inner: int                                                    # width inside a layer
    positions: int = 512
    types: int = 2                                                # of sentences in one input
    dropout: float = 0.1
    attention_dropout: float = 0.1
    eps: float = 1e-12                                            # LayerNorm's
    pad_id: int = 0
    activation: str = "gelu"                                      # a name in ACTIVATIONS

    @property
    def first_position(self) -> int:
        """RoBERTa counts on from the padding's id, so its first positions are never used."""
        return self.pad_id + 1 if self.model_type == "roberta" else 0

    @property
    def usable_positions(self) -> int:
        return self.positions - self.first_position

    @classmethod
    def read(cls, folder: str | Path) -> "EncoderConfig":
        path = Path(folder) / "config.json"
        found = read(path)
        for key, allowed in SUPPORTED.items():
            if found.get(key, allowed[0]) not in allowed:
                raise wrong(path, f"{key} to be {' or '.join(map(str, allowed))}", found[key])
        values = {f.name: found.get(SETTINGS[f.name], f.default) for f in fields(cls)}
        for f in fields(cls):
            if type(values[f.name]) not in (f.type, int):
                raise wrong(path, f"{SETTINGS[f.name]} ({f.type.__name__})",
                            found.get(SETTINGS[f.name], "nothing"))
        if not values["heads"] or values["width"] % values["heads"]:
            raise wrong(path, "a hidden_size that num_attention_heads divides",
                        f"{values['width']} and {values['heads']}")
        return cls(**values)


def initialize(module: nn.Module) -> None:
    """BERT's start: weights from N(0, 0.02), biases 0. LayerNorm is the identity anyway."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class SelfAttention(nn.Module):
    """Each token takes a weighted average of all tokens of its own sentence, H times.

        softmax(q kᵀ / √(D / H)) v      Vaswani et al. 2017, eq. 1
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.query, self.key, self.value, self.output = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )
        self.heads, self.dropout = config.heads, config.attention_dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:         # (B, T, D), (B, T) -> (B, T, D)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)            # (B, H, T, D/H)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(                                   # (B, H, T, D/H)
            q, k, v, attn_mask=mask[:, None, None, :],            # nobody looks at padding
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(mixed.transpose(1, 2).flatten(2))                      # (B, T, D)


class Layer(nn.Module):
    """Tokens look at each other, then each works alone. LayerNorm follows the sum: post-norm."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.inner = nn.Linear(config.width, config.inner)
        self.outer = nn.Linear(config.inner, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:         # (B, T, D), (B, T) -> (B, T, D)
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.norm(x + self.dropout(self.outer(self.activation(self.inner(x)))))


class Encoder(nn.Module):
    """BERT or RoBERTa. What comes out is [embeddings, layer 1, ..., layer L]."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.types = nn.Embedding(config.types, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.apply(initialize)

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:  # (B, T), (B, T) -> (B, T, D)s
        T, most = ids.shape[1], self.config.usable_positions
        if T > most:
            raise ValueError(f"expected at most {most} tokens a sentence, found {T}; "
                             "lower max_tokens")
        positions = self.positions.weight[self.config.first_position :][:T]       # (T, D)
        # Type 0 marks the first of an input's sentences, which is the only one here.
        x = self.words(ids) + self.types.weight[0] + positions                    # (B, T, D)
        hidden = [self.dropout(self.norm(x))]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], mask))
        return hidden


# --- From tokens to a sentence ---

def cls(hidden: list[Tensor], mask: Tensor) -> Tensor:            # (B, T, D)s, (B, T) -> (B, D)
    """The first token of the last layer: [CLS] in BERT, <s> in RoBERTa."""
    return hidden[-1][:, 0]


def mean(hidden: list[Tensor], mask: Tensor) -> Tensor:
    """The mean token of the last layer, [CLS] and [SEP] included. Padding has no vote."""
    return (hidden[-1] * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def first_last(hidden: list[Tensor], mask: Tensor) -> Tensor:
    """The mean of layers 1 and L. SimCSE's code, too, means hidden[1], not the embeddings."""
    return mean([(hidden[1] + hidden[-1]) / 2], mask)


def last2(hidden: list[Tensor], mask: Tensor) -> Tensor:
    """The mean of the last two layers: SimCSE's `avg_top2`."""
    return mean([(hidden[-2] + hidden[-1]) / 2], mask)


POOLINGS = {"cls": cls, "mean": mean, "first-last": first_last, "last2": last2}


class Head(nn.Linear):
    """tanh(W c + b): SimCSE's "MLP" is this one layer, drawn afresh, without dropout."""

    def __init__(self, width: int):
        super().__init__(width, width)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:                       # (B, D) -> (B, D)
        return super().forward(x).tanh()


class SentenceEncoder(nn.Module):
    """One vector a sentence: encoder, pooling and, in training, a head.

    Unsupervised SimCSE drops the head after training, supervised SimCSE keeps it (`keep_head`).
    `normalize` makes vectors of length 1 outside training, `max_tokens` is where `encode` cuts,
    `files` are those that go unchanged from the folder read to the folder written.
    """

    def __init__(self, encoder: Encoder, *, pooling: str = "mean", head: Head | None = None,
                 keep_head: bool = False, normalize: bool = False, max_tokens: int | None = None,
                 files: dict[str, bytes] | None = None):
        super().__init__()
        self.config, self.encoder, self.head = encoder.config, encoder, head
        self.pooling, self.keep_head, self.normalize = pooling, keep_head, normalize
        self.max_tokens = min(max_tokens or self.config.positions, self.config.usable_positions)
        self.files = files or {}

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:       # (B, T), (B, T) -> (B, D)
        return self.embed(self.encoder(ids, mask), mask)

    def embed(self, hidden: list[Tensor], mask: Tensor) -> Tensor:
        """What follows the encoder, for a method that needs the layers as well."""
        x = POOLINGS[self.pooling](hidden, mask)                  # (B, D)
        if self.head is not None and (self.training or self.keep_head):
            x = self.head(x)
        return F.normalize(x, dim=-1) if self.normalize and not self.training else x


@torch.no_grad()
def encode(model: SentenceEncoder, tokenizer: Callable, sentences: Sequence[str], *,
           batch_size: int = 64, max_tokens: int | None = None,
           precision: torch.dtype = torch.float32) -> Tensor:     # N sentences -> (N, D)
    """The vectors of sentences, in their order, without dropout: float32, on the CPU.

    Equal sentences are encoded once, and those of like length together: that is little padding.
    """
    unique = sorted(dict.fromkeys(sentences), key=len, reverse=True)
    device, was_training = next(model.parameters()).device, model.training
    # Vectors stay on the device until the end: it computes while the next batch is tokenized.
    vectors = [torch.empty(0, model.config.width, device=device)]
    model.eval()
    try:
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            for start in range(0, len(unique), batch_size):
                ids, mask = tokenizer(unique[start : start + batch_size],
                                      max_tokens=max_tokens or model.max_tokens)
                vectors.append(model(ids.to(device), mask.to(device)).float())
    finally:
        model.train(was_training)
    row = {sentence: i for i, sentence in enumerate(unique)}
    return torch.cat(vectors).cpu()[[row[sentence] for sentence in sentences]]


class MaskedLMHead(nn.Module):
    """Scores every word of the vocabulary as the one behind a token.

    `words` decodes: the encoder's own word embeddings tie the two together, a clone does not.
    """

    def __init__(self, config: EncoderConfig, words: nn.Parameter):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.words = words                                                        # (V, D)
        self.bias = nn.Parameter(torch.zeros(len(words)))                         # (V,)
        # RoBERTa's head has GELU whatever its layers have.
        self.activation = ACTIVATIONS[config.activation if config.model_type == "bert" else "gelu"]
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:                       # (..., D) -> (..., V)
        return F.linear(self.norm(self.activation(self.dense(x))), self.words, self.bias)


# --- Other people's names ---

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
    ("^words", "embeddings.word_embeddings"),
    ("^positions", "embeddings.position_embeddings"),
    ("^types", "embeddings.token_type_embeddings"),
    ("^norm", "embeddings.LayerNorm"),
    ("^layers", "encoder.layer"),
    ("attention.(query|key|value)", r"attention.self.\1"),
    ("attention.output", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("inner", "intermediate.dense"),
    ("outer", "output.dense"),
    (r"\.norm", ".output.LayerNorm"),
]
MASKED_LM = {
    "bert": [("^", "cls.predictions."), ("dense", "transform.dense"),
             ("norm", "transform.LayerNorm"), ("words", "decoder.weight")],
    "roberta": [("^", "lm_head."), ("norm", "layer_norm"), ("words", "decoder.weight")],
}
POOLER, DENSE = [("^", "pooler.dense.")], [("^", "linear.")]      # a kept head, in either library
DENSE_SETTINGS = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
CHAINS = [["Transformer", "Pooling", *more]
          for more in ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"])]
TODAY = [(r"\.gamma$", ".weight"), (r"\.beta$", ".bias"), (r"^(bert|roberta)\.", "")]
NOT_ENCODER = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")
COPIED = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"]


def translate(tensors: dict[str, Tensor], table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """The same tensors under other names."""
    for pattern, new in table:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    return tensors


def wrong(path: str | Path, expected: object, found: object) -> ValueError:
    """Where, what was expected, what was found, and what to do about it."""
    return ValueError(f"{path}: expected {expected}, found {found}; choose another encoder")


def read(path: Path) -> dict | list:
    """What a JSON or safetensors file holds; all that can be wrong with it is said here."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected an encoder as Hugging Face stores "
                                "it, with its weights in model.safetensors; choose another folder")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = json.loads(path.read_bytes())
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    if not isinstance(content, list if path.name == "modules.json" else dict):
        raise wrong(path, "settings of an encoder", content)
    return content


def fill(module: nn.Module, tensors: dict[str, Tensor], table: list[tuple[str, str]],
         path: Path) -> None:
    """Every tensor of the module comes from the file, and none of the file's is left over."""
    own = translate(module.state_dict(), table)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise wrong(path, "the tensors that config.json implies",
                    f"{missing or 'none'} missing and {extra or 'none'} left over")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise wrong(path, f"{name} of shape {[*own[name].shape]}", [*tensor.shape])
        if not tensor.isfinite().all():
            raise wrong(path, f"finite numbers in {name}", "NaN or infinity")
        own[name].copy_(tensor)                                   # fp16 becomes fp32 here


def load(folder: str | Path, *, pooling: str | None = None,
         dropout: float | None = None) -> SentenceEncoder:
    """The encoder of a Hugging Face or sentence-transformers folder, pooled as the folder says.

    `pooling` overrides that; `dropout` overrides both rates, of hidden states and of attention.
    """
    folder = Path(folder)
    config, path = EncoderConfig.read(folder), folder / "model.safetensors"
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout)
    encoder = Encoder(config)
    fill(encoder, {name: tensor for name, tensor in translate(read(path), TODAY).items()
                   if not name.startswith(NOT_ENCODER)}, ENCODER, path)
    parts = read_parts(folder, config.width)
    parts["pooling"] = pooling or parts["pooling"]
    files = {name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()}
    return SentenceEncoder(encoder, files=files, **parts)


def read_parts(folder: Path, width: int) -> dict:
    """What sentence-transformers adds to the encoder; where it says nothing, that is the mean."""
    parts, limits, path = {}, folder / "sentence_bert_config.json", folder / "modules.json"
    if limits.is_file():
        parts["max_tokens"] = read(limits).get("max_seq_length")
    if not path.is_file():
        return parts | {"pooling": "mean"}
    modules = read(path)
    kinds = [module["type"].split(".")[-1] for module in modules]
    if kinds not in CHAINS:
        raise wrong(path, f"one of {CHAINS}", kinds)
    parts["pooling"] = read_pooling(folder / modules[1]["path"] / "config.json")
    parts["normalize"] = "Normalize" in kinds
    if "Dense" in kinds:
        dense = folder / modules[2]["path"]
        settings, weights = read(dense / "config.json"), dense / "model.safetensors"
        if not DENSE_SETTINGS.items() <= settings.items() or settings.get("use_residual"):
            raise wrong(dense / "config.json", DENSE_SETTINGS, settings)
        parts |= {"head": Head(width), "keep_head": True}
        fill(parts["head"], read(weights), DENSE, weights)
    return parts


def read_pooling(path: Path) -> str:
    """The one that is on: `"pooling_mode": "mean"` or, in older files, one of several booleans."""
    settings = read(path)
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    found = settings.get("pooling_mode", on)
    for name, key in (("cls", "pooling_mode_cls_token"), ("mean", "pooling_mode_mean_tokens")):
        if found in (name, [key]):
            return name
    raise wrong(path, "cls or mean pooling", found)


def load_masked_lm(folder: str | Path, model: SentenceEncoder) -> MaskedLMHead:
    """The head that the encoder was pre-trained with.

    Its decoder starts as a copy of the word embeddings and goes its own way, as in SimCSE's code;
    `head.words = model.encoder.words.weight` ties them again.
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


def check_vocabulary(config: EncoderConfig, tokenizer_size: int) -> None:
    """An encoder may know a few words more than its tokenizer, for a round number; never fewer."""
    if not 0.9 * config.vocab_size <= tokenizer_size <= config.vocab_size:
        raise wrong("tokenizer.json", f"90 to 100 % of the encoder's {config.vocab_size} entries",
                    tokenizer_size)


def save(model: SentenceEncoder, folder: str | Path) -> None:
    """Write a folder that loads here, in transformers and in sentence-transformers.

    Every file is complete on the disk before the first takes its place: where writing fails, the
    old ones stand. A head that serves training only is no part of the model and left out.
    """
    files, folder = contents(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as waiting:
        for name, content in files.items():
            write(Path(waiting, name), content)
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(Path(waiting, name), folder / name)


def write(path: Path, content: bytes | dict | list) -> None:
    """The opposite of `read`. Afterwards the file is on the disk, not on its way there."""
    if path.suffix == ".safetensors":
        plain = {name: tensor.float().cpu().contiguous() for name, tensor in content.items()}
        content = safetensors.torch.save(plain, metadata={"format": "pt"})
    elif not isinstance(content, bytes):
        content = json.dumps(content, indent=2).encode()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def contents(model: SentenceEncoder) -> dict[str, bytes | dict | list]:
    """Every file of the folder, by name."""
    if model.pooling not in ("cls", "mean"):
        raise ValueError(f"expected cls or mean pooling, found {model.pooling}, which has no name "
                         "in sentence-transformers; use it for evaluation only")
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
            "word_embedding_dimension": width, "pooling_mode_cls_token": model.pooling == "cls",
            "pooling_mode_mean_tokens": model.pooling == "mean",
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
