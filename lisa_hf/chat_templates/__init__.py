"""The chat templates of LLaVA and LISA, one Jinja file each."""

from pathlib import Path


CHAT_TEMPLATES = Path(__file__).parent


def load_chat_template(name: str | None) -> str | None:
    """Return the Jinja text of a template of this package (`llava_v1`, ...) or of a file; None stays None.

    Raises:
        ValueError: `name` is neither.
    """
    if name is None:
        return None
    path = CHAT_TEMPLATES / f"{name}.jinja"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        names = ", ".join(sorted(template.stem for template in CHAT_TEMPLATES.glob("*.jinja")))
        raise ValueError(f"chat_template: expected one of {names} or a Jinja file, got '{name}'")
    return path.read_text(encoding="utf-8")
