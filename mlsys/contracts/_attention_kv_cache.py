"""The exercise about the KV cache: who holds which block, through scripts of starts, appends, forks and frees.

The implementation is anything that is called as `make(blocks, block)` and gives an object with

    start(tokens)       a handle, whose `length` says how many tokens of this prompt need not be computed again
    append(seq, token)  the copies [(from, to), …] of blocks that must be made before the token is written; or None
    fork(seq)           another handle with the same tokens
    free(seq)
    table(seq)          the block of each `block` tokens
    available           how many blocks can be had: free ones, and those that only the prefix index remembers

where a handle is any object with an int `length`, which counts on as tokens are appended. It holds no tensors. The
exercise has a memory, makes the copies that it is told to make, writes each token where the table says, and after
every operation reads what each sequence then has: so it is known whether a mistake would have changed a token. The
rules that more than one answer would fit:

- what a prompt takes over are full blocks of equal prefixes, whoever computed them, freed or not; at least one token
  stays to be computed;
- a block is taken when a token needs it, not before, and copied when it is shared and a token is about to be
  written into it, not before;
- where blocks are needed, free ones are taken first, then of those that are only remembered the one that has been
  so for longest; who is freed lets go of the last block first;
- with none left, `append` raises an exception called OutOfBlocks, and nothing has changed.

The oracle knows blocks by the whole of their prefix, not by a hash, and has no tables of numbers.
"""

from __future__ import annotations

import operator
import random
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mlsys.attention.kv_cache import OutOfBlocks, Pool
from mlsys.contracts.core import Case, Contract, Inputs, Mismatch, Results, Wrong, accepts

METHODS = ("start", "append", "fork", "free", "table")
SIGNATURE = (
    "make(blocks, block) -> object with start(tokens) -> handle, append(seq, token) -> [(from, to), …], "
    "fork(seq) -> handle, free(seq), table(seq) -> [block, …], and the int available; a handle has an int length"
)
NOTHING = -1
NO_BLOCK = -2  # what is read where the table ends before the sequence does
NO_TOKEN = -3  # what is in a place before any token is
READS = {NO_BLOCK: "−2: table(seq) has no block for it", NO_TOKEN: "−3: never written"}
Script = list[tuple[Any, ...]]

CASES: list[Case] = [
    {"script": "one sequence", "blocks": 4, "block": 3},
    {"script": "two sequences", "blocks": 6, "block": 2},
    {"script": "free and start again", "blocks": 3, "block": 4},
    {"script": "fork in a block", "blocks": 8, "block": 4},
    {"script": "fork after a block", "blocks": 8, "block": 4},
    {"script": "known prefixes", "blocks": 16, "block": 2},
    {"script": "equal blocks after different ones", "blocks": 16, "block": 2},
    {"script": "free blocks first", "blocks": 6, "block": 2},
    {"script": "remembered blocks", "blocks": 8, "block": 2},
    {"script": "evictions", "blocks": 6, "block": 2},
    {"script": "the end of a prefix", "blocks": 6, "block": 2},
    {"script": "one token too many", "blocks": 3, "block": 2},
    {"script": "out of blocks", "blocks": 3, "block": 2},
    {"script": "out of blocks for a copy", "blocks": 2, "block": 3},
    {"script": "random", "blocks": 12, "block": 3},
    {"script": "random", "blocks": 6, "block": 2},
    {"script": "random", "blocks": 10, "block": 1},
]


def _scripts(name: str, rng: random.Random) -> Script:
    """The operations of a case; sequences go by letters."""
    t = [rng.randrange(100, 1000) for _ in range(30)]  # tokens that differ, but for chance
    match name:
        case "one sequence":
            return [("start", "a", t[:1]), *(("append", "a", token) for token in t[1:12]), ("free", "a")]
        case "two sequences":
            turns = [("append", "ab"[i % 2], token) for i, token in enumerate(t[:7])]
            return [("start", "a", t[8:11]), ("start", "b", t[11:12]), *turns, ("free", "a"), ("free", "b")]
        case "free and start again":
            return [("start", "a", t[:9]), ("free", "a"), ("start", "b", t[9:20]), ("free", "b")]
        case "fork in a block":
            forks = [("start", "a", t[:6]), ("fork", "a", "b"), ("fork", "a", "c")]
            appends = [("append", x, token) for x, token in zip("bcabca", t[6:], strict=False)]
            return [*forks, *appends, ("free", "a"), ("append", "c", t[20]), ("free", "b"), ("free", "c")]
        case "fork after a block":
            return [
                *(("start", "a", t[:4]), ("fork", "a", "b"), ("append", "b", t[5]), ("append", "a", t[6])),
                *(("fork", "b", "c"), ("free", "b"), ("append", "c", t[7]), ("free", "a"), ("free", "c")),
            ]
        case "known prefixes":
            return [
                *(("start", "a", t[:7]), ("start", "b", t[:7]), ("start", "c", [*t[:4], t[8], t[9]])),
                *(("start", "d", t[:6]), ("append", "d", t[10]), ("start", "e", t[1:6]), ("start", "f", t[:3])),
                *(("free", "a"), ("free", "b"), ("append", "c", t[11]), ("start", "a", [*t[:4], *t[8:10], t[11], 0])),
            ]
        case "equal blocks after different ones":
            return [
                *(("start", "a", [1, 2, 3, 4, 5, 6]), ("start", "b", [3, 4, 5, 6, 7])),
                *(("start", "c", [1, 2, 5, 6, 7]), ("start", "d", [9, 9, 3, 4, 7]), ("start", "e", [1, 2, 3, 4, 7])),
            ]
        case "free blocks first":  # four of them: nothing need be forgotten for b
            return [("start", "a", t[:5]), ("free", "a"), ("start", "b", t[10:15]), ("start", "c", t[:5])]
        case "remembered blocks":
            return [
                *(("start", "a", t[:6]), ("free", "a"), ("start", "b", t[:6]), ("start", "c", t[10:13])),
                *(("append", "c", token) for token in t[13:18]),
                *(("free", "c"), ("start", "d", t[10:15]), ("free", "b"), ("free", "d"), ("start", "e", t[:7])),
            ]
        case "evictions":
            return [
                *(("start", "a", t[:5]), ("free", "a"), ("start", "b", t[10:15]), ("free", "b")),
                *(("start", "c", t[20:27]), ("free", "c"), ("start", "d", t[10:15]), ("free", "d")),
                *(("start", "e", t[:5]), ("append", "e", 7), ("append", "e", 8), ("free", "e")),
                *(("start", "f", t[10:15]), ("start", "g", t[20:25])),
            ]
        case "the end of a prefix":  # c finds the beginning of a; for more there is no room
            return [("start", "a", t[:5]), ("free", "a"), ("start", "b", t[10:19]), ("start", "c", t[:5])]
        case "one token too many":
            return [("start", "a", t[:3]), ("start", "b", t[5:7]), ("append", "b", t[7]), ("free", "a"), ("free", "b")]
        case "out of blocks":
            return [
                *(("start", "a", t[:3]), ("start", "b", t[5:6]), ("append", "b", t[7]), ("append", "b", t[8])),
                *(("append", "a", t[9]), ("append", "a", t[10]), ("free", "b"), ("append", "a", t[11])),
                *(("append", "a", t[12]), ("start", "c", t[:2]), ("free", "a"), ("start", "d", t[20:26])),
            ]
        case "out of blocks for a copy":
            return [
                *(("start", "a", t[:4]), ("fork", "a", "b"), ("append", "b", t[5]), ("append", "a", t[6])),
                *(("free", "a"), ("append", "b", t[7]), ("append", "b", t[8]), ("append", "b", t[9]), ("free", "b")),
            ]
    return _random(rng)


def _random(rng: random.Random) -> Script:
    """60 operations; few tokens and prompts that continue each other, so that much is shared and blocks run out."""
    script: Script = []
    live: dict[str, list[int]] = {}
    prompts = [[rng.randrange(3) for _ in range(9)] for _ in range(2)]
    for _ in range(60):
        free = sorted(set("abcde") - live.keys())
        what = rng.choice(["start", "append", "append", "append", "append", "fork", "free"])
        if what == "start" and free:
            prompt = rng.choice(prompts)[: rng.randrange(1, 10)] + [rng.randrange(3)]
            live[free[0]] = prompt
            script.append(("start", free[0], prompt))
        elif what == "append" and live:
            name, token = rng.choice(sorted(live)), rng.randrange(3)
            script.append(("append", name, token))
        elif what == "fork" and live and free:
            live[free[0]] = []
            script.append(("fork", rng.choice(sorted(live.keys() - {free[0]})), free[0]))
        elif what == "free" and live:
            name = rng.choice(sorted(live))
            del live[name]
            script.append(("free", name))
    return script


def inputs(case: Case, seed: int, device: str) -> Inputs:
    """The script, and the size of the pool."""
    return {
        "script": _scripts(case["script"], random.Random(seed)),
        "blocks": case["blocks"],
        "block": case["block"],
    }


# --- running a script -------------------------------------------------------------------------------------------------


@dataclass
class _Log:
    """What is seen after each operation."""

    names: list[str]
    longest: int
    rows: dict[str, list[Any]] = field(default_factory=lambda: {"raised": [], "taken over": [], "available": []})
    tokens: list[np.ndarray] = field(default_factory=list)

    def see(self, raised: bool, taken_over: int, available: int, tokens: Mapping[str, list[int]]) -> None:
        """One operation: its outcome, and what every live sequence reads."""
        for name, value in zip(self.rows, (raised, taken_over, available), strict=True):
            self.rows[name].append(int(value))
        grid = np.full((len(self.names), self.longest), NOTHING, np.int64)
        for name, row in tokens.items():
            grid[self.names.index(name), : len(row)] = row
        self.tokens.append(grid)

    def results(self) -> Results:
        """Arrays of one row an operation."""
        return {"tokens": np.stack(self.tokens)} | {name: np.array(row) for name, row in self.rows.items()}


def _log(inputs: Inputs) -> _Log:
    names = sorted({name for operation in inputs["script"] for name in operation[1:] if isinstance(name, str)})
    return _Log(names, inputs["blocks"] * inputs["block"] + 2)


class _Memory:
    """What is in the blocks: a token in each place, and before that a number that is no token.

    It asks the manager, and Mismatch says so where the answer is of another kind than it must be.
    """

    def __init__(self, make: Callable[..., Any], blocks: int, block: int) -> None:
        accepts(make, 2, {}, SIGNATURE)
        self.manager, self.blocks, self.block = make(blocks, block), blocks, block
        missing = [name for name in METHODS if not callable(getattr(self.manager, name, None))]
        if not hasattr(type(self.manager), "available") and not hasattr(self.manager, "available"):
            missing.append("available")
        if missing:
            raise Mismatch(f"{_kind(self.manager)} has no {', '.join(missing)}; wanted is {SIGNATURE}")
        self.places = np.full((blocks, block), NO_TOKEN)

    def start(self, tokens: list[int]) -> Any:
        """A handle."""
        try:
            return self.handle("start(tokens)", self.manager.start(tokens))
        except Exception as error:
            if not _is_out_of_blocks(error):
                raise
            raise Mismatch(
                "start(tokens) raised OutOfBlocks, but it takes no free block: it finds those that are known, "
                "and append takes the others"
            ) from None

    def fork(self, seq: Any) -> Any:
        """Another handle."""
        return self.handle("fork(seq)", self.manager.fork(seq))

    def append(self, seq: Any, token: int) -> None:
        """Let the manager make room, copy as it says, and write where its table says; without a block, it is lost."""
        for source, target in self.copies(self.manager.append(seq, token)):
            self.places[target] = self.places[source]
        at = self.length(seq) - 1
        if at < 0:
            raise Mismatch("append left a sequence of length 0: `length` counts the tokens, the new one too")
        table = self.table(seq)
        if at // self.block < len(table):
            self.places[table[at // self.block], at % self.block] = token

    def read(self, seq: Any) -> list[int]:
        """The tokens of a sequence, as far as its table has a block for them."""
        length, table = self.length(seq), self.table(seq)
        there = min(length, len(table) * self.block)
        tokens = [int(self.places[table[p // self.block], p % self.block]) for p in range(there)]
        return tokens + [NO_BLOCK] * (length - there)

    @property
    def available(self) -> int:
        """As the manager says."""
        found = self.manager.available
        if callable(found):
            raise Mismatch("`available` is a method: make it a property, or an attribute")
        if (number := _whole(found)) is None:
            raise Mismatch(f"`available` must be an int, how many blocks can be had, got {reprlib.repr(found)}")
        return number

    def handle(self, method: str, seq: Any) -> Any:
        """What a method has returned, if that is one."""
        if not hasattr(seq, "length") and not hasattr(type(seq), "length"):
            raise Mismatch(f"{method} must return a handle, an object with an int `length`, got {_kind(seq)}")
        return seq

    def length(self, seq: Any) -> int:
        """Of a handle: no more than there is room for."""
        length, room = seq.length, self.blocks * self.block
        if callable(length):
            raise Mismatch("the `length` of a handle is a method: make it a property, or an attribute")
        if (number := _whole(length)) is None:
            raise Mismatch(f"the `length` of a handle must be an int, got {reprlib.repr(length)}")
        if not 0 <= number <= room:
            raise Mismatch(f"a handle says length {number}; the pool has room for {room} tokens")
        return number

    def table(self, seq: Any) -> list[int]:
        """The blocks of a sequence."""
        table = self.manager.table(seq)
        try:
            blocks = list(table)
        except TypeError:
            raise Mismatch(f"table(seq) must return a sequence's blocks in order, got {reprlib.repr(table)}") from None
        return [self.number(block) for block in blocks]

    def copies(self, told: Any) -> list[tuple[int, int]]:
        """What `append` has returned, as pairs of blocks."""
        try:
            return [(self.number(source), self.number(target)) for source, target in (() if told is None else told)]
        except (TypeError, ValueError):
            raise Mismatch(
                "append(seq, token) must return the copies to be made, a list of pairs of blocks [(from, to), …], "
                f"or None, got {reprlib.repr(told)}"
            ) from None

    def number(self, block: Any) -> int:
        """Of a block that there is."""
        number = _whole(block)
        if number is None or not 0 <= number < self.blocks:
            raise Mismatch(f"blocks have numbers from 0 to {self.blocks - 1}, got {reprlib.repr(block)}")
        return number


def _whole(value: Any) -> int | None:
    """As an int, if it is a whole number of any library."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _kind(value: Any) -> str:
    return "None" if value is None else f"an object of class {type(value).__name__}"


def call(make: Callable[..., Any], inputs: Inputs) -> Results:
    """Run the script; what is live is read after each operation."""
    memory, log = _Memory(make, inputs["blocks"], inputs["block"]), _log(inputs)
    live: dict[str, Any] = {}
    for what, name, *more in inputs["script"]:
        raised, taken_over = False, NOTHING
        if what == "start":
            seq = live[name] = memory.start(list(more[0]))
            taken_over = memory.length(seq)
            for token in more[0][taken_over:]:
                raised = raised or _out_of_blocks(memory, seq, token)
            if raised:  # as an engine does: the prompt waits
                memory.manager.free(live.pop(name))
        elif name in live:  # its start may have failed
            if what == "append":
                raised = _out_of_blocks(memory, live[name], more[0])
            elif what == "fork":
                live[more[0]] = memory.fork(live[name])
            else:
                memory.manager.free(live.pop(name))
        log.see(raised, taken_over, memory.available, {name: memory.read(seq) for name, seq in live.items()})
    return log.results()


def _out_of_blocks(memory: _Memory, seq: Any, token: int) -> bool:
    try:
        memory.append(seq, token)
    except Exception as error:
        if not _is_out_of_blocks(error):
            raise
        return True
    return False


def _is_out_of_blocks(error: Exception) -> bool:
    """Ours, or one that a student has called so."""
    return isinstance(error, OutOfBlocks) or type(error).__name__ == "OutOfBlocks"


# --- the oracle, and the mistakes -------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Block:
    """A block: its number, who holds it, and, if it is full, the whole prefix that ends with it."""

    number: int
    holders: set[_Seq] = field(default_factory=set)
    prefix: tuple[int, ...] | None = None
    left: int = 0  # when its last holder let go of it


@dataclass(eq=False)
class _Seq:
    """A handle: its tokens and its blocks."""

    tokens: list[int]
    blocks: list[_Block]

    @property
    def length(self) -> int:
        """How many tokens."""
        return len(self.tokens)


class _Plain:
    """A pool that looks through all blocks whenever it wants one: the oracle. `mistake` makes a wrong variant of it."""

    def __init__(self, blocks: int, block: int, mistake: str = "") -> None:
        self.all = [_Block(number) for number in range(blocks)]
        self.block = block
        self.mistake = mistake
        self.clock = 0

    @property
    def available(self) -> int:
        """Held by nobody."""
        return sum(not b.holders and not (self.mistake == "remembered_is_used" and b.prefix) for b in self.all)

    def start(self, tokens: list[int]) -> _Seq:
        """Walk along the prompt as far as some block is known for it."""
        seq = _Seq([], [])
        last = len(tokens) if self.mistake == "all_known" else len(tokens) - 1
        for end in range(self.block, last + 1, self.block):
            found = self._known(tokens[:end])
            if found is None:
                break
            if not (self.mistake == "hit_not_held" and not found.holders):
                found.holders.add(seq)
            seq.blocks.append(found)
            seq.tokens = tokens[:end]
        for token in tokens[seq.length :] if self.mistake == "prompt_counted" else ():
            self.append(seq, token)
        return seq

    def _known(self, prefix: list[int]) -> _Block | None:
        if self.mistake == "no_prefixes":
            return None
        if self.mistake == "block_alone":  # whatever comes before it
            alone = prefix[-self.block :]
            return next((b for b in self.all if b.prefix and list(b.prefix[-self.block :]) == alone), None)
        alike = [b for b in self.all if b.prefix == tuple(prefix)]
        if self.mistake == "forgets_when_freed":
            alike = [b for b in alike if b.holders]
        return alike[0] if alike else None

    def append(self, seq: _Seq, token: int) -> list[tuple[int, int]]:
        """Take a block where the last is full, copy it where it is shared."""
        copies = []
        rest = seq.length % self.block
        if self.mistake == "counts_before_it_fails":
            seq.tokens.append(token)
        if self._wants_block(seq):
            seq.blocks.append(self._take(seq))
        elif rest and seq.blocks and len(seq.blocks[-1].holders) > 1 and self.mistake != "no_copy":
            shared = seq.blocks[-1]
            new = self._take(seq)
            seq.blocks[-1] = new
            copies = [] if self.mistake == "copy_not_told" else [(shared.number, new.number)]
            copies = [pair[::-1] for pair in copies] if self.mistake == "copy_backwards" else copies
            if self.mistake != "copy_keeps_holding":
                shared.holders.discard(seq)
        elif rest and self.mistake == "always_copies":
            old = seq.blocks[-1]
            new = self._take(seq)
            seq.blocks[-1] = new
            self._let_go(seq, [old])
            copies = [(old.number, new.number)]
        if self.mistake != "counts_before_it_fails":
            seq.tokens.append(token)
        if self.mistake == "one_block_ahead" and seq.length % self.block == 0:
            seq.blocks.append(self._take(seq))
        self._remember(seq)
        return copies

    def _wants_block(self, seq: _Seq) -> bool:
        """Before the next token is counted: whether the blocks are full."""
        room = len(seq.blocks) * self.block
        match self.mistake:
            case "block_late":
                return seq.length > room
            case "block_late_after_first":
                return seq.length > room or not room
            case "blocks_rounded_down":
                return seq.length + 1 >= room + self.block
        return seq.length % self.block == 0 and seq.length == room

    def _remember(self, seq: _Seq) -> None:
        rest, prefix = seq.length % self.block, tuple(seq.tokens)
        if len(seq.blocks) * self.block < seq.length:  # so a mistake has left it
            return
        if rest == 0 and not any(b.prefix == prefix for b in self.all):
            seq.blocks[seq.length // self.block - 1].prefix = prefix

    def _take(self, seq: _Seq) -> _Block:
        """A free block, else the one that has been remembered for longest."""
        spare = [b for b in self.all if not b.holders]
        if self.mistake == "remembered_is_used":
            spare = [b for b in spare if not b.prefix]
        if not spare:
            raise OutOfBlocks("no block is left")
        order: Callable[[_Block], Any] = lambda b: (b.prefix is not None, b.left)  # noqa: E731
        if self.mistake == "newest_first":
            order = lambda b: (b.prefix is not None, -b.left)  # noqa: E731
        if self.mistake == "remembered_before_free":
            order = lambda b: (b.prefix is None, b.left)  # noqa: E731
        block = min(spare, key=order)
        if self.mistake != "index_not_cleared":
            block.prefix = None
        block.holders = {seq}
        return block

    def fork(self, seq: _Seq) -> _Seq:
        """Hold the same blocks."""
        child = _Seq(list(seq.tokens), list(seq.blocks))
        if self.mistake == "shared_table":
            child.blocks = seq.blocks
        for i, block in enumerate(seq.blocks):
            if self.mistake == "fork_takes_blocks" and i == len(seq.blocks) - 1 and seq.length % self.block:
                child.blocks[i] = self._take(child)
                continue
            if self.mistake != "fork_not_counted":
                block.holders.add(child)
        return child

    def free(self, seq: _Seq) -> None:
        """Let go of the last block first."""
        if self.mistake == "last_block_kept" and seq.length % self.block:
            self._let_go(seq, seq.blocks[:-1])
            return
        self._let_go(seq, seq.blocks)

    def _let_go(self, seq: _Seq, blocks: list[_Block]) -> None:
        for block in blocks if self.mistake == "first_block_first" else reversed(blocks):
            if self.mistake == "free_ignores_others":
                block.holders.clear()
            block.holders.discard(seq)
            self.clock += 1
            block.left = self.clock if not block.holders else block.left

    def table(self, seq: _Seq) -> list[int]:
        """Their numbers."""
        numbers = [b.number for b in seq.blocks]
        return numbers[::-1] if self.mistake == "backwards" else numbers


def oracle(inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The same script, run on `_Plain` without any memory: a sequence reads the tokens it was given."""
    pool, log = _Plain(inputs["blocks"], inputs["block"]), _log(inputs)
    live: dict[str, _Seq] = {}
    for what, name, *more in inputs["script"]:
        raised, taken_over = False, NOTHING
        try:
            if what == "start":
                live[name] = pool.start(more[0])
                taken_over = live[name].length
                for token in more[0][taken_over:]:
                    pool.append(live[name], token)
            elif what == "append" and name in live:
                pool.append(live[name], more[0])
            elif what == "fork" and name in live:
                live[more[0]] = pool.fork(live[name])
            elif what == "free" and name in live:
                pool.free(live.pop(name))
        except OutOfBlocks:
            raised = True
            if what == "start":
                pool.free(live.pop(name))
        log.see(raised, taken_over, pool.available, {name: seq.tokens for name, seq in live.items()})
    return log.results()


def _compare(inputs: Inputs, got: np.ndarray, want: np.ndarray, tolerance: float, *, what: str) -> str | None:
    """What the first operation was after which the books are wrong, and how."""
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if np.array_equal(got, want):
        return None
    first = int(np.argmax((got != want).reshape(len(want), -1).any(-1)))
    operation, *arguments = inputs["script"][first]
    after = f"after operation {first + 1}, {operation}({', '.join(map(str, arguments))})"
    if what != "tokens":
        return f"{after}: {int(got[first])}, expected {int(want[first])}"
    names = _log(inputs).names
    row = int(np.argmax((got[first] != want[first]).any(-1)))
    mine, right = ([int(x) for x in grid[first, row] if x != NOTHING] for grid in (got, want))
    told = "; ".join(text for number, text in READS.items() if number in mine)
    return f"{after}: {names[row]} reads {mine}, expected {right}" + (f" ({told})" if told else "")


HINTS = {
    "no_copy": "a block that somebody else holds too must be copied before a token is written into it",
    "copy_not_told": "the new block has nothing of the old one's tokens unless append returns the copy (from, to)",
    "copy_backwards": "a copy goes from the shared block to the new one: (from, to)",
    "copy_keeps_holding": "after a copy, the sequence no longer holds the block it was copied from: count it down",
    "always_copies": "a block that nobody else holds is written in place",
    "shared_table": "a fork needs a table of its own: what one of them appends is not the other's",
    "fork_takes_blocks": "fork takes no block: the last one is shared too, until one of its holders writes",
    "fork_not_counted": "count the blocks up when they are forked, or the first free gives them away",
    "free_ignores_others": "free counts down; only at 0 is a block free",
    "last_block_kept": "free gives back the last block too, though it is not full",
    "one_block_ahead": "take a block when a token needs it, not when the one before has been filled",
    "block_late": "the token that is appended needs room too: take a block when those there are full, not one later",
    "block_late_after_first": "when the blocks are full, the next token needs another one: n ≥ room, not n > room",
    "blocks_rounded_down": "n tokens need n / block blocks, rounded up: the last one need not be full",
    "prompt_counted": "start counts only tokens that have been computed before; append is called for all the rest",
    "all_known": "of a prompt that is known to the end, a token must be left to compute: its result is wanted",
    "block_alone": "a block is the same only after the same tokens: its hash must contain that of the block before",
    "no_prefixes": "a prompt that begins as another takes over its full blocks",
    "forgets_when_freed": "a full block that nobody holds stays in the index until its room is needed",
    "hit_not_held": "a block that a prompt takes over is in use again: it must leave the list of those to evict",
    "remembered_is_used": "a block that is only remembered can be had: evict it when no other is free",
    "index_not_cleared": "a block that is taken for something else must leave the index",
    "newest_first": "evict what has been unused for longest",
    "remembered_before_free": "take the free blocks first; they hold nothing that anyone could want",
    "first_block_first": "let go of the last block first: without its beginning, the rest of a prefix is not found",
    "counts_before_it_fails": "if there is no block, nothing may have changed: count the token after taking the block",
    "backwards": "table(seq) begins with the block of the first tokens",
}


def contract(name: str) -> Contract:
    """The contract under this name."""
    results = ("tokens", "raised", "taken over", "available")
    return Contract(
        name=name,
        signature=SIGNATURE,
        reference=Pool,
        cases=CASES,
        inputs=inputs,
        call=call,
        oracle=oracle,
        tolerance=lambda inputs, name, want: 0.0,
        wrong={mistake: Wrong(partial(_Plain, mistake=mistake), hint) for mistake, hint in HINTS.items()},
        compare={result: partial(_compare, what=result) for result in results},
    )
