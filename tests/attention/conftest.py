"""What several files of attention tests share."""

import sys
from pathlib import Path

# Tests are imported without a package around them; batches and plain_attention are found beside this file.
sys.path.append(str(Path(__file__).parent))
