"""
Folders as the world has them: each gives what sentence-transformers computes, or one sentence.

A layout is what differs from the folder of a tiny BERT, as sentence-transformers saves it: the new
content of a file by its name, or None where it lacks that file; and functions that change it.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

import eval_sts
from engine import encoders
from eval_sts import open_encoder
from model import encode

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers")

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] paris Paris café cafe owl the The a b ##s ##aris 中 文 "
         "中文 . , '").split()
PIECES = ["<s>", "<pad>", "</s>", "<unk>", *"abcehilnoprstwPT", "Ġ", "Ġa", "Ġo", "ow", "<mask>"]
SENTENCES = ["Paris, the café.", "the owls", "中文", "a's b", "", "a " * 40, "  b [MASK] "]
CONFIG, WEIGHTS, DENSE = "config.json", "model.safetensors", "2_Dense/config.json"
POOLING, TOKENS = "1_Pooling/config.json", "sentence_bert_config.json"
RULES, ABOUT = "tokenizer.json", "tokenizer_config.json"
PROMPTS = "config_sentence_transformers.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4\n"


def rules(lower=True, ends=True, normal=True, words=WORDS) -> dict:
    """A tokenizer.json of BERT: `normal` adds its normalizer, `ends` puts [CLS] and [SEP]."""
    ids = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if normal:
        made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    if ends:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(WORDS[:5])
    return json.loads(made.to_str())


def about(kind="BertTokenizer", **settings) -> dict:
    return {"tokenizer_class": kind, "pad_token": "[PAD]", **settings}


def modules(*more, first="", where="sentence_transformers.models.") -> list[dict]:
    return [{"idx": i, "name": str(i), "type": where + kind, "path": f"{i}_{kind}" if i else first}
            for i, kind in enumerate(("Transformer", "Pooling", *more))]


def model(kind="BertModel", **settings):
    """Another model, with random weights everywhere."""
    def save(folder):
        torch.manual_seed(0)
        family = "Bert" if kind.startswith("Bert") else "Roberta"
        words = {"Bert": WORDS, "Roberta": PIECES}[family]
        made = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(
            vocab_size=len(words), hidden_size=20, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=66, **settings)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=.3)
        made.save_pretrained(folder)
    return save


def dense(**settings):
    """A Dense module behind the pooling."""
    def add(folder):
        put(folder, {"modules.json": modules("Dense"), DENSE: {
            "in_features": 20, "out_features": 20, "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh"} | settings})
        save_file({"linear.weight": torch.eye(20) / 2, "linear.bias": torch.ones(20)},
                  folder / "2_Dense" / WEIGHTS)
    return add


def early(first, kind="Transformer"):
    """The layout before version 0.4: the encoder in a folder of its own."""
    def move(folder):
        (folder / first).mkdir()
        for path in [*folder.glob("*.*")]:
            path.rename(folder / first / path.name)
        chain = modules(first=first)
        chain[0]["type"] = f"sentence_transformers.models.{kind}"
        put(folder, {"modules.json": chain, CONFIG: {"__version__": "0.2.5"}})
    return move


def sharded(*missing):
    """The weights in two files; `missing` ones are lost."""
    def split(folder):
        whole = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        place = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors"
                 for i, name in enumerate(whole)}
        for shard in {*place.values()} - {*missing}:
            save_file({name: x for name, x in whole.items() if place[name] == shard},
                      folder / shard, metadata={"format": "pt"})
        put(folder, {f"{WEIGHTS}.index.json": {"metadata": {}, "weight_map": place}})
    return split


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def inside(*folders):
    """Everything once more in each of these folders, and no longer above them."""
    def move(folder):
        paths = [*folder.iterdir()]
        for inner in folders:
            for path in paths:
                (folder / inner).mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, folder / inner / path.name)
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return move


def put(folder: Path, files: dict) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8", newline="")


@pytest.fixture
def laid_out(tmp_path):
    """laid_out(layout) -> the folder."""
    def make(*changes) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        base = {"modules.json": modules(), RULES: rules(), ABOUT: about(),
                TOKENS: {"max_seq_length": 16, "do_lower_case": False},
                POOLING: {"word_embedding_dimension": 20, "pooling_mode_mean_tokens": True}}
        with contextlib.redirect_stderr(io.StringIO()):           # bars of progress
            for change in (model(), base, *changes):
                put(folder, change) if isinstance(change, dict) else change(folder)
        return folder
    return make


def vectors(folder):
    return encode(*open_encoder(folder), SENTENCES)


def theirs(folder):
    with contextlib.redirect_stderr(io.StringIO()):
        reference = library.SentenceTransformer(str(folder), device="cpu")
        return reference.encode(SENTENCES, convert_to_tensor=True)


NO_JSON = {RULES: None, "vocab.txt": "".join(f"{word}\n" for word in WORDS)}
BYTES = [model("RobertaModel", pad_token_id=1), {
    RULES: None, ABOUT: {"tokenizer_class": "RobertaTokenizer", "model_max_length": 64},
    "vocab.json": {piece: i for i, piece in enumerate(PIECES)},
    "merges.txt": "#version: 0.2\nĠ a\nĠ o\no w\n"}]
FAST = about("PreTrainedTokenizerFast", cls_token="[CLS]", sep_token="[SEP]")
SAME = {
    "as it is": [],
    "[CLS]": [{POOLING: {"embedding_dimension": 20, "pooling_mode": "cls"}}],
    "unit length": [{"modules.json": modules("Normalize")}],
    "Dense": [dense()],
    "saved by the library": [
        lambda folder: library.SentenceTransformer(str(folder)).save(str(folder))],
    "a pooling elsewhere": [{"modules.json": [modules()[0], modules()[1] | {"path": "p"}],
                             "p/config.json": {"embedding_dimension": 20, "pooling_mode": "cls"}}],
    "no limit but model_max_length": [{TOKENS: None, ABOUT: about(model_max_length=9)}],
    "a limit of null": [{TOKENS: {"max_seq_length": None}, ABOUT: about(model_max_length=9)}],
    "settings of today": [{ABOUT: about(model_max_length=9), TOKENS: {
        "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
        "modality_config": {"text": {"method": "forward",
                                     "method_output_name": "last_hidden_state"}}}}],
    "RoBERTa's limit": [{TOKENS: None, "sentence_roberta_config.json": {"max_seq_length": 5}}],
    "a limit above the positions": [{TOKENS: {"max_seq_length": 512}}],
    "small letters asked for": [{TOKENS: {"do_lower_case": True}, RULES: rules(lower=False),
                                 ABOUT: about(do_lower_case=False)}],
    "small letters asked for, other class": [{TOKENS: {"do_lower_case": True}, ABOUT: FAST,
                                              RULES: rules(lower=False)}],
    "case against tokenizer.json": [{ABOUT: about(do_lower_case=False)}],
    "no case against tokenizer.json": [{ABOUT: about(do_lower_case=True),
                                        RULES: rules(lower=False)}],
    "no settings of the tokenizer": [{ABOUT: None, RULES: rules(lower=False)}],
    "accents kept": [{ABOUT: about("BertTokenizerFast", strip_accents=False)}],
    "Chinese in words": [{ABOUT: about(tokenize_chinese_chars=False)}],
    "a class that sets nothing": [{ABOUT: FAST | {"do_lower_case": True},
                                   RULES: rules(lower=False)}],
    "prompts, none by default": [{PROMPTS: {"prompts": {"query": "a"},
                                            "default_prompt_name": None}}],
    "an empty prompt": [{PROMPTS: {"prompts": {"query": ""}, "default_prompt_name": "query"}}],
    "vocab.txt": [NO_JSON],
    "vocab.txt, cased": [NO_JSON, {ABOUT: {"do_lower_case": False}}],
    "vocab.txt alone": [NO_JSON, {ABOUT: None}],
    "vocab.txt, small letters asked for": [NO_JSON, {
        ABOUT: about(do_lower_case=False), TOKENS: {"do_lower_case": True}}],
    "vocab.txt of Windows": [NO_JSON, {"vocab.txt": "\r\n".join(WORDS)}],
    "vocab.json and merges.txt": BYTES,
    "merges.txt and a first space": [*BYTES, {ABOUT: {"add_prefix_space": True}}],
    "a smaller vocabulary": [{RULES: rules(words=WORDS[:12])}],
    "shards": [sharded()],
    "the encoder in 0_Transformer": [early("0_Transformer")],
    "classifier": [model("BertForSequenceClassification", num_labels=3)],
    "names": [model("BertForTokenClassification")],
    "answers": [model("BertForQuestionAnswering")],
    "RoBERTa's classifier": [*BYTES, model("RobertaForSequenceClassification", pad_token_id=1)],
    "masked LM": [model("BertForMaskedLM")],
    "two heads of pre-training": [model("BertForPreTraining")],
}


@pytest.mark.parametrize("layout", SAME)
def test_the_vectors_are_those_of_sentence_transformers_also_when_saved_again(
        layout, laid_out, tmp_path):
    folder = laid_out(*SAME[layout])
    ours = vectors(folder)
    torch.testing.assert_close(ours, theirs(folder), rtol=1e-5, atol=1e-5)
    encoders.save(encoders.load(folder), tmp_path / "saved")
    assert (vectors(tmp_path / "saved") == ours).all()
    torch.testing.assert_close(ours, theirs(tmp_path / "saved"), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "saved" / RULES).is_file()


REFUSED = {
    "a default prompt": ([{PROMPTS: {"prompts": {"q": "a: "}, "default_prompt_name": "q"}}],
                         "expected default_prompt_name to be null, .* found 'a: '"),
    "a pooling without the prompt": ([{POOLING: {"pooling_mode": "mean", "include_prompt": False}}],
                                     "found include_prompt false"),
    "no [CLS]": ([{RULES: rules(ends=False)}], r"expected a tokenizer.json that puts \[CLS\]"),
    "no [CLS], other class": ([{RULES: rules(ends=False), ABOUT: FAST}], r"that puts \[CLS\]"),
    "other rules than its class has": ([{RULES: rules(normal=False)}],
                                       "normalizer of type BertNormalizer.*found None"),
    "a Dense of tokens": ([dense(module_input_name="token_embeddings")], "2_Dense/config.json: "),
    "code of one's own": ([{"modules.json": modules(where="custom_st.")}], "custom_st.Transformer"),
    "modules above": ([{"modules.json": [modules()[0], modules()[1] | {"path": "../p"}]}],
                      "expected modules with a type and a path"),
    "a tokenizer elsewhere": ([{TOKENS: {"tokenizer_name_or_path": "bert"}}],
                              "no settings but max_seq_length and do_lower_case, found .*'bert'"),
    "arguments of a model": ([{TOKENS: {"model_args": {"torch_dtype": "float16"}}}], "float16"),
    "an adapter": ([{"adapter_config.json": {"base_model_name_or_path": "owl/bert"}, CONFIG: None}],
                   "adapter .LoRA. of owl/bert: merge .*from peft import"),
    "an adapter beside its encoder": ([{"adapter_config.json": {}}], "adapter .LoRA. of None"),
    "Google's names": ([{CONFIG: None, "bert_config.json": "{}"}], "rename .* bert_config.json"),
    "a pointer": ([{WEIGHTS: POINTER}], "a pointer of git-LFS, .* git -C .*model lfs pull"),
    "a pointer to a tokenizer": ([{RULES: POINTER}], "tokenizer.json is a pointer of git-LFS"),
    "a pointer to words": ([NO_JSON, {"vocab.txt": POINTER}], "vocab.txt is a pointer of git-LFS"),
    "a pickle": ([pickled], "model.safetensors is missing: pytorch_model.bin is a pickle, never"),
    "other weights": ([{WEIGHTS: None, "tf_model.h5": ""}], "found tf_model.h5"),
    "a lost shard": ([sharded("model-00002-of-00002.safetensors")],
                     "model-00002-of-00002.safetensors is missing: the index .* lists it"),
    "an index of elsewhere": ([sharded(), {f"{WEIGHTS}.index.json": {"weight_map": {"x": "/y"}}}],
                              "expected a weight_map .* beside it, found {'/y'}"),
    "seeds": ([inside("seed-1", "seed-0")], "only holds the folders of encoders: .*model.seed-0$"),
    "words of a class that cuts otherwise": ([NO_JSON, {ABOUT: about("BertJapaneseTokenizer")}],
                                             "found those of BertJapaneseTokenizer"),
    "words without [CLS]": ([NO_JSON, {"vocab.txt": "[PAD]\na\n"}], r"found none of \[CLS\] "),
    "words added later": ([NO_JSON, {"added_tokens.json": {"zebra": 99}}], "found {'zebra': 99}"),
    "no tokenizer": ([{RULES: None}], "expected the encoder's tokenizer .* found none of these"),
    "a vocabulary too large": ([{RULES: rules(words=[*WORDS, "elk"])}], "below the encoder's 22"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_not_read_is_named_in_one_sentence_with_the_way_on(layout, laid_out):
    changes, said = REFUSED[layout]
    with pytest.raises((ValueError, FileNotFoundError), match=said) as refused:
        open_encoder(laid_out(*changes))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_a_folder_of_the_hubs_cache_is_answered_with_its_id_and_its_commit(laid_out, tmp_path):
    cache = laid_out(inside("snapshots/aa", "snapshots/bb"), {"refs/main": "bb"}).rename(
        tmp_path / "models--owl--bert")
    with pytest.raises(FileNotFoundError, match="snapshots.bb, or the Hub id owl/bert$"):
        open_encoder(cache)


def test_the_line_that_is_said_of_a_pickle_converts_it(laid_out):
    folder = laid_out()
    expected = vectors(folder)
    pickled(folder)
    with pytest.raises(FileNotFoundError) as refused:
        open_encoder(folder)
    line = str(refused.value).partition("convert it with ")[2].replace("python", sys.executable)
    subprocess.run(line, shell=True, check=True)
    assert (vectors(folder) == expected).all()


# ---- what the user hears --------------------------------------------------------------------

HEADLESS = {"modules.json": None}


def test_a_folder_that_states_no_pooling_is_pooled_by_cls_and_that_is_said(laid_out, capsys):
    folder = laid_out(HEADLESS)
    assert open_encoder(folder)[0].pooling == "cls"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].endswith(
        f"NOTICE: {folder} does not say how to pool: cls is assumed; choose with --pooling")
    open_encoder(folder, pooling="mean")
    assert capsys.readouterr().err == ""


def test_what_stands_on_the_encoder_is_left_out_and_named(laid_out, capsys):
    open_encoder(laid_out(model("BertForQuestionAnswering")))
    assert "without what stands on it: qa_outputs\n" in capsys.readouterr().err


def simcse(folder):
    """What SimCSE's training code leaves: bert., and its head as mlp.dense."""
    found = {f"bert.{name}": x for name, x in load_file(folder / WEIGHTS).items()}
    found |= {name.replace("bert.pooler", "mlp"): found.pop(name) for name in [*found]
              if "pooler" in name}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("changes", [[], [simcse]], ids=["converted", "unconverted"])
def test_the_pooling_pooler_is_the_tanh_layer_that_transformers_has_on_cls(
        changes, laid_out, capsys):
    folder = laid_out(HEADLESS)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    ids, mask = open_encoder(folder)[1](SENTENCES, max_tokens=16)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long()).pooler_output
    for change in changes:
        change(folder)
    capsys.readouterr()
    found = encode(*open_encoder(folder, pooling="pooler"), SENTENCES, max_tokens=16)
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    open_encoder(folder)
    said = "stands on it: mlp; --pooling pooler scores with mlp"
    assert (said in capsys.readouterr().err) == bool(changes)


def test_the_oldest_layout_is_that_of_version_0_4_under_another_name(laid_out, tmp_path):
    expected = vectors(laid_out().rename(tmp_path / "flat"))
    assert (vectors(laid_out(early("0_BERT", "BERT"))) == expected).all()


# ---- training goes on with what the folder has ------------------------------------------------

def before(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())["before"]


@pytest.mark.parametrize("changes, pooling, head", [
    ([], "mean", False), ([HEADLESS], "cls", False), ([dense()], "mean", True)])
def test_training_starts_from_the_vectors_that_eval_sts_scores_and_keeps_how_they_are_made(
        changes, pooling, head, laid_out, program, pairs, tmp_path, capsys):
    folder, scores = laid_out(*changes), tmp_path / "scores.json"
    eval_sts.main([str(folder), "--test", str(pairs), "--json", str(scores)])
    run = program(encoder=folder, steps=2)
    assert before(run) == json.loads(scores.read_text())["scores"]
    trained = encoders.load(run)
    assert (trained.pooling, trained.head is not None) == (pooling, head)
    if head:                                                      # it has learned, too
        assert not torch.equal(trained.head.weight, encoders.load(folder).head.weight)


@pytest.mark.parametrize("flags, said", [
    ({"pooling": "cls"}, "--pooling cls takes the place of {}'s own, mean"),
    ({"head": "train"}, "--head train takes the place of the Dense module of {}")])
def test_a_flag_wins_and_one_line_says_what_it_replaces(flags, said, laid_out, program, capsys):
    folder = laid_out(*[dense()] * ("head" in flags))
    trained = encoders.load(program(encoder=folder, steps=2, **flags))
    assert capsys.readouterr().err.count("NOTICE: " + said.format(folder)) == 1
    assert trained.pooling == flags.get("pooling", "mean") and trained.head is None


def test_the_prompts_of_a_folder_are_those_of_the_run(laid_out, program):
    prompts = {"prompts": {"query": "a"}, "default_prompt_name": None, "similarity_fn_name": "dot"}
    run = program(encoder=laid_out({PROMPTS: prompts}), steps=2)
    assert json.loads((run / PROMPTS).read_text()) == prompts


def test_a_head_of_the_method_does_not_take_the_place_of_a_dense_module_unasked(
        laid_out, program, capsys):
    folder = laid_out(model("BertForMaskedLM"), dense())
    with pytest.raises(SystemExit) as refused:
        program(encoder=folder, method="diffcse", generator=folder)
    assert refused.value.code == 2
    assert "--head own: the head of --method diffcse serves training" in capsys.readouterr().err
