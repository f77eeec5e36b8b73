"""What several files of attention tests share."""

import os
import sys
from pathlib import Path

# Triton asks once, on import, whether kernels are to be interpreted. A machine with a GPU sets this to 0 to compile them.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests are imported without a package around them; batches and plain_attention are found beside this file.
sys.path.append(str(Path(__file__).parent))
