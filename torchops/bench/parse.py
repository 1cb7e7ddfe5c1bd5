"""Problem strings in the style of oneDNN's benchdnn: `conv2d:mb8_ic64ih56oc64kh3ph1`.

After `op:` come keys with numbers and flags, with or without underscores between them. Spatial keys
end in d, h or w, and one that is left out takes the value of the one before it, so ih56 is a 56x56
map. Numbers mean what they mean in torch, which differs from benchdnn in two places: dilation dh1
is none, and the stride of a pool defaults to its kernel. Output sizes follow from the rest; they
may be given, and are then checked.

    mb batch            g groups            ic, oc channels in and out
    id ih iw  input     kd kh kw  kernel    sd sh sw  stride
    pd ph pw  padding   dd dh dw  dilation  od oh ow  output
    kc, sc  window and stride of a channel pool
    bias, ceil (ceil_mode), nopad (count_include_pad=False), act=NAME, res (residual),
    eval (no gradients, running statistics), first (the input needs no gradient)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchops.bench.problem import (
    ACTIVATIONS,
    ADAPTIVE_POOLS,
    CHANNEL_POOLS,
    CONVS,
    OPS,
    POOLS,
    Problem,
    ProblemError,
    dims,
)

DEFAULT_BATCH = 8

_TOKEN = re.compile(r"act=(?P<act>\w*)|(?P<key>[a-z]+)(?P<number>\d*)")
_ACTIVATION = re.compile("|".join(sorted(ACTIVATIONS, key=len, reverse=True)))


@dataclass(frozen=True)
class _Grammar:
    """What an op's string may hold: scalar keys, spatial letters by prefix, flags."""

    required: tuple[str, ...]
    scalars: tuple[str, ...] = ()
    spatial: str = "i"
    flags: tuple[str, ...] = ()
    activation: bool = False


def _grammar(op: str) -> _Grammar:
    if op == "conv1x1":
        return _Grammar(("ic", "oc"), spatial="iso", flags=("bias", "eval", "first"))
    if op == "conv2d_bn_act":
        flags = ("bias", "res", "eval", "first")
        return _Grammar(("ic", "oc"), ("g",), "ikspdo", flags, activation=True)
    if op in CONVS:
        return _Grammar(("ic", "oc"), ("g",), "ikspdo", ("bias", "eval", "first"))
    if op in ADAPTIVE_POOLS:
        return _Grammar(("ic",), spatial="io", flags=("eval",))
    if op in CHANNEL_POOLS:
        return _Grammar(("ic", "kc"), ("sc",), flags=("eval",))
    if op in POOLS and op.startswith("max"):
        return _Grammar(("ic",), spatial="ikspdo", flags=("ceil", "eval"))
    if op in POOLS:
        return _Grammar(("ic",), spatial="ikspo", flags=("ceil", "nopad", "eval"))
    return _Grammar(("ic",), flags=("res", "eval"), activation=True)


def parse(text: str, *, batch: int | None = None) -> Problem:
    """Read a problem string; a batch given here stands in where the string has no `mb`.

    Raises ProblemError naming the token that is wrong and what is allowed in its place.
    """
    op, colon, body = text.partition(":")
    if op not in OPS:
        raise ProblemError(f"{text}: unknown op {op!r}; known: {', '.join(OPS)}")
    if not colon or not body:
        raise ProblemError(f"{text}: expected sizes after the op, such as {_example(op)}")
    try:
        return _build(op, *_tokens(op, body), batch or DEFAULT_BATCH)
    except ProblemError as error:
        raise ProblemError(f"{text}: {error}") from None


def _letters(op: str) -> str:
    """The spatial letters of `op`; batch_norm and channel pools take any suffix of d, h, w."""
    return "dhw"[-(dims(op) or 3) :]


def _tokens(op: str, body: str) -> tuple[dict[str, int], set[str], str | None]:
    grammar = _grammar(op)
    keys = ["mb", *grammar.required, *grammar.scalars]
    keys += [prefix + letter for prefix in grammar.spatial for letter in _letters(op)]
    words = [*keys, *grammar.flags, *(["act=NAME"] if grammar.activation else [])]
    allowed = f"{op} takes {' '.join(words)}"

    numbers: dict[str, int] = {}
    flags: set[str] = set()
    activation = None
    position = 0
    while position < len(body):
        if body[position] == "_":
            position += 1
            continue
        match = _TOKEN.match(body, position)
        where = f"at character {len(op) + 2 + position}"
        if not match:
            raise ProblemError(f"unexpected {body[position]!r} {where}; {allowed}")
        key, number = match["key"], match["number"]
        position = match.end()
        if key is None and grammar.activation:
            activation, position = _activation(body, match.start("act"), where)
        elif key is None:
            raise ProblemError(f"unknown flag 'act' {where}; {allowed}")
        elif key in numbers or key in flags:
            raise ProblemError(f"{key!r} is given twice, again {where}")
        elif key in keys and number:
            numbers[key] = int(number)
        elif key in keys:
            raise ProblemError(f"{key!r} {where} needs a number, such as {key}3")
        elif key in grammar.flags and not number:
            flags.add(key)
        elif key in grammar.flags:
            raise ProblemError(f"flag {key!r} {where} takes no number, got {number}")
        else:
            raise ProblemError(f"unknown key {key!r} {where}; {allowed}")
    return numbers, flags, activation


def _activation(body: str, start: int, where: str) -> tuple[str, int]:
    match = _ACTIVATION.match(body, start)
    if match and (match.end() == len(body) or body[match.end()] == "_"):
        return match[0], match.end()
    name = body[start:].split("_")[0]
    raise ProblemError(f"unknown activation {name!r} {where}; known: {', '.join(ACTIVATIONS)}")


def _build(
    op: str, numbers: dict[str, int], flags: set[str], activation: str | None, batch: int
) -> Problem:
    grammar = _grammar(op)
    letters = _letters(op)
    if dims(op) is None:
        given = [letter for letter in letters if f"i{letter}" in numbers]
        letters = letters[letters.index(given[0]) :] if given else ""
    _require(op, grammar, letters, numbers)

    def spatial(prefix: str, default: tuple[int, ...]) -> tuple[int, ...]:
        sizes: list[int] = []
        for letter, size in zip(letters, default, strict=True):
            sizes.append(numbers.get(prefix + letter, sizes[-1] if sizes else size))
        return tuple(sizes) if any(prefix + letter in numbers for letter in letters) else default

    problem = Problem(
        op,
        batch=numbers.get("mb", batch),
        in_channels=numbers["ic"],
        input_size=spatial("i", (1,) * len(letters)),
        out_channels=numbers.get("oc", 0),
        **_windows(op, numbers, spatial, len(letters)),
        groups=numbers.get("g", 1),
        adaptive_size=spatial("o", (1,) * len(letters)) if op in ADAPTIVE_POOLS else (),
        ceil_mode="ceil" in flags,
        count_include_pad="nopad" not in flags,
        bias="bias" in flags,
        activation=activation,
        residual="res" in flags,
        training="eval" not in flags,
        first="first" in flags,
    )
    for letter, size in zip(letters, problem.output_size, strict=True):
        key = "o" + letter
        if numbers.get(key, size) != size:
            raise ProblemError(f"{key}{numbers[key]} contradicts the rest, which gives {key}{size}")
    return problem


def _require(op: str, grammar: _Grammar, letters: str, numbers: dict[str, int]) -> None:
    prefixes = [prefix for prefix in "ik" if prefix in grammar.spatial and dims(op)]
    prefixes += ["o"] if op in ADAPTIVE_POOLS else []
    needed = [*grammar.required, *(prefix + letters[0] for prefix in prefixes)]
    missing = [key for key in needed if key not in numbers]
    if missing:
        raise ProblemError(f"{op} needs {', '.join(needed)}; missing: {', '.join(missing)}")


def _windows(
    op: str,
    numbers: dict[str, int],
    spatial: Callable[[str, tuple[int, ...]], tuple[int, ...]],
    rank: int,
) -> dict[str, Any]:
    """The fields that place windows on the input, for the ops that have windows."""
    if op in CHANNEL_POOLS:
        return {"kernel_size": (numbers["kc"],), "stride": (numbers.get("sc", numbers["kc"]),)}
    if op not in CONVS and op not in POOLS:
        return {}
    ones = (1,) * rank
    kernel_size = spatial("k", ones)
    return {
        "kernel_size": kernel_size,
        "stride": spatial("s", kernel_size if op in POOLS else ones),
        "padding": spatial("p", (0,) * rank),
        "dilation": spatial("d", ones),
    }


def unparse(problem: Problem) -> str:
    """The shortest string that `parse` reads back as `problem`."""
    op = problem.op
    letters = "dhw"[3 - len(problem.input_size) :]
    ones = (1,) * len(letters)

    def spatial(prefix: str, sizes: tuple[int, ...], default: tuple[int, ...] = ()) -> str:
        if sizes == default:
            return ""
        kept = [i for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
        return "".join(f"{prefix}{letters[i]}{sizes[i]}" for i in kept)

    parts = [f"mb{problem.batch}_"]
    parts += [f"g{problem.groups}"] if problem.groups > 1 else []
    parts += [f"ic{problem.in_channels}", spatial("i", problem.input_size)]
    parts += [f"oc{problem.out_channels}"] if op in CONVS else []
    parts += [spatial("o", problem.adaptive_size)]
    if op in CHANNEL_POOLS:
        parts += [f"kc{problem.kernel_size[0]}"]
        parts += [f"sc{problem.stride[0]}"] if problem.stride != problem.kernel_size else []
    elif problem.kernel_size:
        parts += [spatial("k", problem.kernel_size)] if op != "conv1x1" else []
        parts += [spatial("s", problem.stride, problem.kernel_size if op in POOLS else ones)]
        parts += [spatial("p", problem.padding, (0,) * len(letters))]
        parts += [spatial("d", problem.dilation, ones)]
    flags = {
        "bias": problem.bias,
        "ceil": problem.ceil_mode,
        "nopad": not problem.count_include_pad,
        f"act={problem.activation}": problem.activation,
        "res": problem.residual,
        "eval": not problem.training,
        "first": problem.first,
    }
    return "_".join([f"{op}:" + "".join(parts), *(flag for flag, on in flags.items() if on)])


def _example(op: str) -> str:
    letter = _letters(op)[0] if dims(op) else "h"
    example = f"{op}:mb8_ic64i{letter}56"
    if op in CONVS:
        example += "oc64"
    if op in ADAPTIVE_POOLS:
        return f"{example}o{letter}7"
    if op in CHANNEL_POOLS:
        return f"{example}kc4"
    return example if op in ("batch_norm", "conv1x1") else f"{example}k{letter}3p{letter}1"
