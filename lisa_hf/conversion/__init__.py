"""Original checkpoints become this project's: visible key tables, applied strictly.

A table is a list of rows (regular expression of a whole original key, replacement). The replacement is the new key, a
tuple of new keys (one tensor that the new model holds under several names) or None (not a weight: dropped).
"""

import re


def nest(table: list, source: str, target: str) -> list:
    """The rows of a table whose model has become a part of another: prefixes its original and its new keys."""
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
    """New keys of an original key, by the first row that matches: none if it is dropped, None if no row matches."""
    for pattern, replacement in table:
        match = re.fullmatch(pattern, key)
        if match is not None:
            replacements = replacement if isinstance(replacement, tuple) else (replacement,)
            return tuple(match.expand(new_key) for new_key in replacements if new_key is not None)
    return None


def convert_state_dict(state_dict: dict, table: list) -> dict:
    """Renames the keys of a state dict; the values pass through, whatever they are.

    Raises:
        ValueError: keys that no row of the table matches, or several keys that become the same one; all are listed.
    """
    converted, origins, unknown, collisions = {}, {}, [], []
    for key, value in state_dict.items():
        new_keys = convert_key(key, table)
        if new_keys is None:
            unknown.append(key)
            continue
        for new_key in new_keys:
            if new_key in converted:
                collisions.append(f"{origins[new_key]} and {key} -> {new_key}")
            converted[new_key], origins[new_key] = value, key
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} of {len(state_dict)} keys are in no row of the key table: {unknown}.")
    if collisions:
        problems.append(f"Keys that become the same one: {collisions}.")
    if problems:
        problems.append("This is another architecture, or the table lacks a row.")
        raise ValueError(" ".join(problems))
    return converted
