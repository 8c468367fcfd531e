from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import graftwork
from graftwork.merge.errors import RecipeError
from graftwork.merge.methods import registry
from graftwork.merge.parameters import position, resolve, scopes
from graftwork.merge.recipe import Recipe, json_schema, load_recipe, parse_recipe


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A working directory with six models."""
    monkeypatch.chdir(tmp_path)
    for name in "ABCOTZ":
        (tmp_path / name).mkdir()
    return tmp_path


def one(text: str, **options) -> Recipe:
    (recipe,) = parse_recipe(textwrap.dedent(text), **options).recipes
    return recipe


def problems(text: str, **options) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(textwrap.dedent(text), **options)
    lines = list(caught.value.problems)
    assert lines
    assert all("\n" not in line and len(line) < 400 for line in lines)
    return lines


def setting(recipe: Recipe, name: str, *, group: int = 0, source: int | None = None, tensor: str, at: float) -> object:
    parameter = registry.get(recipe.method).parameters[name]
    chosen = recipe.slices[group]
    where = scopes(parameter, recipe, chosen, None if source is None else chosen.sources[source])
    return resolve(parameter, where, name=tensor, position=at)


LINEAR = "merge_method: linear\nmodels:\n- model: A\n- model: C\nparameters: {weight: 1}\n"


# What a recipe becomes.


def test_a_recipe_has_its_models_in_order():
    recipe = one(LINEAR)
    assert [source.model.text for source in recipe.slices[0].sources] == ["A", "C"]
    assert [str(model) for model in recipe.inputs] == ["A", "C"]
    assert recipe.donor.text == "A"
    assert recipe.base is None
    assert not recipe.sliced
    assert recipe.warnings == ()
    assert recipe.text == LINEAR


def test_an_unlisted_base_comes_last_and_is_the_donor():
    recipe = one("{merge_method: ties, base_model: Z, models: [{model: A}, {model: C}], parameters: {weight: 1}}")
    group = recipe.slices[0]
    assert [source.model.text for source in group.sources] == ["A", "C", "Z"]
    assert [source.model.text for source in group.models] == ["A", "C"]
    assert group.base == recipe.base == recipe.donor
    assert [str(model) for model in recipe.inputs] == ["A", "C", "Z"]


def test_a_listed_base_keeps_its_place():
    recipe = one("{merge_method: ties, base_model: Z, models: [{model: Z}, {model: A}], parameters: {weight: 1}}")
    assert [source.model.text for source in recipe.slices[0].sources] == ["Z", "A"]


def test_json_is_read_like_yaml():
    text = json.dumps(
        {"merge_method": "linear", "models": [{"model": "A", "parameters": {"weight": 1e-05}}]}, indent="\t"
    )
    assert one(text).slices[0].sources[0].parameters["weight"] == 1e-5


def test_equal_recipes_have_equal_canonical_forms():
    short = one("{merge_method: linear, models: [{model: A}], parameters: {weight: '1e-1'}}")
    long = one(
        """
        # another order, other forms, a parameter without effect
        parameters:
          int8_mask: true
          weight: 0.1
        models:
        - {model: A, parameters: }
        merge_method: linear
        """
    )
    assert short.canonical() == long.canonical()
    assert json.loads(short.canonical()) == {
        "merge_method": "linear",
        "models": [{"model": "A"}],
        "parameters": {"weight": 0.1},
    }


def test_the_canonical_form_tells_different_recipes_apart():
    other = LINEAR.replace("weight: 1", "weight: [1, 2]")
    assert one(LINEAR).canonical() != one(other).canonical()


@pytest.mark.parametrize(
    ("word", "code"),
    [("bfloat16", "BF16"), ("torch.float16", "F16"), ("fp32", "F32"), ("double", "F64"), ("half", "F16")],
)
def test_dtype_names(word, code):
    assert one(LINEAR + f"dtype: {word}\n").dtype == code


def test_out_dtype_wins_over_dtype():
    assert one(LINEAR + "dtype: float32\nout_dtype: bf16\n").dtype == "BF16"


@pytest.mark.parametrize(
    ("word", "said"),
    [("bfloat", 'did you mean "bfloat16"?'), ("int64", "int64 is no dtype for a merge"), ("5", "put it in quotes")],
)
def test_other_dtypes_are_refused(word, said):
    (line,) = problems(LINEAR + f"dtype: {word}\n")
    assert line.startswith("dtype: ")
    assert said in line


def test_excluded_tensors():
    assert one(LINEAR + 'exclude: ["*.bias", "lm_head*"]\n').exclude == ("*.bias", "lm_head*")
    assert one(LINEAR + "exclude: lm_head*\n").exclude == ("lm_head*",)
    assert problems(LINEAR + "exclude: [1]\n") == ["exclude: must be text or a list of text, not a list"]


# YAML.


def test_a_repeated_key_is_an_error_with_both_lines():
    (line,) = problems("merge_method: linear\nmodels:\n- model: A\n  parameters:\n    weight: 1\n    weight: 2\n")
    assert line == "models[0].parameters.weight: is written twice, in lines 5 and 6"


def test_a_flattened_recipe_is_told_by_its_repeated_keys():
    lines = problems("merge_method: linear\nmodels:\n- model: A\nparameters:\nweight: 1\nparameters:\nweight: 1\n")
    assert "parameters: is written twice, in lines 4 and 6" in lines


def test_an_indented_root_key_is_recognised():
    (line,) = problems("merge_method: linear\n dtype: bf16\n", source="recipe.yaml")
    assert line == "recipe.yaml, line 2, column 7: `dtype` is indented by 1, should be 0"


def test_an_indented_root_key_after_a_list_is_recognised():
    (line,) = problems("models:\n- model: A\n merge_method: linear\n")
    assert "`merge_method` is indented by 1, should be 0" in line


def test_a_backslash_in_double_quotes_is_explained():
    (line,) = problems('merge_method: linear\nmodels:\n- model: "C:\\models\\x"\n')
    assert line.startswith("recipe, line 3, column ")
    assert 'write the path with "/"' in line


def test_a_tab_is_named():
    (line,) = problems("merge_method: linear\nmodels:\n\t- model: A\n")
    assert "line 3" in line
    assert "a tab" in line


@pytest.mark.parametrize("front", ["---\nlicense: mit\nbase_model:\n- a/b\n---\n", ""])
def test_a_readme_is_recognised(front):
    text = f"{front}# Title\n\n```yaml\nmerge_method: linear\n```\n"
    (line,) = problems(text)
    first = text.splitlines().index("merge_method: linear") + 1
    assert line.startswith(f"recipe: this is a README; its YAML block starts at line {first}")


def test_a_comment_in_the_second_document_makes_no_readme():
    text = "---\nname: one\n" + LINEAR + "---\n# the second\nmerge_method: linear\nmodels: [{model: one}]\n"
    assert len(parse_recipe(text + "parameters: {weight: 1}\n").recipes) == 2


def test_anchors_aliases_and_merge_keys():
    recipe = one(
        """
        merge_method: ties
        base_model: Z
        models:
        - model: A
          parameters: &common {weight: 1, density: 0.5}
        - model: C
          parameters: {<<: *common, density: 0.25}
        """
    )
    assert recipe.slices[0].sources[1].parameters == {"weight": 1.0, "density": 0.25}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n# nothing\n",
        "---\n---\n",
        "null",
        "just words",
        "[1, 2]",
        "5",
        "a: b: c",
        "{",
        "[" * 5000,
        "- " * 5000,
        "a: *b",
        "a: &b [*b]",
        "a: !!python/object/apply:os.system ['true']",
        "? [a, b]\n: c",
        "!!set {a, b}",
        "merge_method: \0",
        "merge_method: \ud800",
        "merge_method: !!int abc",
        "merge_method: !!bool abc",
        "merge_method: 0x" + "f" * 8000,
        "merge_method: 0b_",
        "merge_method: .nan",
        "merge_method: {a: 1}\nmodels: 3\nslices: x\nbase_model: [1]\ndtype: {}\nname: [1]\nparameters: 5\nexclude: {}",
        "models: [1, null, [], {}, {model: null}, {model: 1.5}, {model: {}}, {model: {model: {path: 3}}}, {model: ''}]",
        "merge_method: linear\nslices: [1, {}, {sources: 5}, {sources: []}, {sources: [{model: A, layer_range: x}]}]",
        "merge_method: linear\nmodules: {a: 1, b: {}, c: {models: [], slices: []}}\ntokenizer: 5\nchat_template: []",
        "merge_method: linear\nmodels: [{model: " + "x" * 100_000 + "}, {model: " + "a/" * 50_000 + "b}]",
        "merge_method: " + "linear" * 10_000,
        "%YAML 9.9\n---\nmerge_method: linear",
        "2024-01-01",
        "=",
        "<<: 3",
        "\ufeff",
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told_in_single_lines(text):
    problems(text)


def test_a_bomb_of_aliases_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (line,) = problems("\n".join(lines))
    assert "expands to more than 100,000 values" in line


def test_a_huge_text_is_refused(tmp_path):
    (line,) = problems("# " + "x" * (5 * 2**20))
    assert "more than 4 MiB" in line
    (tmp_path / "huge.yaml").write_bytes(b"#" * (5 * 2**20))
    with pytest.raises(RecipeError, match="more than 4 MiB"):
        load_recipe(tmp_path / "huge.yaml")


def test_many_problems_are_cut_off():
    lines = problems("merge_method: linear\nmodels: [" + "{model: A, parameters: {weight: x}}, " * 500 + "]")
    assert len(lines) == 101
    assert lines[-1].startswith("recipe: and ")


# Files.


def test_a_file_is_read_byte_for_byte(tmp_path):
    (tmp_path / "r.yaml").write_bytes(LINEAR.replace("\n", "\r\n").encode())
    found = load_recipe(tmp_path / "r.yaml")
    assert found.text == LINEAR.replace("\n", "\r\n")
    assert found.path == tmp_path / "r.yaml"
    assert found.recipes[0].method == "linear"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("merge_method: linear\nname: ü".encode("latin-1"))
    for path, said in [
        (tmp_path / "none.yaml", "there is no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "latin.yaml", "line 2: is not UTF-8 text"),
        ("a\0b", "is no file name"),
        ("x" * 5000, "cannot be read"),
    ]:
        with pytest.raises(RecipeError, match=said) as caught:
            load_recipe(path)
        assert len(str(caught.value)) < 400


# Keys.


def test_every_problem_is_listed_with_its_suggestion():
    lines = problems(
        """
        merge_method: tie
        base_model: Z
        dtpye: float32
        paramters: {normalize: 1.0}
        models:
        - model: A
          parameters: {weight: null, densty: 0.5}
        """
    )
    assert lines == [
        'dtpye: is not a key here; did you mean "dtype"?',
        'paramters: is not a key here; did you mean "parameters"?',
        'merge_method: there is no method "tie"; did you mean "ties"?',
        "models[0].parameters.weight: must be a number, not nothing (null)",
        'models[0].parameters.densty: is not a parameter of "ties"; did you mean "density"?',
    ]


def test_a_misspelt_layer_range():
    lines = problems("{merge_method: passthrough, slices: [{sources: [{model: A, layer_rnage: [0, 2]}]}]}")
    assert lines == ['slices[0].sources[0].layer_rnage: is not a key here; did you mean "layer_range"?']


def test_numbers_and_booleans_in_their_many_forms():
    recipe = one("{merge_method: linear, models: [{model: A}], parameters: {weight: 1e-1, normalize: 'true'}}")
    assert recipe.parameters == {"weight": 0.1, "normalize": True}
    assert one(LINEAR.replace("weight: 1", "weight: 1, normalize: 1.0")).parameters["normalize"] is True


def test_an_unknown_key_is_a_warning():
    assert one(LINEAR + "foo: 1\n").warnings == ("foo: is not a known key and has no effect",)


def test_a_parameter_of_another_method_is_one_warning():
    text = LINEAR.replace("- model: A", "- {model: A, parameters: {density: 1}}").replace(
        "- model: C", "- {model: C, parameters: {density: 1}}"
    )
    assert one(text).warnings == (
        'models[0].parameters.density: "linear" has no such parameter, it has no effect (and in one more place)',
    )


def test_int8_mask_is_accepted():
    for method in ("linear", "ties"):
        text = LINEAR.replace("linear", method).replace("weight: 1", "weight: 1, int8_mask: true")
        recipe = one(text + "base_model: Z\n" * (method == "ties"))
        assert recipe.warnings == ("parameters.int8_mask: is accepted and has no effect",)


def test_misplaced_keys_are_told_where_they_belong():
    recipe = one(LINEAR.replace("weight: 1", "weight: 1, dtype: bf16").replace("model: A", "model: A\n  weight: 2"))
    assert recipe.dtype is None
    assert recipe.warnings == (
        "parameters.dtype: has no effect here; move it to the root of the recipe",
        "models[0].weight: has no effect here; move it to models[0].parameters",
    )


def test_a_value_that_is_missing_because_it_is_misplaced():
    lines = problems("{merge_method: linear, models: [{model: A, weight: 1}]}")
    assert lines == [
        'models[0].parameters.weight: is missing: "linear" needs it here or under the root\'s parameters; '
        "models[0].weight stands beside `parameters`, move it in"
    ]


def test_a_shared_value_in_a_model_is_not_read():
    text = "{merge_method: slerp, base_model: Z, models: [{model: Z}, {model: A, parameters: {t: 0.5}}]}"
    (line,) = problems(text)
    assert line.startswith('parameters.t: is missing: "slerp" needs it; it stands in models[1].parameters.t')


@pytest.mark.parametrize("key", ["experts", "gate_mode"])
def test_a_mixture_of_experts_is_declined(key):
    (line,) = problems(f"base_model: a/b\n{key}: hidden\ndtype: bfloat\n")
    assert line == f"{key}: this is a mergekit-moe recipe, which is not supported"


def test_other_programs_recipes_are_declined():
    assert "mergekit-evolve" in problems("genome: {models: []}")[0]
    assert "separated by `---`" in problems("stages: []")[0]


def test_exactly_one_of_models_slices_modules():
    both = LINEAR + "slices: [{sources: [{model: A, layer_range: [0, 2]}]}]\n"
    assert problems(both) == ["slices: stands beside models; a recipe has only one of models, slices and modules"]
    assert problems("merge_method: linear") == ["models: is missing; a recipe has models, slices or modules"]
    assert problems("{merge_method: linear, models: []}")[0] == "models: is empty"


@pytest.mark.parametrize(
    ("extra", "source"),
    [("tokenizer_source: union", "union"), ("tokenizer: {}", "union"), ("tokenizer: {source: base}", "base"),
     ("tokenizer_source: model:A", "A")],
)  # fmt: skip
def test_tokenizers_are_read(models, extra, source):
    [recipe] = parse_recipe(LINEAR + extra + "\n").recipes
    assert str(recipe.tokenizer.source) == source


def test_what_is_not_there_yet_is_checked_all_the_same():
    lines = problems(LINEAR + "tokenizer: {sorce: A, pad_to_multiple_of: x}\ntokenizer_source: base\n")
    assert any(line.startswith("tokenizer.sorce: ") for line in lines)
    assert any(line.startswith("tokenizer.pad_to_multiple_of: ") for line in lines)
    assert any("stands beside tokenizer" in line for line in lines)
    lines = problems("{merge_method: linear, modules: {default: {models: [{model: A, paramters: {}}]}}}")
    assert any(line.startswith("modules.default.models[0].paramters: ") for line in lines)


# References.


def test_two_texts_of_one_folder_are_one_model(models):
    (models / "link").symlink_to("A")
    recipe = one(
        f"{{merge_method: linear, models: [{{model: A}}, {{model: C}}], base_model: /{models}/link, "
        "parameters: {weight: 1}}"
    )
    assert recipe.base == recipe.slices[0].sources[0].model
    assert len(recipe.inputs) == 2
    lines = problems("{merge_method: linear, models: [{model: A}, {model: ./link}], parameters: {weight: 1}}")
    assert lines == ["models[1].model: is the same model as models[0]"]


def test_names_with_plus_and_at_work(models):
    (models / "a+b@c").mkdir()
    assert (
        one("{merge_method: linear, models: [{model: a+b@c}], parameters: {weight: 1}}").inputs[0].path
        == (models / "a+b@c").resolve()
    )


def reference_problem(text: str, **options) -> str:
    (line,) = problems(f"{{merge_method: linear, parameters: {{weight: 1}}, models: [{{model: {text}}}]}}", **options)
    assert line.startswith("models[0].model: ")
    return line.removeprefix("models[0].model: ")


def test_a_missing_folder_is_told_with_its_nearest_parent(models):
    assert reference_problem("./A/deep/er") == 'there is no "./A/deep/er"; the nearest folder that exists is "A"'
    assert "the nearest folder that exists is the working directory" in reference_problem("./none")
    assert f'exists is "{models}"' in reference_problem(f"{models}/none/x")


def test_a_folder_beside_the_recipe_is_found(models):
    (models / "recipes" / "mine").mkdir(parents=True)
    for text in ("mine", "./mine"):
        said = reference_problem(text, folder=models / "recipes")
        assert f'from which it is "{models}/recipes/' in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A+C+Z", "more than one `+`"),
        ("a@b@c", "more than one `@`"),
        ("A@main", '"A" is local; a revision is for repositories of the hub'),
        ("+A", "lacks the text before"),
        ("'A+'", "lacks the text"),
        ("'a@'", "lacks the text after `@`"),
        ("C:\\models\\x", "is a Windows path"),
        ("'C:/models/x'", "is a Windows path"),
        ("'no id!'", "is neither a folder or file nor the id of a repository"),
        ("123", 'put it in quotes: "123"'),
        ("[A]", "must be the text that names a model"),
        ("{model: {path: A, revision: x}}", "is local; a revision"),
        ("{path: A}", "must be a text, or a mapping"),
    ],
)
def test_references_that_cannot_be_used(text, said):
    line = (
        reference_problem(text)
        if text != "{path: A}"
        else problems("{merge_method: linear, parameters: {weight: 1}, models: [{model: {path: A}}]}")[0]
    )
    assert said in line


@pytest.mark.parametrize(
    ("text", "hub", "revision", "adapter"),
    [
        ("org/name", "org/name", None, None),
        ("gpt2@main", "gpt2", "main", None),
        ("org/name@v1+x/lora@abc", "org/name", "v1", "x/lora"),
        ("{model: {path: org/name, revision: v1}, lora: x/lora}", "org/name", "v1", "x/lora"),
    ],
)
def test_references_to_the_hub_are_read_without_looking_for_them(text, hub, revision, adapter):
    recipe = one(f"{{merge_method: linear, parameters: {{weight: 1}}, models: [{{model: {text}}}, {{model: A}}]}}")
    reference = recipe.inputs[0]
    assert (reference.path, reference.hub, reference.revision) == (None, hub, revision)
    assert (reference.adapter and reference.adapter.hub) == adapter


def test_a_reference_may_be_written_out():
    recipe = one(
        "{merge_method: linear, parameters: {weight: 1}, "
        "models: [{model: {model: {path: A}, override_architecture: X}}]}"
    )
    assert recipe.inputs[0].text == "A"
    assert recipe.warnings == ("models[0].model.override_architecture: has no effect",)


def test_a_wrong_reference_is_told_once():
    text = "{merge_method: passthrough, slices: ["
    text += ", ".join(f"{{sources: [{{model: ./none, layer_range: [{n}, {n + 1}]}}]}}" for n in range(40)) + "]}"
    (line,) = problems(text)
    assert line.startswith("slices[0].sources[0].model: ")
    assert line.endswith("(and in 39 more places)")


def test_an_adapter_alone_is_no_model(models):
    (models / "A" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (models / "A" / "adapter_model.safetensors").write_bytes(b"")
    assert 'holds only a LoRA adapter over "org/base"' in reference_problem("A")
    (models / "A" / "model.safetensors").write_bytes(b"")
    one("{merge_method: linear, parameters: {weight: 1}, models: [{model: A}]}")


# Parameters of whole recipes.


def test_a_gradient_over_all_layers():
    recipe = one(
        "{merge_method: task_arithmetic, base_model: Z, models: [{model: O}], parameters: {weight: [.25, .5, 1]}}"
    )
    found = [setting(recipe, "weight", source=0, tensor=f"model.layers.{n}.w", at=position(n, 6)) for n in range(6)]
    assert found == pytest.approx([0.25, 0.35, 0.45, 0.6, 0.8, 1.0], abs=1e-12)
    assert setting(recipe, "weight", source=0, tensor="lm_head.weight", at=0.0) == 0.25


def test_slices_have_their_own_gradients_filters_and_shared_values():
    recipe = one(
        """
        merge_method: task_arithmetic
        base_model: Z
        slices:
        - sources:
          - {model: Z, layer_range: [0, 3]}
          - {model: O, layer_range: [0, 3], parameters: {weight: [.25, .75]}}
        - sources:
          - {model: Z, layer_range: [2, 6]}
          - model: O
            layer_range: [2, 6]
            parameters:
              weight: [{filter: layers.2., value: .1}, {filter: layers.4., value: .4}, {value: [.5, .9]}]
          parameters:
            lambda: [{filter: layers.4., value: 2}, {value: 1}]
        """
    )
    found = []
    for place, (first, last) in enumerate([(0, 3), (2, 6)]):
        for offset in range(last - first):
            at = position(offset, last - first)
            weight = setting(recipe, "weight", group=place, source=1, tensor=f"model.layers.{first + offset}.w", at=at)
            scale = setting(recipe, "lambda", group=place, tensor=f"model.layers.{len(found)}.w", at=at)
            found.append(weight * scale)
    assert found == pytest.approx([0.25, 0.5, 0.75, 0.1, 2 * (0.5 + 0.4 / 3), 0.4, 0.9], abs=1e-12)
    assert setting(recipe, "weight", group=0, source=1, tensor="model.embed_tokens.weight", at=0.0) == 0.25
    assert setting(recipe, "weight", group=1, source=1, tensor="model.norm.weight", at=0.0) == 0.5


def test_a_filter_that_matches_nothing_leaves_the_question_to_the_root():
    recipe = one(
        """
        merge_method: linear
        models: [{model: A, parameters: {weight: [{filter: mlp, value: .5}]}}]
        parameters: {weight: 0.125}
        """
    )
    assert setting(recipe, "weight", source=0, tensor="h.0.mlp.w", at=0.0) == 0.5
    assert setting(recipe, "weight", source=0, tensor="h.0.attn.w", at=0.0) == 0.125


def test_a_filter_that_ends_in_a_layer_number_is_a_warning():
    recipe = one(
        LINEAR.replace("weight: 1", "weight: [{filter: layers.1, value: 1}, {filter: fc1, value: 2}, {value: 3}]")
    )
    assert recipe.warnings == ('parameters.weight: the filter "layers.1" also matches "layers.10"; end it with a dot',)


def test_a_value_out_of_range_is_told_by_its_place():
    text = "{merge_method: ties, base_model: Z, models: [{model: A}], parameters: {weight: 1, density: [0.5, 1.5]}}"
    assert problems(text) == ["parameters.density[1]: must be from 0 to 1, not 1.5"]


# Base and counts.


def test_linear_merges_an_unlisted_base_and_warns():
    recipe = one("{merge_method: linear, base_model: Z, models: [{model: O}], parameters: {weight: 1}}")
    assert [source.model.text for source in recipe.slices[0].sources] == ["O", "Z"]
    assert recipe.slices[0].base is None
    (warning,) = recipe.warnings
    assert warning.startswith('base_model: "linear" has no base: "Z" is merged as one more model')


def test_linear_needs_a_weight_for_an_unlisted_base():
    (line,) = problems("{merge_method: linear, base_model: Z, models: [{model: O, parameters: {weight: 1}}]}")
    assert line.startswith('base_model: "Z" is merged as one more model and has no `weight`')


def test_passthrough_of_a_model_and_a_base_is_too_much():
    (line,) = problems("{merge_method: passthrough, base_model: Z, models: [{model: A}]}")
    assert line == ('models: "passthrough" takes exactly 1 model, here are 2, the base_model among them; leave it out')


def test_slerp_of_one_listed_model_and_its_base():
    recipe = one("{merge_method: slerp, base_model: Z, models: [{model: A}], parameters: {t: 0.5}}")
    assert len(recipe.slices[0].models) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{merge_method: ties, models: [{model: A}], parameters: {weight: 1}}",
         'base_model: is missing: "ties" needs a base model'),
        ("{merge_method: slerp, base_model: Z, models: [{model: A}, {model: C}], parameters: {t: 0.5}}",
         'models: "slerp" takes exactly 1 model besides the base, here are 2'),
        ("{merge_method: model_stock, base_model: Z, models: [{model: A}]}",
         'models: "model_stock" takes at least 2 models besides the base, here is 1'),
        ("{merge_method: nuslerp, models: [{model: A}], parameters: {weight: 1}}",
         'models: "nuslerp" takes exactly 2 models, here is 1'),
        ("{merge_method: slerp, base_model: A, models: [{model: A}, {model: A}], parameters: {t: 0.5}}",
         "models[1].model: is the same model as models[0]"),
    ],
)  # fmt: skip
def test_the_number_of_models_is_checked(text, said):
    assert said in problems(text)


def test_a_slice_without_the_base_is_an_error_that_proposes_a_source():
    (line,) = problems(
        """
        merge_method: slerp
        base_model: Z
        slices:
        - sources: [{model: A, layer_range: [0, 4]}, {model: C, layer_range: [0, 4]}]
        - sources: [{model: A, layer_range: [4, 6]}, {model: C, layer_range: [4, 6]}]
        parameters: {t: 0.5}
        """
    )
    assert line == (
        'slices[0]: "slerp" needs the base model "Z" among the sources of each slice; add it, or make "A" or "C" '
        "the base_model (and in one more place)"
    )


def test_a_slice_may_have_its_own_base():
    recipe = one(
        """
        merge_method: task_arithmetic
        base_model: Z
        slices:
        - base_model: O
          residual_weight: 0.5
          sources:
          - {model: Z, layer_range: [0, 6], parameters: {weight: .25}}
          - {model: O, layer_range: [0, 6]}
        """
    )
    assert recipe.slices[0].base.text == "O"
    assert [source.model.text for source in recipe.slices[0].models] == ["Z"]
    assert recipe.donor.text == "Z"
    assert recipe.warnings == ("slices[0].residual_weight: has no effect; mergekit has never used this",)


def test_for_slices_without_a_base_the_base_is_only_the_donor():
    recipe = one("{merge_method: passthrough, base_model: Z, slices: [{sources: [{model: A, layer_range: [0, 2]}]}]}")
    assert len(recipe.slices[0].sources) == 1
    assert recipe.donor.text == "Z"
    assert [model.text for model in recipe.inputs] == ["A", "Z"]
    assert recipe.warnings == ()


def test_a_weight_of_the_base_is_not_used():
    recipe = one(
        "{merge_method: ties, base_model: Z, models: [{model: Z, parameters: {weight: 1, density: 1}}, "
        "{model: A, parameters: {weight: 1}}]}"
    )
    assert recipe.warnings == ("models[0].parameters: the base model has no use for `weight` and `density`",)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("[4, 2]", "layer_range: holds no layer: 4 is not before 2"),
        ("[-2, 0]", "layer_range: must be between 0 and the number of layers, not [-2, 0]"),
        ("[0]", "layer_range: must be two whole numbers"),
        ("[0, 1.5]", "layer_range: must be two whole numbers"),
        ("[true, 2]", "layer_range: must be two whole numbers"),
        ("5", "layer_range: must be a list"),
        ("null", "layer_range: is missing"),
    ],
)
def test_layer_ranges_are_checked(layers, said):
    (line,) = problems(f"{{merge_method: passthrough, slices: [{{sources: [{{model: A, layer_range: {layers}}}]}}]}}")
    assert said in line


def test_sources_of_a_slice_have_equally_many_layers():
    (line,) = problems(
        "{merge_method: linear, parameters: {weight: 1}, slices: [{sources: [{model: A, layer_range: [0, 3]}, "
        "{model: C, layer_range: [0, 4]}]}]}"
    )
    assert line == "slices[0]: its sources have 3 and 4 layers; they must have equally many"


# Several documents.

STEPS = """\
name: first
merge_method: linear
models: [{model: A}, {model: second}]
parameters: {weight: 1}
---
merge_method: slerp
base_model: first
models: [{model: second}]
parameters: {t: 0.5}
---
name: second
merge_method: linear
dtype: float16
models: [{model: C}, {model: B}]
parameters: {weight: 1}
"""


def test_documents_run_after_what_they_need():
    found = parse_recipe(STEPS)
    assert [recipe.name for recipe in found.recipes] == ["second", "first", None]
    final = found.recipes[-1]
    assert final.base.step == "first"
    assert final.base.path is None
    assert final.slices[0].models[0].model.step == "second"
    assert all(recipe.text == STEPS for recipe in found.recipes)


def test_intermediate_results_are_float32_unless_said_otherwise():
    assert [recipe.dtype for recipe in parse_recipe(STEPS).recipes] == ["F16", "F32", None]


def test_a_name_is_only_a_model_never_another_word():
    text = STEPS.replace("second", "linear")
    assert [recipe.method for recipe in parse_recipe(text).recipes] == ["linear", "linear", "slerp"]


def test_circles_duplicates_and_two_finals_are_errors():
    circle = STEPS.replace("{model: B}", "{model: first}")
    (line,) = problems(circle)
    assert "needs its own output: " in line
    assert '"second" → "first"' in line or '"first" → "second"' in line
    assert 'document 3: name: "first" is already the name of document 1' in problems(
        STEPS.replace("name: second", "name: first")
    )
    assert any("documents 2 and 3 " in line for line in problems(STEPS.replace("name: second\n", "")))
    assert any("usable as the name of a folder" in line for line in problems(STEPS.replace("first", "a/b")))


def test_a_document_that_needs_itself_is_a_circle():
    assert any("needs its own output" in line for line in problems(STEPS.replace("{model: C}", "{model: second}")))


def test_problems_name_their_document():
    (line,) = problems(STEPS.replace("dtype: float16", "dtype: floot16"))
    assert line.startswith("document 3: dtype: ")


def test_a_path_to_an_earlier_output_is_explained():
    (line,) = problems(STEPS.replace("base_model: first", "base_model: ./intermediates/first"))
    assert 'to use the output of another document write its name: "first"' in line


def test_the_name_of_a_single_document_is_a_title():
    recipe = one("name: A title / of a merge\n" + LINEAR)
    assert recipe.name == "A title / of a merge"
    assert recipe.dtype is None


# Recipes seen in the wild.


def test_a_base_with_empty_parameters_and_a_comment():
    recipe = one(
        """
        models:
          - model: Z
            # the base needs no parameters
            parameters:
          - model: A
            parameters:
              density: [1, 0.7, 0.1] # density gradient
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
    )
    assert len(recipe.slices[0].models) == 2
    assert recipe.dtype == "F16"


def test_tolerances_without_a_dot_are_numbers():
    text = "{merge_method: karcher, models: [{model: A}, {model: C}], parameters: {tol: 1e-10, max_iter: 100}}"
    assert one(text).parameters["tol"] == 1e-10
    text = "{merge_method: ram, base_model: Z, models: [{model: A}, {model: C}], parameters: {epsilon: 1e-16}}"
    assert one(text).parameters["epsilon"] == 1e-16


def test_block_expansion_with_scale_filters():
    recipe = one(
        """
        merge_method: passthrough
        slices:
        - sources:
          - layer_range: [0, 2]
            model: A
        - sources:
          - model: A
            layer_range: [1, 2]
            parameters:
              scale:
              - filter: o_proj
                value: 0.0
              - filter: down_proj
                value: 0.0
              - value: 1.0
        - sources:
          - model: A
            layer_range: [2, 6]
        """
    )
    assert setting(recipe, "scale", group=1, source=0, tensor="layers.1.mlp.down_proj.weight", at=1.0) == 0.0
    assert setting(recipe, "scale", group=1, source=0, tensor="layers.1.mlp.up_proj.weight", at=1.0) == 1.0
    assert setting(recipe, "scale", group=0, source=0, tensor="layers.1.mlp.up_proj.weight", at=1.0) is None
    assert len(recipe.inputs) == 1


def test_linear_over_slices_with_a_dummy_model():
    ends = "{sources: [{model: A, layer_range: [%d, %d], parameters: {weight: 1}}, "
    ends += "{model: C, layer_range: [%d, %d], parameters: {weight: 0}}]}"
    middle = "{sources: [{model: C, layer_range: [1, 5], parameters: {weight: 1}}]}"
    recipe = one(
        f"{{merge_method: linear, tokenizer_source: , "
        f"slices: [{ends % (0, 1, 0, 1)}, {middle}, {ends % (5, 6, 5, 6)}]}}"
    )
    assert [len(group.sources) for group in recipe.slices] == [2, 1, 2]


def test_weights_under_model_stock_are_ignored():
    recipe = one(
        """
        merge_method: model_stock
        base_model: Z
        models: [{model: A, parameters: {weight: [0.1, 0.9]}}, {model: C}]
        parameters: {normalize: false, int8_mask: true}
        """
    )
    assert len(recipe.warnings) == 3
    assert recipe.parameters == {}


def test_a_slerp_from_the_examples():
    recipe = one(
        """
        slices:
          - sources:
              - model: Z
                layer_range: [0, 6]
              - model: C
                layer_range: [0, 6]
        # or, the equivalent models: syntax
        merge_method: slerp
        base_model: Z
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: float16
        """
    )
    assert setting(recipe, "t", tensor="model.layers.5.mlp.w", at=1.0) == 0.0
    assert setting(recipe, "t", tensor="lm_head.weight", at=0.0) == 0.5


def test_root_keys_indented_by_one_blank_alike_are_fine():
    one(textwrap.indent(LINEAR, " "))


# The schema, and what is not needed.


def test_the_schema_knows_every_method_and_parameter():
    schema = json_schema()
    assert set(schema["properties"]["merge_method"]["enum"]) == set(registry.names())
    assert set(schema["$defs"]["Parameters"]["properties"]) == set(registry.parameter_names())
    assert schema["$defs"]["SourceEntry"]["required"] == ["model", "layer_range"]
    json.dumps(schema)


def test_the_schemas_references_exist():
    schema = json_schema()
    text = json.dumps(schema)
    wanted = {part.split('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert wanted <= set(schema["$defs"])


def test_importing_recipes_needs_nothing_heavy():
    code = "import sys, graftwork.merge.recipe_reader, graftwork.merge.layers\n"
    code += "print([name for name in ('torch', 'numba', 'scipy') if name in sys.modules])"
    folder = Path(graftwork.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == "[]"


class TestStages:
    """What a recipe has done before and after the merge."""

    HEAD = "merge_method: linear\nparameters: {weight: 1}\n"

    def problems(self, text: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            parse_recipe(self.HEAD + text)
        return list(caught.value.problems)

    def models(self, folder: Path, *tasks: str | None) -> str:
        lines = ["models:"]
        for number, task in enumerate(tasks):
            path = folder / f"m{number}"
            path.mkdir(exist_ok=True)
            lines.append(f"- {{model: {path}" + (f", task: '{task}'}}" if task else "}"))
        return "\n".join(lines) + "\n"

    def test_are_read(self, tmp_path: Path) -> None:
        text = "align: {to: first, seed: 3}\nrenormalize: repair\nmeasure: {examples: 64}\nevaluate: true\n"
        [recipe] = parse_recipe(self.HEAD + text + self.models(tmp_path, "a.py:a", "b.py:b")).recipes
        assert recipe.align == {"to": "first", "seed": 3}
        assert recipe.renormalize == {"method": "repair"}
        assert recipe.measure == {"examples": 64}
        assert recipe.evaluate == ("a.py:a", "b.py:b")
        assert [source.task for source in recipe.slices[0].sources] == ["a.py:a", "b.py:b"]

    def test_a_word_that_is_none_of_the_known_ones(self, tmp_path: Path) -> None:
        [problem] = self.problems("align: {to: frst}\n" + self.models(tmp_path, None, None))
        assert problem == 'align.to: must be base, first or universe, not "frst"; did you mean "first"?'

    def test_what_needs_a_task_says_so(self, tmp_path: Path) -> None:
        text = "align: {to: first, method: ste}\nrenormalize: bn\nevaluate: true\n"
        problems = self.problems(text + self.models(tmp_path, None, None))
        assert [line.partition(":")[0] for line in problems] == ["align.task", "renormalize.task", "evaluate"]

    def test_an_alignment_to_a_base_needs_one(self, tmp_path: Path) -> None:
        [problem] = self.problems("align: {to: base}\n" + self.models(tmp_path, None, None))
        assert problem.startswith("align.to: is base, but the recipe has no base_model")
