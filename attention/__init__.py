"""Attention through block tables: tensors in, tensors out; it knows no request.

`paged_attention` reads, `write_kv` writes, `plan` divides a step's work once for all layers, `merge_states` puts partial
results together; `cascade_attention` reads a prefix that many share once, and so does a `plan` that is told of it by
`shared_with_previous`. `backend_info()` says what runs here.
"""

try:
    # Asked for here, so that its absence is told in one sentence.
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "pagedkv.attention needs torch: in a checkout of pagedkv, pip install '.[torch]'", name="torch"
    ) from None

from pagedkv.attention.backends import BackendInfo, backend_info
from pagedkv.attention.cascade import CascadePlan, cascade_attention, plan_cascade
from pagedkv.attention.errors import AttentionArgumentError, BackendUnsupportedError
from pagedkv.attention.formats import CacheFormat, format_of, scale_shape
from pagedkv.attention.merge import merge_states
from pagedkv.attention.op import paged_attention, write_kv
from pagedkv.attention.shared_prefixes import order_by_prefix, shared_with_previous
from pagedkv.attention.step_plan import AttentionPlan, plan
from pagedkv.attention.tree_mask import pack_tree_mask, tree_mask_from_parents

__all__ = [
    "paged_attention",
    "write_kv",
    "merge_states",
    "plan",
    "AttentionPlan",
    "cascade_attention",
    "plan_cascade",
    "CascadePlan",
    "order_by_prefix",
    "shared_with_previous",
    "pack_tree_mask",
    "tree_mask_from_parents",
    "CacheFormat",
    "format_of",
    "scale_shape",
    "backend_info",
    "BackendInfo",
    "AttentionArgumentError",
    "BackendUnsupportedError",
]
