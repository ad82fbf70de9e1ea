"""Kernels in C, called directly: on this processor where it can, else under emulation. See tools/check_kernels.py."""

from __future__ import annotations

import pytest

import check_kernels


@pytest.fixture(scope="module")
def outcomes():
    """What became of each part, by its name."""
    parts = check_kernels.PARTS
    return dict(zip(parts, check_kernels.check_all(parts, check_kernels.parse([]))))


@pytest.mark.timeout(1200)  # the fixture compiles all kernels for each part, and an emulator is slow on a busy machine
@pytest.mark.parametrize("part", check_kernels.PARTS)
def test_kernels__are_as_close_to_the_reference_as_they_must_be(part, outcomes, record_property):
    outcome = outcomes[part]
    if outcome.state == "left out":
        pytest.skip(f"kernels, {part}: {outcome.words}")
    record_property("kernels", f"{part}: {outcome.words}")
    assert outcome.state == "passed", outcome.output


def test_bare_image__has_header_segments_and_a_stack():
    """The image of a program with one segment: its bytes are where they belong, and the stack begins with the arguments."""
    entry, address = 0x200010, 0x200000
    header = b"\x7fELF".ljust(24, b"\0") + check_kernels.struct.pack("<QQ", entry, 64)
    header = header.ljust(54, b"\0") + check_kernels.struct.pack("<HH", 56, 1)
    segment = check_kernels.struct.pack("<IIQQQQQQ", 1, 5, 0, address, address, 200, 300, 0x1000)
    program = (header.ljust(64, b"\0") + segment).ljust(200, b"\x55")
    image = check_kernels.bare_image(program, ["name", "word"])
    place = address - check_kernels.IMAGE_ADDRESS
    assert image[place : place + 200] == program
    start, stack, free = check_kernels.struct.unpack_from("<3Q", image)
    assert (start, free) == (entry, check_kernels.IMAGE_ADDRESS + len(image))
    count, first, second, end = check_kernels.struct.unpack_from("<4Q", image, stack - check_kernels.IMAGE_ADDRESS)
    assert (count, end) == (2, 0)
    assert image[first - check_kernels.IMAGE_ADDRESS :].startswith(b"name\0")
    assert image[second - check_kernels.IMAGE_ADDRESS :].startswith(b"word\0")


def test_parts__that_nobody_knows__are_refused(capsys):
    with pytest.raises(SystemExit):
        check_kernels.parse(["sparc"])
    assert "no part is called sparc" in capsys.readouterr().err


def test_install__without_root__says_what_is_missing(monkeypatch):
    monkeypatch.setattr(check_kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(check_kernels.os, "geteuid", lambda: 1000)
    with pytest.raises(check_kernels.LeftOutError, match="needs root for apt-get"):
        check_kernels.install("bochs")
