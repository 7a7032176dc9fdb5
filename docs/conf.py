"""The site: `make docs` builds it into docs/_build/html, without network."""

import dataclasses
import re
import sys
from pathlib import Path

from sphinx.search.en import SearchEnglish


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments  # noqa: E402


project = html_title = "lisa_hf"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_show_sphinx = html_show_copyright = False

# The notebook asks the quick start's model and trains it further, for minutes: where there is one, and once.
nb_execution_mode = "cache" if (ROOT / "outputs/quickstart/config.json").is_file() else "off"
nb_execution_timeout = 900
nb_execution_raise_on_error = True


def argument_table(arguments) -> str:
    """Return the fields of a dataclass as a Markdown table of names, defaults and meanings."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(arguments):
        if field.name in arguments.__annotations__:  # not those of transformers
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = (
                "none" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
            )
            lines.append(f"| `{field.name}` | {value} | {field.metadata['help']} |")
    return "\n".join(lines)


myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3  # links to headings as on GitHub: page.md#the-heading
myst_substitutions = {
    arguments.__name__: argument_table(arguments)
    for arguments in (ModelArguments, DataArguments, LisaTrainingArguments)
}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True


MARKUP = re.compile(r"(?:\[`~?([\w.]+)`\]|(?<![`:])`([^`]+)`(?!`))(?=(\w?))")  # transformers' links, and code


def to_restructured_text(lines: list[str]) -> list[str]:
    """Turn the Markdown of a docstring into what Sphinx reads: links, code in backticks, code blocks."""
    output, fence, in_sections = [], None, False
    for line in lines:
        if opening := re.match(r"(\s*)```(\w*)$", line):
            fence = opening[1] if fence is None else None
            output += [f"{fence}.. code-block:: {opening[2]}", ""] if fence is not None else [""]
        elif fence is not None:
            output.append("    " + line)
        elif not in_sections and line.startswith("    ") and not (output and output[-1].strip()):
            output += ["::", "", line] if not (len(output) > 1 and output[-2].startswith("    ")) else [line]
        elif not in_sections and line.startswith("    "):
            output.append(line)
        else:
            in_sections = in_sections or re.fullmatch(r"[A-Z]\w+:", line) is not None
            output.append(line)
    return MARKUP.sub(_markup, "\n".join(output)).split("\n")


def _markup(match: re.Match) -> str:
    name, code, next_letter = match.groups()
    text = f":py:obj:`~{name}`" if name else f"``{code}``"
    return text + "\\ " * bool(next_letter)


class Search(SearchEnglish):
    """English, and Chinese by pairs of characters: it has no spaces, and readers type words of two or more."""

    def split(self, text: str) -> list[str]:
        words = super().split(text)
        runs = re.findall("[\u4e00-\u9fff]{3,}", text)
        return words + [run[start : start + 2] for run in runs for start in range(len(run) - 1)]


def setup(app):
    app.add_search_language(Search)

    def change(app, what, name, obj, options, lines):
        lines[:] = to_restructured_text(lines)

    def set_language(app, pagename, templatename, context, doctree):
        if pagename.startswith("zh/"):
            context["language"] = "zh-CN"  # browsers choose glyphs by it

    app.connect("html-page-context", set_language)
    app.connect("autodoc-process-docstring", change, priority=100)  # before napoleon
