"""The license of a checkpoint, as the metadata of model cards name it."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

_KEYS = ("license", "license_name", "license_link")
_MAX_NAME = 60
_KNOWN = {
    "apache-2.0": re.compile(r"Apache License\s+Version 2\.0"),
    "mit": re.compile(r"Permission is hereby granted, free of charge, to any person"),
}


def find_license(folder: Path) -> dict[str, str]:
    """What a checkpoint's card says of its license, or else its LICENSE file.

    Args:
        folder: a checkpoint.

    Returns:
        Of "license", "license_name" and "license_link" what is known; an unknown text is "other" with the
        name in its first line, as the Hub asks for. Empty if nothing is known.
    """
    return _from_card(folder / "README.md") or _from_text(folder)


def _from_card(file: Path) -> dict[str, str]:
    try:
        data = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's file: absent, not UTF-8, not YAML
        return {}
    return {key: data[key] for key in _KEYS if isinstance(data.get(key), str)}


def _from_text(folder: Path) -> dict[str, str]:
    file = next(iter(sorted(folder.glob("LICENSE*"))), None)
    if file is None or not file.is_file():
        return {}
    text = file.read_text("utf-8", errors="replace")
    for license_id, pattern in _KNOWN.items():
        if pattern.search(text):
            return {"license": license_id}
    title = next((line for line in text.splitlines() if line.strip()), file.name)
    name = re.sub(r"[^a-z0-9.]+", "-", title.lower())[:_MAX_NAME].strip("-")
    return {"license": "other", "license_name": name or "other", "license_link": file.name}
