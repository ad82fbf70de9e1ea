"""Translate a source in the Metal shading language to C++ for the software Metal device.

    python tools/metal_translator.py SOURCE.metal OUTPUT.cpp

The source is preprocessed by clang, cut into tokens, and rewritten where C++ differs: attributes become tables, threadgroup variables and
function constants become variables of the executor, constructors of vectors become calls. Types are not parsed; the compiler knows them.

What the language forbids and a C++ compiler lets pass is an error here, with its place in the source: see `Translator.lint`. An attribute
that is not known is an error, never ignored.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LANGUAGE_VERSION = 310
MOST_BUFFERS = 31

TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<line>^\#[^\n]*)|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<string>"(?:\\.|[^"\\])*")|(?P<character>'(?:\\.|[^'\\])*')
    |(?P<number>\.?\d(?:[\w.]|(?<=[eEpP])[+-])*)|(?P<name>[A-Za-z_]\w*)
    |(?P<mark>\[\[|\]\]|::|->|<<=|>>=|\+=|-=|\*=|/=|\|=|&=|&&|\|\||==|!=|<=|>=|\+\+|--|.)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
LINE_MARKER = re.compile(r'# (\d+) "([^"]*)"')
VECTOR = re.compile(r"(char|uchar|short|ushort|int|uint|long|ulong|half|float)[234]")

ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
# What becomes of them where kernels are run, and where they are checked, as C++ for OpenCL.
ERASED = {"device": "", "constant": "const", "threadgroup": "", "thread": "", "kernel": ""}
CHECKED = {"device": "__global", "constant": "const __global", "threadgroup": "__local", "thread": "__private", "kernel": ""}
# Names that OpenCL takes for address spaces and the like.
OPENCL_WORDS = {"local", "global", "private", "generic", "pipe"}
CHECK_FLAGS = ["-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc", "--target=spir64-unknown-unknown", "-fsyntax-only"]
CHECK_FLAGS += ["-Xclang", "-cl-ext=+cl_khr_fp16,-__opencl_c_fp64,-cl_khr_fp64", "-Werror"]
CHECK_FLAGS += ["-Wno-undefined-inline", "-Wno-null-dereference"]
# Attributes of kernel parameters whose value the executor gives.
POSITIONS = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "threads_per_grid",
    "threadgroups_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "threads_per_simdgroup",
    "simdgroups_per_threadgroup",
}
POSITION_TYPES = {"uint", "ushort", "uint2", "uint3", "ushort2", "ushort3"}
ATTRIBUTES = POSITIONS | {"buffer", "threadgroup", "function_constant", "host_name", "kernel", "max_total_threads_per_threadgroup"}
# Words that the language, or the compiler that macOS runs for an application, does not accept, with the reason in the message.
FORBIDDEN = {
    "double": "there is no type double",
    "goto": "there is no goto",
    "virtual": "there are no virtual functions",
    "throw": "there are no exceptions",
    "try": "there are no exceptions",
    "catch": "there are no exceptions",
    "noexcept": "there are no exceptions",
    "new": "there is no dynamic memory",
    "delete": "there is no dynamic memory",
    "thread_local": "there is no thread_local",
    "dynamic_cast": "there is no run-time type information",
    "typeid": "there is no run-time type information",
    "register": "there is no register",
    "static": "variables of functions cannot be static",
    "std": "there is no C++ standard library",
    "asm": "the run-time compiler accepts no inline assembly",
    "__asm": "the run-time compiler accepts no inline assembly",
    "__asm__": "the run-time compiler accepts no inline assembly",
}
# Words after which a name is not a type.
NO_TYPES = {"return", "sizeof", "case", "else", "using", "typename", "template", "operator", "goto", "struct", "decltype"}


class MissingCompilerError(Exception):
    """There is no clang++ here."""


class TranslationError(Exception):
    """What is wrong with a source, a line for each fault: ``file:line: error: ...``."""


@dataclass
class Token:
    """A piece of the source; `text` is what becomes of it."""

    kind: str
    text: str
    file: str = ""
    line: int = 0
    original: str = ""


@dataclass
class Attribute:
    """A name and its argument in ``[[...]]``."""

    name: str
    argument: str | None


@dataclass
class Kernel:
    """A kernel function: its parameters' names with their attributes, and the most threads a threadgroup of it may have."""

    parameters: list[tuple[str, list[Attribute]]]
    most_threads: str


@dataclass
class Constant:
    """A function constant."""

    name: str
    type_name: str
    index: str


def compiler() -> str:
    """The path of clang++: one on PATH, or that of the Swift toolchain.

    Raises
    ------
    MissingCompilerError
        If there is none.
    """
    swift = shutil.which("swift")
    for candidate in ("clang++", *([str(Path(swift).resolve().parent / "clang++")] if swift else [])):
        if found := shutil.which(candidate):
            return found
    raise MissingCompilerError("the software Metal device needs clang++, which is part of Swift's toolchain, on PATH")


def flatten(source: Path) -> str:
    """The text of a source with its own ``#include "..."`` replaced by what they name: the run-time compiler has no include path."""
    lines = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r'\s*#include "([^"]+)"\s*', line)
        if match:
            included = source.parent / match[1]
            lines += [f'#line 1 "{included.name}"', flatten(included).rstrip("\n"), f'#line {number + 1} "{source.name}"']
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def source_hash(text: str) -> int:
    """The 64-bit FNV-1a hash by which the software device finds the kernels of a text."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def preprocess(text: str, name: str) -> str:
    """Expand macros and conditions; the language's own headers stay out."""
    stand_in = Path(__file__).resolve().parent.parent / "core" / "SoftMetal" / "Headers" / "Empty"
    command = [
        compiler(),
        "-E",
        "-x",
        "c++",
        "-undef",
        "-nostdinc",
        "-nostdinc++",
        f"-D__METAL_VERSION__={LANGUAGE_VERSION}",
        "-D__METAL__=1",
    ]
    answer = subprocess.run([*command, "-I", str(stand_in), "-"], input=f'#line 1 "{name}"\n{text}', capture_output=True, text=True)
    if answer.returncode != 0:
        raise TranslationError(answer.stderr.strip())
    return answer.stdout


def tokenise(text: str, name: str) -> list[Token]:
    """Cut preprocessed text into tokens that know where they come from."""
    tokens = []
    line, file = 1, name
    for match in TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match.group()
        if kind == "line" and (marker := LINE_MARKER.match(piece)):
            line, file = int(marker[1]) - 1, marker[2]
        tokens.append(Token(kind, piece, file, line, piece))
        line += piece.count("\n")
    return tokens


@dataclass
class Translator:
    """The translation of one source. `is_check`: to C++ for OpenCL, which keeps address spaces, and is compiled only."""

    text: str
    name: str
    is_check: bool = False
    tokens: list[Token] = field(default_factory=list)
    code: list[int] = field(default_factory=list)  # indices of the tokens that are neither space nor comment
    attributes: dict[int, tuple[int, list[Attribute]]] = field(default_factory=dict)  # start in `code`: end, names
    in_attribute: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    derived: set[str] = field(default_factory=set)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    instances: list[tuple[str, str, str]] = field(default_factory=list)  # host name, kernel, the function with its template arguments

    def translate(self) -> str:
        """The C++ text.

        Raises
        ------
        TranslationError
            If the source is not legal, as far as that is checked here.
        """
        self.tokens = tokenise(preprocess(self.text, self.name), self.name)
        self.code = [index for index, token in enumerate(self.tokens) if token.kind not in ("space", "line", "comment")]
        self.read_attributes()
        self.lint()
        self.rewrite_constants()
        self.read_kernels()
        self.rewrite_threadgroup_variables()
        self.rewrite_words()
        if self.errors:
            raise TranslationError("\n".join(self.errors))
        for position in self.in_attribute:
            self.at(position).text = ""
        body = "".join(token.text for token in self.tokens)
        body = re.sub(r'^# (\d+) "([^"<]*)".*$', r'#line \1 "\2"', body, flags=re.MULTILINE)
        body = re.sub(r"^# .*$", "", body, flags=re.MULTILINE)
        body = re.sub(r"^#pragma METAL fp contract", "#pragma clang fp contract", body, flags=re.MULTILINE)
        includes = "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\n"
        if self.is_check:
            return includes + body
        return includes + body + '\n#line 1 "tables"\n#include "thunk.h"\n' + "\n".join(self.tables()) + "\n"

    # Reading

    def at(self, position: int) -> Token:
        """The token at a position in `code`; an empty one beyond its ends."""
        return self.tokens[self.code[position]] if 0 <= position < len(self.code) else Token("mark", "")

    def word(self, position: int) -> str:
        """The text of the source there."""
        return self.at(position).original

    def fail(self, position: int, message: str) -> None:
        """Note a fault."""
        token = self.at(position)
        self.errors.append(f"{token.file}:{token.line}: error: {message}")

    def closing(self, position: int, opening: str, closing: str) -> int:
        """The position of the bracket that closes the one at or after `position`."""
        depth = 0
        while position < len(self.code):
            if position not in self.in_attribute:
                depth += {opening: 1, closing: -1}.get(self.word(position), 0)
                if depth == 0 and self.word(position) == closing:
                    return position
            position += 1
        raise TranslationError(f"{self.name}: error: a {opening} has no {closing}")

    def find(self, position: int, *words: str) -> int:
        """The first position from there on, outside attributes, of one of `words`."""
        while position < len(self.code) and (position in self.in_attribute or self.word(position) not in words):
            position += 1
        return position

    def words(self, start: int, end: int) -> list[str]:
        """The words of a range, attributes left out."""
        return [self.word(position) for position in range(start, end) if position not in self.in_attribute]

    def attributes_in(self, start: int, end: int) -> list[Attribute]:
        """All attributes of a range."""
        return [attribute for position in range(start, end) if position in self.attributes for attribute in self.attributes[position][1]]

    def read_attributes(self) -> None:
        """Find ``[[name(argument), ...]]``. What looks like it in an index, ``a[b[i]]``, has one opening bracket."""
        position = 0
        while position < len(self.code):
            if self.word(position) != "[[":
                position += 1
                continue
            end = position
            while end < len(self.code) and self.word(end) != "]]":
                end += 1
            self.attributes[position] = (end, list(self.parse_attributes(position + 1, end)))
            self.in_attribute.update(range(position, end + 1))
            position = end + 1

    def parse_attributes(self, position: int, end: int) -> Iterator[Attribute]:
        """The attributes between the brackets."""
        while position < end:
            name, argument = self.word(position), None
            if name not in ATTRIBUTES:
                self.fail(position, f"the attribute [[{name}]] is not known to the software Metal device")
            position += 1
            if self.word(position) == "(":
                close = self.closing(position, "(", ")")
                argument = " ".join(self.word(index) for index in range(position + 1, close))
                position = close + 1
            if self.word(position) == ",":
                position += 1
            yield Attribute(name, argument)

    # Checks

    def lint(self) -> None:
        """Note what the language forbids."""
        for position in range(len(self.code)):
            if position in self.in_attribute:
                continue
            word, kind = self.word(position), self.at(position).kind
            if kind == "name" and word in FORBIDDEN and not (word == "static" and self.word(position + 1) in ("inline", "constexpr")):
                self.fail(position, FORBIDDEN[word])
            if word in ("threadgroup_barrier", "simdgroup_barrier") and "mem_none" in self.words(position, self.find(position, ";")):
                self.fail(position, f"{word} with mem_none orders no memory")
            if word in ("*", "&"):
                self.lint_pointer(position)

    def lint_pointer(self, star: int) -> None:
        """Note a pointer or reference that is declared without an address space."""
        if self.at(star + 1).kind != "name" or self.word(star + 2) not in (",", ")", "=", ";", "[") or self.at(star - 1).kind == "number":
            return
        position, spaces = star - 1, set()
        while self.word(position) == "const" or self.word(position) in ADDRESS_SPACES:
            spaces.add(self.word(position))
            position -= 1
        if self.word(position) == ">":
            depth = 0
            while position >= 0:
                depth += {">": 1, "<": -1}.get(self.word(position), 0)
                position -= 1
                if depth == 0:
                    break
        if self.at(position).kind != "name" or self.word(position) in NO_TYPES or self.word(position) == "auto":
            return
        position -= 1
        while self.word(position) == "::":
            position -= 2
        while self.word(position) in ADDRESS_SPACES | {"const", "volatile", "unsigned", "signed"}:
            spaces.add(self.word(position))
            position -= 1
        if spaces & ADDRESS_SPACES or position < 0 or self.word(position) not in (";", "{", "}", "(", ","):
            return
        if self.word(position) in ("(", ",") and not self.is_parameter(position):
            return
        what = "pointer" if self.word(star) == "*" else "reference"
        self.fail(star, f"the {what} '{self.word(star + 1)}' needs an address space: {', '.join(sorted(ADDRESS_SPACES))}")

    def is_parameter(self, position: int) -> bool:
        """Whether a bracket or comma belongs to the parameters of a function that is declared: a type and a name stand before them."""
        depth = 0
        while position >= 0 and not (self.word(position) == "(" and depth == 0):
            depth += {")": 1, "(": -1}.get(self.word(position), 0)
            position -= 1
        before = self.at(position - 2)
        is_type = before.kind == "name" and before.original not in NO_TYPES
        return self.at(position - 1).kind == "name" and (is_type or before.original in (">", "*", "&"))

    # Function constants

    def rewrite_constants(self) -> None:
        """Make variables of function constants, and functions of constants that depend on them: these are known at run time only."""
        depth = position = 0
        while position < len(self.code):
            word = self.word(position)
            if position not in self.in_attribute:
                depth += {"{": 1, "}": -1}.get(word, 0)
                if word == "constant" and depth == 0 and self.word(position - 1) in (";", "}", "", ">"):
                    position = self.rewrite_constant(position)
            position += 1
        names = {constant.name for constant in self.constants}
        for position in range(len(self.code)):
            token = self.at(position)
            if position in self.in_attribute or token.kind != "name":
                continue
            if token.original == "is_function_constant_defined" and self.word(position + 1) == "(":
                name = self.word(position + 2)
                if name not in names:
                    self.fail(position, f"'{name}' is no function constant")
                token.text = f"{name}_is_defined"
                for index in range(position + 1, position + 4):
                    self.at(index).text = ""
            elif token.original in self.derived and token.text == token.original and self.word(position - 1) != ".":
                token.text += "_value()"

    def rewrite_constant(self, start: int) -> int:
        """Rewrite one declaration in program scope, if it is a function constant or depends on one; give its end."""
        end = self.find(start, ";", "(", "{")
        found = [attribute for attribute in self.attributes_in(start, end) if attribute.name == "function_constant"]
        declared = self.words(start + 1, end)
        if found:
            name, type_name = declared[-1], " ".join(declared[:-1])
            self.constants.append(Constant(name, type_name, found[0].argument or ""))
            storage = "extern const __global" if self.is_check else "static thread_local"
            self.at(start).text = f"{storage} {type_name} {name}; {storage} bool {name}_is_defined;"
            for position in range(start + 1, end + 1):
                self.at(position).text = ""
            return end
        equals = self.find(start, "=", ";")
        end = self.find(start, ";")
        if self.word(equals) != "=":
            return end
        known = {constant.name for constant in self.constants} | self.derived
        if known & set(self.words(equals, end)):
            name = self.word(equals - 1)
            type_name = " ".join(word for word in self.words(start + 1, equals - 1) if word != "constexpr")
            self.at(start).text = f"static inline {type_name} {name}_value() {{ return "
            for position in range(start + 1, equals + 1):
                self.at(position).text = ""
            self.at(end).text = "; }"
            self.derived.add(name)
        return end

    # Kernels

    def read_kernels(self) -> None:
        """Read the parameters of kernels, and the host names of their instances."""
        position = 0
        while position < len(self.code):
            if self.word(position) == "template" and self.word(position + 1) == "[[":
                position = self.read_instance(position)
            elif (self.word(position) == "kernel" and position not in self.in_attribute) or any(
                attribute.name == "kernel" for attribute in self.attributes.get(position, (0, []))[1]
            ):
                position = self.read_kernel(position)
            position += 1

    def read_instance(self, start: int) -> int:
        """Read ``template [[host_name("x")]] [[kernel]] decltype(f<...>) f<...>;``."""
        end = self.find(start, ";")
        host = next((attribute.argument for attribute in self.attributes_in(start, end) if attribute.name == "host_name"), None)
        declared = self.find(start, "decltype")
        if host is None or declared >= end:
            self.fail(start, 'an instance of a kernel is written `template [[host_name("x")]] [[kernel]] decltype(f<...>) f<...>;`')
            return end
        close = self.closing(declared + 1, "(", ")")
        function = " ".join(self.words(declared + 2, close))
        self.instances.append((host.strip('"'), self.word(declared + 2), function))
        return end

    def read_kernel(self, start: int) -> int:
        """Read a kernel's head."""
        opening = self.find(start, "(")
        close = self.closing(opening, "(", ")")
        name = self.word(opening - 1)
        before = self.word(opening - 2)
        if before != "void":
            self.fail(opening - 1, f"the kernel '{name}' returns {before}, not void")
        if name in self.kernels:
            self.fail(opening - 1, f"the kernel '{name}' is declared twice")
        limits = (found.argument for found in self.attributes_in(start, opening) if found.name == "max_total_threads_per_threadgroup")
        kernel = self.kernels[name] = Kernel([], next(limits, None) or "0")
        for first, last in self.parameters(opening + 1, close):
            self.read_parameter(kernel, first, last)
        taken: dict[tuple[str, str | None], str] = {}
        for parameter, attributes in kernel.parameters:
            place = (attributes[0].name, attributes[0].argument)
            if place[0] in ("buffer", "threadgroup"):
                if place in taken:
                    self.fail(opening, f"'{parameter}' and '{taken[place]}' have the same index: {place[0]}({place[1]})")
                if not (place[1] or "").isdigit() or int(place[1] or "") >= MOST_BUFFERS:
                    self.fail(opening, f"'{parameter}': an index is 0 to {MOST_BUFFERS - 1} (got {place[1]})")
                taken[place] = parameter
        if self.word(start - 1) != ">":
            self.instances.append((name, name, name))
        return close

    def parameters(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of the parameters in between."""
        depth, first = 0, start
        for position in range(start, end):
            if position in self.in_attribute:
                continue
            depth += {"(": 1, "<": 1, ")": -1, ">": -1}.get(self.word(position), 0)
            if self.word(position) == "," and depth == 0:
                yield first, position
                first = position + 1
        if first < end:
            yield first, end

    def read_parameter(self, kernel: Kernel, first: int, last: int) -> None:
        """Read and check one parameter."""
        declared, attributes = self.words(first, last), self.attributes_in(first, last)
        name = declared[-1]
        if not attributes:
            self.fail(first, f"the kernel's parameter '{name}' has no attribute")
            return
        is_pointer = "*" in declared or "&" in declared
        place = attributes[0].name
        if place == "buffer" and not (is_pointer and {"device", "constant"} & set(declared)):
            self.fail(first, f"'{name}': [[buffer(n)]] is for pointers and references to device or constant")
        elif place == "threadgroup" and not (is_pointer and "threadgroup" in declared):
            self.fail(first, f"'{name}': [[threadgroup(n)]] is for pointers and references to threadgroup")
        elif place in POSITIONS and (is_pointer or declared[-2] not in POSITION_TYPES):
            self.fail(first, f"'{name}': [[{place}]] is uint or ushort, or a vector of them, not {declared[-2]}")
        kernel.parameters.append((name, attributes))

    # Other rewriting

    def rewrite_threadgroup_variables(self) -> None:
        """Give variables in threadgroup memory to the executor: left as they are, each thread would have its own."""
        for position in range(len(self.code)):
            if self.word(position) != "threadgroup" or position in self.in_attribute or self.word(position - 1) not in ("{", "}", ";"):
                continue
            end = self.find(position, ";")
            declared = self.words(position + 1, end)
            before_size = declared[: declared.index("[")] if "[" in declared else declared
            if "*" in before_size or "&" in before_size:
                continue
            if "=" in declared or len(list(self.parameters(position + 1, end))) > 1:
                self.fail(position, "a threadgroup variable is declared alone and without a value")
                continue
            bracket = min(self.find(position, "["), end)
            name = self.word(bracket - 1)
            self.at(bracket - 1).text = f"{name}_type"
            self.at(position).text = "typedef "
            if self.is_check:
                self.at(end).text = f"; __local {name}_type& {name} = *(__local {name}_type*)0;"
            else:
                self.at(end).text = f"; static char {name}_key; {name}_type& {name} = softmetal::variable<{name}_type>(&{name}_key);"

    def rewrite_words(self) -> None:
        """Rewrite what is a matter of single words."""
        for position in range(len(self.code)):
            token = self.at(position)
            if position in self.in_attribute or token.text != token.original:
                continue
            spaces = CHECKED if self.is_check else ERASED
            if token.text in spaces:
                token.text = spaces[token.text]
            elif self.is_check and token.text in OPENCL_WORDS:
                token.text += "_"
            elif token.text == "char" and self.word(position - 1) not in ("unsigned", "signed"):
                token.text = "signed char"  # as in the language; a plain one has no sign on arm64
            elif VECTOR.fullmatch(token.text) and self.word(position + 1) == "(":
                token.text = f"softmetal::make<{token.text}>"

    # Tables

    def tables(self) -> Iterator[str]:
        """The kernels of the source as the executor reads them."""
        for constant in self.constants:
            name, type_name = constant.name, constant.type_name
            yield (
                f"static void set_{name}(const void* value) {{ {name}_is_defined = value != nullptr; "
                f"{name} = value ? *static_cast<const {type_name}*>(value) : {type_name}(); }}"
            )
        slots = [f'{{"{c.name}", {c.index}, sizeof({c.type_name}), set_{c.name}}}' for c in self.constants]
        yield f"static const sm_constant_slot constant_slots[] = {{{', '.join([*slots, '{}'])}}};"
        rows = []
        for number, (host, base, function) in enumerate(self.instances):
            if base not in self.kernels:
                raise TranslationError(f"{self.name}: error: '{base}', an instance of which is called '{host}', is no kernel")
            kernel = self.kernels[base]
            arguments, parameters = self.arguments(kernel, f"signature_{number}")
            yield f"using signature_{number} = softmetal::signature<decltype(&{function})>;"
            yield f"static void entry_{number}(const sm_arguments* a, const sm_thread* t) {{ {function}({', '.join(arguments)}); }}"
            yield f"static const sm_parameter parameters_{number}[] = {{{', '.join([*parameters, '{}'])}}};"
            rows.append(
                f'{{"{host}", entry_{number}, parameters_{number}, {len(parameters)}, constant_slots, {len(slots)}, {kernel.most_threads}}}'
            )
        yield f"static const sm_kernel kernel_rows[] = {{{', '.join(rows)}}};"
        yield f"static const sm_library library_row = {{0x{source_hash(self.text):016x}u, kernel_rows, {len(rows)}}};"
        yield "__attribute__((constructor)) static void register_library() { sm_register(&library_row); }"

    def arguments(self, kernel: Kernel, signature: str) -> tuple[list[str], list[str]]:
        """The arguments of a call of the kernel, and the rows of its table of parameters."""
        arguments, parameters = [], []
        for number, (name, attributes) in enumerate(kernel.parameters):
            place, index = attributes[0].name, attributes[0].argument
            type_name = f"{signature}::parameter<{number}>"
            condition = next((attribute.argument for attribute in attributes[1:] if attribute.name == "function_constant"), None)
            if condition in self.derived:
                condition += "_value()"
            wanted = f"[]() -> bool {{ return {condition}; }}" if condition else "nullptr"
            if place in POSITIONS:
                arguments.append(f"softmetal::attribute<{type_name}>(t->{place})")
            elif place == "threadgroup":
                arguments.append(f"softmetal::binding<{type_name}>::from(a->threadgroup_memory[{index}])")
                parameters.append(f'{{"{name}", true, {index}, 0, {wanted}}}')
            else:
                arguments.append(f"softmetal::binding<{type_name}>::from(a->buffers[{index}].address)")
                parameters.append(f'{{"{name}", false, {index}, softmetal::binding<{type_name}>::least_size, {wanted}}}')
        return arguments, parameters


def check_address_spaces(text: str, name: str) -> None:
    """Compile a flattened source as C++ for OpenCL: an address space that does not match another is an error there.

    Raises
    ------
    TranslationError
        With the compiler's messages.
    """
    headers = Path(__file__).resolve().parent.parent / "core" / "SoftMetal" / "Headers" / "Checked"
    command = [compiler(), *CHECK_FLAGS, "-I", str(headers), "-"]
    answer = subprocess.run(command, input=Translator(text, name, is_check=True).translate(), capture_output=True, text=True)
    if answer.returncode != 0:
        raise TranslationError(answer.stderr.strip())


def translate(text: str, name: str) -> str:
    """Translate a flattened source; `name` is what its diagnostics are to call it."""
    return Translator(text, name).translate()


def main() -> None:
    """Translate the file that the command line names."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source = Path(sys.argv[1])
    try:
        Path(sys.argv[2]).write_text(translate(flatten(source), source.name), encoding="utf-8")
    except TranslationError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
