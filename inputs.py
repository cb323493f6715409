"""
What does a run need? Everything from outside, read and checked before the first step.

    read_inputs(given)        corpus, tokenizer, tests and settings, which all seeds share
    build(inputs, config)     model, method and optimizer of one seed

What is wrong ends the program here, in one sentence: 2 for what was typed, 3 for what was read.
Not here: the settings themselves (config.py), which of them go together (papers.py).
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import config as settings
import data
import devices
import regimes
from config import Config
from eval_sts import Encode, StsTest, TwinTest, exits, open_encoder, pick_device, read_test
from folders import load, load_masked_lm
from model import SentenceEncoder, encode
from papers import METHODS, check
from teacher import read_teacher


@dataclass(frozen=True)
class Inputs:
    """What every seed of a run shares: read and checked; only `known` grows."""
    corpus: data.Corpus
    tokenizer: data.Tokenizer
    folder: Path                      # of the encoder
    dev: StsTest | TwinTest | None
    test: StsTest | TwinTest
    config: Config                    # all defaults and recipes filled in
    doctor: dict
    device: torch.device
    later: tuple[data.Corpus, ...] = ()   # what a sequence goes on with (regimes.py)
    start: dict | None = None         # the parts that a stage takes over from the one before
    known: dict = field(default_factory=dict)   # what one seed found that is so for the next, too


def read_inputs(given: dict) -> Inputs:
    """Everything from outside is read here, before the first step."""
    asked = Config(**given)
    with exits(2):
        settings.validate(asked)
        device = pick_device(asked.device)
    with exits(3):
        own = Path(asked.data) if asked.data else None
        corpus, *later = [data.read_corpus(name, own) for name in settings.names(asked.corpus)]
        folder = data.encoder_folder(asked.encoder)
        model, tokenizer = open_encoder(folder, pooling=asked.pooling)
        config = settings.resolve(given, model_type=model.config.model_type,
                                  width=model.config.width, columns=len(corpus.columns))
        test = read_test(config.test, own)
        dev = None if config.dev == "none" else read_test(config.dev, own, split="dev")
        doctor, *others = [data.doctor(each, tokenizer, max_tokens=config.max_tokens)
                           for each in (corpus, *later)]
        doctor |= {"later": others} if others else {}
    with exits(2):
        settings.validate(config)
        check(config, len(corpus.columns), layers=model.config.layers)
        check_fit(config, len(corpus), model.config.usable_positions)
        devices.check(config, device)
        regimes.check(config, [corpus, *later])
    if METHODS[config.method].reads_teacher:
        with exits(3):
            corpus = replace(corpus, teacher=read_teacher(config.teacher, corpus, device))
    return Inputs(corpus, tokenizer, folder, dev, test, config, doctor, device, tuple(later))


def check_fit(config: Config, rows: int, positions: int) -> None:
    """The corpus must fill a batch, and a sentence must fit into the encoder."""
    if rows < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} needs a corpus of as many rows, found "
                         f"{rows} in {config.corpus}: use --batch-size {rows} or less")
    if not 3 <= config.max_tokens <= positions:
        raise ValueError(f"--max-tokens: expected 3 to {positions}, the encoder's positions, "
                         f"found {config.max_tokens}")


@dataclass(frozen=True)
class Job:
    """What one seed trains, and with what."""
    config: Config
    inputs: Inputs
    parts: nn.ModuleDict              # model, method, and lm_head where the loss has that term
    optimizer: torch.optim.Optimizer
    steps: int
    bf16: bool

    @property
    def model(self) -> SentenceEncoder:
        return self.parts["model"]

    @property
    def encode(self) -> Encode:
        """Scores are computed in float32, whatever the precision of training."""
        return partial(encode, self.model, self.inputs.tokenizer)


def build(inputs: Inputs, config: Config) -> Job:
    """Model, method and optimizer of one seed, before the first step."""
    torch.manual_seed(config.seed)                                # the head's weights
    model = load(inputs.folder, pooling=config.pooling, dropout=config.dropout)
    width = model.config.width
    parts = nn.ModuleDict({"model": model,
                           "method": METHODS[config.method](inputs.corpus, config, model=model)})
    if config.mlm_weight:
        parts["lm_head"] = load_masked_lm(inputs.folder, model)
    if config.head != "none":
        model.head = parts["method"].head(width)
        model.keep_head = config.head == "keep"
    parts.to(inputs.device)
    if inputs.start:
        parts.load_state_dict(inputs.start)
        parts["method"].follow(model)
    optimizer = torch.optim.AdamW(parts.parameters(), weight_decay=config.weight_decay, fused=True)
    return Job(config, inputs, parts, optimizer, count_steps(inputs, config),
               wants_bf16(config.precision, inputs.device))


def count_steps(inputs: Inputs, config: Config) -> int:
    """As many as were asked for, or those of the epochs."""
    return config.steps or config.epochs * (len(inputs.corpus) // config.batch_size)


def wants_bf16(precision: str, device: torch.device) -> bool:
    """`auto`: where the hardware multiplies bfloat16, since elsewhere it is slower than float32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                     or torch.cpu._is_amx_tile_supported())
