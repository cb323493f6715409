"""
How does a folder cut text into tokens? By its tokenizer.json and the settings beside it.

    tokenizer_json(folder)      the rules that data.Tokenizer follows
    rules_of(folder)            without the small letters that sentence-transformers may ask for
    built(folder, kind)         from older files: vocab.txt, or vocab.json and merges.txt

Other files overrule tokenizer.json. In transformers, BertTokenizer and RobertaTokenizer set letter
case, accents and the first space as tokenizer_config.json says; sentence-transformers may ask for
small letters.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from engine.layouts import (VOCABULARY_FILES, home, read, refuse_pointer, sentence_settings,
                            wrong)

USUAL = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}  # where no file names a class
# Class -> the rule that it sets, the type of that rule, and its settings with their defaults.
SET_BY = {
    "BertTokenizer": ("normalizer", "BertNormalizer", {
        "lowercase": ("do_lower_case", True), "strip_accents": ("strip_accents", None),
        "handle_chinese_chars": ("tokenize_chinese_chars", True)}),
    "RobertaTokenizer": ("pre_tokenizer", "ByteLevel", {
        "add_prefix_space": ("add_prefix_space", False)}),
}
SPECIAL = {"BertTokenizer": ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"],
           "RobertaTokenizer": ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]}


def tokenizer_json(folder: Path) -> str:
    """All rules by which an encoder's folder cuts text, in the format of tokenizer.json."""
    rules = rules_of(folder)
    if sentence_settings(folder).get("do_lower_case"):
        both = [{"type": "Lowercase"}, rules.get("normalizer")]
        rules["normalizer"] = {"type": "Sequence", "normalizers": [one for one in both if one]}
    return json.dumps(rules)


def rules_of(folder: Path) -> dict:
    """The rules of transformers' tokenizer, which sentence-transformers may add to."""
    inner = home(folder)
    path, about = inner / "tokenizer.json", optional(inner / "tokenizer_config.json")
    config = optional(inner / "config.json")
    kind = (about.get("tokenizer_class") or config.get("tokenizer_class")
            or USUAL.get(config.get("model_type"), "")).removesuffix("Fast")
    rules = read(path) if path.is_file() else built(inner, kind)
    if kind in SET_BY:
        name, expected, settings = SET_BY[kind]
        if not isinstance(rules.get(name), dict) or rules[name].get("type") != expected:
            raise wrong(path, f"a {name} of type {expected}, as in every {kind} (other rules are "
                        "those of a PreTrainedTokenizerFast)", rules.get(name))
        rules[name] |= {own: about.get(key, default) for own, (key, default) in settings.items()}
    return rules


def optional(path: Path) -> dict:
    """The settings in a file that a folder may lack."""
    return read(path) if path.is_file() else {}


def built(folder: Path, kind: str) -> dict:
    """The rules of a folder that is older than tokenizer.json."""
    paths = [folder / name for name in VOCABULARY_FILES if (folder / name).is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder}: expected the encoder's tokenizer (tokenizer.json, "
                                "vocab.txt, or vocab.json and merges.txt), found none of these")
    for path in paths:
        refuse_pointer(path)
    if kind not in SPECIAL:
        raise wrong(folder, f"tokenizer.json, or the older files of {' or '.join(SPECIAL)}",
                    f"those of {kind or 'an unknown class'}")
    try:
        made = {"BertTokenizer": word_pieces, "RobertaTokenizer": byte_pairs}[kind](folder)
    except Exception as error:          # the library raises bare Exception
        raise wrong(folder, f"the vocabulary of a {kind}", error) from None
    first, last, *_, mask = names = SPECIAL[kind]
    ids = made.get_vocab()
    if missing := [name for name in names if name not in ids]:
        raise wrong(folder, f"a vocabulary with {' '.join(names)}", f"none of {' '.join(missing)}")
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(name, ids[name]) for name in (first, last)])
    made.add_special_tokens([*names[:-1], AddedToken(mask, lstrip=mask == "<mask>", special=True)])
    added = optional(folder / "added_tokens.json")
    if odd := {token: number for token, number in added.items() if ids.get(token) != number}:
        raise wrong(folder / "added_tokens.json", "no tokens beyond the vocabulary", odd)
    rules = json.loads(made.to_str())
    if "merges" in rules["model"]:      # pairs are read by new versions only, texts by all
        rules["model"]["merges"] = [" ".join(pair) for pair in rules["model"]["merges"]]
    return rules


def word_pieces(folder: Path) -> Tokenizer:
    """BERT's: a word, or a piece of one, on each line of vocab.txt; its id is the line's number."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def byte_pairs(folder: Path) -> Tokenizer:
    """RoBERTa's: vocab.json has the ids, merges.txt which pieces grow together, in order."""
    paths = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    made = Tokenizer(models.BPE(*models.BPE.read_file(*paths)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    return made
