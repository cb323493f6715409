"""The house: budgets, which way imports point, what a page has, one name for one thing."""

import ast
import re
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

import conftest
import papers
from papers import METHODS, own_settings, settings

ROOT = Path(__file__).parent.parent
LINES = {"mincse.py": 400, "model.py": 350, "losses.py": 160, "data.py": 300, "eval_sts.py": 320}
# A lower floor is imported by the higher ones, never the other way round.
FLOORS = [{"model", "losses"}, {"engine"}, {"data"}, {"eval_sts"}, {"papers"}, {"mincse"},
          {"tools", "claims"}]
SHARED_PAGES = {"__init__", "settings", "simcse", "views", "corpus", "memory"}
PAGES = ["simcse", "focal", "is_cse", "sscl", "cards", "kdmcse", "diffcse", "twins", "ifnd",
         "core_tuning", "debcse", "infocse", "pnr", "fedrcl", "sparsecse"]
# Names that stand in two modules, each with the reason why one reader never meets both.
TWICE = {"main", "parse",             # every program has its own
         "measure",                   # every claim has its own, and sparsecse
         "curves",                    # so has every claim with a picture
         "Config",                    # every page has its own, and pre-training
         "mean",                      # of tokens in model.py, of numbers in eval_sts.py
         # tools/pretrain.py goes the way of mincse.py, step by step, with another loss.
         "Job", "build", "make_optimizer", "train", "fit", "run"}


def sources() -> dict[str, str]:
    """Every module of the product by its path."""
    paths = [*ROOT.glob("*.py"), *(path for folder in ("papers", "engine", "tools", "claims")
                                   for path in (ROOT / folder).glob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def length(text: str) -> int:
    return len(text.splitlines())


# ---- budgets --------------------------------------------------------------------------------

def test_the_whole_product_and_its_tests_stay_short():
    """What is read to understand a paper, what is out of sight, and what shows the claims."""
    count = Counter()
    for path, text in sources().items():
        count[path.split("/")[0] if "/" in path else "top"] += length(text)
    assert count["top"] + count["papers"] <= 4550
    assert all(length(text) <= 67 for path, text in sources().items() if path.startswith("claims/")
               and path not in ("claims/__init__.py", "claims/planted.py"))
    assert count["engine"] <= 2800 and count["tools"] <= 1600 and count["claims"] <= 1230, count
    assert sum(length(path.read_text()) for path in (ROOT / "tests").glob("*.py")) <= 11300


def test_the_top_level_is_five_modules_within_their_budgets():
    top = {path: length(text) for path, text in sources().items() if "/" not in path}
    assert top.keys() == LINES.keys()
    assert all(count <= LINES[path] for path, count in top.items()), top


def test_a_page_is_at_most_300_lines_and_half_of_them_at_most_150():
    count = {page: length((ROOT / "papers" / f"{page}.py").read_text()) for page in PAGES}
    assert max(count.values()) <= 300 and median(count.values()) <= 150, count


def test_there_are_few_flags_that_all_share_and_few_that_a_paper_adds(capsys):
    with pytest.raises(SystemExit):
        papers.parse(["--help"])
    assert len(set(re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.M))) <= 40
    assert all(len(own_settings(name)) <= 8 for name in METHODS)


def test_there_is_one_level_of_folders_and_no_drawer_for_odds_and_ends():
    names = [Path(path).parts for path in sources()]
    assert all(len(parts) <= 2 for parts in names)
    assert not {parts[-1] for parts in names} & {"utils.py", "helpers.py", "misc.py", "common.py"}


# ---- imports --------------------------------------------------------------------------------

def imported(text: str) -> set[str]:
    """Modules that a source names, wherever in it: `papers.views`, `engine.hub`, `data` ..."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(module: str) -> int | None:
    top = module.split(".")[0]
    return next((number for number, names in enumerate(FLOORS) if top in names), None)


def test_imports_point_down_the_floors_and_never_up():
    for path, text in sources().items():
        own = floor_of(path.removesuffix(".py").replace("/", "."))
        for module in imported(text):
            assert (floor_of(module) or 0) <= own, f"{path} imports {module}"


def test_no_module_imports_itself_by_way_of_others():
    names = {path.removesuffix(".py").replace("/", "."): text for path, text in sources().items()}
    reached = {name: imported(text) & names.keys() - {name} for name, text in names.items()}
    reached = {name: {"papers.__init__"} if name == "papers" else found
               for name, found in reached.items()}
    for _ in names:
        reached = {name: found.union(*(reached[other] for other in found))
                   for name, found in reached.items()}
    assert [name for name, found in reached.items() if name in found] == []


def test_no_page_imports_another_paper():
    """But for what several share; and simcse reads the menu of losses, where focal stands."""
    for page in PAGES:
        names = imported((ROOT / f"papers/{page}.py").read_text())
        found = {name.split(".")[1] for name in names if re.match(r"papers\.[a-z_]+$", name)}
        found -= SHARED_PAGES | ({"focal"} if page == "simcse" else set())
        assert not found & set(PAGES), f"{page} imports {found}"


# ---- a page ---------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_in_its_first_lines_what_it_changes_and_whose_idea_it_is(page):
    said = ast.get_docstring(ast.parse((ROOT / f"papers/{page}.py").read_text()))
    assert re.match(r"[\w/-]+: [^\n]+\n\n", said) or said.splitlines()[0].endswith(".")
    assert re.search(r"^Unlike (SimCSE|what came before)\b[^\n:]*:", said, re.M)
    assert re.search(r"(20\d\d|arXiv)", said)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_has_settings_recipes_refusals_a_row_and_a_class(method):
    page = METHODS[method]
    assert issubclass(page.Config, settings.Config) and "rows" in vars(page)
    assert callable(page.check) and isinstance(page.recipes, dict) and page.__doc__
    for f in own_settings(method):
        assert f.metadata["help"] and f.metadata["group"] == method, f.name
    for row in vars(page)["rows"]:
        assert all((row.flags, row.idea, row.citation, row.published))
    known = {f.name for f in fields(page.Config)}
    for size, values in vars(page).get("recipes", {}).items():
        assert values.keys() <= known and re.match(
            r"(any|(bert-|roberta-)?(small|base|large))(, supervised)?$", size)


def test_the_lists_of_a_loss_and_of_a_program_are_pages_too():
    from papers import focal, sparsecse
    assert focal.Focal.rows and sparsecse.SparseCSE.rows


def test_tests_come_in_reading_order_and_what_has_no_place_in_it_comes_last():
    items = [SimpleNamespace(path=Path(f"test_{name}.py")) for name in ("new", "ifnd", "losses")]
    conftest.pytest_collection_modifyitems(items)
    assert [item.path.stem for item in items] == ["test_losses", "test_ifnd", "test_new"]
    assert {*PAGES} <= {*conftest.READING_ORDER}


# ---- names ----------------------------------------------------------------------------------

def test_no_function_or_class_has_its_name_in_two_modules():
    where = defaultdict(set)
    for path, text in sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                where[node.name].add(path)
    twice = {name: paths for name, paths in where.items() if len(paths) > 1}
    assert twice.keys() <= TWICE, {name: twice[name] for name in twice.keys() - TWICE}


def test_functions_are_short_and_lines_fit_the_page():
    for path, text in sources().items():
        assert max(map(len, text.splitlines())) <= 100, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"


# ---- pages that speak of files --------------------------------------------------------------

@pytest.mark.parametrize("page", ["README.md", "docs/RESULTS.md", "docs/PERFORMANCE.md",
                                  "docs/SECURITY.md", "docs/EXERCISES.md", "mini/README.md"])
def test_every_link_and_every_program_of_a_page_exists(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
    for module in re.findall(r"python -m ((?:tools|papers)\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page}: {module}"
    for script in re.findall(r"python (\w+\.py|tests/\w+\.py)", text):
        assert (ROOT / script).exists(), f"{page}: {script}"
