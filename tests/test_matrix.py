"""Every method with every loss, text view and kind of corpus: it learns, or a sentence says no."""

import pytest

import mincse
from losses import LOSSES
from papers import METHODS
from positives import POSITIVES

# Columns of the corpus that each method takes; a method without an entry fails the test below.
TAKES = {"simcse": (1, 2, 3), "is-cse": (1, 2), "infocse": (1,), "sscl": (1, 2), "kdmcse": (1,),
         "twins": (1,), "diffcse": (1,), "cards": (1,), "debcse": (1,), "ifnd": (1, 2, 3),
         "core-tuning": (2, 3), "fedrcl": (1,), "pnr": (1,)}
DRAWS_ITS_OWN_POSITIVES = {"debcse"}
HAS_A_LOSS_OF_ITS_OWN = {"kdmcse", "core-tuning", "fedrcl", "pnr"}
NEEDS = {"kdmcse": {"teacher": "mini"}, "cards": {"retrieve_from": 8}, "is-cse": {"neighbours": 4},
         "sscl": {"layers_as_negatives": 1}, "diffcse": {"generator": "mini"},
         "fedrcl": {"levels": 2}}
LEARNS_A_SEQUENCE = {"pnr"}


def makes_sense(method: str, loss: str, positives: str, columns: int) -> bool:
    """What goes with what, in one place."""
    return (columns in TAKES[method]
            and not (columns == 3 and loss == "focal")            # defined without labels
            and not (columns > 1 and positives != "dropout")      # the corpus brings its own
            and not (method in DRAWS_ITS_OWN_POSITIVES and positives != "dropout")
            and not (method in HAS_A_LOSS_OF_ITS_OWN and loss != "info-nce"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict:
    """48 rows of one, two and three columns; the sentences in documents of six."""
    folder = tmp_path_factory.mktemp("corpora")
    who, does = ["dog", "cat", "owl", "elk", "bee", "cow", "ant", "fox"], [
        "runs home", "sees us", "eats bread", "reads two books", "sings well", "digs all day"]
    columns = [[f"{word} {a} {b}" for a in who for b in does] for word in ("the", "an old", "no")]
    documents = [columns[0][row : row + 6] for row in range(0, 48, 6)]
    (folder / "1.txt").write_text("\n\n".join("\n".join(lines) for lines in documents))
    for width in (2, 3):
        rows = zip(*columns[:width])
        (folder / f"{width}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (folder / "later.txt").write_text("".join(f"later {text}\n" for text in columns[0]))
    return {1: folder / "1.txt", 2: folder / "2.tsv", 3: folder / "3.tsv"}


def first_step(method, loss, positives, corpus, tiny, pairs):
    """Loss of the first step, and the size of the gradient that reached the encoder."""
    texts = str(corpus)
    if method in LEARNS_A_SEQUENCE:
        texts = [texts, str(corpus.with_name("later.txt"))]
    given = {"method": method, "loss": loss, "positives": positives, "corpus": texts,
             "encoder": str(tiny), "test": str(pairs), "batch_size": 8, "steps": 2,
             "rate": 0.3} | NEEDS.get(method, {})
    inputs = mincse.read_inputs(given)
    job = mincse.build(inputs, inputs.config)
    job.parts["method"].prepare(job.encode, 0)
    batches = mincse.batches_by_round(job, first=1)
    loop = mincse.train(job.parts, job.optimizer, batches, inputs.config, steps=job.steps, first=1,
                        device=inputs.device, bf16=False)
    _, loss, _ = next(loop)
    return loss.item(), next(job.model.encoder.parameters()).grad.abs().sum().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("columns", (1, 2, 3))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_with_every_text_view_it_learns_or_is_refused_in_a_sentence(method, loss, columns, corpora,
                                                                    tiny, pairs, capsys):
    for positives in POSITIVES:
        if makes_sense(method, loss, positives, columns):
            value, gradient = first_step(method, loss, positives, corpora[columns], tiny, pairs)
            assert 0 < value < 100 and gradient > 0, positives
        else:
            with pytest.raises(SystemExit) as refused:
                first_step(method, loss, positives, corpora[columns], tiny, pairs)
            said = capsys.readouterr().err
            assert refused.value.code == 2 and "--" in said and "use " in said, positives
