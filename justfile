# Recipes for people and for CI. ./justw RECIPE brings the tools; `just RECIPE` works too once .venv is there.

set positional-arguments
set shell := ["bash", "-euo", "pipefail", "-c"]

python := justfile_directory() / ".venv/bin/python"
export PATH := justfile_directory() / ".venv/bin:" + env("PATH")

# List the recipes
default:
    @just --justfile "{{ justfile() }}" --list --unsorted

# Build libmfa and install the Python package `umfa` in place
build:
    {{ python }} tools/build_library.py
    {{ python }} tools/install.py package
