"""
What does a masked language model read, and what do counts alone tell about its words?

    train_tokenizer(texts, vocab_size)        WordPiece, as BERT's uncased models have it
    streams(corpus, tokenizer)                all tokens in a row: to train on, and held out
    Sequences(stream, tokenizer, max_tokens)  cut into (B, T), and masked
    positive_pmi(stream, vocab_size)          (V, V) which words meet more often than by chance
    svd_embeddings(pmi, width)                (V, D) words of the same use point the same way
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor

import data

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# ---- from text to tokens --------------------------------------------------------------------

def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """BERT's uncased WordPiece, as a tokenizer.json: frequent words whole, others in pieces.

    The library takes pieces of equal frequency in no fixed order: a second training on the same
    texts may number them otherwise. A run that is resumed keeps the tokenizer it began with.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    # Without a limit, the letters of the world's scripts take the place of English words.
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, limit_alphabet=1000, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer.to_str()


def tokenizer_files(tokenizer_json: str, max_tokens: int) -> dict[str, bytes]:
    """The tokenizer as transformers reads it."""
    about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True,
             "model_max_length": max_tokens}
    about |= {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return {"tokenizer.json": tokenizer_json.encode(),
            "tokenizer_config.json": json.dumps(about).encode()}


def streams(corpus: data.Corpus, tokenizer: data.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all documents in a row, [SEP] between two: to train on, and held out.

    Every hundredth document is held out; of fewer than a thousand, ten are.
    """
    documents = corpus.documents or range(len(corpus))
    every = min(100, max(2, (documents[-1] + 1) // 10))
    end, pieces = tokenizer.whole.encode("").ids[-1], ([], [])
    small = np.min_scalar_type(tokenizer.vocab_size - 1)          # two bytes a token, mostly
    for start in range(0, len(corpus), 4096):
        texts = corpus.columns[0][start : start + 4096]
        rows = tokenizer.whole.encode_batch_fast(texts, add_special_tokens=False)
        for i, row in enumerate(rows, start=start):
            last = i + 1 == len(corpus) or documents[i + 1] != documents[i]
            held_out = documents[i] % every == every - 1
            pieces[held_out].append(np.array(row.ids + [end] * last, dtype=small))
    return tuple(np.concatenate(its_own or [np.empty(0, small)]) for its_own in pieces)


@dataclass(frozen=True)
class Sequences:
    """A stream cut into N sequences of T tokens, [CLS] and [SEP] around each: no padding.

    A sentence may be cut in two: the price for computing on nothing but text.
    """
    stream: np.ndarray
    tokenizer: data.Tokenizer
    max_tokens: int                                               # T

    def __len__(self) -> int:
        return len(self.stream) // (self.max_tokens - 2)

    def __call__(self, rows: list[int]) -> Tensor:                # B numbers -> (B, T)
        inner = self.max_tokens - 2
        cut = self.stream[: len(self) * inner].reshape(-1, inner)[rows]           # (B, T - 2)
        first, last = (np.full((len(rows), 1), i) for i in self.tokenizer.whole.encode("").ids)
        return torch.from_numpy(np.concatenate([first, cut.astype(np.int64), last], axis=1))

    def masked(self, rows: list[int], *, rate: float, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, (B, T) each.

        Only the tokens asked for teach, so BERT's 15 % teach little a step; with many more, too
        little is left to guess from (Wettig et al. 2023 compare rates). One in five of them is
        not [MASK] but another word or itself: real sentences hold no [MASK], and a model that
        was only ever asked there would have no reason to make anything of other tokens.
        """
        return self.tokenizer.mask(self(rows), rate=rate, seed=seed)


# ---- from counts to word embeddings ---------------------------------------------------------

def positive_pmi(stream: np.ndarray, vocab_size: int, window: int = 5) -> sparse.csr_matrix:
    """How much more often than by chance do two words meet within the window?      -> (V, V)

        max(0, log p(a, b) / (p(a) p(b)))       Church & Hanks 1990
    """
    counts = sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    for piece in np.array_split(stream.astype(np.int32), 1 + len(stream) // 2_000_000):
        for gap in range(1, window + 1):
            pairs = piece[:-gap], piece[gap:]
            counts += sparse.csr_matrix((np.ones(len(pairs[0]), np.float32), pairs), counts.shape)
    counts = (counts + counts.T).tocoo()
    of_word = np.asarray(counts.sum(axis=0)).ravel()                              # (V,)
    pmi = np.log(counts.data * of_word.sum() / (of_word[counts.row] * of_word[counts.col]))
    more = pmi > 0
    return sparse.csr_matrix((pmi[more], (counts.row[more], counts.col[more])), counts.shape)


def svd_embeddings(pmi: sparse.csr_matrix, width: int) -> np.ndarray:             # (V, D)
    """Words that meet the same words point the same way, before the first step of training.

    Truncated SVD (Levy, Goldberg & Dagan 2015): U √Σ, centred, every row of length 0.6. A word
    that met nobody is 0.
    """
    if width >= pmi.shape[0]:
        raise ValueError(f"--init svd: expected more than --width {width} word pieces, found "
                         f"{pmi.shape[0]}: use more text, a smaller --width, or --init random")
    # A symmetric matrix needs one side only: its singular values are its eigenvalues' sizes.
    values, vectors = eigsh(pmi, k=width, v0=np.ones(pmi.shape[0], pmi.dtype), tol=1e-2)
    x = vectors * np.sqrt(np.abs(values))
    met = pmi.getnnz(axis=1) > 0
    x[met] -= x[met].mean(axis=0)
    return 0.6 * x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) * met[:, None]
