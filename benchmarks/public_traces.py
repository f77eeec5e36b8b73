"""Where the public traces are: the folder that `PAGEDKV_TRACES` names, or else `shared/traces` beside the checkout.

`docs/traces.md` says where to get them, and what their files are called here.
"""

import os
from pathlib import Path

__all__ = ["AZURE_CONVERSATION", "MOONCAKE_CONVERSATION", "missing"]

FOLDER = Path(os.environ.get("PAGEDKV_TRACES") or Path(__file__).parents[2] / "shared" / "traces")
AZURE_CONVERSATION = FOLDER / "azure_llm_2023_conv.csv.gz"
MOONCAKE_CONVERSATION = FOLDER / "mooncake_fast25_conversation.jsonl.gz"


def missing(*traces: Path) -> bool:
    """Whether one of these is not there, which is then printed."""
    absent = [trace.name for trace in traces if not trace.exists()]
    if absent:
        print(
            f"not there: {', '.join(absent)}. PAGEDKV_TRACES names their folder, docs/traces.md says where to get them"
        )
    return bool(absent)
