"""Pages and pieces of pages from the templates beside this file; stands below all values."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from pruning.kit.words import percent
from pruning.report.table import TextTable, is_name

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(["html"]),  # Markdown is not HTML
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.tests["name"] = is_name


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)


def _code(text: str) -> Markup:
    """Prose whose words between backticks are code, as in Markdown."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


TEMPLATES.filters |= {
    "code": _code,
    "cell": lambda text: text.replace("|", "\\|"),  # of a table in Markdown
    "count": "{:,}".format,
    "oneline": lambda text: " ".join(text.split()),
    "percent": percent,
    "yaml": _yaml,
}


def render(template: str, **values: Any) -> str:
    """A template with its values; in HTML all that is not `Markup` is escaped."""
    return TEMPLATES.get_template(template).render(**values)


def document(title: str, parts: Iterable[Markup]) -> str:
    """A page of its own from pieces of HTML; it loads nothing."""
    return render("page.html", title=title, parts=list(parts))


def piece(name: str, *values: Any) -> Markup:
    """A piece of a page, by its name in pieces.html."""
    return getattr(TEMPLATES.get_template("pieces.html").module, name)(*values)


def text_html(text: str, level: str = "p") -> Markup:
    """A paragraph, or a title of level "h1" or "h2"."""
    return Markup("<{0}>{1}</{0}>").format(Markup(level), text)


def section_html(table: TextTable) -> Markup:
    """A table under its title."""
    return piece("section", table)


def long_section(table: TextTable) -> Markup:
    """A table under its title, folded if it is long."""
    return piece("folded", table)


def fragment(headlines: Iterable[Any], tables: Iterable[TextTable]) -> str:
    """Headlines, each with number, unit and detail, and tables, unstyled, for a notebook."""
    lines = Markup("<br>").join(
        Markup("<b>{} {}</b>: {}").format(line.number, line.unit, line.detail) for line in headlines
    )
    return Markup("<p>{}</p>{}").format(lines, Markup("").join(map(section_html, tables)))
