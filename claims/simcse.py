"""
SimCSE: dropout alone makes a positive: vectors spread out, and texts of one meaning stay close.

Source: Gao, Yao, Chen. EMNLP 2021, arXiv 2104.08821, section 3, figure 2 and table 3.
Planted: 200 meanings of a small grammar, each in two wordings, to be found by each other after
training on other text, the built-in corpus. Without dropout a text and its positive have the same
vector, so that only the negatives teach.
Tried as well: the 244 doc twins after 45 steps. With dropout 30 % are found, without it 32 %.
"""

from claims import Rows, Shows, Trial, show, steps
from claims.planted import meanings, say
from eval_sts import TwinTest
from losses import alignment, uniformity
from papers.simcse import measures

SHOWS = [Shows("uniformity", "as it was", "dropout 0.1"),         # the lower, the more evenly
         Shows("alignment", "dropout 0", "dropout 0.1"),          # the lower, the closer
         Shows("found", "dropout 0.1", "dropout 0")]


def measure(trial: Trial) -> Rows:
    rng = trial.rng
    known = meanings(200, rng)
    pairs = [[say(meaning, half + rng.randrange(16)) for meaning in known] for half in (0, 16)]
    test = TwinTest([*zip(map(str, known), *pairs)])

    def row(encode) -> dict[str, float]:
        ours, theirs = map(encode, pairs)
        return {"uniformity": uniformity(ours).item(), "alignment": alignment(ours, theirs).item(),
                "found": test.score(encode).scores["acc@1"]}

    rows = {"as it was": row(trial.encode)}
    for rate in (0.0, 0.1):
        job = trial.job("simcse", trial.sentences(1000), dropout=rate, steps=trial.scaled(30),
                        batch_size=32, max_tokens=16, learning_rate=3e-4)
        first, *_ = [measures(out)["positive_cosine"] for _, _, out in steps(job)]
        rows[f"dropout {rate:g}"] = row(job.encode) | {"first positives": first}
    return rows | {"perfect": {"uniformity": -4, "alignment": 0, "found": 100}}


if __name__ == "__main__":
    show(__name__)
