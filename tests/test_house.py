"""The rules of the house: who imports whom, which files a README names, and how words are spelled."""

import ast
import re
from pathlib import Path

import pytest
from fixtures.paths import ROOT


# What each folder or file of `lisa_hf` may import of the others; all but the model may import the first three.
ALLOWED = {
    "redaction": set(),
    "errors": set(),
    "files": set(),
    "model": set(),
    "chat_templates": set(),
    "data": {"model"},
    "conversion": {"model", "chat_templates"},
    "from_scratch": {"data", "model"},
    "evaluation": {"data", "model"},
    "inference": {"evaluation", "data", "model"},
    "training": {"conversion", "evaluation", "from_scratch", "chat_templates", "data", "model"},
    "export": {"training", "evaluation", "conversion", "data", "model"},
    "__init__": {"training", "data", "model"},
}
FOLDERS = ("lisa_hf", "data_scripts", "recipes")
SOURCE_FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Return the dotted names of all that a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join((*package[: len(package) + 1 - node.level], node.module or "")).strip(".")
            prefix = parent if node.level else node.module
            names += [f"{prefix}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "lisa_hf" / "model").glob("*.py")), ids=lambda path: path.name)
def test_model_files_import_nothing_else_of_lisa_hf(path):
    """They travel to the Hub as remote code, where only `from .module import name` resolves."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert (path.parent / f"{node.module}.py").is_file(), ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] in ("lisa_hf", "data_scripts", "recipes") for name in names)


def test_imports_go_one_way():
    wrong = []
    for path in SOURCE_FILES:
        folder, *inside = path.relative_to(ROOT).with_suffix("").parts
        for name in imported_modules(path):
            top, *rest = name.split(".")
            if folder == "lisa_hf":
                other = rest[0] if top == "lisa_hf" and rest else None
                allowed = {inside[0], "redaction", "errors", "files"} | ALLOWED[inside[0]]
                is_wrong = top in ("data_scripts", "recipes") or other in ALLOWED.keys() - allowed
            else:
                is_wrong = folder == "data_scripts" and top == "recipes"
            if is_wrong:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_in_a_circle():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCE_FILES
    }
    imports = {}
    for module, path in modules.items():
        names = imported_modules(path)
        imports[module] = {name for full in names for name in (full, full.rpartition(".")[0]) if name in modules}
        imports[module].discard(module)
    finished = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in finished:
            for other in sorted(imports[module]):
                visit(other, (*trail, module))
            finished.add(module)

    for module in modules:
        visit(module, ())


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_no_test_is_imported(path):
    for name in imported_modules(path):
        assert not name.startswith("test_"), f"{path} imports {name}"


def test_every_file_is_named_in_a_readme():
    readmes = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
    words = {
        word
        for readme in readmes
        if readme.is_file()
        for word in re.findall(r"[\w./]+", readme.read_text(encoding="utf-8"))
    }
    names = {part for word in words for part in (word, word.strip("/").rpartition("/")[2])}
    files = [path for path in SOURCE_FILES if path.name != "__init__.py"]
    folders = {path.parent for path in SOURCE_FILES}
    missing = [path for path in sorted({*files, *folders}) if path.name not in names]
    assert not missing, "no README names " + ", ".join(str(path.relative_to(ROOT)) for path in missing)


BRITISH = re.compile(
    r"colour|behaviour|neighbour|favour\b|honour|flavour|centre\b|centred|licence|catalogue|analys(?:e|ed|es|ing)\b"
    r"|labell(?:ed|ing)|modell(?:ed|ing)|cancell(?:ed|ing)|travell|grey\b|defence|artefact|programme\b"
    r"|(?:normal|initial|serial|recogn|optim|quant|material|token|summar|organ|real|general|special|parallel|penal"
    r"|synchron|visual|memor|minim|maxim|random|regular|util|custom|character|emphas|parametr|final)is(?:e|ed|es|er|ers|ing|ation|able)\b",
    re.IGNORECASE,
)
# The drawn scenes keep theirs: another word would be another vocabulary, and other results of the quick start. And so
# does a key of Label Studio.
TEXTS_OF_ROWS = re.compile(r'"colour"|colour(?:ed)? (?:of|like|is the|shape)|was_cancelled')


def test_spelling_is_american():
    found = []
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        hidden = any(part.startswith(".") or part in ("golden", "outputs", "shared") for part in relative.parts)
        if hidden or path.suffix not in (".py", ".md", ".yaml", ".cfg", ".toml", ".jinja") or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{relative}:{number}: {word[0]}" for word in BRITISH.finditer(TEXTS_OF_ROWS.sub("", line))]
    assert not found, "\n".join(found)
