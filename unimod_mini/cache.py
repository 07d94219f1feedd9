"""The key/value cache of causal inference: a layer remembers the tokens that it routed, and no others.

A sequence is fed in any number of chunks that cut no bidirectional span. In every layer the tokens which it selected
are packed, row by row, into (1, N, D) and the block runs on them alone: a skipped token computes nothing, attends to
nothing and leaves nothing behind. Row b of a layer fills its slots 0 .. count_b - 1 in the order of the sequence:

    keep 1:    t0 t1 t2 t3 t4         keep 0.4:  row 0: t1 t4 --        keep 0:  nothing is stored
                                                 row 1: t0 t2 t3

Departure from the usual: the rows of a batch have different lengths, and in every layer others. For inference alone:
what is stored carries no gradient.

Legend: B rows, t new tokens a row, N new tokens that a layer routes (all rows), M at most of one row, S slots,
R rows that a single token routes, H heads, G key/value heads, d head width.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .plan import capacity
from .transformer import Context, UnifiedTransformer, attend, unwrapped

# not cuDNN's attention: it plans anew for every shape, and behind a cache no two steps have the same
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BY_ROW = ("cpu",)   # devices on which ragged rows are decoded one after the other; elsewhere they are put side by side


class LayerCache:
    """One layer: k and v (B, G, S, d), positions (B, S) int32, counts: a list of the B numbers of slots in use."""

    def __init__(self, batch: int, n_slot: int, limit: int):
        self.n_slot, self.limit, self.counts = n_slot, limit, [0] * batch
        self.k = self.v = self.positions = None            # made with the first tokens, which know dtype and width

    def begin(self, row: Tensor, rows: list, positions: Tensor, spans: Tensor | None, single: bool) -> None:
        """Which packed tokens come next: row, positions and spans (N,), row by row in the order of the sequence.

        rows: row as a list; single: a chunk of one token, so no row is named twice."""
        self.row, self.rows, self.new_positions, self.new_spans, self.single = row, rows, positions, spans, single

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v (1, G, N, d) of the packed tokens; q (1, H, N, d) -> (1, H, N, d), each over its own row."""
        rows, counts, slots = self.rows, list(self.counts), []
        for b in rows:                                     # a row's next token takes its next slot
            slots.append(counts[b])
            counts[b] += 1
        self.reserve(max(counts), k, v)
        together = self.single and len(rows) == len(counts) and min(slots) == max(slots)
        # all rows write the same slot: a slice, which is cheaper than an index
        place = (slice(None), slots[0]) if together else (self.row, torch.tensor(slots, device=q.device))
        self.k[place[0], :, place[1]] = k[0].detach().transpose(0, 1)                       # (N, G, d)
        self.v[place[0], :, place[1]] = v[0].detach().transpose(0, 1)
        self.positions[place] = self.new_positions.to(torch.int32)
        before, self.counts = self.counts, counts
        with sdpa_kernel(KERNELS) if q.is_cuda else nullcontext():
            if self.single:
                return self.attend_single(q, rows, together)
            return self.attend_chunk(q, place[1], [slot - before[b] for b, slot in zip(rows, slots)])

    def attend_single(self, q: Tensor, rows: list, together: bool) -> Tensor:
        """Decoding, one new token in each of R rows: its query over all slots of its row."""
        counts = [self.counts[b] for b in rows]
        # heads that share a key stand in the place of queries: no grouped attention is needed
        query, S = q[0].transpose(0, 1).unflatten(1, (self.k.shape[1], -1)), max(counts)    # (R, G, H / G, d)
        if together:
            y = attend(query, self.k[:, :, :S], self.v[:, :, :S])
        elif q.device.type in BY_ROW:                      # no cache is copied, none is read past its end
            y = torch.cat([attend(query[i:i + 1], self.k[b:b + 1, :, :n], self.v[b:b + 1, :, :n])
                           for i, (b, n) in enumerate(zip(rows, counts))])
        else:
            used = torch.arange(S, device=q.device) < torch.tensor(counts, device=q.device)[:, None]    # (R, S)
            y = attend(query, self.k[self.row, :, :S], self.v[self.row, :, :S], used[:, None, None])
        return y.flatten(1, 2).transpose(0, 1)[None]

    def attend_chunk(self, q: Tensor, slot: Tensor, columns: list) -> Tensor:
        """One kernel for all rows: the packed queries in a grid (B, H, M, d), the mask rule over the slots in use."""
        M, S, row, N = max(columns) + 1, max(self.counts), self.row, q.shape[2]
        column = torch.tensor(columns, device=q.device)
        grid = q.new_zeros(len(self.counts), M, *q.shape[1::2])                             # (B, M, H, d)
        grid[row, column] = q[0].transpose(0, 1)
        plain = N == S * len(self.counts) and self.new_spans is None                        # a first chunk, no padding
        y = attend(grid.transpose(1, 2), self.k[:, :, :S], self.v[:, :, :S],
                   None if plain else self.mask(slot, column, M, S), causal=plain)          # (B, H, M, d)
        return y.transpose(1, 2)[row, column].transpose(0, 1)[None]

    def mask(self, slot: Tensor, column: Tensor, M: int, S: int) -> Tensor:
        """(B, 1, M, S) bool. Slots are in the order of the sequence: j <= i, or both new and in the same span."""
        B, row = len(self.counts), self.row
        mine = slot.new_zeros(B, M)
        mine[row, column] = slot
        see = torch.arange(S, device=slot.device) <= mine[:, :, None]
        if self.new_spans is not None:
            mine, theirs = self.new_spans.new_zeros(B, M), self.new_spans.new_zeros(B, S)
            mine[row, column], theirs[row, slot] = self.new_spans, self.new_spans
            see = see | ((theirs[:, None] == mine[:, :, None]) & (mine != 0)[:, :, None])
        return see[:, None]

    def reserve(self, n: int, k: Tensor, v: Tensor) -> None:
        """Make room for n slots a row: the plan's capacity at first, half as much again whenever a row needs more."""
        if self.k is not None and self.k.dtype != k.dtype:
            raise ValueError(f"this cache holds {self.k.dtype}, the new keys are {k.dtype}: feed all chunks under the "
                             "same autocast")
        if self.k is not None and n <= self.n_slot:
            return
        old, batch = (self.k, self.v, self.positions), len(self.counts)
        if n > self.n_slot:
            self.n_slot = max(n, min(self.limit, self.n_slot + self.n_slot // 2))
        self.k, self.v = (x.new_zeros(batch, x.shape[1], self.n_slot, x.shape[3]) for x in (k, v))
        self.positions = torch.zeros(batch, self.n_slot, dtype=torch.int32, device=k.device)
        if old[0] is not None:
            S = old[0].shape[2]
            self.k[:, :, :S], self.v[:, :, :S], self.positions[:, :S] = old

    def nbytes(self, used: bool = False) -> int:
        """Bytes allocated for keys, values and positions; used: of the routed tokens alone."""
        if self.k is None:
            return 0
        stored = sum(map(tensor_bytes, (self.k, self.v, self.positions)))
        return stored // self.positions.numel() * sum(self.counts) if used else stored


class Cache:
    """What earlier tokens left behind in a model, for one task: a LayerCache a layer, None where the plan skips it.

    batch rows of at most max_length tokens each, padding counted. Pass it to every forward of the same rows with
    routing="causal". Raises ValueError for an unknown task.
    """

    def __init__(self, model: UnifiedTransformer, task: str, batch: int, max_length: int):
        model = unwrapped(model)
        if task not in model.plan.tasks:
            raise ValueError(f"unknown task {task!r}: this model's plan knows {', '.join(model.plan.tasks)}")
        self.model, self.task, self.batch, self.max_length, self.length = model, task, batch, max_length, 0
        device = next(model.parameters()).device
        self.layers = [LayerCache(batch, max(1, capacity(keep, max_length)), max_length) if keep else None
                       for keep in model.plan.keep[task]]
        self.n_valid = torch.zeros(batch, 1, dtype=torch.long, device=device)      # valid tokens so far
        self.n_image = torch.zeros_like(self.n_valid)                              # image tokens so far
        self.last_span = None                                                      # (B,) span of the last valid token
        self.whole = self.mark()                           # where the last call that came to its end left it

    def check(self, model: UnifiedTransformer, ids: Tensor, task: str, positions: Tensor | None, routing: str) -> None:
        """ValueError when a call does not fit what the cache holds."""
        if routing != "causal":
            raise ValueError('a cache needs routing="causal": top-k over a sequence changes when it grows')
        if self.model is not model:
            raise ValueError("this cache was made for another model: make a new one, Cache(model, task, batch, length)")
        if (self.task, self.batch) != (task, len(ids)):
            raise ValueError(f"this cache is for {self.batch} rows of {self.task!r}, got {len(ids)} of {task!r}: make "
                             "a new one")
        if positions is not None:
            raise ValueError("positions are counted by the cache: leave them out")
        if (length := self.length + ids.shape[1]) > self.max_length:
            raise ValueError(f"{length} tokens, but this cache was made for {self.max_length}")

    def begin(self, context: Context) -> None:
        """Before the first layer: the (row, column) of all valid tokens, which dense layers route. What a call that
        failed half-way has left is forgotten.

        ValueError when the chunk goes on with the span that the last one ended in (checked on a CPU)."""
        self.rewind(self.whole)
        self.valid_tokens = context.valid.nonzero(as_tuple=True)
        self.valid_rows = self.valid_tokens[0].tolist()
        if self.last_span is not None and context.spans is not None and context.spans.device.type == "cpu":
            first = context.spans.gather(1, context.valid.long().argmax(1, keepdim=True))[:, 0]
            if bool(((first == self.last_span) & (first != 0) & context.valid.any(1)).any()):
                raise ValueError("a chunk cuts a bidirectional span: feed all its tokens in one call (or, for another "
                                 "span, give it another id)")

    def end(self, context: Context) -> None:
        self.length += context.valid.shape[1]
        self.n_valid, before, self.last_span = self.n_valid + context.valid.sum(1, keepdim=True), self.last_span, None
        if context.spans is not None:                      # a row without a valid token stands where it stood
            index = torch.arange(context.valid.shape[1], device=context.spans.device)
            last = context.spans.gather(1, (context.valid * index).argmax(1, keepdim=True))[:, 0]
            self.last_span = torch.where(context.valid.any(1), last, 0 if before is None else before)
        self.whole = self.mark()

    def mark(self) -> tuple:
        """Where the cache stands now, for rewind."""
        counts = [layer and layer.counts for layer in self.layers]
        return self.length, self.n_valid, self.n_image, self.last_span, counts

    def rewind(self, mark: tuple) -> None:
        """Forget all tokens after `mark`: Show-o draws its picture anew in every step behind the same prompt."""
        self.whole = mark
        self.length, self.n_valid, self.n_image, self.last_span, counts = mark
        for layer, used in zip(self.layers, counts):
            if layer is not None:
                layer.counts = used

    def nbytes(self, used: bool = False) -> int:
        """Bytes allocated; used: those of the routed tokens' keys, values and positions alone."""
        layers = sum(layer.nbytes(used) for layer in self.layers if layer is not None)
        return layers if used else layers + tensor_bytes(self.n_valid) + tensor_bytes(self.n_image)


def tensor_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
