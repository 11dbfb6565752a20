"""Fine-tuned models at work on people's own photos: `open_model`, `open_photos`, `score`, `search`, `answers`."""

from oscar_train.predict.answer import answers
from oscar_train.predict.model import open_model
from oscar_train.predict.photos import open_photos
from oscar_train.predict.search import score, search

__all__ = ["answers", "open_model", "open_photos", "score", "search"]
