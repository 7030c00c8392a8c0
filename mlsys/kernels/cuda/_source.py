"""What a kernel file says of itself: its kernels, their parameters, and what a processor's compiler has to be told.

Not a compiler's parser: it looks for `__global__`, matches brackets, and leaves all meaning to the compiler. Comments
and strings are blanked out first, by as many spaces, so that places in one text are places in the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
_DYNAMIC = re.compile(r"\bextern\s+__shared__\s+([^;(]*?(?:\([^)]*\)[^;(]*?)*?)\b(\w+)\s*\[\s*\]\s*;")
_GLOBAL = re.compile(r"\b__device__\b(?=([^;({=\[]*)[;={\[])")
_ALIGNMENT = re.compile(r"(?:__align__|alignas)\s*\([^)]*\)|__attribute__\s*\(\(.*?\)\)")
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define\b(?:[^\n\\]|\\.)*", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r"\s*#\s*include\s*<(\w+)>")
_CONDITION = re.compile(r"\s*#\s*(if\w*|endif)\b")
_BRACES = re.compile(r"\bnamespace\b\s*([\w:]*)\s*\{|[{}]")
_NAME = re.compile(r"[A-Za-z_]\w*")
# C++ headers that a kernel file may name: what is in them has a meaning on a GPU, and NVRTC is given them too
STANDARD = frozenset(
    ("array", "cassert", "cfloat", "climits", "cmath", "cstddef", "cstdint", "cstdio", "cstdlib", "cstring")
    + ("initializer_list", "limits", "tuple", "type_traits", "utility")
)


@dataclass(frozen=True)
class Parameter:
    """One of a kernel: `const float *a` has the type `const float *` and the name `a`."""

    type: str
    name: str


@dataclass(frozen=True)
class Declared:
    """A kernel as its file declares it."""

    name: str
    template: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    line: int
    scope: str = ""

    def spelled(self, instance: str) -> str:
        """An instance as the compiler takes it anywhere in the file: `course::sgemm<32>`, `course::defaults<>`."""
        scope = "" if "::" in instance.split("<", 1)[0] else self.scope
        return f"{scope}{instance}{'<>' if self.template and '<' not in instance else ''}"

    def __str__(self) -> str:
        """As one would call it."""
        template = f"<{', '.join(self.template)}>" if self.template else ""
        return f"{self.name}{template}({', '.join(f'{p.type} {p.name}' for p in self.parameters)})"


def kernels(text: str) -> dict[str, Declared]:
    """The kernels that a file defines, by name, in its order; not those that macros would make."""
    code = _DEFINE.sub(_blank, without_comments(text))
    found: dict[str, Declared] = {}
    for match in re.finditer(r"\b__global__\b", code):
        declared = _kernel(code, match.start(), match.end())
        if declared is not None:
            found.setdefault(declared.name, declared)
    return found


def without_comments(text: str) -> str:
    """The text with comments and strings blanked out; every place and line stays."""
    return _NOT_CODE.sub(_blank, text)


def for_device_only(text: str) -> str:
    """The code without what `#ifndef MLSYS` hides, which may be host code; every line stays."""
    out, hidden, depth = [], 0, 0
    for line in without_comments(text).splitlines(keepends=True):
        word = re.match(r"\s*#\s*(if\w*|endif|else|elif)\b\s*(\w*)", line)
        if word and word[1].startswith("if"):
            depth += 1
            if word[1] == "ifndef" and word[2] in ("MLSYS", "__CUDACC_RTC__") and not hidden:
                hidden = depth
        elif word and word[1] in ("else", "elif") and hidden == depth:
            hidden = 0
        elif word and word[1] == "endif":
            hidden = 0 if hidden == depth else hidden
            depth -= 1
        out.append("\n" if hidden else line)
    return "".join(out)


def host_header(text: str) -> tuple[int, str] | None:
    """The first standard header that no kernel can use, and its line: <vector>. What stands under an #if is let be."""
    depth = 0
    for number, line in enumerate(without_comments(text).splitlines(), 1):
        if condition := _CONDITION.match(line):
            depth += -1 if condition[1] == "endif" else 1
        elif not depth and (included := _INCLUDE.match(line)) and included[1] not in STANDARD:
            return number, included[1]
    return None


def for_processor(text: str) -> str:
    """The text as a processor's compiler takes it, line for line: dynamic shared arrays are pointers to their room."""
    code, out, last = without_comments(text), [], 0
    for match in _DYNAMIC.finditer(code):
        kind = _ALIGNMENT.sub("", match[1]).strip()
        lines = "\n" * match.group().count("\n")
        out += [text[last : match.start()], f"{kind} *const {match[2]} = ({kind} *)mlsys_dynamic_shared;{lines}"]
        last = match.end()
    text = "".join([*out, text[last:]])
    return _replaced(text, _GLOBAL, "__device_variable__", unless=r"\b(const|constexpr|__constant__|__global__)\b")


def _replaced(text: str, pattern: re.Pattern[str], by: str, unless: str) -> str:
    """What the pattern finds in the code, unless its first group holds such a word; every line stays."""
    code, out, last = without_comments(text), [], 0
    for match in pattern.finditer(_ALIGNMENT.sub(lambda m: " " * len(m.group()), code)):
        if not re.search(unless, match[1]):
            out += [text[last : match.start()], by]
            last = match.end()
    return "".join([*out, text[last:]])


def base_name(instance: str) -> str:
    """`sgemm` of `sgemm<32, float>`."""
    return instance.split("<", 1)[0].strip()


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def _scope(code: str) -> str:
    """The namespaces that are open at the end of the code, `course::inner::`."""
    names: list[str] = []
    for brace in _BRACES.finditer(code):
        if brace.group() != "}":
            names.append(brace[1] or "")
        elif names:
            names.pop()
    return "".join(f"{name}::" for name in names if name)


def _kernel(code: str, start: int, after: int) -> Declared | None:
    at = after
    while True:  # words such as void and __launch_bounds__(…), up to the name
        name = _NAME.search(code, at)
        if name is None:
            return None
        following = _skip_space(code, name.end())
        if code[following : following + 1] == "(":
            close = _matching(code, following)
            if name.group() not in ("__launch_bounds__", "__attribute__", "alignas", "__align__", "__cluster_dims__"):
                break
            at = close + 1
        else:
            at = name.end()
    if code[_skip_space(code, close + 1) :].startswith(";"):
        return None  # it only says that there will be one
    parts = [p for p in _split(code[following + 1 : close]) if p and p != "void"]
    line = code.count("\n", 0, name.start()) + 1
    return Declared(
        name.group(), _template_before(code, start), tuple(map(_parameter, parts)), line, _scope(code[:start])
    )


def _parameter(text: str) -> Parameter:
    text = re.sub(r"\b(__restrict__|__restrict|__grid_constant__)\b", " ", text.split("=", 1)[0])
    words = re.match(r"(.*?)\b([A-Za-z_]\w*)\s*(\[[^\]]*\])?\s*$", text, re.DOTALL)
    if words is None or not words[1].strip():
        return Parameter(" ".join(text.split()), "")
    kind = " ".join(words[1].split()) + (" *" if words[3] else "")
    return Parameter(re.sub(r"\s*\*", " *", kind), words[2])


def _template_before(code: str, start: int) -> tuple[str, ...]:
    head = re.sub(r"\b(static|inline|extern|__forceinline__)\s*$", "", code[:start].rstrip()).rstrip()
    if not head.endswith(">"):
        return ()
    depth, at = 0, len(head) - 1
    while at >= 0:
        depth += {">": 1, "<": -1}.get(head[at], 0)
        if depth == 0:
            break
        at -= 1
    return tuple(_split(head[at + 1 : -1])) if re.search(r"\btemplate\s*$", head[:at]) else ()


def _split(text: str) -> list[str]:
    """At commas that stand in no brackets."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "(<[{") - (c in ")>]}")
        if c == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    return [" ".join(part.split()) for part in [*parts, text[last:]] if part.strip()]


def _matching(code: str, at: int) -> int:
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] == "(") - (code[i] == ")")
        if depth == 0:
            return i
    return len(code)


def _skip_space(code: str, at: int) -> int:
    while at < len(code) and code[at].isspace():
        at += 1
    return at
