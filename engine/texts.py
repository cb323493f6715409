"""How are millions of lines read and kept? Line by line, in one block of bytes."""

import gzip
import io
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


class Lines(Sequence[str]):
    """Texts in one block of UTF-8; a list would take some 60 bytes more a text."""

    def __init__(self, texts: Iterable[str] = ()):
        self.block, self.ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self.block += text.encode()
        self.ends.append(len(self.block))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]                             # -1 is the last one
        return self.block[self.ends[place] : self.ends[place + 1]].decode()

    def __eq__(self, other) -> bool:
        return list(self) == list(other)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped or not; \\n alone ends one, as texts may hold U+2028."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(io.BufferedReader(file), start=1):
                if b"\0" in line:
                    raise ValueError(f"{path}:{number}: expected UTF-8 text, found a NUL character,"
                                     " as in UTF-16 or in what is no text; convert the file")
                text = line.decode("utf-8")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: expected UTF-8, found the byte "
                         f"{error.object[error.start]:#04x}; convert the file, "
                         "for example by iconv -f cp1252 -t utf-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip after line {number} ({error}); fetch the file "
                         "again") from None
