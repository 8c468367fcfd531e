"""Broken recipes: whatever is done to a valid one, it is read, or its problems are told in short lines."""

from __future__ import annotations

import copy
import json
import random
import time

import pytest
import yaml

from graftwork.merge.errors import RecipeError
from graftwork.merge.recipe import RecipeFile, parse_recipe

TIES = """\
models:
  - model: Z
    # the base
  - model: A
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: C
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: Z
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLERP = """\
slices:
  - sources:
      - model: A
        layer_range: [0, 32]
      - model: Z
        layer_range: [0, 32]
merge_method: slerp
base_model: Z
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
out_dtype: "bfloat16"
exclude: ["*.bias"]
"""
STEPS = """\
name: first
merge_method: linear
models: [{model: A, parameters: &one {weight: 1e-1}}, {model: C, parameters: *one}]
---
name: second
merge_method: dare_ties
base_model: Z
models: [{model: A, parameters: {<<: *none, weight: 1}}, {model: first}]
parameters: {weight: 1, density: 0.5, rescale: density}
---
merge_method: passthrough
slices:
- sources: [{model: first, layer_range: [0, 4]}]
- sources: [{model: {model: {path: second}}, layer_range: [2, 6], parameters: {scale: 0.5}}]
""".replace("<<: *none, ", "")
RECIPES = {"ties": TIES, "slerp": SLERP, "steps": STEPS}

STRANGE = (
    None, True, -1, 0, 1.5, float("nan"), float("-inf"), 10**30, "", " ", "x", "1e5", "é", "A+C", "a@b@c", "../..", "~",
    "*", [], {}, [[]], [{}], {"value": 1}, {"a": {"b": {"c": []}}}, [1, "x", None], ["A"], {"": ""}, "x" * 5000,
)  # fmt: skip
LETTERS = "\t\n :-#&*!|>'\"%@`{}[],?~\\0aZ.\x00\x7f\x85\u2028\ufeff\ud800é\U0001f600"


def check(text: str) -> bool:
    """Return whether the text was read; anything but a reading or short single lines fails."""
    start = time.perf_counter()
    found, lines = None, ()
    try:
        found = parse_recipe(text)
    except RecipeError as error:
        lines = error.problems
    assert time.perf_counter() - start < 10
    if found is None:
        assert lines
        for line in lines:
            assert len(line) < 400
            assert len(line.splitlines()) == 1
            assert "Traceback" not in line
            assert "pydantic" not in line
        return False
    assert isinstance(found, RecipeFile)
    for recipe in found.recipes:
        assert json.loads(recipe.canonical())["merge_method"] == recipe.method
        assert all(len(line) < 400 and len(line.splitlines()) == 1 for line in recipe.warnings)
    return True


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ACZ":
        (tmp_path / name).mkdir()


def places(value, path=()):
    """Yield the path of every value below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def written(documents):
    return yaml.dump_all(documents, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), allow_unicode=True)


def parent_of(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_themselves_are_read(name):
    assert check(RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", range(20))
def test_letters_are_replaced_inserted_and_removed(name, seed):
    random_source = random.Random(f"{name} {seed}")
    for _ in range(5):
        letters = list(RECIPES[name])
        for _ in range(random_source.randint(1, 4)):
            place = random_source.randrange(len(letters))
            letters[place : place + random_source.randint(0, 2)] = random_source.choices(
                LETTERS, k=random_source.randint(0, 2)
            )
        check("".join(letters))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("seed", range(10))
def test_lines_are_removed_repeated_swapped_and_indented(name, seed):
    random_source = random.Random(f"{name} {seed}")
    for _ in range(5):
        lines = RECIPES[name].splitlines()
        for _ in range(random_source.randint(1, 3)):
            first, second = random_source.randrange(len(lines)), random_source.randrange(len(lines))
            kind = random_source.choice(["remove", "repeat", "swap", "indent", "cut"])
            if kind == "remove" and len(lines) > 1:
                del lines[first]
            elif kind == "repeat":
                lines.insert(second, lines[first])
            elif kind == "swap":
                lines[first], lines[second] = lines[second], lines[first]
            elif kind == "indent":
                lines[first] = " " * random_source.randint(1, 4) + lines[first].lstrip()
            else:
                lines[first] = lines[first][: random_source.randint(0, len(lines[first]))]
        check("\n".join(lines))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("strange", range(len(STRANGE)))
def test_a_strange_value_in_many_places(name, strange):
    documents = list(yaml.safe_load_all(RECIPES[name]))
    random_source = random.Random(f"{name} {strange}")
    for number, document in enumerate(documents):
        everywhere = list(places(document))
        for path in random_source.sample(everywhere, k=len(everywhere) // 3):
            changed = copy.deepcopy(documents)
            parent_of(changed[number], path)[path[-1]] = STRANGE[strange]
            check(written(changed))


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_misspelt_moved_and_removed(name):
    documents = list(yaml.safe_load_all(RECIPES[name]))
    for number, document in enumerate(documents):
        for path in places(document):
            if not isinstance(path[-1], str):
                continue
            for kind in ("misspell", "rename", "remove", "to the root"):
                changed = copy.deepcopy(documents)
                parent = parent_of(changed[number], path)
                value = parent.pop(path[-1])
                if kind == "misspell":
                    parent[path[-1][1::-1] + path[-1][2:]] = value
                elif kind == "rename":
                    parent["x" * 300] = value
                elif kind == "to the root":
                    changed[number][path[-1]] = value
                check(written(changed))


@pytest.mark.parametrize("name", RECIPES)
def test_a_cut_file_is_read_or_told(name):
    text = RECIPES[name]
    for end in range(0, len(text), 11):
        check(text[:end])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 300_000,
        "{a: " * 300_000,
        "- " * 300_000,
        "? " * 300_000,
        "a: " + "&a " * 10_000,
        "&a " + "[*a, " * 1000,
        "a: [" + "x, " * 1_000_000,
        "---\n{}\n" * 5_000,
        "---\nname: x\n" * 900,
        "\n".join(f"---\nname: s{n}\nmerge_method: linear\nmodels: [{{model: s{n + 1}}}]" for n in range(900)),
        "models:\n" + "- {model: A, wieght: 1, foo: 2}\n" * 20_000,
        "merge_method: linear\nmodels:\n" + "- {model: A, parameters: {weight: x}}\n" * 20_000,
        "merge_method: passthrough\nslices:\n" + "- sources: [{model: none/x/y, layer_range: [0, 1]}]\n" * 10_000,
        "".join(f"key{n}: 1\n" for n in range(50_000)),
        "merge_method: " + "a" * 4_000_000,
        "'" * 4_000_000,
        "a: |\n" + " x\n" * 1_000_000,
        "%" * 100_000,
        "\t" * 1_000_000,
        "#" * 4_000_000,
        "```\n" * 500_000,
    ],
)  # fmt: skip
def test_large_and_deep_texts_are_told_in_bounded_time(text):
    assert not check(text)
