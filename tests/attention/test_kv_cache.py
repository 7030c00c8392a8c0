"""`mlsys.attention.kv_cache`: in whatever order, each sequence reads its own tokens and no block is lost."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlsys.attention import _pages, kv_cache
from mlsys.attention._kv_quant import FORMATS, dequantize, quantize
from mlsys.attention.kv_cache import OutOfBlocks, PagedKVCache, Pool
from mlsys.bench.memory import peak_bytes
from mlsys.contracts import check, find
from mlsys.models.transformer import KVCache, Transformer
from mlsys.perf.configs import llama

LAYERS, HEADS, DIM = 2, 2, 3
LARGEST = torch.finfo(torch.float32).max


def filled(pool, tokens):
    """A sequence with these tokens; each is one append."""
    seq = pool.start(tokens)
    for token in tokens[seq.length :]:
        pool.append(seq, token)
    return seq


# --- any sequence of operations ---------------------------------------------------------------------------------------


def numbers(prefix):
    """The keys of a prefix's last token in layer 0: a function of all tokens up to it, as a model's are."""
    seed = hash(tuple(prefix))
    return torch.tensor([[(seed >> 8 * i) % 256 / 64 - 2 for i in range(DIM * h, DIM * h + DIM)] for h in range(HEADS)])


class Machine(RuleBasedStateMachine):
    """A cache beside a plain model of it: for each sequence its list of tokens, and tensors made from those."""

    def __init__(self):
        super().__init__()
        self.seqs = []  # (sequence, its tokens, whether they are told)
        self.fresh = itertools.count(100)
        self.numbers = {}

    @initialize(
        blocks=st.integers(1, 9), block=st.integers(1, 4), window=st.none() | st.integers(0, 9),
        quantized=st.sampled_from([None, None, "int8", "fp8"]),
    )  # fmt: skip
    def make(self, blocks, block, window, quantized):
        self.cache = PagedKVCache(LAYERS, HEADS, DIM, blocks, block, window=window, quantized=quantized)
        self.pool = self.cache.pool
        self.tolerance = {None: 0.0, "int8": 1 / 250, "fp8": 1 / 15}[quantized]

    def state(self):
        """All that can be read of the pool, and of its inside."""
        inside = (self.pool._counts, self.pool._free, self.pool._idle, self.pool._index, self.pool._sealed)
        held = [
            (s.length, s.blocks, s.dropped, s.reserved, s.sealed, None if s.tail is None else list(s.tail))
            for s, *_ in self.seqs
        ]
        return [type(x)(x) for x in inside], [tuple(list(x) if isinstance(x, list) else x for x in row) for row in held]

    def tensors(self, tokens, start):
        """Keys and values of the tokens from `start` on: layer → (1, heads, t, dim)."""
        rows = [
            self.numbers.setdefault(tuple(tokens[: i + 1]), numbers(tokens[: i + 1])) for i in range(start, len(tokens))
        ]
        k = torch.stack(rows, 1)[None]
        return [(k + layer, 2 * k - layer) for layer in range(LAYERS)]

    def extend(self, picked, new):
        """One step of a batch: the same number of new tokens for each; or nothing at all."""
        entries = [self.seqs[i] for i in picked]
        before = self.state()
        try:
            self.cache.reserve([seq for seq, *_ in entries], len(new[0]))
        except OutOfBlocks:
            assert self.state() == before
            return False
        made = [self.tensors(tokens + more, len(tokens)) for (_, tokens, _), more in zip(entries, new, strict=True)]
        for layer in range(LAYERS):
            k, v = (torch.cat([one[layer][part] for one in made]) for part in (0, 1))
            self.cache.append(layer, [seq for seq, *_ in entries], k, v)
        for (seq, tokens, told), more in zip(entries, new, strict=True):
            self.cache.advance([seq], [more] if told else len(more))
            tokens += more
        return True

    @rule(
        prefix=st.lists(st.integers(0, 1), max_size=9), own=st.integers(0, 2), of=st.integers(0, 9), told=st.booleans()
    )
    def start(self, prefix, own, of, told):
        if self.seqs and of < 5:  # begin like another one
            prefix = self.seqs[of % len(self.seqs)][1] + prefix
        prompt = [*prefix, *(next(self.fresh) for _ in range(own))] or [0]
        seq = self.pool.start(prompt if told else None)
        assert seq.length % self.pool.block == 0
        assert seq.length < len(prompt)
        self.seqs.append((seq, prompt[: seq.length], told))
        rest = prompt[seq.length :]
        if not self.extend([len(self.seqs) - 1], [rest]):
            self.pool.free(self.seqs.pop()[0])

    @precondition(lambda self: self.seqs)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def append(self, data, tokens):
        picked = data.draw(st.lists(st.integers(0, len(self.seqs) - 1), min_size=1, max_size=3, unique=True))
        self.extend(picked, [[(token + i) % 2 for token in tokens] for i, _ in enumerate(picked)])

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0, 99))
    def fork(self, which):
        seq, tokens, told = self.seqs[which % len(self.seqs)]
        available = self.pool.available
        self.seqs.append((self.pool.fork(seq), list(tokens), told))
        assert self.pool.available == available

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0, 99), tokens=st.integers(0, 5))
    def reserve_only(self, which, tokens):
        before = self.state()
        try:
            self.cache.reserve([self.seqs[which % len(self.seqs)][0]], tokens)
        except OutOfBlocks:
            assert self.state() == before

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0, 99), length=st.integers(0, 30))
    def truncate(self, which, length):
        seq, tokens, _ = self.seqs[which % len(self.seqs)]
        length = min(length, seq.length)
        before = self.state()
        if self.pool.window is not None and max(0, length - self.pool.window) < seq.dropped * self.pool.block:
            with pytest.raises(ValueError, match="given back"):
                self.pool.truncate(seq, length)
            assert self.state() == before
        else:
            self.pool.truncate(seq, length)
            del tokens[length:]

    @precondition(lambda self: self.seqs)
    @rule(which=st.integers(0, 99))
    def free(self, which):
        self.pool.free(self.seqs.pop(which % len(self.seqs))[0])

    @invariant()
    def books_balance(self):
        if hasattr(self, "pool"):
            self.pool.check()

    @invariant()
    def every_sequence_reads_its_own(self):
        for seq, tokens, told in self.seqs:
            assert seq.length == len(tokens)
            assert seq.tokens == (tokens if told else None)
            start = seq.dropped * self.pool.block
            if self.pool.window is not None:
                assert start <= max(0, len(tokens) - self.pool.window)
            else:
                assert start == 0
            if start == len(tokens):
                continue
            for layer, want in enumerate(self.tensors(tokens, start)):
                for got, right in zip(self.cache.gather(layer, seq), want, strict=True):
                    limit = self.tolerance * right[0].abs().amax(-1, keepdim=True)
                    assert ((got - right[0]).abs() <= limit).all()

    def teardown(self):
        for seq, *_ in self.seqs:
            self.pool.free(seq)
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.available == self.pool.blocks


# The shape checks compile something at every call: tests below run with them
TestMachine = pytest.mark.usefixtures("unchecked_types")(Machine.TestCase)
TestMachine.settings = settings(max_examples=60, stateful_step_count=30)


def test_all_hashes_collide_and_nothing_changes(monkeypatch):
    """One key for every block: a hit is then by the tokens alone, and few blocks are found."""
    monkeypatch.setattr(_pages, "chain_hash", lambda before, tokens: 7)
    pool = Pool(20, 2)
    filled(pool, [1, 2, 3, 4])
    assert pool.start([5, 6, 7]).length == 0
    assert pool.start([1, 2, 3]).length == 2  # the first one was indexed
    assert pool.start([3, 4, 3]).length == 0
    pool.check()


def test_a_block_after_different_ones_is_another_block():
    """Whose hash had no part of what comes before it would find the tokens different, and forget one of the two."""
    pool = Pool(20, 2)
    filled(pool, [1, 2, 5, 6])
    filled(pool, [3, 4, 5, 6])
    assert pool.start([1, 2, 5, 6, 7]).length == pool.start([3, 4, 5, 6, 7]).length == 4


def test_equal_hashes_of_what_comes_before_are_no_proof(monkeypatch):
    """Blocks (1, 2) and (3, 4) get the same hash; so do then all that follow them alike."""
    monkeypatch.setattr(_pages, "chain_hash", lambda before, tokens: hash((before, 0 if before == 0 else tokens)))
    pool = Pool(20, 2)
    first = filled(pool, [1, 2, 5, 6, 9])
    pool.truncate(first, 1)
    pool.reserve([first])  # (1, 2) is about to be overwritten, so no longer known; (5, 6) still is
    filled(pool, [3, 4])
    assert pool.start([3, 4, 5, 6, 7]).length == 2
    pool.check()


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_token_takes_a_block_only_when_the_last_is_full():
    pool = Pool(4, 3)
    seq = pool.start()
    used = []
    for token in range(7):
        pool.append(seq, token)
        used.append(pool.used)
    assert used == [1, 1, 1, 2, 2, 2, 3]
    assert pool.table(seq) == [0, 1, 2]


def test_the_second_writer_of_a_shared_block_copies_the_last_writes_in_place():
    pool = Pool(8, 4)
    parent = filled(pool, [1, 2, 3, 4, 5])
    children = [pool.fork(parent) for _ in range(2)]
    assert pool.used == 2
    assert pool.append(children[0], 6) == [(1, 2)]
    assert pool.append(children[1], 7) == [(1, 3)]
    assert pool.append(parent, 8) == []
    assert [pool.table(s) for s in (parent, *children)] == [[0, 1], [0, 2], [0, 3]]
    assert [s.tokens[-1] for s in (parent, *children)] == [8, 6, 7]


def test_a_batch_of_all_holders_needs_a_copy_less_than_it_has_sequences():
    pool = Pool(3, 4)
    parent = filled(pool, [1])
    children = [pool.fork(parent), pool.fork(parent)]
    assert pool.reserve([parent, *children]) == [(0, 1), (0, 2)]
    assert [pool.table(s) for s in (parent, *children)] == [[1], [2], [0]]


def test_a_fork_takes_no_part_in_what_was_reserved():
    cache = PagedKVCache(1, 1, 1, 8, 2)
    parent, rows = filled(cache.pool, [1]), torch.arange(1.0, 5.0).view(1, 1, 4, 1)
    cache.reserve([parent], 4)
    child = cache.pool.fork(parent)
    assert child.blocks == parent.blocks[:1]
    for seq, sign in ((child, -1), (parent, 1)):
        cache.append(0, [seq], sign * rows, sign * rows)
    cache.advance([child, parent], 4)
    for seq, sign in ((child, -1), (parent, 1)):
        assert torch.equal(cache.gather(0, seq)[0][:, 1:], sign * rows[0])


def test_forks_are_shortened_and_lengthened_apart():
    pool = Pool(8, 4)
    parent = filled(pool, [1, 2, 3, 4, 5, 6])
    child = pool.fork(parent)
    grandchild = pool.fork(child)
    pool.truncate(child, 5)
    assert (parent.tokens, grandchild.tokens) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    pool.truncate(parent, 3)
    pool.append(child, 7)
    assert (parent.tokens, child.tokens) == ([1, 2, 3], [1, 2, 3, 4, 5, 7])
    pool.check()


def test_tokens_that_were_not_told_are_not_found():
    pool = Pool(8, 2)
    seq = filled(pool, [1, 2, 3])
    pool.append(seq)
    pool.reserve([seq], 2)
    pool.advance(seq, [5, 6])  # too late: what comes before them is not known
    assert seq.tokens is None
    assert pool.start([1, 2, 3, 0, 5, 6, 7]).length == 2
    pool.check()


def test_a_sequence_is_not_shortened_to_where_its_window_is_gone():
    pool = Pool(8, 2, window=3)
    seq = pool.start()
    for token in range(9):
        pool.append(seq, token)
    assert seq.dropped == 2
    with pytest.raises(ValueError, match=r"at least 7, got 6: .* sees tokens from 3 on, and those before 4 were given"):
        pool.truncate(seq, 6)
    assert (seq.length, pool.used) == (9, 3)
    pool.truncate(seq, 7)
    assert seq.length == 7


def test_forking_at_the_end_of_a_block_copies_nothing():
    pool = Pool(8, 4)
    parent = filled(pool, [1, 2, 3, 4])
    child = pool.fork(parent)
    assert pool.append(child, 5) == []
    assert pool.table(child) == [0, 1]


@pytest.mark.parametrize(("prompt", "hit"), [(8, 4), (9, 8), (7, 4), (4, 0), (1, 0), (12, 8)])
def test_of_a_known_prompt_one_token_is_left_to_compute(prompt, hit):
    pool = Pool(8, 4)
    tokens = list(range(12))
    pool.free(filled(pool, tokens))
    assert pool.start(tokens[:prompt]).length == hit


def test_a_block_is_known_only_after_the_same_prefix():
    pool = Pool(20, 2)
    filled(pool, [1, 2, 3, 4, 5, 6])
    assert pool.start([3, 4, 5, 6, 0]).length == 0
    assert pool.start([1, 2, 5, 6, 0]).length == 2
    assert pool.start([1, 2, 3, 4, 9, 9]).length == 4


def test_a_block_is_not_known_before_it_is_written():
    cache = PagedKVCache(1, 1, 1, 8, 2)
    seq = cache.pool.start([1, 2, 3])
    cache.append(0, [seq], torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1))
    assert cache.pool.start([1, 2, 3]).length == 0
    cache.advance([seq], [[1, 2, 3]])
    assert cache.pool.start([1, 2, 3]).length == 2


def test_what_nobody_holds_is_evicted_oldest_first_and_its_end_before_its_beginning():
    pool = Pool(6, 2)
    old, new = [1, 2, 3, 4, 0], [5, 6, 7, 8, 0]
    for tokens in (old, new):
        pool.free(filled(pool, tokens))
    assert pool.available == 6
    taken = pool.start()
    pool.reserve([taken], 6)  # two were free (those of the zeros), so one is evicted: the end of the old one
    assert pool.start(old).length == 2
    assert pool.start(new).length == 4
    pool.check()


def test_a_hit_keeps_a_block_from_being_evicted():
    pool = Pool(2, 2)
    pool.free(filled(pool, [1, 2]))
    kept = pool.start([1, 2, 3])
    other = pool.start()
    pool.reserve([other], 2)
    with pytest.raises(OutOfBlocks, match="1 more blocks of 2 tokens are needed, 0 of 2 are left"):
        pool.reserve([kept], 1)
    assert kept.tokens == [1, 2]


def test_a_window_gives_blocks_back_and_no_earlier_than_it_may():
    pool = Pool(4, 2, window=3)
    seq = pool.start()
    held = []
    for token in range(12):
        pool.append(seq, token)  # the query of this token sees tokens token − 3 … token
        held.append((seq.dropped * 2, pool.table(seq)[: seq.dropped]))
    assert [first for first, _ in held] == [0, 0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 8]
    assert held[-1][1] == [-1] * 4
    assert pool.used <= 3


def test_a_window_makes_room_for_its_own_next_block():
    pool = Pool(2, 1, window=0)
    seq = pool.start()
    for token in range(5):
        pool.append(seq, token)
    pool.reserve([seq], 2)
    with pytest.raises(OutOfBlocks):
        pool.reserve([seq], 3)


def test_a_truncated_block_is_found_until_it_is_written_again():
    pool = Pool(4, 2)
    seq = filled(pool, [1, 2, 3, 4])
    pool.truncate(seq, 3)
    reader = pool.start([1, 2, 3, 4, 5])
    assert reader.length == 4  # still there
    assert pool.append(seq, 9) == [(1, 2)]  # and somebody reads it
    pool.truncate(reader, 3)
    assert pool.append(reader, 8) == []  # nobody else does
    assert pool.start([1, 2, 3, 4, 5]).length == 2
    assert pool.start([1, 2, 3, 9, 5]).length == 4
    pool.check()


def test_a_sequence_shortened_into_a_shared_block_copies_it_before_it_writes():
    cache = PagedKVCache(1, 1, 1, 6, 4)
    parent = cache.pool.start(range(8))
    rows = torch.arange(8.0).view(1, 1, 8, 1)
    cache.append(0, [parent], rows, rows)
    cache.advance([parent], [range(8)])
    child = cache.pool.fork(parent)
    grandchild = cache.pool.fork(child)
    cache.pool.truncate(child, 2)  # the first of two shared blocks, in its middle
    cache.append(0, [child], -rows[:, :, :3], -rows[:, :, :3])
    cache.advance([child], [[20, 21, 22]])
    assert cache.gather(0, child)[0].flatten().tolist() == [0, 1, 0, -1, -2]
    for other in (parent, grandchild):
        assert cache.gather(0, other)[0].flatten().tolist() == list(range(8))
    assert cache.pool.start([*range(8), 9]).length == 8
    assert cache.pool.start([0, 1, 20, 21, 9]).length == 4
    cache.pool.check()


def test_running_out_in_the_middle_of_a_batch_changes_nothing():
    cache = PagedKVCache(1, 1, 1, 3, 2)
    one, two = cache.pool.start(), cache.pool.start()
    cache.append(0, [one, two], torch.full((2, 1, 1, 1), 5.0), torch.ones(2, 1, 1, 1))
    cache.advance([one, two], 1)
    with pytest.raises(OutOfBlocks):
        cache.append(0, [one, two], torch.full((2, 1, 2, 1), 9.0), torch.ones(2, 1, 2, 1))
    assert cache.pool.available == 1
    assert cache.gather(0, one)[0].tolist() == [[[5.0]]]
    cache.append(0, [one], torch.full((1, 1, 2, 1), 9.0), torch.ones(1, 1, 2, 1))
    assert one.length == 1
    assert cache.gather(0, one, pending=2)[0].flatten().tolist() == [5.0, 9.0, 9.0]


def test_a_step_that_cannot_be_counted_for_all_is_counted_for_none():
    cache = PagedKVCache(1, 1, 1, 8, 2)
    one, two = cache.pool.start([1]), cache.pool.start([2])
    cache.reserve([one], 1)
    for seqs, tokens in (([one, two], 1), ([one, two], [[1], [2]]), ([one, one], 0)):
        with pytest.raises(ValueError, match=r"reserved, 0 more, got 1|different sequences"):
            cache.advance(seqs, tokens)
        assert (one.length, two.length) == (0, 0)
        assert one.tail == two.tail == []


def test_an_append_that_dies_in_the_middle_can_be_made_again(monkeypatch):
    cache = PagedKVCache(2, 1, 1, 8, 4, quantized="int8")
    parent = cache.pool.start()
    old, new = torch.arange(3.0).view(1, 1, 3, 1), torch.full((2, 1, 1, 1), 7.0)
    for layer in range(2):
        cache.append(layer, [parent], old, old)
    cache.advance([parent], 3)
    pair = [cache.pool.fork(parent), cache.pool.fork(parent)]
    cache.append(0, pair, new, new)
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "quantize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.append(1, pair, new, new)
    cache.pool.check()
    for seq in (parent, *pair):
        assert cache.gather(1, seq)[0].flatten().tolist() == [0, 1, 2]
    for layer in range(2):
        cache.append(layer, pair, new, new)
    cache.advance(pair, 1)
    assert [cache.gather(1, seq)[1].flatten().tolist() for seq in pair] == [[0, 1, 2, 7]] * 2
    assert cache.gather(1, parent)[0].flatten().tolist() == [0, 1, 2]


def test_a_copy_on_write_allocates_nothing():
    """It comes after the books have changed, so it must not fail."""
    cache = PagedKVCache(2, 2, 4, 8, 64)
    parent = filled(cache.pool, [1])
    children = [cache.pool.fork(parent) for _ in range(3)]
    assert peak_bytes(lambda: cache.reserve(children)) == 0
    assert cache.pool.used == 4


def test_equal_prefixes_computed_apart_are_one_chain():
    """Each block is indexed by whoever was first; to compare prefixes must not then walk them for every block."""
    pool = Pool(40, 1)
    one, two = pool.start([0]), pool.start([0])
    for token in range(10):
        for seq in (one, two) if token % 2 else (two, one):
            pool.append(seq, token)
    assert one.sealed is two.sealed
    assert pool.start(range(11)).sealed is one.sealed


def test_a_large_pool_is_checked_and_freed_in_linear_time():
    """100,000 blocks: quadratic would be minutes, and a chain that is freed by recursion a crash."""
    pool, tokens = Pool(100_000, 1), range(100_000)
    seq = pool.start(tokens)
    pool.reserve([seq], 100_000)
    pool.advance(seq, tokens)
    pool.check()
    assert len(repr(seq)) < 100
    pool.free(seq)
    assert pool.available == 100_000
    seq = pool.start()
    pool.reserve([seq], 100_000)
    assert pool.idle == []


def test_a_known_prefix_longer_than_the_window_gives_its_beginning_back():
    pool = Pool(6, 2, window=3)
    first = pool.start(range(9))
    pool.reserve([first], 9)
    pool.advance(first, range(9))
    assert pool.start(range(9)).length == 8  # the window has not passed: all blocks are still held
    second = pool.start(range(9))
    pool.append(second, 8)
    assert (second.dropped, pool.table(second)[:2]) == (2, [-1, -1])
    assert pool.fork(second).blocks == second.blocks
    pool.check()


def corrupt(pool, how):
    seq = next(iter(pool._live))
    block = seq.blocks[0]
    match how:
        case "count":
            pool._counts[block] += 1
        case "both used and free":
            pool._free.append(block)
        case "lost":
            pool._free.pop()
        case "index":
            pool._index[pool._sealed[block].key] = seq.blocks[1]
        case "stale hash":
            pool._index[12345] = block
        case "other tokens":
            pool._index.pop(pool._sealed[block].key)
            pool._sealed[block] = _pages.Sealed.after(None, (8, 8))
            pool._index[pool._sealed[block].key] = block
        case "free and indexed":
            pool._free.append(pool._idle.popitem()[0])
        case "idle and unknown":
            pool._idle[pool._free.pop()] = None
        case "room":
            seq.reserved = 100
        case "twice":
            pool._release([seq.blocks[1]])
            pool._hold(block)
            seq.blocks[1] = block
        case "tail":
            seq.tail.append(0)
        case "chain too short":
            seq.sealed = None
        case "chain too long":
            seq.sealed = _pages.Sealed.after(seq.sealed, (1, 1))


HOW = ["count", "both used and free", "lost", "index", "stale hash", "other tokens", "free and indexed",
       "idle and unknown", "room", "twice", "tail", "chain too short", "chain too long"]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_the_check_finds_what_does_not_balance(how):
    pool = Pool(8, 2)
    filled(pool, [1, 2, 3])
    pool.free(filled(pool, [4, 5]))
    pool.check()
    corrupt(pool, how)
    with pytest.raises(RuntimeError, match="books do not balance"):
        pool.check()


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gather_returns_what_was_appended_bit_for_bit(dtype):
    cache = PagedKVCache(2, 3, 4, 10, 4, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 3, 9, 4, generator=generator).to(dtype) for _ in "kv")  # (layer, b, …)
    seqs = [cache.pool.start(), cache.pool.start()]
    for layer in range(2):
        cache.append(layer, seqs, k[layer], v[layer])
    cache.advance(seqs, 9)
    for layer, (i, seq) in itertools.product(range(2), enumerate(seqs)):
        got_k, got_v = cache.gather(layer, seq)
        assert torch.equal(got_k, k[layer, i])
        assert torch.equal(got_v, v[layer, i])


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_nothing_is_gathered_of_an_empty_sequence(quantized):
    cache = PagedKVCache(1, 2, 3, 4, quantized=quantized)
    seq = cache.pool.start()
    empty = torch.zeros(1, 2, 0, 3)
    cache.append(0, [seq], empty, empty)
    cache.append(0, [], empty[:0], empty[:0])
    assert cache.gather(0, seq)[0].shape == (2, 0, 3)
    assert cache.pool.used == 0


def test_tables_and_lengths_are_int32_and_padded():
    cache = PagedKVCache(1, 1, 1, 8, 2, window=2)
    long, short = filled(cache.pool, list(range(7))), filled(cache.pool, [9])
    tables, lengths = cache.tables([long, short])
    assert tables.dtype == lengths.dtype == torch.int32
    assert tables.tolist() == [[-1, -1, *long.blocks], [short.blocks[0], -1, -1, -1]]
    assert lengths.tolist() == [7, 1]
    assert cache.tables([])[0].shape == (0, 0)


@settings(max_examples=60)
@given(
    name=st.sampled_from(["int8", "fp8"]), d=st.integers(1, 40), log=st.floats(-30, 30), spread=st.floats(0, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_eight_bits_err_by_what_the_format_says(name, d, log, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, d, generator=generator) * torch.exp(spread * torch.randn(5, d, generator=generator)) * 10**log
    codes, scales = quantize(x, FORMATS[name])
    assert codes.dtype == FORMATS[name].dtype
    error = (dequantize(codes, scales, torch.float64) - x).abs()
    scale = scales.double().unsqueeze(-1)
    allowed = scale / 2 if name == "int8" else torch.maximum(x.abs().double() / 16, scale / 1024)
    assert (error <= allowed * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_that_eight_bits_cannot_hold(name):
    held = [[0.0, 0.0], [1e-44, 0.0], [1e-38, -1e-38], [3e38, 1.0], [LARGEST, -LARGEST]]
    x = torch.tensor([*held, [math.inf, 1.0], [1.0, math.nan]])
    back = dequantize(*quantize(x, FORMATS[name]), torch.float32)
    assert (back[:2] == 0).all()
    assert back[2:5].isfinite().all()
    torch.testing.assert_close(back[2:5, 0], x[2:5, 0], rtol=1e-2, atol=0)
    assert back[5:].isnan().all()


@pytest.mark.parametrize(("name", "ulps"), [("int8", 190), ("fp8", 600)])
def test_a_scale_too_small_to_be_exact_does_not_wrap_around(name, ulps):
    """Below 1e-38 a scale has few bits: rounded down, it makes codes that 8 bits do not hold."""
    x = torch.tensor([[float(ulps), -float(ulps)]]) * 2.0**-149
    back = dequantize(*quantize(x, FORMATS[name]), torch.float32)
    assert ((back - x).abs() <= x.abs() / 2).all()


@pytest.mark.parametrize(("quantized", "itemsize", "scale"), [(None, 4, 0), ("int8", 1, 4), ("fp8", 1, 4)])
def test_bytes(quantized, itemsize, scale):
    cache = PagedKVCache(3, 2, 8, 5, 4, quantized=quantized)
    assert cache.nbytes == 2 * 3 * 2 * 20 * (8 * itemsize + scale)


# --- what the layers of a step share ----------------------------------------------------------------------------------


class Rows:
    """A cache of two layers, and what each of its sequences must hold: numbers that were never written before."""

    def __init__(self, blocks=24, block=4, window=None):
        self.cache = PagedKVCache(2, 1, 1, blocks, block, window=window)
        self.held, self.next = {}, 1.0

    def start(self, tokens=None):
        seq = self.cache.pool.start(tokens)
        self.held[seq] = []
        return seq

    def fork(self, seq):
        child = self.cache.pool.fork(seq)
        self.held[child] = list(self.held[seq])
        return child

    def append(self, layer, seqs, rows):
        self.cache.append(layer, seqs, rows + layer / 2, -rows - layer / 2)

    def step(self, seqs, t, *, upto=2):
        """t tokens in each layer, or in the first only: then nothing counts."""
        rows = torch.arange(self.next, self.next + len(seqs) * t).view(len(seqs), 1, t, 1)
        self.next += len(seqs) * t
        for layer in range(upto):
            self.append(layer, seqs, rows)
            self.check(seqs, [self.held[seq] + row.flatten().tolist() for seq, row in zip(seqs, rows, strict=True)], t)
        if upto == 2:
            self.cache.advance(seqs, t)
            for seq, row in zip(seqs, rows, strict=True):
                self.held[seq] += row.flatten().tolist()

    def check(self, seqs, want, pending=0):
        """By what attention is told to read, in the layer that was written first, and by nothing else."""
        tables, block = self.cache.held(seqs, pending), self.cache.pool.block
        assert tables.length.tolist() == [len(row) for row in want]
        for table, row in zip(tables.table.tolist(), want, strict=True):
            places = [(table[p // block], p % block) for p in range(len(row)) if table[p // block] >= 0]
            got = [self.cache.keys[0, b, 0, p, 0].item() for b, p in places]
            assert got == row[len(row) - len(got) :]
        for table, seq in zip(tables.table.tolist(), seqs, strict=True):
            assert [b for b in table if b >= 0] == seq.blocks

    def check_all(self):
        """Without `held`, which would prepare a step anew, and an old one would not be found out."""
        for seq, row in self.held.items():
            for layer in range(2):
                got = self.cache.gather(layer, seq)
                assert got[0].flatten().tolist() == [x + layer / 2 for x in row[len(row) - got[0].shape[1] :]]
                assert torch.equal(got[1], -got[0])
        self.cache.pool.check()


@pytest.mark.usefixtures("unchecked_types")
@settings(deadline=None, max_examples=100)
@given(
    block=st.integers(1, 4),
    ops=st.lists(
        st.tuples(
            st.sampled_from(["step", "half", "read", "look", "fork", "truncate", "free", "reserve"]),
            st.integers(0, 1), st.integers(0, 3),
        ),
        max_size=14,
    ),
)  # fmt: skip
def test_whatever_happens_between_two_steps_they_write_and_read_where_they_must(block, ops):
    """Two batches take turns on one cache, and steps die half-way; each step must see the pool as it is then."""
    rows = Rows(blocks=400 // block, block=block)
    batches = [[rows.start(), rows.start()], [rows.start()]]
    for what, which, n in ops:
        batch = batches[which]
        if what in ("step", "half"):
            rows.step(batch, n, upto=2 if what == "step" else 1)
        elif what == "read":
            rows.check(batch, [rows.held[seq] for seq in batch])
        elif what == "look":  # at room that nobody has written
            rows.cache.held(batch, min([n, *(seq.reserved - seq.length for seq in batch)]))
        elif what == "fork":
            batch[0] = rows.fork(batches[1 - which][0])
        elif what == "truncate":
            left = min(n, batch[-1].length)
            rows.cache.pool.truncate(batch[-1], left)
            rows.held[batch[-1]] = rows.held[batch[-1]][:left]
        elif what == "free":
            rows.cache.pool.free(batch[-1])
            del rows.held[batch[-1]]
            batch[-1] = rows.start()
        else:
            rows.cache.reserve(batch, n)
        rows.check_all()


def test_a_step_is_prepared_for_the_first_layer_and_not_again(monkeypatch):
    rows, prepared = Rows(), []
    monkeypatch.setattr(
        PagedKVCache, "_prepared", lambda *x, old=PagedKVCache._prepared, **y: (prepared.append(x[2]), old(*x, **y))[1]
    )
    seqs = [rows.start(), rows.start()]
    new = torch.ones(2, 1, 3, 1)
    for layer in range(2):
        rows.append(layer, seqs, new)
        assert rows.cache.held(iter(seqs), 3) is rows.cache.held(seqs, 3)
    assert prepared == [3]
    rows.append(0, seqs[::-1], new)  # another order is another step
    rows.append(0, seqs, new[:, :, :2])
    assert prepared == [3, 3, 2]


def test_every_change_of_the_pool_is_seen_by_who_reads_next():
    rows = Rows()
    cache, pool, seq = rows.cache, rows.cache.pool, rows.start([1, 2, 3])
    seen = [cache.held([seq])]

    def read(of, blocks):
        now = cache.held([of])
        assert (now.length.tolist(), now.table.tolist()) == ([of.length], [blocks])
        assert now is not seen[-1]
        seen.append(now)

    cache.reserve([seq], 3)
    read(seq, [0])
    cache.advance([seq], 3)
    read(seq, [0])
    pool.truncate(seq, 2)
    read(seq, [0])
    version = pool.version
    child = pool.fork(seq)
    assert pool.version != version
    read(child, [0])
    cache.reserve([child], 1)
    read(child, [1])
    pool.free(child)
    with pytest.raises(ValueError, match="freed, or of another pool"):
        cache.held([child])
    read(seq, [0])
    version = pool.version
    pool.start()
    assert pool.version != version


@pytest.mark.parametrize("looked", [False, True])
def test_a_block_shared_in_the_middle_of_a_step_is_copied_before_the_next_layer(looked):
    """What was only read since, with the same number of tokens pending, is no leave to write."""
    rows = Rows()
    seq = rows.start()
    rows.step([seq], 2)
    rows.append(0, [seq], torch.full((1, 1, 1, 1), 7.0))
    child = rows.fork(seq)
    if looked:
        rows.cache.held([seq], 1)
    rows.append(1, [seq], torch.full((1, 1, 1, 1), 7.0))
    rows.step([child], 1)
    assert rows.cache.gather(1, seq, 1)[0].flatten().tolist() == [1.5, 2.5, 7.5]
    rows.check_all()


def test_a_block_taken_by_another_is_not_written_by_whom_it_was_prepared_for():
    """A step is prepared and given up; its room goes to another sequence, and all of it is used."""
    rows = Rows(blocks=2)
    seq, other = rows.start(), rows.start()
    rows.step([seq], 3)
    rows.append(0, [seq], torch.full((1, 1, 4, 1), 7.0))
    rows.cache.pool.truncate(seq, 3)
    rows.step([other], 4)
    with pytest.raises(OutOfBlocks):
        rows.append(1, [seq], torch.full((1, 1, 4, 1), 7.0))
    rows.check_all()
    rows.cache.pool.free(other)
    with pytest.raises(ValueError, match="freed, or of another pool"):
        rows.cache.append(0, [other], *[torch.ones(1, 1, 4, 1)] * 2)
    with pytest.raises(ValueError, match="freed, or of another pool"):
        rows.cache.held([other])


def test_blocks_that_have_left_the_window_are_not_read_by_the_next_step():
    rows = Rows(window=3)
    seq = rows.start()
    for _ in range(12):
        rows.step([seq], 1)
        rows.check_all()
    assert (rows.cache.held([seq]).table[0, : seq.dropped] == -1).all()
    assert seq.dropped == 2


def test_tables_that_are_given_out_are_nobody_elses():
    rows = Rows()
    seq = rows.start()
    rows.step([seq], 5)
    for x in rows.cache.tables([seq]):
        x.fill_(99)
    rows.check_all()


# --- under a model ----------------------------------------------------------------------------------------------------


def model():
    config = llama(2, 16, 4, 24, vocab=50, context=64, kv_heads=2)
    torch.manual_seed(0)
    return Transformer(config, dtype=torch.float64)


def paged(made, blocks=40, **options):
    config = made.config
    return PagedKVCache(
        config.layers, config.kv_heads, config.head_dim, blocks, 4, **{"dtype": torch.float64, **options}
    )


@pytest.mark.usefixtures("unchecked_types")
@torch.no_grad()
def test_a_model_gives_the_same_logits_with_either_cache():
    made, generator = model(), torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (2, 30), generator=generator)
    cache = paged(made)
    batch, contiguous = cache.batch([cache.pool.start(), cache.pool.start()]), made.cache(2)
    assert isinstance(contiguous, KVCache)
    for part in tokens.split([7, 1, 4, 1, 17], dim=1):
        torch.testing.assert_close(made(part, cache=batch), made(part, cache=contiguous))
        assert batch.length == contiguous.length
    batch.truncate(9)
    contiguous.truncate(9)
    torch.testing.assert_close(made(tokens[:, 9:12], cache=batch), made(tokens[:, 9:12], cache=contiguous))
    torch.testing.assert_close(made(tokens[:, 12:13], cache=batch), made(tokens[:, :13])[:, -1:])
    cache.pool.check()


@pytest.mark.usefixtures("unchecked_types")
@torch.no_grad()
def test_a_known_prefix_and_a_fork_do_not_change_the_logits():
    made, generator = model(), torch.Generator().manual_seed(1)
    prompt = torch.randint(50, (1, 14), generator=generator)
    want = made(prompt)[:, -1]
    cache = paged(made)
    first = cache.batch([cache.pool.start(prompt[0])])
    torch.testing.assert_close(made(prompt, cache=first.tell(prompt))[:, -1], want)
    again = cache.batch([cache.pool.start(prompt[0])])
    assert again.length == 12
    torch.testing.assert_close(made(prompt[:, 12:], cache=again)[:, -1], want)
    used = cache.pool.used
    pair = cache.batch([cache.pool.fork(first.seqs[0]), cache.pool.fork(first.seqs[0])])
    assert cache.pool.used == used
    new = torch.tensor([[3], [4]])
    got = made(new, cache=pair)[:, -1]
    for row, token in zip(got, new, strict=True):
        torch.testing.assert_close(row, made(torch.cat((prompt, token[None]), 1))[0, -1])
    cache.pool.check()


def test_a_batch_is_read_at_one_length_and_told_what_it_gets():
    cache = PagedKVCache(1, 1, 1, 8, 2)
    new = torch.ones(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"same length, got \[1, 2\]"):
        cache.batch([filled(cache.pool, [1]), filled(cache.pool, [1, 2])]).append(0, new, new)
    with pytest.raises(ValueError, match="at least one sequence"):
        cache.batch([])
    batch = cache.batch([cache.pool.start([5])])
    batch.tell(torch.tensor([[5, 6]])).append(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match="the 2 that were told of, got 1"):
        batch.advance(1)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": 0}, ValueError, "blocks must be at least 1, got 0"),
        ({"block": 2.0}, TypeError, "block must be an int, got float 2.0"),
        ({"layers": True}, TypeError, "layers must be an int"),
        ({"window": -1}, ValueError, "window must be at least 0, got -1"),
        ({"quantized": "int4"}, ValueError, "quantized must be None or one of 'int8', 'fp8', got 'int4'"),
        ({"dtype": torch.int8}, TypeError, "8 bits are asked for by quantized="),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        PagedKVCache(**{"layers": 1, "kv_heads": 1, "head_dim": 1, "blocks": 4, **arguments})


@pytest.mark.usefixtures("unchecked_types")
def test_bad_calls():
    cache = PagedKVCache(1, 2, 3, 8, 2)
    pool, seq = cache.pool, cache.pool.start()
    good = torch.zeros(1, 2, 1, 3)
    for call, error, message in [
        (lambda: cache.append(1, [seq], good, good), ValueError, "layer must be below 1"),
        (lambda: cache.append(0, [seq], good, None), TypeError, r"v must be a torch\.Tensor, got NoneType"),
        (lambda: cache.append(0, seq, good, good), TypeError, "put it in a list"),
        (lambda: cache.append(0, [seq], good[0], good), ValueError, r"k must have the cache.s .* got \(2, 1, 3\)"),
        (lambda: cache.append(0, [seq], good, good[:, :1]), ValueError, r"v must have the cache.s .* = \(1, 2, 1, 3\)"),
        (lambda: cache.append(0, [seq], good.double(), good), ValueError, "k must be torch.float32 on cpu"),
        (lambda: cache.append(0, [seq], good.clone().requires_grad_(), good), RuntimeError, "for inference"),
        (lambda: cache.append(0, [seq, seq], *[good.repeat(2, 1, 1, 1)] * 2), ValueError, "different sequences"),
        (lambda: cache.advance([seq], 1), ValueError, "0 more, got 1: call reserve first"),
        (lambda: cache.advance([seq], [[1], [2]]), ValueError, "a row for each of 1 sequences, got 2"),
        (lambda: cache.gather(0, seq, pending=1), ValueError, "pending must lie between 0 and 0, got 1"),
        (lambda: pool.start(["a"]), TypeError, "tokens must be token ids"),
        (lambda: pool.fork(3), TypeError, "seq must be a Sequence of this pool, got int"),
        (lambda: pool.fork(Pool(1).start()), ValueError, "freed, or of another pool"),
        (lambda: pool.truncate(seq, 1), ValueError, "length must be at most 0, the tokens held, got 1"),
        (lambda: pool.reserve(seq), TypeError, "seqs must be several sequences, got one: put it in a list"),
        (lambda: pool.reserve([seq], -1), ValueError, "tokens must be at least 0, got -1"),
    ]:
        with pytest.raises(error, match=message):
            call()
        pool.check()
    assert pool.available == 8
    pool.free(seq)
    with pytest.raises(ValueError, match="freed"):
        pool.free(seq)


def test_a_reservation_is_given_back_by_truncate():
    pool = Pool(4, 2)
    seq = filled(pool, [1, 2, 3])
    pool.reserve([seq], 5)
    assert pool.used == 4
    pool.truncate(seq, 3)
    assert pool.used == 2
    assert seq.tokens == [1, 2, 3]


def test_tokens_may_be_a_tensor_and_hash_as_ints():
    pool = Pool(4, 2)
    seq = pool.start(torch.tensor([1, 2, 3]))
    pool.reserve([seq], 3)
    pool.advance(seq, torch.tensor([1, 2, 3]))
    assert pool.start([1, 2, 3]).length == 2


# --- the contract -----------------------------------------------------------------------------------------------------


class Full(Exception):
    """As a student may write it; the contract goes by the name that it wants."""


Full.__name__ = "OutOfBlocks"


class Handle:
    """A list of tokens and a list of blocks."""

    def __init__(self, tokens=(), blocks=()):
        self.tokens, self.blocks = list(tokens), list(blocks)

    @property
    def length(self):
        return len(self.tokens)


class Lists:
    """A block manager of plain lists that looks for everything: slow, and another way to be right."""

    def __init__(self, blocks, block):
        self.block, self.handles = block, []
        self.text = [None] * blocks  # the whole prefix that ends with a full block
        self.spare = list(range(blocks))  # the longest unused first

    @property
    def available(self):
        return len(self.spare)

    def start(self, tokens):
        seq = Handle()
        self.handles.append(seq)
        while len(seq.tokens) + self.block < len(tokens):
            longer = tokens[: len(seq.tokens) + self.block]
            if longer not in self.text:
                break
            found = self.text.index(longer)
            if found in self.spare:
                self.spare.remove(found)
            seq.tokens, seq.blocks = longer, [*seq.blocks, found]
        return seq

    def take(self):
        if not self.spare:
            raise Full
        block = next((b for b in self.spare if self.text[b] is None), self.spare[0])
        self.spare.remove(block)
        self.text[block] = None
        return block

    def append(self, seq, token):
        copies = None
        if len(seq.tokens) % self.block == 0:
            seq.blocks.append(self.take())
        elif sum(seq.blocks[-1] in other.blocks for other in self.handles) > 1:
            copies = [(seq.blocks[-1], self.take())]
            seq.blocks[-1] = copies[0][1]
        seq.tokens.append(token)
        if len(seq.tokens) % self.block == 0 and seq.tokens not in self.text:
            self.text[seq.blocks[-1]] = list(seq.tokens)
        return copies

    def fork(self, seq):
        self.handles.append(Handle(seq.tokens, seq.blocks))
        return self.handles[-1]

    def free(self, seq):
        self.handles.remove(seq)
        held = {block for other in self.handles for block in other.blocks}
        self.spare += [block for block in reversed(seq.blocks) if block not in held]

    def table(self, seq):
        return torch.tensor(seq.blocks).numpy()


@pytest.mark.parametrize("seed", range(5))
def test_the_contract_accepts_another_right_implementation(seed):
    verdict = check(find("attention.kv_cache"), Lists, seed=100 * seed)
    assert verdict.passed, verdict


def changed(**methods):
    return type("Changed", (Lists,), methods)


def test_the_contract_accepts_whole_numbers_of_torch():
    kind = changed(
        table=lambda self, seq: torch.tensor(seq.blocks, dtype=torch.int32),
        available=property(lambda self: torch.tensor(len(self.spare))),
    )
    verdict = check(find("attention.kv_cache"), kind)
    assert verdict.passed, verdict


class Nameless:
    """All but what the rest of the engine would call."""

    def __init__(self, blocks, block):
        pool = Lists(blocks, block)
        self.start, self.append, self.table = pool.start, pool.append, pool.table


def returns(method, change):
    """`Lists`, whose method returns something else than it should."""
    return changed(**{method: lambda self, *given: change(self, getattr(Lists, method)(self, *given), *given)})


def start_or_refuse(self, tokens):
    """Refuses at once a prompt that there is no room for."""
    if len(tokens) > len(self.spare) * self.block:
        raise Full
    return Lists.start(self, tokens)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        (Nameless, "an object of class Nameless has no fork, free, available; wanted is make(blocks, block) -> object"),
        (
            lambda blocks: Lists(blocks, 1),
            "cannot be called as make(blocks, block) -> object with start(tokens) -> han",
        ),
        (lambda blocks, block: None, "None has no start, append, fork, free, table, available; wanted is make("),
        (changed(available=lambda self: 3), "`available` is a method: make it a property, or an attribute"),
        (changed(available=None), "`available` must be an int, how many blocks can be had, got None"),
        (
            returns("start", lambda self, seq, tokens: 7),
            "start(tokens) must return a handle, an object with an int `le",
        ),
        (returns("start", lambda self, seq, tokens: None), "start(tokens) must return a handle, an object with an int"),
        (
            returns("fork", lambda self, new, seq: None),
            "fork(seq) must return a handle, an object with an int `length`",
        ),
        (changed(start=lambda self, tokens: SimpleNamespace(length=list)), "the `length` of a handle is a method"),
        (changed(start=lambda self, tokens: SimpleNamespace(length=1.0)), "of a handle must be an int, got 1.0"),
        (changed(start=start_or_refuse), "start(tokens) raised OutOfBlocks, but it takes no free block"),
        (returns("append", lambda self, copies, *_: 3), "append(seq, token) must return the copies to be made, a list"),
        (returns("append", lambda self, copies, seq, _: (seq.blocks[-1], 0)), "[(from, to), …], or None, got (0, 0)"),
        (returns("append", lambda self, copies, *_: ((0, 1), copies or [])), "or None, got ((0, 1), [])"),
        (returns("append", lambda self, copies, *_: copies and copies[0]), "or None, got (1, 2)"),
        (changed(table=lambda self, seq: None), "table(seq) must return a sequence's blocks in order, got None"),
        (changed(table=lambda self, seq: []), "a reads [-2], expected [964] (−2: table(seq) has no block for it)"),
        (changed(table=lambda self, seq: [99] * 9), "blocks have numbers from 0 to 3, got 99"),
        (changed(append=lambda self, seq, token: None), "`length` counts the tokens, the new one too"),
        (
            changed(take=lambda self: Lists.take(self) if self.spare else [].pop()),
            "raised IndexError: pop from empty list",
        ),
        (changed(free=lambda self, seq: self.handles.remove(seq)), "available: after operation 13, free(a): 0, exp"),
    ],
)
def test_other_mistakes_of_a_block_manager_are_told_plainly(impl, message):
    failure = check(find("attention.kv_cache"), impl).failure
    assert failure is not None
    assert message in failure.message, failure.message


def taking(wants):
    """A block is taken when `wants(tokens, room)`, before the new token is counted."""

    def append(self, seq, token):
        if wants(len(seq.tokens), len(seq.blocks) * self.block, self.block):
            seq.blocks.append(self.take())
        seq.tokens.append(token)

    return changed(append=append)


def counts_prompt(self, seq, tokens):
    for token in tokens[len(seq.tokens) :]:
        self.append(seq, token)
    return seq


@pytest.mark.parametrize(
    ("impl", "like", "message"),
    [
        (taking(lambda n, room, block: n > room), "block_late", "reads [-2], expected [964] (−2: table(seq) has no bl"),
        (taking(lambda n, room, block: n % block == 1), "block_late", "−2: table(seq) has no block for it"),
        (taking(lambda n, room, block: n > room or n == 0), "block_late_after_first", "reads [964, 494, 876, -2], exp"),
        (taking(lambda n, room, block: (n + 1) // block * block > room), "blocks_rounded_down", "−2: table(seq) has"),
        (returns("start", counts_prompt), "prompt_counted", "a reads [-3], expected [964] (−3: never written)"),
        (
            returns("append", lambda self, copies, *_: copies and [pair[::-1] for pair in copies]),
            "copy_backwards",
            "478, 718] (−3: never written)",
        ),
    ],
)
def test_mistakes_of_students_are_named_whichever_block_they_take(impl, like, message):
    class LastFirst(impl):
        def __init__(self, blocks, block):
            super().__init__(blocks, block)
            self.spare.reverse()

    for kind in (impl, LastFirst):
        failure = check(find("attention.kv_cache"), kind).failure
        assert failure.like == like, failure
        assert message in failure.message, failure.message


def test_every_mistake_in_the_books_is_named():
    """Not one is taken for another, and none is only an exception."""
    contract = find("attention.kv_cache")
    named = {name: check(contract, wrong.impl).failure for name, wrong in contract.wrong.items()}
    assert {name: failure and failure.like for name, failure in named.items()} == {name: name for name in named}
