"""Crates for rust/ from Debian's packages, for machines that reach a Debian mirror and not the registry of crates.

Debian packages crates as sources. Those that rust/ needs, named in rust/debian-crates.txt, are downloaded from the mirror that apt uses
here and unpacked below .build-rust, without root and without installing anything. Cargo is pointed at them by a home directory of its own,
so no file of the repository or of the user's is touched.

    python tools/debian_crates.py              download them, unless that is done; prints the home for CARGO_HOME
    python tools/debian_crates.py --check      fail unless the list names exactly the packages that cargo takes crates from
    python tools/debian_crates.py --update     write the list anew
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKSPACE = ROOT / "rust"
LIST = WORKSPACE / "debian-crates.txt"
SCRATCH = ROOT / ".build-rust" / "debian"
HOME = SCRATCH / "cargo-home"
REGISTRY = SCRATCH / "registry"
STAMP = SCRATCH / "stamp"
# The oldest release that has all crates in the versions that rust/Cargo.toml asks for.
RELEASE = "forky"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MOST_SECONDS = 300


class LeftOutError(Exception):
    """Why there are no crates here, in words for the person at the keyboard."""


def run(*command: str | Path, folder: Path | None = None, apt: Path | None = None) -> str:
    """What a command prints; LeftOutError if it fails."""
    words = [str(word) for word in command]
    variables = {**os.environ, "LC_ALL": "C", **({"APT_CONFIG": str(apt)} if apt else {})}
    try:
        answer = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder, env=variables, timeout=MOST_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise LeftOutError(f"`{words[0]}` did not end within {MOST_SECONDS} s") from None
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines() or ["it says nothing"]
        raise LeftOutError(f"`{' '.join(words[:2])}` failed: {lines[-1]}")
    return answer.stdout


# ---- Packages ----------------------------------------------------------------------------------------------------------------------------


def mirrors() -> list[str]:
    """The addresses that apt takes Debian packages from on this machine, whether or not it has fetched its lists yet."""
    listing = run("apt-get", "indextargets", "--no-release-info", "--format", "$(SITE)", "Created-By: Packages")
    return [uri for uri in dict.fromkeys(listing.split()) if re.search(r"/debian/?$", uri)]


def prepare_apt() -> Path:
    """A configuration of apt with folders of its own, whose index is that of `RELEASE`."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise LeftOutError(f"there is no `{program}`")
    if not KEYRING.exists():
        raise LeftOutError(f"Debian's keys are not at {KEYRING}")
    folder = SCRATCH / "apt"
    for name in ("etc/sources.list.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    settings = {
        "Dir::Etc": folder / "etc",
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "none",
        "Acquire::Retries": 0,
        "Acquire::http::Timeout": 20,
        # A mirror may be a snapshot, whose signature is as good as ever.
        "Acquire::Check-Valid-Until": "false",
        "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any",
    }
    configuration = folder / "apt.conf"
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    reason = "apt has no Debian mirror here"
    for mirror in mirrors():
        (folder / "etc" / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n")
        try:
            run("apt-get", "update", apt=configuration)
        except LeftOutError as error:
            reason = str(error)
        else:
            return configuration
    raise LeftOutError(reason)


def unpack(apt: Path, packages: Sequence[str], into: Path) -> dict[str, str]:
    """Download packages and move their crates into a folder; returns the package of each crate's folder."""
    archives = SCRATCH / "archives"
    shutil.rmtree(archives, ignore_errors=True)
    archives.mkdir(parents=True)
    run("apt-get", "download", *packages, folder=archives, apt=apt)
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    owners = {}
    for archive in sorted(archives.glob("*.deb")):
        contents = archives / "contents"
        run("dpkg-deb", "--extract", archive, contents)
        for crate in (contents / "usr/share/cargo/registry").glob("*"):
            if crate.is_symlink():
                continue
            # Debian patches some crates, and has no checksum of the registry's for those: cargo is asked to compare none.
            (crate / ".cargo-checksum.json").write_text(json.dumps({"files": {}}))
            shutil.move(crate, into / crate.name)
            owners[crate.name] = archive.name.partition("_")[0]
        shutil.rmtree(contents)
    shutil.rmtree(archives)
    return owners


def write_home(home: Path, registry: Path) -> None:
    """A home for cargo in which a folder stands in for the registry."""
    home.mkdir(parents=True, exist_ok=True)
    lines = ["[source.crates-io]", 'replace-with = "debian"', "[source.debian]", f'directory = "{registry}"', "[net]", "offline = true"]
    (home / "config.toml").write_text("\n".join(lines) + "\n")


def listed() -> list[str]:
    """The packages in the list."""
    return [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]


def fetch() -> Path:
    """Make sure that the crates are there; returns the home for cargo.

    Raises
    ------
    LeftOutError
        If they cannot be had here.
    """
    stamp = hashlib.sha256(f"{RELEASE} {ROOT} {listed()}".encode()).hexdigest()
    if not STAMP.exists() or STAMP.read_text() != stamp:
        print(f"debian_crates: taking {len(listed())} crates from Debian", file=sys.stderr)
        owners = unpack(prepare_apt(), listed(), REGISTRY)
        write_home(HOME, REGISTRY)
        (SCRATCH / "owners.json").write_text(json.dumps(owners))
        STAMP.write_text(stamp)
    return HOME


# ---- The list ----------------------------------------------------------------------------------------------------------------------------


def resolved(home: Path) -> set[str]:
    """The crates that cargo takes, by name and version, resolved anew in a copy of the workspace."""
    copy = SCRATCH / "workspace"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(WORKSPACE, copy, symlinks=True, ignore=shutil.ignore_patterns("Cargo.lock", "target"))
    command = ["cargo", "generate-lockfile", "--offline", "--manifest-path", str(copy / "Cargo.toml")]
    answer = subprocess.run(command, env={**os.environ, "CARGO_HOME": str(home)}, capture_output=True, text=True)
    if answer.returncode != 0:
        raise LeftOutError(f"cargo does not find all crates:\n{answer.stderr}")
    lock = (copy / "Cargo.lock").read_text()
    return {f"{name}-{version}" for name, version in re.findall(r'name = "(.+)"\nversion = "(.+)"\nsource = ', lock)}


def packages_of(crates: Iterable[str], owners: dict[str, str]) -> set[str]:
    """The packages that hold crates. A folder may have more after the version than cargo says."""
    return {owner for folder, owner in owners.items() if any(folder == crate or folder.startswith(f"{crate}-") for crate in crates)}


def check() -> None:
    """Exit with an error unless the list is what `update` would write."""
    home = fetch()
    used = packages_of(resolved(home), json.loads((SCRATCH / "owners.json").read_text()))
    if used != set(listed()):
        sys.exit(f"debian_crates: not needed: {sorted(set(listed()) - used)}; run tools/debian_crates.py --update")


def update() -> None:
    """Write the list: of all packages that those of the direct dependencies pull in, the few that cargo takes."""
    apt = prepare_apt()
    dependencies = (WORKSPACE / "Cargo.toml").read_text().partition("[workspace.dependencies]")[2].partition("\n[")[0]
    names = [name.replace("_", "-") for name in re.findall(r"^([\w-]+) = ", dependencies, flags=re.M)]
    plan = run("apt-get", "install", "--simulate", *(f"librust-{name}-dev" for name in names), apt=apt)
    closure = re.findall(r"^Inst (librust-\S+)", plan, flags=re.M)
    registry, home = SCRATCH / "all", SCRATCH / "all-home"
    owners = unpack(apt, closure, registry)
    write_home(home, registry)
    used = packages_of(resolved(home), owners)
    shutil.rmtree(registry)
    head = f"# Debian packages ({RELEASE}) of the crates that rust/ needs. Generated by tools/debian_crates.py --update."
    LIST.write_text("\n".join([head, *sorted(used)]) + "\n")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="Take the crates for rust/ from Debian's packages.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="fail unless the list names exactly what is needed")
    group.add_argument("--update", action="store_true", help="write the list anew")
    arguments = parser.parse_args()
    try:
        if arguments.update:
            update()
        elif arguments.check:
            check()
        else:
            print(fetch())
    except LeftOutError as error:
        sys.exit(f"debian_crates: {error}")


if __name__ == "__main__":
    main()
