"""
What encodes a sentence? BERT and RoBERTa in plain PyTorch, poolings and heads.

    ids     (B, T)     token numbers of B sentences, padded on the right to T
    mask    (B, T)     True at a token, False at padding
    places  (R,)       where the R tokens are among all B·T, the rest being padding
    hidden  (B, T, D)  one vector a token, L + 1 times: the embeddings, then every layer
    x       (B, D)     one vector a sentence, pooled from the hidden states

BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) differ only in the number of their first
position. Not here: reading and writing weights (engine/encoders.py), tokens (data.py), losses.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@dataclass(frozen=True)
class EncoderConfig:
    """The numbers that make an encoder; the defaults are BERT's, as config.json may lack some."""
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
        """RoBERTa counts on from the padding's id, so it never uses its first positions."""
        return self.pad_id + 1 if self.model_type == "roberta" else 0

    @property
    def usable_positions(self) -> int:
        return self.positions - self.first_position


def initialize(module: nn.Module) -> None:
    """BERT's start: weights from N(0, 0.02), biases 0. LayerNorm is the identity anyway."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class Tokens:
    """The R real tokens of a batch in one block; only attention computes on padding."""
    rows: Tensor                                                  # (R, D)
    places: Tensor                                                # (R,) among all B·T
    mask: Tensor                                                  # (B, T)
    visible: Tensor                                               # (B, 1, 1, T) -inf: padding

    @property
    def whole(self) -> bool:
        """True where nothing is padding, so that packing only changes the shape."""
        return len(self.places) == self.mask.numel()

    def pack(self, x: Tensor) -> Tensor:                          # (B, T, D) -> (R, D)
        x = x.flatten(0, 1)
        return x if self.whole else x.index_select(0, self.places)

    def unpack(self, rows: Tensor) -> Tensor:                     # (R, D) -> (B, T, D)
        """The rows in their places; padding is 0."""
        if not self.whole:
            empty = rows.new_zeros(self.mask.numel(), rows.shape[1])
            rows = empty.index_copy_(0, self.places, rows)
        return rows.unflatten(0, self.mask.shape)

    def starts(self) -> Tensor:                                   # -> (B,)
        """The row of each sentence's first token."""
        lengths = self.mask.sum(dim=1)
        return lengths.cumsum(0) - lengths

    def first(self) -> "Tokens":
        """Only the first token of every sentence: T is 1."""
        rows = self.rows.index_select(0, self.starts())           # (B, D)
        return replace(self, rows=rows, mask=self.mask[:, :1],
                       places=torch.arange(len(rows), device=rows.device))


@dataclass(frozen=True)
class Hidden(Sequence):
    """The hidden states of a batch, (B, T, D) each; one is unpacked only when it is read."""
    states: list[Tokens]

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, which: int | slice) -> Tensor | list[Tensor]:
        if isinstance(which, slice):
            return [self[layer] for layer in range(len(self))[which]]
        return self.states[which].unpack(self.states[which].rows)


def places_of(mask: Tensor) -> Tensor:                            # (B, T) -> (R,)
    """Where the real tokens are; for a mask on the GPU the host waits, as it must know R."""
    return mask.flatten().nonzero()[:, 0]


class SelfAttention(nn.Module):
    """Each token takes a weighted average of all tokens of its own sentence, H times.

        softmax(q kᵀ / √(D / H)) v      Vaswani et al. 2017, eq. 1
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.dropout = config.attention_dropout
        self.each = config.heads, config.width // config.heads    # H, D/H

    def project(self, x: Tokens, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """What the weight's rows make of the tokens, D rows at a time: (B, H, T, D/H)s."""
        made = x.unpack(F.linear(x.rows, weight, bias))
        return [each.transpose(1, 2) for each in made.unflatten(-1, (-1, *self.each)).unbind(dim=2)]

    def forward(self, asking: Tokens, x: Tokens) -> Tensor:       # Q tokens, R tokens -> (Q, D)
        weights = self.query_key_value.weight, self.query_key_value.bias          # (3·D, D), (3·D,)
        if asking is x:
            q, k, v = self.project(x, *weights)                   # in one product
        else:
            D = x.rows.shape[1]
            [q], [k, v] = map(self.project, (asking, x), *(w.split([D, 2 * D]) for w in weights))
        mixed = F.scaled_dot_product_attention(                                   # (B, H, T, D/H)
            q, k, v, attn_mask=x.visible,                         # no token looks at padding
            dropout_p=self.dropout if self.training else 0.0)
        return self.output(asking.pack(mixed.transpose(1, 2).flatten(2)))         # (Q, D)


class Layer(nn.Module):
    """Attention between tokens, then a network on each alone; LayerNorm follows each sum."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        self.inner = nn.Linear(config.width, config.inner)
        self.outer = nn.Linear(config.inner, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, asking: Tokens, x: Tokens) -> Tokens:       # Q tokens, R tokens -> Q tokens
        """The next hidden state of the tokens that ask, which are some or all of x."""
        rows = self.attention_norm(asking.rows + self.dropout(self.attention(asking, x)))
        rows = self.norm(rows + self.dropout(self.outer(self.activation(self.inner(rows)))))
        return replace(asking, rows=rows)


class Encoder(nn.Module):
    """BERT or RoBERTa; it returns [embeddings, layer 1, ..., layer L], where padding is 0."""

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

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor | None = None, *,
                first_only: bool = False) -> Hidden:              # (B, T), (B, T) -> (B, T, D)s
        """The hidden states; `first_only` leaves but the first token of the last: (B, 1, D)."""
        return self.through(self.embed(ids, mask, places), first_only=first_only)

    def embed(self, ids: Tensor, mask: Tensor, places: Tensor | None = None) -> Tokens:
        """The input of the first layer: word, position and type, normalized.  -> R tokens"""
        T, most = ids.shape[1], self.config.usable_positions
        if T > most:
            raise ValueError(f"expected at most {most} tokens, found {T}; lower max_tokens")
        positions = self.positions.weight[self.config.first_position :][:T]       # (T, D)
        # Type 0 marks the first of an input's sentences, which is the only one here.
        x = self.words(ids) + self.types.weight[0] + positions                    # (B, T, D)
        places = places_of(mask) if places is None else places                    # (R,)
        rows = self.dropout(self.norm(x.flatten(0, 1).index_select(0, places)))   # (R, D)
        # Made here in the precision of products, or every layer would convert it.
        kind = x.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        visible = mask.to(precision).log()[:, None, None, :]      # log 1 = 0, log 0 = -inf
        return Tokens(rows, places, mask, visible)

    def through(self, x: Tokens, *, first_only: bool = False) -> Hidden:
        """The hidden states from given embeddings on: L + 1 x (B, T, D)."""
        states = [x]
        for layer in self.layers:
            last = layer is self.layers[-1]
            states.append(x := layer(x.first() if first_only and last else x, x))
        return Hidden(states)


def cls(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:        # (B, T, D)s, (B, T) -> (B, D)
    """The first token of the last layer: [CLS] in BERT, <s> in RoBERTa."""
    return hidden[-1][:, 0]


def mean(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The mean of the last layer over the real tokens, [CLS] and [SEP] included."""
    return (hidden[-1] * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def first_last(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The mean of layers 1 and L: SimCSE's code, too, takes hidden[1], not the embeddings.

    So raw BERT-base scores 60.73, as users of that code report (its issue 285); the 56.70 of the
    paper's Table 5 is from an older code, which averaged the embeddings with layer L.
    """
    return mean([(hidden[1] + hidden[-1]) / 2], mask)


def last2(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
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
    `normalize` makes vectors of length 1 outside training; `encode` cuts at `max_tokens`; `files`
    go unchanged from the folder read to the folder written.
    """

    def __init__(self, encoder: Encoder, *, pooling: str = "mean", head: nn.Module | None = None,
                 keep_head: bool = False, normalize: bool = False, max_tokens: int | None = None,
                 files: dict[str, bytes] | None = None):
        super().__init__()
        self.config, self.encoder, self.head = encoder.config, encoder, head
        self.pooling, self.keep_head, self.normalize = pooling, keep_head, normalize
        self.max_tokens = min(max_tokens or self.config.positions, self.config.usable_positions)
        self.files = files or {}

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor | None = None) -> Tensor:
        return self.embed(self.layers(ids, mask, places), mask)   # (B, T), (B, T) -> (B, D)

    def layers(self, ids: Tensor, mask: Tensor, places: Tensor | None = None) -> Hidden:
        """The hidden states that the pooling reads: for [CLS], one token of the last layer."""
        return self.encoder(ids, mask, places, first_only=self.pooling == "cls")

    def embed(self, hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
        """The vectors from the hidden states, for a method that needs these as well."""
        x = POOLINGS[self.pooling](hidden, mask)                  # (B, D)
        if self.head is not None and (self.training or self.keep_head):
            x = self.head(x)
        return F.normalize(x, dim=-1) if self.normalize and not self.training else x


def sent(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait until a GPU has it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@torch.no_grad()
def encode(model: SentenceEncoder, tokenizer: Callable, sentences: Sequence[str], *,
           batch_size: int = 64, max_tokens: int | None = None, pooling: str | None = None,
           precision: torch.dtype = torch.float32) -> Tensor:     # N sentences -> (N, D)
    """The vectors of sentences, in their order, without dropout: float32, on the CPU.

    Equal sentences are encoded once, and those of like length together, for little padding.
    `pooling` replaces the model's own, and then no head is used.
    """
    if isinstance(sentences, str):            # or every letter would be a sentence
        raise ValueError(f"expected a list of sentences, found one string, {sentences[:40]!r}: "
                         "put it in brackets")
    unique = sorted(dict.fromkeys(sentences), key=len, reverse=True)
    device, was_training = next(model.parameters()).device, model.training
    # Vectors stay on the device, which so computes while the next batch is tokenized.
    vectors = torch.empty(len(unique), model.config.width, device=device)
    model.eval()
    try:
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            for rows, ids, mask in batches_by_length(unique, tokenizer, batch_size,
                                                     max_tokens or model.max_tokens):
                rows, ids, mask, places = (
                    sent(x, device) for x in (rows, ids, mask, places_of(mask)))
                x = (POOLINGS[pooling](model.encoder(ids, mask, places), mask) if pooling
                     else model(ids, mask, places))               # (B, D)
                vectors[rows] = x.float()
    finally:
        model.train(was_training)
    row = {sentence: i for i, sentence in enumerate(unique)}
    return vectors.cpu()[[row[sentence] for sentence in sentences]]


def batches_by_length(sentences: Sequence[str], tokenizer: Callable, batch_size: int,
                      max_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Places (B,), ids and mask (B, T) of sentences of like length.

    They come sorted by letters; within a window of 32 batches they are sorted by tokens.
    """
    for start in range(0, len(sentences), 32 * batch_size):
        ids, mask = tokenizer(sentences[start : start + 32 * batch_size], max_tokens=max_tokens)
        lengths = mask.sum(dim=1)
        for rows in lengths.argsort(descending=True, stable=True).split(batch_size):
            longest = lengths[rows[0]]
            yield start + rows, ids[rows, :longest], mask[rows, :longest]


class MaskedLMHead(nn.Module):
    """Scores every word of the vocabulary as the one behind a token, by its row of `words`."""

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
