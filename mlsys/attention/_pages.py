"""Who holds which block of a paged cache: reference counts, an index of prefixes, and what to evict. No tensors.

A block is in one of three states:

    used   some sequences hold it; its count says how many
    idle   none does, but it is indexed: the next prompt that begins alike takes it up again
    free   none does, and nothing is known of what is in it

A block is *sealed* when it is full. It is then never written again, so it may be found by its content: by the
hash of its tokens and of everything before them. Sealed blocks are shared by counting; a block that is not full can
be shared too, after `fork`, and is copied before one of its holders writes to it.

See also:
    `mlsys.attention.kv_cache` (the idea, the papers, and the tensors).
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

BLOCK = 64  # tokens in a block, unless told otherwise (see `Pool`)


class OutOfBlocks(RuntimeError):
    """Too few blocks are left for what was asked; nothing has changed."""


def chain_hash(before: int, tokens: tuple[int, ...]) -> int:
    """The hash of a block: of its tokens and the hash of the block before it, so that it stands for the whole prefix.

    Two prefixes may have the same hash; who finds a block by it compares the tokens too.
    """
    return hash((before, tokens))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Sealed:
    """What a full block holds: its tokens, after everything before them."""

    before: Sealed | None
    tokens: tuple[int, ...]
    key: int

    @classmethod
    def after(cls, before: Sealed | None, tokens: tuple[int, ...]) -> Sealed:
        """The next full block of a sequence."""
        return cls(before, tokens, chain_hash(before.key if before else 0, tokens))

    def same(self, other: Sealed | None) -> bool:
        """Whether both stand for the same tokens, to the first one; equal hashes are no proof."""
        mine: Sealed | None = self
        while mine is not other:  # most often the same object after a step or none
            if mine is None or other is None or mine.tokens != other.tokens:
                return False
            mine, other = mine.before, other.before
        return True


@dataclass(eq=False, repr=False, slots=True)
class Sequence:
    """A sequence's place in a pool, made by `Pool.start` and `Pool.fork`. Read it; only the pool changes it.

    length:   tokens whose keys and values are in the cache.
    blocks:   that it holds, in order; the last ones may be reserved only.
    dropped:  how many blocks before them have left the window.
    reserved: up to which position there is room.
    sealed:   its last full block, and through it all others.
    tail:     the tokens after that; None if the tokens of this sequence were not told.
    """

    length: int = 0
    blocks: list[int] = field(default_factory=list)
    dropped: int = 0
    reserved: int = 0
    sealed: Sealed | None = None
    tail: list[int] | None = field(default_factory=list)

    @property
    def tokens(self) -> list[int] | None:
        """All its tokens; None if they were not told."""
        if self.tail is None:
            return None
        parts, sealed = [tuple(self.tail)], self.sealed
        while sealed:
            parts.append(sealed.tokens)
            sealed = sealed.before
        return [token for part in reversed(parts) for token in part]

    def __repr__(self) -> str:
        more = ", …" if len(self.blocks) > 8 else ""
        return f"<Sequence of {self.length} tokens in blocks [{', '.join(map(str, self.blocks[:8]))}{more}]>"


class Pool:
    """`blocks` blocks of `block` tokens each, and the sequences that share them.

    block:  `BLOCK`, 64, unless told otherwise. Small blocks waste less at the end of a sequence, half of one, and begin
            more prefixes alike; large ones are read faster, of which `benchmarks/attention/paged.py` says how much.
    window: how many tokens before it a query sees beside itself, as `window=(left, 0)` of `attention`; blocks that no
    later query sees are given back. None: all.

    version: a number that every call which changes something changes, so that tables noted down are known to be old.

    Block numbers are 0 … blocks − 1. A free block is taken before an idle one, and of the idle ones that which has
    been so for longest; a sequence lets go of its last blocks first, so that of a prefix the end is evicted first.
    """

    def __init__(self, blocks: int, block: int = BLOCK, *, window: int | None = None) -> None:
        self.blocks = whole("blocks", blocks)
        self.block = whole("block", block)
        self.window = None if window is None else whole("window", window, at_least=0)
        self._counts = [0] * self.blocks
        self._free = list(range(self.blocks - 1, -1, -1))  # a stack: what was given back last is still in cache
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self._sealed: dict[int, Sealed] = {}  # of the indexed blocks
        self._index: dict[int, int] = {}  # hash → block
        self._live: set[Sequence] = set()
        self.version = 0

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.blocks - self.available

    @property
    def idle(self) -> list[int]:
        """Blocks that no sequence holds and the index still knows, in the order in which they will be evicted."""
        return list(self._idle)

    def start(self, tokens: Iterable[int] | None = None) -> Sequence:
        """A new sequence. It holds the blocks that `tokens`, its prompt, shares with what is known: see its `length`.

        The tokens from `length` on are still to be computed, and there is at least one, since its result is wanted:
        of a prompt that is known to the end, the last block is computed again. Takes no new block, so cannot fail.
        Without `tokens`, nothing is taken over and nothing of this sequence will be known to others.
        """
        seq = Sequence(tail=None if tokens is None else [])
        prompt = [] if tokens is None else ids("tokens", tokens)
        for end in range(self.block, len(prompt), self.block):
            found = self._find(seq.sealed, tuple(prompt[end - self.block : end]))
            if found is None:
                break
            self._hold(found)
            seq.blocks.append(found)
            seq.sealed = self._sealed[found]
            seq.length = seq.reserved = end
        self._live.add(seq)
        self.version += 1
        return seq

    def reserve(self, seqs: Iterable[Sequence], tokens: int = 1) -> list[tuple[int, int]]:
        """Make room for `tokens` more in each sequence, in blocks that may be written; again is no harm.

        Returns the copies, (from, to), that must be made of blocks before anything is written: those of shared
        blocks that are not full. Blocks that have left the window are given back first. OutOfBlocks, and all stays
        as it was, if there is not enough for all of them.
        """
        seqs = self.different(seqs)
        tokens = whole("tokens", tokens, at_least=0)
        needed = self._needed(seqs, tokens)
        if needed > self.available:
            raise OutOfBlocks(
                f"{needed} more blocks of {self.block} tokens are needed, {self.available} of {self.blocks} are left: "
                "free or truncate a sequence and try again, or make a larger pool"
            )
        self.version += 1
        for seq in seqs:  # all of them, before any takes a block
            passed = self._passed(seq)
            self._release(seq.blocks[:passed])
            del seq.blocks[:passed]
            seq.dropped += passed
        return [copy for seq in seqs for copy in self._make_room(seq, tokens)]

    def advance(self, seq: Sequence, tokens: Iterable[int] | int) -> None:
        """Count `tokens`, for which room was reserved, as held. Blocks that they fill can be shared from now on.

        Tell their ids; or how many there are, and the sequence shares no more than it does already.
        Call it when keys and values of all layers are written, since another sequence may read them at once.
        """
        told = tokens if isinstance(tokens, int) else ids("tokens", tokens)
        count = self.check_room(seq, told)
        if isinstance(told, int):
            if count:
                seq.tail = None
        elif count and seq.tail is not None:
            self._seal(seq, told)
        seq.length += count
        self.version += 1

    def append(self, seq: Sequence, token: int | None = None) -> list[tuple[int, int]]:
        """`reserve` and `advance` by one token; returns the copies to make before its keys and values are written."""
        told = 1 if token is None else ids("token", [token])
        copies = self.reserve([seq])
        self.advance(seq, told)
        return copies

    def fork(self, seq: Sequence) -> Sequence:
        """Another sequence with the same tokens, in the same blocks: no block is taken and nothing is copied yet."""
        self._known(seq)
        blocks = seq.blocks[: self._blocks_for(seq.length) - seq.dropped]
        tail = None if seq.tail is None else list(seq.tail)
        child = Sequence(seq.length, blocks, seq.dropped, seq.length, seq.sealed, tail)
        for block in blocks:
            self._hold(block)
        self._live.add(child)
        self.version += 1
        return child

    def truncate(self, seq: Sequence, length: int) -> None:
        """Forget what follows the first `length` tokens (a rejected draft), and room that was reserved.

        ValueError if that is more than there are, or if their window reaches back to blocks that were given back.
        """
        self._known(seq)
        whole("length", length, at_least=0)
        if length > seq.length:
            raise ValueError(f"length must be at most {seq.length}, the tokens held, got {length}")
        start = 0 if self.window is None else max(0, length - self.window)
        if seq.dropped * self.block > start:
            raise ValueError(
                f"length must be at least {seq.dropped * self.block + (self.window or 0)}, got {length}: the query "
                f"after that sees tokens from {start} on, and those before {seq.dropped * self.block} were given back"
            )
        keep = self._blocks_for(length) - seq.dropped
        self._release(seq.blocks[keep:])
        del seq.blocks[keep:]
        if seq.tail is not None:
            for _ in range(seq.length // self.block - length // self.block):
                assert seq.sealed is not None
                seq.tail, seq.sealed = list(seq.sealed.tokens), seq.sealed.before
            del seq.tail[length % self.block :]
        seq.length = seq.reserved = length
        self.version += 1

    def free(self, seq: Sequence) -> None:
        """Let go of all its blocks; what is indexed stays findable until the room is needed."""
        self._known(seq)
        self._release(seq.blocks)
        self._live.remove(seq)
        seq.length = seq.reserved = seq.dropped = 0
        seq.blocks, seq.tail, seq.sealed = [], None, None
        self.version += 1

    def table(self, seq: Sequence) -> list[int]:
        """The block of each `block` positions, reserved ones included; −1 for those that have left the window."""
        self._known(seq)
        return [-1] * seq.dropped + seq.blocks

    def check(self) -> None:
        """Prove that the books balance: RuntimeError that says where they do not. For tests; it looks at everything."""
        held = Counter(block for seq in self._live for block in seq.blocks)
        free, idle = Counter(self._free), Counter(list(self._idle))
        for block in range(self.blocks):
            what = f"block {block} with count {self._counts[block]}"
            _insist(self._counts[block] == held[block], f"{what} is held by {held[block]} sequences")
            states = free[block] + idle[block] + (held[block] > 0)
            _insist(states == 1, f"{what} is free {free[block]}, idle {idle[block]} and held {held[block]} times")
            if block in self._sealed:
                _insist(not free[block], f"{what} is indexed, but free")
                _insist(self._index.get(self._sealed[block].key) == block, f"{what} is not found by its hash")
            else:
                _insist(not idle[block], f"{what} is idle, but not indexed")
        _insist(len(self._index) == len(self._sealed), "the index holds a hash of no block")
        for seq in self._live:
            end = (seq.dropped + len(seq.blocks)) * self.block
            _insist(seq.length <= seq.reserved <= end, f"{seq!r} has room up to {seq.reserved} in blocks up to {end}")
            _insist(len(set(seq.blocks)) == len(seq.blocks), f"{seq!r} holds a block twice")
            self._check_contents(seq)

    def _check_contents(self, seq: Sequence) -> None:
        """A full block of this sequence that is indexed must be so under this sequence's tokens."""
        if seq.tail is None:
            return
        _insist(len(seq.tail) == seq.length % self.block, f"{seq!r} has {len(seq.tail)} tokens after its full blocks")
        sealed = seq.sealed
        for at in reversed(range(seq.length // self.block)):
            if sealed is None:
                break
            block = seq.blocks[at - seq.dropped] if at >= seq.dropped else None
            known = self._sealed.get(-1 if block is None else block)
            _insist(known is None or known.same(sealed), f"block {block} of {seq!r} is indexed under other tokens")
            sealed = sealed.before
        else:
            _insist(sealed is None, f"{seq!r} has more sealed blocks than tokens")
            return
        _insist(False, f"{seq!r} has fewer sealed blocks than full ones")

    # --- refusals -----------------------------------------------------------------------------------------------------

    def different(self, seqs: Iterable[Sequence]) -> list[Sequence]:
        """The sequences of a batch: TypeError or ValueError unless they are live, of this pool, and no two the same."""
        if isinstance(seqs, Sequence):
            raise TypeError("seqs must be several sequences, got one: put it in a list")
        known = self._known(*seqs)
        if len(set(known)) < len(known):
            raise ValueError("seqs must be different sequences; fork one to continue it twice")
        return known

    def check_room(self, seq: Sequence, tokens: int | list[int]) -> int:
        """How many `tokens` are, if room was reserved for them; else ValueError."""
        self._known(seq)
        count = len(tokens) if isinstance(tokens, list) else whole("tokens", tokens, at_least=0)
        if seq.length + count > seq.reserved:
            raise ValueError(
                f"tokens must fit in the room that was reserved, {seq.reserved - seq.length} more, got {count}: "
                "call reserve first"
            )
        return count

    # --- inside: live sequences and enough blocks are assumed ---------------------------------------------------------

    def _known(self, *seqs: Sequence) -> list[Sequence]:
        for seq in seqs:
            if not isinstance(seq, Sequence):
                raise TypeError(f"seq must be a Sequence of this pool, got {type(seq).__name__}: make it with start")
            if seq not in self._live:
                raise ValueError(f"seq must be a live sequence of this pool, got {seq!r}: freed, or of another pool?")
        return list(seqs)

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block)

    def _passed(self, seq: Sequence) -> int:
        """How many of the blocks that it holds no further query sees: the next one is at position `length`."""
        if self.window is None:
            return 0
        return max(0, (seq.length - self.window) // self.block - seq.dropped)

    def _needed(self, seqs: list[Sequence], tokens: int) -> int:
        """How many blocks a reservation takes, less those that the window gives back."""
        needed, released = 0, Counter[int]()
        for seq in seqs:
            for block in seq.blocks[: self._passed(seq)]:
                released[block] += 1
                needed -= self._counts[block] == released[block]
        for seq in seqs:
            needed += max(0, self._blocks_for(seq.length + tokens) - seq.dropped - len(seq.blocks))
            partial = self._partial(seq, tokens)
            if partial is not None and self._counts[seq.blocks[partial]] - released[seq.blocks[partial]] > 1:
                needed += 1
                released[seq.blocks[partial]] += 1  # so that the last of several holders writes in place
        return needed

    def _partial(self, seq: Sequence, tokens: int) -> int | None:
        """Where in `blocks` the one is that will be written and holds tokens already, if there is one."""
        return seq.length // self.block - seq.dropped if tokens and seq.length % self.block else None

    def _make_room(self, seq: Sequence, tokens: int) -> list[tuple[int, int]]:
        copies = []
        partial = self._partial(seq, tokens)
        if partial is not None:
            block = seq.blocks[partial]
            if self._counts[block] > 1:
                seq.blocks[partial] = self._take()
                self._release([block])
                copies.append((block, seq.blocks[partial]))
            elif block in self._sealed:  # it was full before a truncate, and is about to hold something else
                self._forget(block)
        while len(seq.blocks) + seq.dropped < self._blocks_for(seq.length + tokens):
            seq.blocks.append(self._take())
        seq.reserved = max(seq.reserved, seq.length + tokens)
        return copies

    def _seal(self, seq: Sequence, told: list[int]) -> None:
        """Index the blocks that these tokens fill, unless another block is known for the same hash already."""
        assert seq.tail is not None
        pending, at = [*seq.tail, *told], seq.length // self.block - seq.dropped
        full = len(pending) - len(pending) % self.block
        for start in range(0, full, self.block):
            new = Sealed.after(seq.sealed, tuple(pending[start : start + self.block]))
            known = self._index.get(new.key)
            if known is None:
                self._index[new.key] = seq.blocks[at]
                self._sealed[seq.blocks[at]] = new
            elif self._sealed[known].same(new):
                new = self._sealed[known]  # one object for one prefix: `same` then needs a step, not a walk
            seq.sealed = new
            at += 1
        seq.tail = pending[full:]

    def _find(self, before: Sealed | None, tokens: tuple[int, ...]) -> int | None:
        wanted = Sealed.after(before, tokens)
        block = self._index.get(wanted.key)
        return block if block is not None and self._sealed[block].same(wanted) else None

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._counts[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self._counts[block] == 0:
            del self._idle[block]
        self._counts[block] += 1

    def _release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # the last first, so that of a prefix the end is evicted before the beginning
            self._counts[block] -= 1
            if self._counts[block]:
                continue
            if block in self._sealed:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _forget(self, block: int) -> None:
        del self._index[self._sealed.pop(block).key]


def _insist(true: bool, otherwise: str) -> None:
    if not true:
        raise RuntimeError(f"the pool's books do not balance: {otherwise}")


def whole(name: str, value: Any, *, at_least: int = 1) -> int:
    """`value`, if it is an int of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value


def ids(name: str, tokens: Iterable[int]) -> list[int]:
    """Token ids as plain ints: NumPy's and torch's, which hash and compare in ways of their own, are turned."""
    try:
        return [operator.index(token) for token in (tokens.tolist() if hasattr(tokens, "tolist") else tokens)]
    except TypeError:
        raise TypeError(f"{name} must be token ids (ints), got {tokens!r}") from None
