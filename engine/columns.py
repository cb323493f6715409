"""
How is a file of columns read, row by row, and what do the usual names of columns say?

    kind_of(path, kinds)         what a file is, by its name
    piped()                      standard input, as a file
    split_rows(path, kind)       line number and cells            meaning    of a column's name
    text_places                  which columns a header calls texts
"""

import csv
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from engine.texts import read_lines

TEXTS = ("anchor", "positive", "hard negative")     # in the order of a corpus' columns
# What a column may hold instead of texts, and what to do then.
IDS, LABELS, SCORES = "row numbers or ids", "labels", "numbers such as scores"
NOTHING = "an empty one"
NO_TEXT = {
    IDS: "leave it out (pandas' to_csv writes its index unless it is given index=False)",
    LABELS: "leave it out, and keep only pairs that mean the same, as every pair here should",
    SCORES: "leave it out; scored pairs are a test, for --dev or --test",
    NOTHING: "leave it out, and the sign at the end of every line if it is the last",
}
# Usual names, in small letters and without signs.
MEANINGS = {name: what for what, names in {
    "anchor": "anchor query question question1 premise sent0 sentence sentence0 sentence1 "
              "sentencea text text1 texta",
    "positive": "positive pos answer document passage question2 hypothesis entailment paraphrase "
                "sent1 sentence2 sentenceb text2 textb",
    "hard negative": "negative neg hardneg hardnegative contradiction sent2 sentence3 text3",
    IDS: "id idx index pairid qid row unnamed",
    LABELS: "label labels class goldlabel isduplicate entailmentlabel entailmentjudgment",
    SCORES: "score scores goldscore rating similarity similarityscore relatednessscore",
}.items() for name in names.split()}
# The function of pandas that reads it.
CONVERTED = {"parquet": "parquet", "json": "json", "xlsx": "excel", "feather": "feather"}


def kind_of(path: Path, kinds: Sequence[str]) -> str:
    """What a file is by the end of its name, in capitals or not; .gz may follow."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in kinds:
        return kind
    way = (f'; convert it with: python -c "import pandas; pandas.read_{CONVERTED[kind]}'
           f"('{path}').to_json('{path.with_suffix('.jsonl')}', orient='records', lines=True)\""
           if kind in CONVERTED else "")
    raise ValueError(f"{path}: expected a name in {', '.join('.' + each for each in kinds[:-1])} "
                     f"or .{kinds[-1]} (.gz may follow){way}")


@cache
def piped():
    """Standard input as a temporary file, as it is read twice; its first line tells the kind."""
    first = sys.stdin.buffer.readline()
    text = first.decode("utf-8", errors="replace").strip()
    kind = kind_by_header(text)
    file = tempfile.NamedTemporaryFile(
        prefix="stdin-", suffix=".tsv" if kind == "txt" and "\t" in text else f".{kind}")
    file.write(first)
    shutil.copyfileobj(sys.stdin.buffer, file)
    file.flush()
    return file


def own_file(name: str, expected: str) -> Path:
    """The file of this name, which must be there; `-` is standard input."""
    path = Path(piped().name if name == "-" else name)
    if not path.is_file():
        found = ("a folder" if path.is_dir() else "something else (a pipe is read by the name -)"
                 if path.exists() else "nothing")
        raise FileNotFoundError(f"{path}: expected {expected}, found {found} there")
    return path


# ---- rows -----------------------------------------------------------------------------------

def split_rows(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells. A .csv may quote a cell; in a .tsv, quotes are ordinary letters."""
    if kind == "jsonl":
        return (yield from json_rows(path))
    if kind == "tsv":
        rows = (line.rstrip("\r\n").split("\t") for line in read_lines(path))
        return (yield from enumerate(rows, start=1))
    reader = csv.reader(read_lines(path), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: damaged csv ({error})") from None


def json_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The keys of the first object as a header, then the values of every object under these."""
    keys = []
    for number, line in enumerate(read_lines(path), start=1):
        found = read_object(f"{path}:{number}", line) if line.strip() else {}
        if found and not keys:
            keys = list(found)
            yield number, keys
        if new := [key for key in found if key not in keys and meaning(key) in TEXTS]:
            raise ValueError(f"{path}:{number}: expected the keys of the first line, found "
                             f"{new[0]!r}, too")
        yield number, [as_cell(f"{path}:{number}", key, found.get(key)) for key in keys]


def as_cell(place: str, key: str, value) -> str:
    """A value of an object; null is an empty cell."""
    if isinstance(value, list | dict | bool) and meaning(key) in TEXTS:
        raise ValueError(f"{place}: expected one text as {key!r}, found {str(value)[:60]}")
    return value if isinstance(value, str) else "" if value is None else str(value)


def read_object(place: str, line: str) -> dict:
    """The object that a line of a .jsonl is."""
    try:
        found = json.loads(line)
        if "\\u" in line:                                         # half of an emoji is no text
            json.dumps(found, ensure_ascii=False).encode()
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise ValueError(f'{place}: expected an object such as {{"sent0": "...", "sent1": "..."}}, '
                     f"found {line.strip()[:60]!r}")


# ---- headers --------------------------------------------------------------------------------

def meaning(name: str) -> str:
    """What a column of this name holds, such as "anchor" or "labels"; "" where it is unusual."""
    bare = re.sub(r"[\W_]+", "", name.lower())
    return MEANINGS.get(bare) or MEANINGS.get(bare.rstrip("0123456789"), "")


def meanings_of(row: Sequence[str]) -> list[str]:
    """A header's meanings, else []. pandas leaves the column of row numbers unnamed."""
    found = [meaning(cell) or ("" if cell.strip() else NOTHING if place else
                               IDS) for place, cell in enumerate(row)]
    return found if all(found) and set(found) & set(TEXTS) else []


def kind_by_header(line: str) -> str:
    """What a file is if its first line is an object or a usual header of columns, else "txt"."""
    if re.match(r'\{\s*"', line):
        return "jsonl"
    return next((kind for kind, sign in (("tsv", "\t"), ("csv", ","))
                 if sign in line and meanings_of(line.split(sign))), "txt")


def text_places(path: Path, kind: str, row: Sequence[str]) -> list[int]:
    """Places of anchor, positive and hard negative in a usual header; [] where the row is none."""
    found = list(map(meaning, row)) if kind == "jsonl" else meanings_of(row)
    places = sorted((place for place, what in enumerate(found) if what in TEXTS),
                    key=lambda place: TEXTS.index(found[place]))
    if not found:
        return []
    if not 1 <= len(places) <= 3:
        raise ValueError(f"{path}: expected names such as text, or sent0, sent1 and perhaps "
                         f"hard_neg, found {', '.join(map(str, row))[:200]}")
    for place, what in enumerate(found):
        # Other keys of an object are left unread, except labels, which may say "not a pair".
        if what in NO_TEXT and (kind != "jsonl" or len(places) > 1 and what in (LABELS, SCORES)):
            raise ValueError(no_text(path, place, what, row[place]))
    return places


# ---- refusals -------------------------------------------------------------------------------

def no_text(path: Path, place: int, what: str, cells: str) -> str:
    """The sentence that refuses a column."""
    return f"{path}: column {place + 1} ({cells!r}) looks like {what}: {NO_TEXT[what]}"


def advice(kind: str, row: Sequence[str], expected: int) -> str:
    """What may be wrong with a row that has an unexpected number of columns."""
    if len(row) > expected:
        return ("; leave out the sign at the end of the line" if not row[-1] else
                "; a text with commas needs quotes around it" if kind == "csv" else
                "; a text must not hold a tab")
    signs = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
    found = [name for sign, name in signs.items() if sign in " ".join(row)]
    return (f"; it looks like a file with {found[0]} between: a .csv has commas, a .tsv tabs"
            if found else "")
