"""What several files of simulation tests share."""

import sys
from pathlib import Path

# Tests are imported without a package around them; recorded_engine is found beside this file.
sys.path.append(str(Path(__file__).parent))
