"""Text for a language model that every machine has: the source of its own standard library, as a stream of tokens.

Some 600 files and 10 MB of Python, written by people over thirty years; or its
documentation; or text of your own. The files are read, never imported or run.
Tests, and files that a program wrote (character tables, `pydoc_data`), are left out.

    >>> train, validation = split(corpus("stdlib"))        # by file: no file is in both
    >>> tokenizer = fit("bytes", train)
    >>> stream = tokens(train, tokenizer)                   # one flat array of uint16

Three tokenizers, from none to the field's own:

    bytes        256 tokens, nothing to learn, any text; a sequence is as long as its UTF-8
    characters   those of the training text; any other becomes the replacement character
    bpe          byte-level byte-pair encoding: starts from the 256 bytes and joins the commonest pair, again and again

Losses in nats a token cannot be compared between them, since their tokens differ
in length. Nats a *byte* can: multiply by tokens and divide by bytes of the text.

Every file ends with the token of the character NUL, which text does not hold: a
model can learn where a file ends, and no id is spent on it.

Cost:
    Reading the standard library takes a second; BPE trains on it in 2 s and encodes it in 4 s. Token streams and
    trained BPE are kept in the user's cache folder (as in `mlsys.data.docs`), keyed by the tokenizer, by this module's
    format and by the digest of the text itself, which differs between versions of Python and between builds of one.

Memory:
    The text, and 2 bytes a token (4 for more than 65,536 tokens).

Papers:
    Sennrich, Haddow & Birch 2016, arXiv:1508.07909, section 3.2, algorithm 1 (byte-pair encoding for text).
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2 (over bytes).

See also:
    `mlsys.data.docs` (the docstrings, as a search corpus), `mlsys.models.training` (which trains on the stream).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from mlsys.data import docs
from mlsys.files import cache_folder, write_atomic

log = logging.getLogger(__name__)

FORMAT = 1  # raise when the same text and tokenizer give other tokens: old caches are then not read
SOURCES = ("stdlib", "docs")
KINDS = ("bytes", "characters", "bpe")
END = "\0"  # ends each file in a token stream
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Folders and files of the standard library that a program wrote: tables of characters, and the manual as one literal.
GENERATED = frozenset({"encodings", "pydoc_data", "html/entities.py", "re/_casefix.py", "stringprep.py"})

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class File:
    """A text and its name: a path with forward slashes, relative to the folder it was found in."""

    name: str
    text: str


# --- the text ---------------------------------------------------------------------------------------------------------


def corpus(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "stdlib") -> list[File]:
    """The files of a source, in a fixed order; a text that occurs twice is kept once.

    "stdlib": the running Python's standard library. "docs": its manual's topics and its docstrings. Anything else is
    the path of a text file or folder, or several; `./docs` is a folder of that name. In a folder, hidden files and
    those that are not UTF-8 text are left out.

    Raises FileNotFoundError for a path that is not there; ValueError if a named file is not text, if two files get the
    same name, or if there is no text at all.
    """
    if isinstance(source, str) and source in SOURCES:
        found = _stdlib() if source == "stdlib" else _docs()
    else:
        paths = [source] if isinstance(source, str | os.PathLike) else list(source)
        found = (file for path in paths for file in _user_files(Path(path)))

    files: dict[str, File] = {}
    seen: set[str] = set()  # a copy could otherwise lie on both sides of the split
    for file in found:
        if not file.text or file.text in seen:
            continue
        if file.name in files:
            raise ValueError(f"source: two files are named {file.name!r}; give the folder that holds both instead")
        files[file.name] = file
        seen.add(file.text)
    if not files:
        raise ValueError(f"source: there is no text in {source!r}; give a UTF-8 text file, or a folder with some")
    return list(files.values())


def _stdlib() -> Iterator[File]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        skipped = not docs.SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]) or any(
            "-" in part for part in relative.parts
        )
        generated = name in GENERATED or relative.parts[0] in GENERATED or name.startswith("_sysconfigdata")
        if skipped or generated:
            continue
        try:
            with tokenize.open(path) as file:  # honours the file's coding line
                yield File(name, file.read().replace(END, ""))
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            log.debug("skipped %s: %s", path, error)


def _docs() -> Iterator[File]:
    """The topics that `help("if")` shows, then each module's docstrings with their names and signatures."""
    topics = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if topics.is_file():  # some systems ship it apart
        for node in ast.parse(topics.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                for name, text in sorted(ast.literal_eval(node.value).items()):
                    yield File(f"topics/{name}", text.strip("\n") + "\n")
    for path, documents in groupby(docs.load(), key=lambda document: document.path):
        parts = [f"{d.name}{d.signature}\n\n{d.summary}\n" + (f"\n{d.body}\n" if d.body else "") for d in documents]
        yield File(f"docstrings/{path}", "\n\n".join(parts).replace(END, ""))


def _user_files(path: Path) -> Iterator[File]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                try:
                    yield File(f"{path.resolve().name}/{relative.as_posix()}", _text(file))
                except ValueError as error:
                    log.debug("skipped %s", error)
    else:
        yield File(path.name, _text(path))


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{path} is not a regular file but a pipe or a device, which cannot be read a second time: "
            "write its text to a file first"
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    if END in text:
        raise ValueError(f"{path} is not text: it holds NUL characters, which end files here; remove them first")
    return text


def split(files: Sequence[File], fraction: float = 0.1, seed: int = 0) -> tuple[list[File], list[File]]:
    """Training and validation files: each file falls by a hash of its name, so about `fraction` go to validation.

    Whole files, because the next line of a file gives away too much of the one before. By name, so that a file keeps
    its side when others come or go. Where one side would be empty, it gets one file; a single file is cut at a line, at
    a space if its lines are too long for that, or else anywhere.

    Raises ValueError if fraction is not between 0 and 1, or if there is nothing to split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: the share for validation must lie between 0 and 1")
    if len(files) == 1:
        return _cut(files[0], fraction)
    if not files:
        raise ValueError("files: there are none to split")
    place = {file.name: _unit_hash(f"{seed}:{file.name}") for file in files}
    lowest, highest = min(place, key=place.__getitem__), max(place, key=place.__getitem__)
    held = {name for name, at in place.items() if at < fraction} - {highest} | {lowest}
    return [file for file in files if file.name not in held], [file for file in files if file.name in held]


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that looks random and is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _cut(file: File, fraction: float) -> tuple[list[File], list[File]]:
    length = len(file.text)
    if length < 2:
        raise ValueError(f"files: the only file, {file.name!r}, is too short to hold some of it out for validation")
    wanted = min(max(round(length * (1 - fraction)), 1), length - 1)
    # Not in the first half of what is wanted: a heading and one long line are no reason to train on the heading.
    places = (file.text.rfind(mark, wanted // 2, wanted) + 1 for mark in "\n ")
    at = next((place for place in places if place), wanted)
    return [File(f"{file.name} (start)", file.text[:at])], [File(f"{file.name} (end)", file.text[at:])]


def size(files: Iterable[File]) -> int:
    """Bytes of UTF-8 text, with one for the end of each file: what losses are divided by."""
    return sum(len(file.text.encode()) + 1 for file in files)


def digest(files: Iterable[File]) -> str:
    """A hexadecimal digest of names and texts: equal only for the same files in the same order."""
    total = hashlib.sha256()
    for file in files:
        for part in (file.name.encode(), file.text.encode()):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


# --- tokenizers -------------------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What the three have in common."""

    kind: ClassVar[str]

    @property
    def vocab(self) -> int:
        """How many different tokens there are: ids are 0 … vocab − 1."""

    def encode(self, text: str) -> Tokens:
        """The ids of a text, as a flat array: uint16, or uint32 if `vocab` needs it."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become the replacement character."""

    def to_json(self) -> str:
        """All that `from_json` needs to build it again."""


@dataclass(frozen=True)
class Bytes:
    """A token is a byte of the text's UTF-8."""

    kind: ClassVar[str] = "bytes"
    vocab: ClassVar[int] = 256

    def encode(self, text: str) -> Tokens:
        """The bytes of the text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these bytes."""
        return bytes(_checked(ids, self.vocab)).decode(errors="replace")

    def to_json(self) -> str:
        """Its kind: there is nothing else to keep."""
        return json.dumps({"kind": self.kind})


@dataclass(frozen=True)
class Characters:
    """A token is a character. Id 0 is the replacement character and stands for all that are not in `characters`.

    characters: those with an id of their own, in the order of their ids from 1 on: ascending code points.
    """

    characters: str
    kind: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        if list(self.characters) != sorted(set(self.characters) - {REPLACEMENT}):
            raise ValueError("characters must ascend, without repeats and without U+FFFD; Characters.fit makes them so")

    @classmethod
    def fit(cls, files: Iterable[File]) -> Characters:
        """The characters of these files, and the end of a file."""
        found = {END}.union(*(file.text for file in files))
        return cls("".join(sorted(found - {REPLACEMENT})))

    @property
    def vocab(self) -> int:
        """The known characters and the replacement character."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Tokens:
        """One id a character; 0 for unknown ones."""
        known, asked = _code_points(self.characters), _code_points(text)
        if not len(known):
            return np.zeros(len(asked), np.uint16)
        at = np.searchsorted(known, asked).clip(max=len(known) - 1)
        return np.where(known[at] == asked, at + 1, 0).astype(_dtype(self.vocab))

    def decode(self, ids: Iterable[int]) -> str:
        """One character an id."""
        table = REPLACEMENT + self.characters
        return "".join(table[i] for i in _checked(ids, self.vocab))

    def to_json(self) -> str:
        """Its kind and its characters."""
        return json.dumps({"kind": self.kind, "characters": self.characters})


class BPE:
    """Byte-level byte-pair encoding, by the library `tokenizers`, which is the field's own.

    Its file is that library's `tokenizer.json`: others can read it, and this reads theirs.
    """

    kind: ClassVar[str] = "bpe"

    def __init__(self, definition: str) -> None:
        library = _tokenizers()
        try:
            self._inner = library.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"definition is not the JSON of a tokenizer: {error}") from None

    @classmethod
    def fit(cls, files: Sequence[File], vocab: int = 4096) -> BPE:
        """Join the commonest pairs of these files until there are `vocab` tokens, or no pair is left.

        ValueError if vocab is below 257: the 256 bytes are always there.
        """
        if vocab <= 256:
            raise ValueError(f"vocab={vocab}: byte-level BPE starts from 256 tokens, so more than 256 are needed")
        library = _tokenizers()
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        inner.train_from_iterator((file.text for file in files), trainer)
        return cls(inner.to_str())

    @property
    def vocab(self) -> int:
        """The bytes and the joined pairs."""
        return int(self._inner.get_vocab_size())

    def encode(self, text: str) -> Tokens:
        """The ids of the text's words; a word never reaches over a space to the left."""
        return np.array(self._inner.encode(text).ids, _dtype(self.vocab))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these tokens."""
        return str(self._inner.decode(_checked(ids, self.vocab), skip_special_tokens=False))

    def to_json(self) -> str:
        """The library's own format, the same text for the same tokenizer."""
        return json.dumps(json.loads(self._inner.to_str()), ensure_ascii=False, sort_keys=True)


def fit(
    kind: str, files: Sequence[File], *, vocab: int = 4096, cache_dir: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """The tokenizer of this kind for these training files: "bytes", "characters" or "bpe".

    `vocab` is for "bpe" alone, which is kept in the cache. ValueError for another kind; ImportError if "bpe" is asked
    for and the library `tokenizers` is not installed.
    """
    if kind == "bytes":
        return Bytes()
    if kind == "characters":
        return Characters.fit(files)
    if kind != "bpe":
        raise ValueError(f"kind={kind!r}: there are {', '.join(KINDS)}")
    key = _digest("bpe", _tokenizers().__version__, vocab, digest(files))
    path = _folder(cache_dir) / f"bpe-{key}.json"
    try:
        return BPE(_unwrap(path).decode())
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("the cache file %s cannot be read (%s); training it again", path, error)
    log.info("training a tokenizer on %.1f MB (once; kept in %s)", size(files) / 1e6, path.parent)
    trained = BPE.fit(files, vocab)
    _keep(path, trained.to_json().encode())
    return trained


def save(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a tokenizer as JSON, all at once: a crash leaves the old file or the new one."""
    write_atomic(path, tokenizer.to_json() + "\n")


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer that `save` wrote, or a `tokenizer.json` of byte-level BPE; ValueError if it is damaged."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} holds no tokenizer: {error}") from None


def from_json(definition: str) -> Tokenizer:
    """The tokenizer that `to_json` described; ValueError if it is not one."""
    data = json.loads(definition)
    if isinstance(data, dict) and data == {"kind": "bytes"}:
        return Bytes()
    if isinstance(data, dict) and data.get("kind") == "characters" and isinstance(data.get("characters"), str):
        return Characters(data["characters"])
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        return BPE(definition)
    raise ValueError('expected {"kind": "bytes"}, {"kind": "characters", …} or the JSON of the library `tokenizers`')


def _tokenizers() -> Any:
    """The library, imported only for BPE. ImportError, with the remedy, if it is missing."""
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise ImportError(
            "the bpe tokenizer needs the library tokenizers, which is not installed: "
            "`pip install 'mlsys-reference[text]'`, or use bytes or characters"
        ) from None


def _checked(ids: Iterable[int], vocab: int) -> list[int]:
    listed = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).ravel()
    if len(listed) and not 0 <= listed.min() <= listed.max() < vocab:
        wrong = listed[(listed < 0) | (listed >= vocab)][0]
        raise ValueError(f"ids: {wrong} is no token of this vocabulary: they are 0 … {vocab - 1}")
    result: list[int] = listed.tolist()
    return result


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint32)


def _dtype(vocab: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The narrowest of the two that holds every id; little-endian, as it is kept on disk."""
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<u4")


# --- the stream, and the cache: a header line with a checksum, then the bytes -----------------------------------------


def tokens(files: Sequence[File], tokenizer: Tokenizer, *, cache_dir: str | os.PathLike[str] | None = None) -> Tokens:
    """The files one after another as one read-only array of ids, each file ended by the ids of NUL.

    Kept in the cache; a damaged cache file is read as none.
    """
    dtype = _dtype(tokenizer.vocab)
    key = _digest("tokens", tokenizer.to_json(), digest(files))
    path = _folder(cache_dir) / f"tokens-{key}.bin"
    try:
        return np.frombuffer(_unwrap(path), dtype)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("the cache file %s cannot be read (%s); building it again", path, error)
    end = tokenizer.encode(END)
    parts = [part for file in files for part in (tokenizer.encode(file.text), end)]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype)
    _keep(path, stream.tobytes())
    stream.flags.writeable = False
    return stream


def _folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(cache_dir) if cache_dir is not None else cache_folder() / "text"


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:20]


def _keep(path: Path, data: bytes) -> None:
    header = json.dumps({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, header + b"\n" + data)
    except OSError as error:
        log.warning("cannot keep %s (%s); it will be made again next time", path, error)


def _unwrap(path: Path) -> bytes:
    """The bytes that `_keep` was given. ValueError if they are not whole."""
    first, _, data = path.read_bytes().partition(b"\n")
    header = json.loads(first)
    if not isinstance(header, dict) or header.get("sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError("its checksum is wrong")
    return data
