"""Makes the models of this folder importable, as the other folders of tests do."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
transformers.logging.set_verbosity_error()
# Two test processes share two cores, and these models are too small for threads anyway.
torch.set_num_threads(1)
