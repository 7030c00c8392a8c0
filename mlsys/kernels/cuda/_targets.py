"""What a kernel file says of where it is to be compiled: two comments among its first lines.

// arch: sm_90a                        only there; `sm_80` means there and on all that is newer
// instances: sgemm<32>, sgemm<16>     of its templates, those that a report compiles
"""

from __future__ import annotations

import re

from mlsys.kernels.cuda import _source

ARCHITECTURES = ("sm_75", "sm_80", "sm_90a")  # where a file that names none is expected to compile
_FIRST = 40  # lines


def architectures(text: str) -> tuple[str, ...]:
    """Those that a file is compiled for. ValueError for a comment that names none."""
    found = _comment(text, "arch")
    wrong = [name for name in found or () if not re.fullmatch(r"sm_\d+[af]?", name)]
    if found == [] or wrong:
        raise ValueError(
            f"the comment `// arch:` must name architectures such as sm_90a, got {', '.join(wrong) or 'none'}"
        )
    return tuple(found or ARCHITECTURES)


def runs_on(text: str, arch: str) -> bool:
    """Whether a file is meant for an architecture. Without the comment it is for all."""
    if _comment(text, "arch") is None:
        return True
    return any(name == arch or (name[-1].isdigit() and _number(name) <= _number(arch)) for name in architectures(text))


def instances(text: str) -> tuple[str, ...]:
    """The kernels to report: those that are no templates, and instances that the comment lists. ValueError if none."""
    declared = _source.kernels(text)
    listed = _comment(text, "instances") or []
    unknown = [name for name in listed if _source.base_name(name).split("::")[-1] not in declared]
    if unknown:
        raise ValueError(
            f"`// instances:` names {', '.join(unknown)}, the file has {', '.join(declared) or 'no kernels'}"
        )
    named = {_source.base_name(name).split("::")[-1] for name in listed}
    missing = [d for name, d in declared.items() if d.template and name not in named]
    found = (*(name for name, d in declared.items() if not d.template and name not in named), *listed)
    if not found:
        example = f"{missing[0].name}<{', '.join('32' for _ in missing[0].template)}>" if missing else "kernel<32>"
        raise ValueError(
            f"the file has {'only templates' if missing else 'no kernels'}: name instances, "
            f"instances=[{example!r}], or in the file itself, // instances: {example}"
        )
    return tuple(found)


def _comment(text: str, word: str) -> list[str] | None:
    """What stands after `// word:`, at commas; a line that ends with one goes on in the next comment."""
    lines = text.splitlines()[:_FIRST]
    for i, line in enumerate(lines):
        match = re.match(rf"\s*//\s*{word}:(.*)", line)
        if match:
            said = match[1].strip()
            for following in lines[i + 1 :]:
                more = re.match(r"\s*//(.*)", following)
                if not said.endswith(",") or more is None:
                    break
                said += more[1].strip()
            return _source._split(said)
    return None


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))
