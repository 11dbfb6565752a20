"""Stage 1: from images and texts to shards of detected regions.

Public are the names in `__all__`; docs/python.md shows them in use.

    open_detector       a detector by name or config file, with its weights
    detect_regions      the regions of one image
"""

from typing import TYPE_CHECKING

from oscar_common.lazy import lazy_names

__all__ = ["Detector", "RefusedImage", "detect_regions", "open_detector"]

if TYPE_CHECKING:
    from oscar_extract.detect import detect_regions
    from oscar_extract.detector import Detector, open_detector
    from oscar_extract.images import RefusedImage
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "oscar_extract.detect": ["detect_regions"],
            "oscar_extract.detector": ["Detector", "open_detector"],
            "oscar_extract.images": ["RefusedImage"],
        },
    )
