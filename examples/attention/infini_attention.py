"""Infini-attention: softmax within a segment, a compressive memory of fixed size for all segments before it.

Source: T. Munkhdalai, M. Faruqui, S. Gopal, "Leave No Context Behind: Efficient Infinite Context Transformers with
Infini-attention", 2024, arXiv:2404.07143, section 2. With f = ELU + 1, the memory is M = sum f(k)^T v and z = sum f(k);
reading it gives f(q) M / (f(q) z), which is attention to all past tokens with weights f(q) . f(k). So log(f(q) z) is the
readout's LSE, and `merge_states` makes one normalisation of both parts: exp(q . k * scale) within the segment, f(q) . f(k)
before it. The paper weighs the parts by a learned gate in place of their mass: `by_gate`, the same merge with constant LSEs.

In the cache: one segment, whose blocks are used again by the next. The memory, (kv_heads, head_dim, value_dim + 1) numbers,
lies beside it. The memory's keys and queries carry no positions, in the paper and here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pagedkv.attention import merge_states, paged_attention, write_kv

Combine = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Memory:
    """What is kept of past segments: `content` (kv_heads, head_dim, value_dim), `mass` (kv_heads, head_dim)."""

    content: Tensor
    mass: Tensor

    @classmethod
    def empty(cls, num_kv_heads: int, head_dim: int, value_dim: int) -> "Memory":
        """Of no segment."""
        return cls(torch.zeros(num_kv_heads, head_dim, value_dim), torch.zeros(num_kv_heads, head_dim))

    def read(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Out (tokens, q_heads, value_dim) and LSE (tokens, q_heads); zeros and -inf while it is empty."""
        features = torch.nn.functional.elu(query).add(1).unflatten(1, (len(self.mass), -1))
        total = torch.einsum("tkgd,kd->tkg", features, self.mass)
        out = torch.einsum("tkgd,kdv->tkgv", features, self.content) / torch.where(total > 0, total, 1)[..., None]
        return out.flatten(1, 2), total.log().flatten(1, 2)

    def add(self, key: Tensor, value: Tensor) -> "Memory":
        """With (tokens, kv_heads, ...) more. The delta rule is `memory.add(key, value - memory.read(key)[0])`."""
        features = torch.nn.functional.elu(key).add(1)
        content = self.content + torch.einsum("tkd,tkv->kdv", features, value)
        return Memory(content, self.mass + features.sum(0))


def by_lse(memory: Tensor, memory_lse: Tensor, local: Tensor, local_lse: Tensor) -> Tensor:
    """Each part by its share of the common denominator."""
    return merge_states(memory, memory_lse, local, local_lse)[0]


def by_gate(beta: Tensor) -> Combine:
    """The paper's gate: sigmoid(beta) of the memory and the rest of the segment; beta: (q_heads,)."""
    share = torch.sigmoid(beta)[:, None]
    return lambda memory, _memory_lse, local, _local_lse: share * memory + (1 - share) * local


def attend(
    query: Tensor, caches: tuple[Tensor, Tensor], block_table: Tensor, *, length: int, memory: Memory, combine: Combine
) -> Tensor:
    """Attention of the last len(query) tokens of a segment that has `length` tokens by now, their K/V written."""
    lengths = torch.tensor([length], dtype=torch.int32)
    starts = torch.tensor([0, len(query)], dtype=torch.int32)
    local = paged_attention(query, *caches, block_table[None], lengths, starts, return_lse=True)
    return combine(*memory.read(query), *local)


def run(
    query: Tensor, key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], block_table: Tensor, combine: Combine
) -> tuple[Tensor, Memory]:
    """A whole text, (tokens, heads, head_dim), in segments as long as the blocks of `block_table` hold; then the memory."""
    memory, block_size = Memory.empty(*key.shape[1:], value.shape[2]), caches[0].shape[1]
    outs, slots = [], (block_table.long()[:, None] * block_size + torch.arange(block_size)).flatten()
    for q, k, v in zip(*(x.split(len(slots)) for x in (query, key, value)), strict=True):
        write_kv(k, v, *caches, slots[: len(k)])
        outs.append(attend(q, caches, block_table, length=len(k), memory=memory, combine=combine))
        if len(k) == len(slots):  # The segment is over: its keys and values go into the memory, its blocks to the next.
            memory = memory.add(k, v)
    return torch.cat(outs), memory


def main() -> None:
    """Read a text of five segments with two blocks."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(40, heads, 16, generator=generator) for heads in (4, 2, 2))
    caches = tuple(torch.full((2, 2, 4, 2, 16), torch.nan))
    out, memory = run(query, key, value, (caches[0], caches[1]), torch.tensor([1, 0], dtype=torch.int32), by_lse)
    kept = memory.content.numel() + memory.mass.numel() + 2 * caches[0].numel()
    print(f"out {tuple(out.shape)}; {kept} numbers kept, a full cache would take {key.numel() + value.numel()}")


if __name__ == "__main__":
    main()
