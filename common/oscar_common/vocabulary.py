"""The names of a detector's classes and attributes, from a file."""

import json
from pathlib import Path

from oscar_common.errors import UsageError, reason
from oscar_common.text_files import read_text, split_lines

NAMES = Path(__file__).parent / "vg"  # objects.txt and attributes.txt of bottom-up attention: 1600 and 400


def read_names(flag: str, file: Path, key: str = "") -> list[str]:
    """Read names from a text file of one a line, or from `key` of a VinVL label map (.json: name to index from 1).

    A line of synonyms "stop sign,stopsign" gives the first, in lower case, as the reference extractors do it.
    """
    try:
        text = read_text(file, flag)
        if file.suffix == ".json":
            indices: dict[str, int] = json.loads(text)[key]
            lines = sorted(indices, key=lambda name: indices[name])
        else:
            lines = [line for line in split_lines(text) if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"{flag} {file}: no such file; give one name a line") from None
    except KeyError:
        raise UsageError(f"{flag} {file}: it has no {key!r}; give VinVL's label map or one name a line") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag} {file}: cannot be read as one name a line or a label map: {reason(error)}") from None

    if not lines:
        raise UsageError(f"{flag} {file}: no name in it; give one name a line")

    return [line.split(",")[0].strip().lower() for line in lines]
