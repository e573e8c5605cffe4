"""Measures how lazy the layers of a model are, and lets a strategy choose: from a GGUF file or a checkpoint to a report.

`subjects` are what can be measured, the runtime's way and transformers'; `analyze` measures what a strategy needs and no more.
"""

from lt_gguf.analysis.analyze import Progress, Settings, analyze
from lt_gguf.analysis.subjects import Checkpoint, GGUFFile, Subject

__all__ = ["Checkpoint", "GGUFFile", "Progress", "Settings", "Subject", "analyze"]
