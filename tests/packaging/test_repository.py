"""The rules of `repository.py` hold, and each of them can fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.packaging.repository import MOST_BYTES, MOST_LINES, ROOT, problems, tracked


def test_the_repository_keeps_its_rules() -> None:
    files = tracked(ROOT)
    assert Path("pyproject.toml") in files
    assert problems(ROOT, files) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("long.py", "x = 1\n" * (MOST_LINES + 1), f"{MOST_LINES + 1} lines"),
        ("large.bin", "x" * (MOST_BYTES + 1), "1.5 MB"),
        ("notes.md", "see /" + "home/somebody/data", "notes.md:1: a path of one machine"),
        ("script.py", 'open("/' + 'tmp/file")', "a path of one machine"),
        ("kernels/__init__.py", "", "must not be there"),
    ],
)
def test_a_broken_rule_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert [words in line for line in problems(tmp_path, [Path(name)])] == [True]


def test_links_and_ratios_are_not_paths(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("https://example.org/" + "data/x and a/" + "tmp/b and ../" + "data/x\n")
    assert problems(tmp_path, [Path("notes.md")]) == []


def test_every_module_of_a_package_has_a_docstring() -> None:
    bare = [
        str(name)
        for name in tracked(ROOT)
        if name.parts[0] in ("fastflow", "kernels", "bench", "examples")
        and name.suffix == ".py"
        and not re.match(r"(#.*\n)*\s*r?\"\"\"", (ROOT / name).read_text(encoding="utf-8"))
    ]
    assert bare == []


def test_no_conftest_skips_while_it_is_imported() -> None:
    """pytest ends with a traceback there where its folder is named on the command line; a fixture skips."""
    skipping = re.compile(r"^(?:\w+ = )?pytest\.(?:importorskip|skip)\(|allow_module_level", re.M)
    found = [str(path) for path in ROOT.glob("tests/**/conftest.py") if skipping.search(path.read_text("utf-8"))]
    assert found == []
