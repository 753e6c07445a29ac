"""Each message that docs/troubleshooting.md quotes is made to happen by a test."""

import ast
from pathlib import Path

import pytest

from tests.guide import quoted, symptoms

TESTS = Path(__file__).parent.parent


def made_to_happen() -> set[str]:
    """What tests hand to `quoted`."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "quoted(" in text else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "quoted":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: give the words themselves"
                found.add(argument.value)
    return found


def test_every_quoted_symptom_is_made_to_happen() -> None:
    made = made_to_happen()
    assert len(made) > 20
    assert [symptom for symptom in symptoms() if symptom not in made] == []


def test_words_that_the_page_does_not_have_are_found_out() -> None:
    with pytest.raises(AssertionError, match="does not quote"):
        quoted("no such symptom")  # the page has none of it
