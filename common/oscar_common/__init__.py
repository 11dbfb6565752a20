"""What both stages speak: the sample schema, settings, errors, files, progress. Imports neither of them.

Public are the names in `__all__`; docs/python.md shows them in use.
"""

from typing import TYPE_CHECKING

from oscar_common.lazy import lazy_names

__version__ = "0.1.0"

__all__ = [
    "Attribute",
    "ImageRecord",
    "OperationError",
    "Regions",
    "Sample",
    "Text",
    "UsageError",
    "__version__",
    "make_key",
]

if TYPE_CHECKING:
    from oscar_common.errors import OperationError, UsageError
    from oscar_common.sample import Attribute, ImageRecord, Regions, Sample, Text, make_key
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "oscar_common.errors": ["OperationError", "UsageError"],
            "oscar_common.sample": ["Attribute", "ImageRecord", "Regions", "Sample", "Text", "make_key"],
        },
    )
