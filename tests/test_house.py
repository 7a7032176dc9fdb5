"""The rules of the house: who imports whom, which files a README names, and how words are spelled."""

import ast
from pathlib import Path

import pytest
from fixtures.paths import ROOT


# What each folder or file of `lisa_hf` may import of the others; all but the model may import the two that come first.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "model": set(),
    "chat_templates": set(),
    "data": {"model"},
    "conversion": {"model", "chat_templates"},
    "from_scratch": {"data", "model"},
    "evaluation": {"data", "model"},
    "training": {"evaluation", "from_scratch", "chat_templates", "data", "model"},
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
                allowed = {inside[0], "errors", "files"} | ALLOWED[inside[0]]
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
