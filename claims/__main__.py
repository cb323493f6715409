"""
Every claim, measured: docs/CLAIMS.md.

    python -m claims                      # 17 pages, twenty minutes of a core
"""

import sys
from importlib import import_module
from pathlib import Path

from claims import CHANCE, Found, Trial, draw, find, parse
from engine.files import write_text
from engine.flags import pick_device, program
from engine.run_folder import environment
from engine.tables import markdown

FOLDER = Path(__file__).parent
PICTURES = FOLDER.parent / "docs/claims"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py")
               if not path.stem.startswith("__") and path.stem != "planted")


def overview(found: dict[str, Found]) -> str:
    """A line for each claim, and how many of them come true."""
    lines = [["", "claim", "statements shown", "seconds of a core"]]
    lines += [[f"[{name}](#{name})", one.page.__doc__.strip().splitlines()[0],
               one.held, f"{one.seconds:.0f}"] for name, one in found.items()]
    return markdown(lines, first=str.ljust)


def document(found: dict[str, Found], args) -> str:
    """The text of docs/CLAIMS.md."""
    about = environment(pick_device("auto"))
    whole = sum(one.held == f"{len(one.page.SHOWS)} of {len(one.page.SHOWS)}"
                for one in found.values())
    said = sum(len(one.page.SHOWS) for one in found.values())
    pages = [f"## {name}\n\n`python -m claims.{name}`\n\n{one.text()}"
             + (f"\n![{name}](claims/{name}.png)\n" if hasattr(one.page, "curves") else "")
             for name, one in found.items()]
    return "\n\n".join([
        "# What the papers claim, on planted truth",
        f"Written by `python -m claims`: encoder {args.encoder}, seeds "
        f"{', '.join(map(str, args.seeds))}, {about['processor']} ({about['platform']}), threads: "
        f"{about['threads']}, torch {about['torch']}. Mean ± standard deviation over seeds. Shown "
        "is a difference of the claimed sign with p < 0.05 in a paired, two-sided t-test over "
        "them; a negative one goes the other way. Seeds 0 to 4 were seen while this was written.",
        f"{whole} of {len(found)} claims are shown in full. Of {said} statements, "
        f"{said * CHANCE / 2:.0f} would be shown by luck alone.", overview(found), *pages])


def main() -> None:
    args = parse(__doc__)
    found = {}
    for name in NAMES:
        page = import_module(f"claims.{name}")
        found[name] = find(page, args.seeds, encoder=args.encoder)
        print(f"{name}: {found[name].seconds:.0f} seconds of a core", found[name].findings(),
              sep="\n", flush=True)
        if hasattr(page, "curves"):
            draw(page, Trial(args.seeds[0], encoder=args.encoder), PICTURES / f"{name}.png")
    write_text(FOLDER.parent / "docs/CLAIMS.md", document(found, args))


if __name__ == "__main__":
    sys.exit(program(main))
