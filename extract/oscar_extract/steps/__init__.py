"""The steps of a preset: resize, proposals, selection, NMS, attributes."""
