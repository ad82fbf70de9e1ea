"""Compare the Swift module Metal of core/SoftMetal with Apple's: what ours declares, the framework must have, with the same signature.

    xcrun swift-synthesize-interface -module-name Metal -sdk "$(xcrun --show-sdk-path)" -target arm64-apple-macos14 -o Metal.txt
    python tools/check_metal_interface.py Metal.txt

Takes any text that declares the framework as Swift sees it: what the command above prints (with Xcode 16.3 or later), or a .swiftinterface.
What a comment marks as "Our own" is left out. Availability, defaults of arguments, and whether a type is Sendable are not compared: they
differ between versions of the framework and change no call.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "core" / "SoftMetal" / "Metal" / "Interface.swift"

TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\n|`?\w+`?|@\w+|#[^\n]*|->|\.\.\.|\"[^\"\n]*\"|[^\s\w]", re.DOTALL)
CONTAINERS = {"protocol", "struct", "enum", "class", "extension"}
MODIFIERS = {"public", "open", "final", "static", "class", "internal", "private", "fileprivate", "nonisolated", "mutating", "override"}
MODIFIERS |= {"required", "convenience", "unsafe", "weak", "unowned", "optional", "prefix", "package", "sending"}
CLOSING = {"(": ")", "[": "]", "{": "}"}


class InterfaceError(Exception):
    """A text that cannot be read."""


@dataclass
class Member:
    """A property, function, initialiser or case."""

    signature: str
    is_settable: bool = False
    value: str = ""  # of a case


@dataclass
class Type:
    """A protocol, struct, enum or class with all that is declared in it and in its extensions."""

    inherited: set[str] = field(default_factory=set)
    members: dict[str, list[Member]] = field(default_factory=dict)


@dataclass
class Interface:
    """What a module declares. Functions of no type are members of the type ""."""

    types: dict[str, Type] = field(default_factory=lambda: {"": Type()})
    aliases: dict[str, str] = field(default_factory=dict)


def canonical(tokens: list[str]) -> str:
    """A type or signature in one spelling, whatever lines, spaces, module names and annotations of concurrency it has."""
    kept = [token for token in tokens if token not in ("\n", "@Sendable", "sending")]
    text = " ".join(kept)
    text = re.sub(r"\b(Metal|Swift) \. ", "", text)
    text = re.sub(r" ([)\],:?!.])", r"\1", text)
    return re.sub(r"([(\[.]) ", r"\1", text).strip()


class Reader:
    """Reads declarations."""

    def __init__(self, text: str):
        self.tokens = TOKEN.findall(text)
        self.at = 0
        self.interface = Interface()
        while self.at < len(self.tokens):
            self.declarations("", is_protocol=True)
            self.at += 1

    def peek(self) -> str:
        """The next token, "" at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        """The next token, which is passed."""
        token = self.peek()
        if not token:
            raise InterfaceError("the text ends in the middle of a declaration")
        self.at += 1
        return token

    def balanced(self) -> list[str]:
        """A bracket with all up to the one that closes it."""
        taken = [self.take()]
        closing = CLOSING[taken[0]]
        while self.peek() != closing:
            if not self.peek():
                raise InterfaceError(f"a `{taken[0]}` is not closed")
            taken += self.balanced() if self.peek() in CLOSING else [self.take()]
        return [*taken, self.take()]

    def until(self, *ends: str) -> list[str]:
        """Everything before one of some tokens that stands in no bracket."""
        taken: list[str] = []
        while self.peek() and self.peek() not in ends and self.peek() != "}":
            taken += self.balanced() if self.peek() in ("(", "[") else [self.take()]
        return taken

    def declarations(self, container: str, *, is_protocol: bool) -> None:
        """All declarations up to a closing brace or the end."""
        is_own = False
        while self.peek() and self.peek() != "}":
            token = self.peek()
            if token.startswith(("//", "/*")):
                is_own = is_own or "Our own" in token
                self.take()
            elif token == "\n" or token.startswith("#") or token == ";":
                self.take()
            elif token.startswith("@"):
                self.take()
                if self.peek() == "(":
                    self.balanced()
            elif token == "import":
                self.until("\n")
            else:
                self.declaration(container, is_kept=not is_own, is_protocol=is_protocol)
                is_own = False

    def declaration(self, container: str, *, is_kept: bool, is_protocol: bool) -> None:
        """One declaration; attributes were passed."""
        modifiers: set[str] = set()
        while self.peek() in MODIFIERS and not (
            self.peek() == "class" and self.tokens[self.at + 1] not in ("func", "var", "let", "subscript")
        ):
            modifiers.add(self.take())
            if self.peek() == "(":
                self.balanced()
            while self.peek().startswith("@") or self.peek() == "\n":
                self.take()
        keyword = self.take()
        is_visible = is_kept and (is_protocol or bool(modifiers & {"public", "open"}))
        if keyword in CONTAINERS:
            self.container(keyword, is_kept)
        elif keyword == "typealias":
            name = self.take()
            self.until("=")
            self.take()
            if is_kept:
                self.interface.aliases[name] = canonical(self.until("\n"))
            self.until("\n")
        elif keyword == "case":
            for part in canonical(self.until("\n")).split(", "):
                name, _, value = part.partition(" = ")
                self.keep(container, f"case {name}", Member(f"case {name}", value=value), is_kept)
        elif keyword in ("var", "let"):
            self.property(container, keyword, modifiers, is_visible)
        elif keyword in ("func", "init", "subscript"):
            self.function(container, keyword, modifiers, is_visible)
        else:
            raise InterfaceError(f"`{keyword}` begins no declaration that is known here (in {container or 'the module'})")

    def container(self, keyword: str, is_kept: bool) -> None:
        """A type or an extension of one."""
        name = canonical(self.until(":", "{", "where"))
        inherited = canonical(self.until("{")).removeprefix(":").strip()
        self.take()
        if is_kept:
            found = self.interface.types.setdefault(name, Type())
            found.inherited |= {part.strip() for part in inherited.split(" where ")[0].split(",") if part.strip()}
        self.declarations(name if is_kept else "Our own", is_protocol=keyword == "protocol")
        self.take()

    def property(self, container: str, keyword: str, modifiers: set[str], is_visible: bool) -> None:
        """A property, after its keyword."""
        name = self.take().strip("`")
        type_name = ""
        if self.peek() == ":":
            self.take()
            type_name = canonical(self.until("=", "{", "\n"))
        if self.peek() == "=":
            self.until("\n", "{")
        is_settable = keyword == "var"
        if self.peek() == "{":
            is_settable = "set" in self.balanced()
        kind = "static var" if modifiers & {"static", "class"} else "var"
        self.keep(container, f"{kind} {name}", Member(f"{kind} {name}: {type_name}", is_settable), is_visible)

    def function(self, container: str, keyword: str, modifiers: set[str], is_visible: bool) -> None:
        """A function or an initialiser, after its keyword."""
        name = keyword if keyword != "func" else self.take()
        while self.peek() != "(":
            name += self.take()  # init?, an operator, or generic parameters
        parameters = self.balanced()
        rest = self.until("{", "\n")
        if self.peek() == "{":
            self.balanced()
        parts = split_parameters(parameters[1:-1])
        labels = "".join(f"{part[0]}:" for part in parts)
        static = "static " if modifiers & {"static", "class"} else ""
        signature = f"{static}{name}({', '.join(map(canonical, parts))}) {canonical(rest)}".strip()
        self.keep(container, f"{static}{name}({labels})", Member(signature), is_visible)

    def keep(self, container: str, name: str, member: Member, is_visible: bool) -> None:
        """Note a member."""
        if is_visible:
            self.interface.types.setdefault(container, Type()).members.setdefault(name, []).append(member)


def split_parameters(tokens: list[str]) -> list[list[str]]:
    """The parameters of a function, without defaults and attributes of their own."""
    parts: list[list[str]] = [[]]
    depth, skips = 0, False
    for token in tokens:
        if token == "\n":
            continue
        depth += (token in CLOSING) - (token in CLOSING.values())
        if depth == 0 and token == ",":
            parts.append([])
            skips = False
        elif depth == 0 and token == "=":
            skips = True
        elif not skips:
            parts[-1].append(token)
    return [part for part in parts if part]


def read(text: str) -> Interface:
    """Read the declarations of a module.

    Raises
    ------
    InterfaceError
        If there is something that is not known here.
    """
    return Reader(text).interface


def expand(signature: str, aliases: dict[str, str]) -> str:
    """A signature to be compared: without spaces, and without names that only stand for others."""
    for name, value in aliases.items():
        signature = re.sub(rf"\b{name}\b", value, signature)
    return signature.replace(" ", "")


def compare(ours: Interface, theirs: Interface) -> list[str]:
    """Say what of ours the framework does not have as it is."""
    lines = []
    aliases = {**theirs.aliases, **ours.aliases}
    for name, declared in ours.types.items():
        if name not in theirs.types:
            lines.append(f"{name}: the framework has no such type")
            continue
        framework = theirs.types[name]
        for parent in sorted(declared.inherited - framework.inherited - {"AnyObject", "Sendable"}):
            lines.append(f"{name}: ours is a {parent}, the framework's is not")
        for key, members in declared.members.items():
            place = f"{name}.{key}" if name else key
            found = framework.members.get(key, [])
            for member in members:
                lines += differences(place, member, found, aliases)
    return lines


def differences(place: str, ours: Member, found: list[Member], aliases: dict[str, str]) -> list[str]:
    """Say how a member differs from those of its name."""
    if not found:
        return [f"{place}: the framework has nothing of this name"]
    wanted = expand(ours.signature, aliases)
    same = [member for member in found if expand(member.signature, aliases) == wanted]
    if not same:
        return [f"{place}: ours is `{ours.signature}`, the framework's `{member.signature}`" for member in found]
    if ours.is_settable and not any(member.is_settable for member in same):
        return [f"{place}: ours can be set, the framework's cannot"]
    if ours.value and any(member.value and member.value != ours.value for member in same):
        return [f"{place}: ours is {ours.value}, the framework's {same[0].value}"]
    return []


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description="Compare the Swift module Metal of core/SoftMetal with Apple's.")
    parser.add_argument("interface", type=Path, help="the framework as swift-synthesize-interface prints it, or a .swiftinterface")
    parser.add_argument("--source", type=Path, default=SOURCE, help="our declarations")
    arguments = parser.parse_args()
    try:
        ours, theirs = (read(path.read_text(encoding="utf-8")) for path in (arguments.source, arguments.interface))
    except (OSError, InterfaceError) as error:
        sys.exit(f"check_metal_interface: {error}")
    if lines := compare(ours, theirs):
        sys.exit("\n".join(["check_metal_interface: the module Metal is not as the framework is", *lines]))
    count = sum(len(members) for declared in ours.types.values() for members in declared.members.values())
    print(f"{count} declarations of {len(ours.types) - 1} types are as the framework has them")


if __name__ == "__main__":
    main()
