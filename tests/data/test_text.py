"""Text is read in a fixed order and split by file; tokenizers give back what they were given; damage is noticed."""

import json
import logging
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys.data import docs, text
from mlsys.data.text import BPE, END, Bytes, Characters, File

PROSE = [
    File("a.txt", "the cat sat on the mat, and the rat sat on the cat\n" * 20),
    File("b.txt", "naïve café: ∑ₙ 1/n² = π²/6 — the theatre\n" * 20),
]


@pytest.fixture(scope="module")
def stdlib():
    return text.corpus("stdlib")


@pytest.fixture(scope="module")
def tokenizers():
    return {"bytes": Bytes(), "characters": Characters.fit(PROSE), "bpe": BPE.fit(PROSE, 300)}


def files_of(names):
    return [File(name, f"text of {name}\n") for name in names]


# --- the text ---------------------------------------------------------------------------------------------------------


def test_standard_library_without_tests_and_generated_files(stdlib):
    names = [file.name for file in stdlib]
    assert {"argparse.py", "json/decoder.py", "email/message.py"} <= set(names)
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert len(names) == len(set(names)) > 300
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "encodings", "pydoc_data", "__pycache__"})
    assert {"stringprep.py", "html/entities.py"}.isdisjoint(names)
    assert text.size(stdlib) > 4_000_000
    root = Path(sysconfig.get_path("stdlib"))
    whole = next(file for file in stdlib if file.name == "argparse.py")
    assert whole.text == (root / "argparse.py").read_text(encoding="utf-8")
    assert text.corpus("stdlib") == stdlib


def test_reading_needs_no_torch_and_runs_nothing_it_reads():
    code = (
        "import sys; from mlsys.data import text; text.corpus('stdlib'); "
        "print(sorted({'torch', 'tokenizers', 'this', 'turtle', 'lib2to3'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_docs_are_topics_and_docstrings(monkeypatch):
    documents = [
        docs.Document("gzip", "module", "", "Read gzip.", "", "gzip.py", 1, "stdlib"),
        docs.Document("gzip.open", "function", "(file)", "Open one.", "More of it.", "gzip.py", 9, "stdlib"),
        docs.Document("zlib.x", "function", "()", "Other.", "", "zlib.py", 1, "stdlib"),
    ]
    monkeypatch.setattr(docs, "load", lambda: documents)
    found = {file.name: file.text for file in text.corpus("docs")}
    assert any('"if" statement' in told for name, told in found.items() if name.startswith("topics/"))
    assert len(set(found.values())) == len(found)  # "if" and "else" have one topic between them
    assert found["docstrings/gzip.py"] == "gzip\n\nRead gzip.\n\n\ngzip.open(file)\n\nOpen one.\n\nMore of it.\n"
    assert found["docstrings/zlib.py"] == "zlib.x()\n\nOther.\n"


def test_own_files_and_folders(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_bytes("é\r\n".encode())
    (folder / "sub" / "a.md").write_text("a")
    (folder / "copy.md").write_text("a")
    (folder / "empty").touch()
    (folder / "nul").write_bytes(b"a\0b")
    (folder / "latin").write_bytes(b"\xe9")
    (folder / ".hidden").write_text("secret")
    (folder / ".git" / "config").write_text("secret")
    (tmp_path / "one.txt").write_text("one")
    found = text.corpus([folder, tmp_path / "one.txt"])
    assert found == [File("mine/b.txt", "é\r\n"), File("mine/copy.md", "a"), File("one.txt", "one")]
    assert text.corpus(str(tmp_path / "one.txt")) == [File("one.txt", "one")]


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes(b"abc\xe9")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "same").write_text("1")
    (tmp_path / "same").write_text("2")
    with pytest.raises(ValueError, match="nul is not text: it holds NUL"):
        text.corpus(tmp_path / "nul")
    with pytest.raises(ValueError, match=r"latin is not UTF-8 text .* at byte 3"):
        text.corpus(tmp_path / "latin")
    with pytest.raises(ValueError, match="there is no text"):
        text.corpus(tmp_path / "empty")
    with pytest.raises(ValueError, match="two files are named 'same'"):
        text.corpus([tmp_path / "x" / "same", tmp_path / "same"])
    with pytest.raises(FileNotFoundError):
        text.corpus(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a regular file but a pipe or a device"):
        text.corpus(os.devnull)


# --- the split --------------------------------------------------------------------------------------------------------


@given(st.sets(st.text(min_size=1), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_is_a_partition_in_order(names, fraction, seed):
    files = files_of(sorted(names))
    train, held = text.split(files, fraction, seed)
    assert train
    assert held
    assert {f.name for f in train}.isdisjoint(f.name for f in held)
    assert sorted(train + held, key=files.index) == files
    assert train == [f for f in files if f in train]
    assert text.split(list(reversed(files)), fraction, seed) == (train[::-1], held[::-1])


def test_a_file_keeps_its_side_when_others_go():
    files = files_of(f"{i}.py" for i in range(500))
    train, held = text.split(files)
    for kept in (files[::2], files[1::2], files[100:300]):
        assert text.split(kept) == ([f for f in kept if f in train], [f for f in kept if f in held])


def test_share_and_seed():
    files = files_of(f"{i}.py" for i in range(3000))
    for fraction in (0.1, 0.5):
        assert len(text.split(files, fraction)[1]) / 3000 == pytest.approx(fraction, abs=0.03)
    assert text.split(files, seed=1) != text.split(files, seed=0)


def test_split_is_the_same_on_every_machine():
    held = text.split(files_of(f"{i}.py" for i in range(40)))[1]
    assert [file.name for file in held] == ["8.py", "12.py", "14.py", "32.py"]  # sha256("0:8.py") begins below 0.1


def test_a_single_file_is_cut_at_a_line():
    lines = "".join(f"line {i}\n" for i in range(100))
    train, held = text.split([File("book", lines)], 0.2)
    assert train[0].text + held[0].text == lines
    assert train[0].text.endswith("\n")
    assert len(held[0].text) / len(lines) == pytest.approx(0.2, abs=0.02)
    assert train[0].name != held[0].name


@pytest.mark.parametrize("mark", ["", " "])
@pytest.mark.parametrize("heading", ["", "heading\n"])
def test_a_single_file_of_one_long_line_is_cut_all_the_same(mark, heading):
    line = heading + f"word{mark}" * 1000
    train, held = text.split([File("book", line)], 0.2)
    assert train[0].text + held[0].text == line
    assert len(held[0].text) / len(line) == pytest.approx(0.2, abs=0.01)
    assert not mark or train[0].text.endswith(mark)
    assert [file[0].text for file in text.split([File("x", "ab")], 0.01)] == ["a", "b"]


def test_split_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="fraction=1"):
        text.split(PROSE, 1)
    with pytest.raises(ValueError, match="there are none"):
        text.split([])
    with pytest.raises(ValueError, match="'x', is too short"):
        text.split([File("x", "a")])


def test_size_counts_bytes_and_ends():
    assert text.size([File("a", "é"), File("b", "xyz")]) == 2 + 1 + 3 + 1


def test_digest_tells_files_apart():
    def of(*pairs):
        return text.digest(File(*pair) for pair in pairs)

    cases = [of(("a", "b")), of(("ab", "")), of(("a", "")), of(("b", "a")), of(("a", "b"), ("c", "d")), of()]
    cases.append(of(("c", "d"), ("a", "b")))
    assert len(set(cases)) == len(cases)
    assert of(("a", "b")) == of(("a", "b"))


# --- tokenizers -------------------------------------------------------------------------------------------------------


@given(st.text())
@settings(max_examples=300)
def test_bytes_give_any_text_back(given_text):
    ids = Bytes().encode(given_text)
    assert ids.tolist() == list(given_text.encode())
    assert ids.dtype == np.uint16
    assert Bytes().decode(ids) == given_text


@given(st.text())
@settings(max_examples=300)
def test_bpe_gives_any_text_back(tokenizers, given_text):
    bpe = tokenizers["bpe"]
    ids = bpe.encode(given_text)
    assert bpe.decode(ids) == given_text
    assert len(ids) <= len(given_text.encode())
    assert not len(ids) or ids.max() < bpe.vocab


@given(st.text())
@settings(max_examples=300)
def test_characters_give_what_they_know_back(given_text):
    fitted = Characters.fit([File("", given_text)])
    assert fitted.decode(fitted.encode(given_text)) == given_text
    other = Characters.fit([File("", "abc")])
    shown = "".join(c if c in "abc\0" else "\ufffd" for c in given_text)
    assert other.decode(other.encode(given_text)) == shown
    assert other.vocab == 5
    assert Characters("").decode(Characters("").encode(given_text)) == "\ufffd" * len(given_text)


def test_special_looking_text_is_text(tokenizers):
    for sample in ("<|endoftext|> [UNK] </s>", "\0", "a\0b", " \t\r\n", "\U0010ffff", "🧑‍🔬"):
        assert tokenizers["bpe"].decode(tokenizers["bpe"].encode(sample)) == sample


def test_bpe_joins_the_commonest_first():
    bpe = BPE.fit([File("", "ababab cd")], 257)
    assert bpe.vocab == 257
    assert bpe.decode([256]) == "ab"
    assert bpe.encode("abab").tolist() == [256, 256]


def test_bpe_shortens_its_text(tokenizers):
    assert len(tokenizers["bpe"].encode(PROSE[0].text)) < len(PROSE[0].text) / 2


def test_bpe_is_the_same_in_every_process(tokenizers):
    code = (
        "import json, sys; from mlsys.data.text import BPE, File; "
        "print(BPE.fit([File(*pair) for pair in json.load(sys.stdin)], 300).to_json())"
    )
    given_files = json.dumps([[file.name, file.text] for file in PROSE])
    ran = subprocess.run([sys.executable, "-c", code], input=given_files, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == tokenizers["bpe"].to_json()


@pytest.mark.parametrize("kind", text.KINDS)
def test_saved_and_loaded(kind, tokenizers, tmp_path):
    tokenizer, sample = tokenizers[kind], "the cat – naïve\n"
    text.save(tokenizer, tmp_path / "t.json")
    loaded = text.load(tmp_path / "t.json")
    assert (loaded.kind, loaded.vocab) == (kind, tokenizer.vocab)
    assert loaded.encode(sample).tolist() == tokenizer.encode(sample).tolist()
    assert loaded.to_json() == tokenizer.to_json()


def test_bpe_file_is_the_library_s_own(tokenizers, tmp_path):
    import tokenizers as library

    text.save(tokenizers["bpe"], tmp_path / "t.json")
    theirs = library.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.encode("the cat").ids == tokenizers["bpe"].encode("the cat").tolist()


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "{}", '{"kind": "words"}', '{"kind": "characters"}', '{"kind": "characters", "characters": "ba"}']
    + ['{"model": {}}', '{"kind": "characters", "characters": "aa"}'],
)
def test_file_that_holds_no_tokenizer_is_named(damage, tmp_path):
    (tmp_path / "t.json").write_text(damage)
    with pytest.raises(ValueError, match=r"t\.json holds no tokenizer"):
        text.load(tmp_path / "t.json")


@pytest.mark.parametrize("kind", text.KINDS)
def test_ids_that_are_no_tokens_are_named(kind, tokenizers):
    tokenizer = tokenizers[kind]
    for wrong in (-1, tokenizer.vocab):
        with pytest.raises(ValueError, match=rf"ids: {wrong} is no token .* 0 … {tokenizer.vocab - 1}"):
            tokenizer.decode([0, wrong])
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("").tolist() == []


def test_bytes_that_are_no_text_are_replaced():
    assert Bytes().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def test_large_vocabularies_get_32_bits():
    many = Characters("".join(map(chr, range(0x10000, 0x10000 + 65_536))))
    assert many.encode("\U0001ffff").tolist() == [65_536]
    assert many.encode("a").dtype == np.uint32


def test_fit_by_kind(tmp_path):
    assert text.fit("bytes", PROSE) == Bytes()
    assert text.fit("characters", PROSE) == Characters.fit(PROSE)
    assert text.fit("bpe", PROSE, vocab=280, cache_dir=tmp_path).vocab == 280
    with pytest.raises(ValueError, match="kind='words': there are bytes, characters, bpe"):
        text.fit("words", PROSE)
    with pytest.raises(ValueError, match="vocab=256"):
        text.fit("bpe", PROSE, vocab=256, cache_dir=tmp_path)


def test_missing_library_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the library tokenizers.*pip install 'mlsys-reference\[text\]'"):
        text.fit("bpe", PROSE, cache_dir=tmp_path)


# --- the stream, and the cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", text.KINDS)
def test_stream_is_the_files_each_with_its_end(kind, tokenizers, tmp_path):
    tokenizer = tokenizers[kind]
    stream = text.tokens(PROSE, tokenizer, cache_dir=tmp_path)
    assert stream.ndim == 1
    assert tokenizer.decode(stream) == "".join(file.text + END for file in PROSE)
    again = text.tokens(PROSE, tokenizer, cache_dir=tmp_path)
    for array in (stream, again):
        assert array.dtype == np.uint16
        assert not array.flags.writeable
    assert again.tolist() == stream.tolist()
    assert len(list(tmp_path.iterdir())) == 1


def test_second_time_is_read_from_the_cache(tmp_path, monkeypatch):
    text.tokens(PROSE, Bytes(), cache_dir=tmp_path)
    text.fit("bpe", PROSE, vocab=260, cache_dir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Bytes, "encode", None)
        patched.setattr(BPE, "fit", None)
        assert len(text.tokens(PROSE, Bytes(), cache_dir=tmp_path)) == text.size(PROSE)
        assert text.fit("bpe", PROSE, vocab=260, cache_dir=tmp_path).vocab == 260


def test_cache_is_keyed_by_text_and_tokenizer(tmp_path):
    fitted = Characters.fit(PROSE)
    kept = [
        text.tokens(PROSE, Bytes(), cache_dir=tmp_path),
        text.tokens(PROSE[:1], Bytes(), cache_dir=tmp_path),
        text.tokens(PROSE, fitted, cache_dir=tmp_path),
        text.tokens(PROSE, Characters(fitted.characters[:-1]), cache_dir=tmp_path),
    ]
    assert len(list(tmp_path.iterdir())) == len(kept)
    text.fit("bpe", PROSE, vocab=260, cache_dir=tmp_path)
    assert text.fit("bpe", PROSE, vocab=270, cache_dir=tmp_path).vocab == 270


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"", lambda d: d[:-1] + b"!", lambda d: b"[]" + d])
def test_damaged_cache_is_built_again(damage, tmp_path, caplog):
    stream = text.tokens(PROSE, Bytes(), cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert text.tokens(PROSE, Bytes(), cache_dir=tmp_path).tolist() == stream.tolist()
    assert "building it again" in caplog.text
    assert path.read_bytes() == whole


def test_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        stream = text.tokens(PROSE, Bytes(), cache_dir=tmp_path / "file")
    assert len(stream) == text.size(PROSE)
    assert "cannot keep" in caplog.text


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLSYS_CACHE", str(tmp_path))
    text.tokens(PROSE, Bytes())
    assert [path.parent for path in tmp_path.rglob("tokens-*")] == [tmp_path / "text"]
