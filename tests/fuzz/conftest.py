"""Tests are imported without a package around them; the targets are found beside this file."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
