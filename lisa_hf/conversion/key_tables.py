"""Rename the keys of original checkpoints with explicit tables, applied strictly.

A table is a list of rows (regular expression for a whole original key, replacement). The replacement is the new key, a
tuple of new keys (one tensor with several names in the new model), or None (not a weight: dropped).
"""

import logging
import re


logger = logging.getLogger(__name__)


class Shapes(dict):
    """Shapes of a checkpoint's tensors by name: `Shapes.of(state_dict)["lm_head.weight"]`.

    Raises:
        ValueError: The checkpoint has no tensor of that name.
    """

    @classmethod
    def of(cls, state_dict: dict) -> "Shapes":
        return cls({key: tuple(tensor.shape) for key, tensor in state_dict.items()})

    def __missing__(self, key: str):
        raise ValueError(
            f"The checkpoint has no {key}: expected the tensors that define the geometry, got {list(self)[:5]} and "
            f"{max(len(self) - 5, 0)} more. It is incomplete, or belongs to another model: name another."
        )


def nest(table: list, source: str, target: str) -> list:
    """Return a table whose original keys start with `source` and whose new keys start with `target`."""
    prefix = re.escape(source)
    nested = []
    for pattern, replacement in table:
        if isinstance(replacement, tuple):
            replacement = tuple(target + key for key in replacement)
        elif replacement is not None:
            replacement = target + replacement
        nested.append((f"{prefix}(?:{pattern})", replacement))
    return nested


def convert_key(key: str, table: list) -> tuple[str, ...] | None:
    """Return the new keys from the first matching row: empty if the key is dropped, None if no row matches."""
    for pattern, replacement in table:
        match = re.fullmatch(pattern, key)
        if match is not None:
            replacements = replacement if isinstance(replacement, tuple) else (replacement,)
            return tuple(match.expand(new_key) for new_key in replacements if new_key is not None)
    return None


def convert_state_dict(state_dict: dict, table: list) -> dict:
    """Rename the keys of a state dict and log each; values of any type pass through.

    Raises:
        ValueError: Keys match no row of the table, or several become the same key; all are listed.
    """
    converted, origins, unknown, collisions = {}, {}, [], []
    for key, value in state_dict.items():
        new_keys = convert_key(key, table)
        if new_keys is None:
            unknown.append(key)
            continue
        logger.info("%s -> %s", key, " and ".join(new_keys) or "dropped")
        for new_key in new_keys:
            if new_key in converted:
                collisions.append(f"{origins[new_key]} and {key} -> {new_key}")
            converted[new_key], origins[new_key] = value, key
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of {len(state_dict)} keys match no row: {unknown}")
    if collisions:
        problems.append(f"keys that become the same key: {collisions}")
    if problems:
        raise ValueError(
            f"Expected the keys of the key table, got others: {'; '.join(problems)}. Name a checkpoint of this "
            "architecture, or add a row to the table."
        )
    return converted
