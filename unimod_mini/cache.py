"""The key/value cache of causal inference: a layer remembers the tokens that it routed, no others.

A sequence is fed in any number of chunks that cut no bidirectional span. In every layer, the tokens
that it selected are packed, row by row, into (1, N, D), and the block runs on them alone: a skipped
token computes nothing, attends to nothing and leaves nothing behind. Row b of a layer fills its
slots 0 .. count_b - 1 in the order of the sequence:

    keep 1:    t0 t1 t2 t3 t4         keep 0.4:  row 0: t1 t4 --        keep 0:  nothing is stored
                                                 row 1: t0 t2 t3

Departure from the usual: the rows of a batch have different lengths, and other ones in every layer.
For inference alone: what is stored carries no gradient.

Legend: B rows, N new tokens that a layer routes (all rows), M at most of one row, S slots, R rows
that a single token routes, H heads, G key/value heads, d head width.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .inference import unwrapped
from .plan import capacity
from .transformer import Context, UnifiedTransformer, attend

# not cuDNN's attention: it plans anew for every shape, and no two steps here have the same
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BY_ROW = ("cpu",)   # devices that decode ragged rows one by one, others side by side


class NewTokens(NamedTuple):
    """The tokens of a chunk that a layer routes, packed row by row in the order of the sequence."""
    row: Tensor            # (N,) long
    rows: list             # the same as a list
    slots: list            # N slots of the cache that they take
    columns: list          # N numbers of the token among the new ones of its row
    positions: Tensor      # (N,)
    spans: Tensor | None   # (N,)
    single: bool           # a chunk of one token: every row is named once at most


class LayerCache:
    """One layer: k and v (B, G, S, d), positions (B, S) int32, and the slots in use of each row."""

    def __init__(self, batch: int, n_slot: int, limit: int):
        self.n_slot, self.limit, self.counts = n_slot, limit, [0] * batch
        self.k = self.v = self.positions = None            # made with the first tokens

    def new_tokens(self, row: Tensor, rows: list, context: Context, pack) -> NewTokens:
        """row (N,) of the selected tokens, rows: as a list; pack: (B, T, ..) -> (N, ..)."""
        taken, slots, columns = list(self.counts), [], []
        for b in rows:                                     # a row's next token takes its next slot
            slots.append(taken[b])
            columns.append(taken[b] - self.counts[b])
            taken[b] += 1
        spans = None if context.spans is None else pack(context.spans)
        single = context.positions.shape[1] == 1
        return NewTokens(row, rows, slots, columns, pack(context.positions), spans, single)

    def attend(self, new: NewTokens, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v (1, G, N, d); q (1, H, N, d) -> (1, H, N, d), each over its own row."""
        self.reserve(max(new.slots) + 1, k, v)
        together = self.is_one_slot(new)
        slot = torch.tensor(new.slots, device=q.device)
        # all rows write the same slot: a slice, which is cheaper than an index
        place = (slice(None), new.slots[0]) if together else (new.row, slot)
        self.k[place[0], :, place[1]] = k[0].detach().transpose(0, 1)          # (N, G, d)
        self.v[place[0], :, place[1]] = v[0].detach().transpose(0, 1)
        self.positions[place] = new.positions.to(torch.int32)
        self.counts = list(self.counts)                    # a mark may hold the old list
        for b, last in zip(new.rows, new.slots):
            self.counts[b] = last + 1
        with sdpa_kernel(KERNELS) if q.is_cuda else nullcontext():
            if new.single:
                return self.attend_single(new, q, together)
            return self.attend_chunk(new, q, slot)

    def is_one_slot(self, new: NewTokens) -> bool:
        """Does every row store one token, all in the same slot?"""
        return new.single and len(new.slots) == len(self.counts) and len(set(new.slots)) == 1

    def attend_single(self, new: NewTokens, q: Tensor, together: bool) -> Tensor:
        """Decoding, one new token in each of R rows: its query over all slots of its row."""
        lengths = [slot + 1 for slot in new.slots]
        S = max(lengths)
        # heads that share a key stand in the place of queries: no grouped attention is needed
        query = q[0].transpose(0, 1).unflatten(1, (self.k.shape[1], -1))       # (R, G, H / G, d)
        if together:
            y = attend(query, self.k[:, :, :S], self.v[:, :, :S])
        elif q.device.type in BY_ROW:                      # no cache is copied
            rows = []
            for i, (b, n) in enumerate(zip(new.rows, lengths)):
                keys, values = self.k[b:b + 1, :, :n], self.v[b:b + 1, :, :n]
                rows.append(attend(query[i:i + 1], keys, values))
            y = torch.cat(rows)
        else:
            ends = torch.tensor(lengths, device=q.device)[:, None]
            used = torch.arange(S, device=q.device) < ends                     # (R, S)
            keys, values = self.k[new.row, :, :S], self.v[new.row, :, :S]
            y = attend(query, keys, values, used[:, None, None])
        return y.flatten(1, 2).transpose(0, 1)[None]

    def attend_chunk(self, new: NewTokens, q: Tensor, slot: Tensor) -> Tensor:
        """One kernel for all rows: the packed queries in a grid (B, H, M, d), the mask rule."""
        B, M, S = len(self.counts), max(new.columns) + 1, max(self.counts)
        column = torch.tensor(new.columns, device=q.device)
        grid = q.new_zeros(B, M, q.shape[1], q.shape[3])                       # (B, M, H, d)
        grid[new.row, column] = q[0].transpose(0, 1)
        is_first = q.shape[2] == S * B and new.spans is None                   # and no padding
        mask = None if is_first else self.chunk_mask(new, slot, column, M, S)
        y = attend(grid.transpose(1, 2), self.k[:, :, :S], self.v[:, :, :S], mask, causal=is_first)
        return y.transpose(1, 2)[new.row, column].transpose(0, 1)[None]        # (1, H, N, d)

    def chunk_mask(self, new: NewTokens, slot: Tensor, column: Tensor, M: int, S: int) -> Tensor:
        """(B, 1, M, S) bool. Slots follow the sequence: j <= i, or both new and in one span."""
        B = len(self.counts)
        query_slot = slot.new_zeros(B, M)
        query_slot[new.row, column] = slot
        see = torch.arange(S, device=slot.device) <= query_slot[:, :, None]
        if new.spans is not None:
            query_span, key_span = new.spans.new_zeros(B, M), new.spans.new_zeros(B, S)
            query_span[new.row, column] = new.spans
            key_span[new.row, slot] = new.spans
            same = key_span[:, None, :] == query_span[:, :, None]
            see = see | (same & (query_span != 0)[:, :, None])
        return see[:, None]

    def reserve(self, n: int, k: Tensor, v: Tensor) -> None:
        """Make room for n slots a row: the plan's capacity first, then half as much again."""
        if self.k is not None and self.k.dtype != k.dtype:
            raise ValueError(f"this cache holds {self.k.dtype}, the new keys are {k.dtype}: feed "
                             "all chunks in the same precision")
        if self.k is not None and n <= self.n_slot:
            return
        if n > self.n_slot:
            self.n_slot = max(n, min(self.limit, self.n_slot + self.n_slot // 2))
        before, batch = (self.k, self.v, self.positions), len(self.counts)
        self.k = k.new_zeros(batch, k.shape[1], self.n_slot, k.shape[3])
        self.v = v.new_zeros(self.k.shape)
        self.positions = torch.zeros(batch, self.n_slot, dtype=torch.int32, device=k.device)
        if before[0] is not None:
            S = before[0].shape[2]
            self.k[:, :, :S], self.v[:, :, :S], self.positions[:, :S] = before

    def nbytes(self, used: bool = False) -> int:
        """Bytes allocated for keys, values and positions; used: of the routed tokens alone."""
        if self.k is None:
            return 0
        allocated = self.k.nbytes + self.v.nbytes + self.positions.nbytes
        return allocated // self.positions.numel() * sum(self.counts) if used else allocated


class Cache:
    """What earlier tokens left behind, for one task: a LayerCache a layer, None for a skipped one.

    batch rows of at most max_length tokens each, padding counted. Pass it to every forward of the
    same rows with routing="causal". ValueError for an unknown task.
    """

    def __init__(self, model: UnifiedTransformer, task: str, batch: int, max_length: int):
        model = unwrapped(model)
        if task not in model.plan.tasks:
            raise ValueError(f"unknown task {task!r}: this model's plan knows "
                             f"{', '.join(model.plan.tasks)}")
        self.model, self.task, self.batch, self.max_length = model, task, batch, max_length
        self.layers = []
        for keep in model.plan.keep[task]:
            n_slot = max(1, capacity(keep, max_length))
            self.layers.append(LayerCache(batch, n_slot, max_length) if keep else None)
        self.length = 0                                    # tokens a row so far, padding counted
        device = next(model.parameters()).device
        self.n_valid = torch.zeros(batch, 1, dtype=torch.long, device=device)  # tokens so far
        self.n_image = torch.zeros_like(self.n_valid)      # image tokens so far
        self.last_span = torch.zeros_like(self.n_valid)    # span of the last valid token
        self.finished = self.mark()                        # where the last whole call left it

    def check_call(self, model: UnifiedTransformer, ids: Tensor, task: str,
                   positions: Tensor | None, routing: str) -> None:
        """ValueError when a call does not fit what the cache holds."""
        if routing != "causal":
            raise ValueError('a cache needs routing="causal": top-k over a sequence changes when '
                             "it grows")
        if self.model is not model:
            raise ValueError("this cache was made for another model: make a new one, "
                             "Cache(model, task, batch, length)")
        if (self.task, self.batch) != (task, len(ids)):
            raise ValueError(f"this cache is for {self.batch} rows of {self.task!r}, got "
                             f"{len(ids)} of {task!r}: make a new one")
        if positions is not None:
            raise ValueError("positions are counted by the cache: leave them out")
        limit = min(self.max_length, model.config.max_length)
        if (length := self.length + ids.shape[1]) > limit:
            raise ValueError(f"{length} tokens, but this cache and its model take {limit} at most")

    def begin_chunk(self, context: Context) -> None:
        """Before the first layer. What a call that failed half-way has left is forgotten.

        ValueError when the chunk goes on with the span that the last one ended in (on a CPU).
        """
        self.rewind(self.finished)
        # what dense layers route: rows (N,), columns (N,), and the rows as a list
        self.valid_tokens = context.valid.nonzero(as_tuple=True)
        self.valid_rows = self.valid_tokens[0].tolist()
        if context.spans is None or context.spans.device.type != "cpu":
            return
        first_valid = context.valid.long().argmax(1, keepdim=True)
        first = context.spans.gather(1, first_valid)       # (B, 1)
        goes_on = (first == self.last_span) & (first != 0)
        if bool((goes_on & context.valid.any(1, keepdim=True)).any()):
            raise ValueError("a chunk cuts a bidirectional span: feed all its tokens in one call "
                             "(or, for another span, give it another id)")

    def end_chunk(self, context: Context, image: Tensor) -> None:
        """After the last layer: counts what the chunk added. image (B, T) bool: its image codes."""
        valid = context.valid
        self.length += valid.shape[1]
        self.n_valid = self.n_valid + valid.sum(1, keepdim=True)
        self.n_image = self.n_image + image.sum(1, keepdim=True)
        spans = context.spans
        if spans is None:
            spans = torch.zeros_like(valid, dtype=torch.long)
        index = torch.arange(valid.shape[1], device=valid.device)
        last = spans.gather(1, (valid * index).argmax(1, keepdim=True))        # (B, 1)
        # a row without a valid token stays where it was
        self.last_span = torch.where(valid.any(1, keepdim=True), last, self.last_span)
        self.finished = self.mark()

    def mark(self) -> tuple:
        """Where the cache stands now, for rewind."""
        counts = [layer and layer.counts for layer in self.layers]
        return self.length, self.n_valid, self.n_image, self.last_span, counts

    def rewind(self, mark: tuple) -> None:
        """Forget all tokens after `mark`: Show-o draws its picture anew behind the same prompt."""
        self.finished = mark
        self.length, self.n_valid, self.n_image, self.last_span, counts = mark
        for layer, used in zip(self.layers, counts):
            if layer is not None:
                layer.counts = used

    def nbytes(self, used: bool = False) -> int:
        """Bytes allocated; used: those of the routed tokens' keys, values and positions alone."""
        layers = sum(layer.nbytes(used) for layer in self.layers if layer is not None)
        return layers if used else layers + self.n_valid.nbytes + self.n_image.nbytes
