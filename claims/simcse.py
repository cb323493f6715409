"""
SimCSE: dropout alone makes a positive: vectors spread out, and texts of one meaning stay close.

Source: Gao, Yao, Chen. EMNLP 2021, arXiv 2104.08821, section 3, figure 2 and table 3.
Planted: 200 meanings of a small grammar, each in two wordings, to be found by each other after
training on other text, the built-in corpus. Without dropout a text and its positive have the same
vector, so that only the negatives teach.
Tried as well: the 244 doc twins after 45 steps. With dropout 30 % are found, without it 32 %.
With six seeds (5 to 10) all three are shown: 46 % found against 35 %, p = 0.006 (alignment 0.006).
"""

from claims import Curves, Rows, Shows, Trial, show, steps
from claims.planted import meanings, say
from eval_sts import Encode, TwinTest
from losses import alignment, uniformity
from mincse import Job
from papers.simcse import measures

SHOWS = [Shows("uniformity", "as it was", "dropout 0.1"),         # the lower, the more evenly
         Shows("alignment", "dropout 0", "dropout 0.1"),          # the lower, the closer
         Shows("found", "dropout 0.1", "dropout 0")]


def measure(trial: Trial) -> Rows:
    rows = {"as it was": row(trial, trial.encode)}
    for rate in (0.0, 0.1):
        job = training(trial, rate)
        first, *_ = [measures(out)["positive_cosine"] for _, _, out in steps(job)]
        rows[f"dropout {rate:g}"] = row(trial, job.encode) | {"first positives": first}
    return rows | {"perfect": {"uniformity": -4, "alignment": 0, "found": 100}}


def training(trial: Trial, rate: float) -> Job:
    return trial.job("simcse", trial.sentences(1000), dropout=rate, steps=trial.scaled(30),
                     batch_size=32, max_tokens=16, learning_rate=3e-4)


def row(trial: Trial, encode: Encode) -> dict[str, float]:
    """How the two wordings of a meaning lie."""
    rng = trial.rng
    known = meanings(200, rng)
    pairs = [[say(meaning, half + rng.randrange(16)) for meaning in known] for half in (0, 16)]
    ours, theirs = map(encode, pairs)
    test = TwinTest([*zip(map(str, known), *pairs)])
    return {"uniformity": uniformity(ours).item(), "alignment": alignment(ours, theirs).item(),
            "found": test.score(encode).scores["acc@1"]}


def curves(trial: Trial) -> Curves:
    """As in the paper's figure 2: where both measures go, seen after every third step."""
    paths = {}
    for rate in (0.0, 0.1):
        job, seen = training(trial, rate), [row(trial, trial.encode)]
        seen += [row(trial, job.encode) for step, *_ in steps(job) if step % 3 == 0]
        paths[f"dropout {rate:g}"] = [(each["uniformity"], each["alignment"]) for each in seen]
    return Curves("uniformity", "alignment", paths)


if __name__ == "__main__":
    show(__name__)
