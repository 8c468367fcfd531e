"""What stands in a recipe file, level by level, and the JSON schema of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from graftwork.merge import dtypes
from graftwork.merge.methods import registry
from graftwork.merge.methods.registry import Parameter

_REFERENCE = "definition"
"""Stands for `$ref` until the schema is complete, because pydantic follows a `$ref` at once."""


def _defined(name: str) -> WithJsonSchema:
    return WithJsonSchema({_REFERENCE: name})


_REFERENCE_SCHEMA = {
    "description": "A model: a folder, a file, or the name of another document of this file.",
    "anyOf": [{"type": "string"}, {"type": "object"}],
}
_Reference = Annotated[Any, WithJsonSchema(_REFERENCE_SCHEMA)]
_Settings = Annotated[dict[str, Any] | None, _defined("Parameters")]


def _list_of(entry: str) -> Any:
    """Return the schema of a list of entries, each of which is read on its own to collect its problems."""
    return WithJsonSchema({"type": "array", "minItems": 1, "items": {_REFERENCE: entry}})


class _Level(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class ModelEntry(_Level):
    """An entry of `models`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model"]})
    model: _Reference = None
    parameters: _Settings = None
    statistics: dict[str, str] | None = Field(
        None, description="Files of what was measured on this model, by kind, such as fisher."
    )
    task: str | None = Field(
        None, description="file.py:name of the model's task; what is missing is measured on its data."
    )


class SourceEntry(_Level):
    """An entry of `sources` in a slice."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "layer_range"]})
    model: _Reference = None
    layer_range: Annotated[
        list[Any] | None,
        WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}),
    ] = Field(None, description="First layer, and the layer after the last.")
    parameters: _Settings = None


class SliceEntry(_Level):
    """An entry of `slices`: output layers that are made from the same layers of some models."""

    model_config = ConfigDict(json_schema_extra={"required": ["sources"]})
    sources: Annotated[list[Any] | None, _list_of("SourceEntry")] = None
    base_model: _Reference = None
    residual_weight: Any = Field(None, description="Has no effect.")
    parameters: _Settings = None


class ModuleEntry(_Level):
    """An entry of `modules`."""

    models: Annotated[list[Any] | None, _list_of("ModelEntry")] = None
    slices: Annotated[list[Any] | None, _list_of("SliceEntry")] = None
    parameters: _Settings = None


class TokenizerEntry(_Level):
    """What `tokenizer` holds."""

    source: _Reference = None
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None
    new_tokens: str | None = None


class AlignEntry(_Level):
    """What `align` holds: how units are re-ordered before the models are merged."""

    to: Literal["base", "first", "universe"] | None = Field(
        None, description="Whose order counts: the base's (default), the first model's, or one found for all."
    )
    method: Literal["weights", "activations", "ste"] | None = Field(None, description="What units are matched by.")
    family: str | None = Field(None, description="Family of networks, if the tensors' names do not tell.")
    spec: str | None = Field(None, description="File that says which axes belong together.")
    module: str | None = Field(None, description="file.py:name of a function that makes the module, to be traced.")
    task: str | None = Field(None, description="Task on whose data units are matched; the first model's if absent.")
    seed: int | None = None
    restarts: int | None = None


class LinesEntry(_Level):
    """What `lines` holds: how the merged task vector grows with the depth of the layer."""

    alpha: float | Literal["auto"] | None = Field(
        None, description="Factor of the first layer and of what lies outside the layers; auto: see the page."
    )
    beta: float | None = Field(None, description="What is added up to the last layer, evenly.")


class RenormalizeEntry(_Level):
    """What `renormalize` holds: how activations are set right after the merge."""

    method: Literal["repair", "bn"] | None = None
    task: str | None = Field(None, description="Task on whose inputs statistics are taken; the models' own if absent.")


class MeasureEntry(_Level):
    """What `measure` holds: how statistics that are missing are measured on the models' tasks."""

    examples: int | None = None
    estimator: str | None = Field(None, description="Of the Fisher information.")
    outputs: Literal["classes", "regression", "multi_label"] | None = Field(
        None, description="What the logits are, for the Fisher information."
    )
    seed: int | None = None


class LearnEntry(_Level):
    """What `learn` holds: how a mask file that is missing is learned on the models' tasks."""

    parametrisation: str | None = None
    loss: str | None = None
    steps: int | None = None
    learning_rate: float | None = None
    coefficient_rate: float | None = None
    batch: int | None = None
    examples: int | None = None
    seed: int | None = None
    coefficient: float | None = None
    temperature: float | None = None
    clamp: bool | None = None
    hard: bool | None = None
    schedule: str | None = None
    trim: float | None = None
    mask_kind: str | None = None


class RecipeDocument(_Level):
    """A recipe for `graftwork merge`."""

    model_config = ConfigDict(json_schema_extra={"required": ["merge_method"]})
    name: str | None = Field(None, description="Name by which other documents of the file can use the output.")
    merge_method: str | None = None
    models: Annotated[list[Any] | None, _list_of("ModelEntry")] = None
    slices: Annotated[list[Any] | None, _list_of("SliceEntry")] = None
    modules: Annotated[
        dict[str, Any] | None,
        WithJsonSchema({"type": "object", "additionalProperties": {_REFERENCE: "ModuleEntry"}}),
    ] = None
    parameters: _Settings = None
    base_model: _Reference = None
    dtype: Annotated[str | None, WithJsonSchema({"enum": sorted(dtypes.NAMES)})] = Field(
        None, description="Dtype of the output, unless out_dtype is given."
    )
    out_dtype: Annotated[str | None, WithJsonSchema({"enum": sorted(dtypes.NAMES)})] = None
    tokenizer_source: _Reference = None
    tokenizer: Annotated[dict[str, Any] | None, _defined("TokenizerEntry")] = None
    chat_template: str | None = None
    mask: str | None = Field(None, description="File of what `graftwork masks` has learned for these models.")
    task_masks: str | None = Field(None, description="File that `emr` or `tall_masks` has written beside its output.")
    lines: Annotated[dict[str, Any] | None, _defined("LinesEntry")] = None
    align: Annotated[dict[str, Any] | None, _defined("AlignEntry")] = None
    renormalize: Annotated[dict[str, Any] | str | None, _defined("RenormalizeEntry")] = None
    measure: Annotated[dict[str, Any] | None, _defined("MeasureEntry")] = None
    learn: Annotated[dict[str, Any] | None, _defined("LearnEntry")] = None
    evaluate: Annotated[
        list[str] | bool | None,
        WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "string"}}]}),
    ] = Field(None, description="Tasks on which the output is evaluated; true for the models' own.")
    exclude: Annotated[list[str] | str | None, WithJsonSchema({"type": "array", "items": {"type": "string"}})] = Field(
        None, description="Patterns of tensors that are copied and not merged."
    )


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of recipe files, for editors that complete and check while typing."""
    schema: dict[str, Any] = _linked(RecipeDocument.model_json_schema())
    definitions = schema.setdefault("$defs", {})
    entries = (ModelEntry, SourceEntry, SliceEntry, ModuleEntry, TokenizerEntry)
    for entry in (*entries, LinesEntry, AlignEntry, RenormalizeEntry, MeasureEntry, LearnEntry):
        definitions[entry.__name__] = _linked(entry.model_json_schema())
    names = registry.names()
    properties: dict[str, Any] = {}
    for name in names:
        for parameter in registry.get(name).parameters.values():
            found = properties.setdefault(parameter.name, {"description": parameter.help, "used": [], "types": []})
            found["used"].append(name)
            for accepted in _value_schemas(parameter):
                if accepted not in found["types"]:
                    found["types"].append(accepted)
    definitions["Parameters"] = {
        "type": ["object", "null"],
        "properties": {
            name: {"description": f"{found['description']} ({', '.join(found['used'])})", **_setting(found["types"])}
            for name, found in sorted(properties.items())
        },
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["merge_method"] = {"enum": list(names), "description": "How the models are merged."}
    return schema


def _linked(schema: Any) -> Any:
    """Return a schema with the names of definitions as JSON references."""
    if isinstance(schema, dict):
        return {
            "$ref" if key == _REFERENCE else key: f"#/$defs/{item}" if key == _REFERENCE else _linked(item)
            for key, item in schema.items()
        }
    return [_linked(item) for item in schema] if isinstance(schema, list) else schema


def _value_schemas(parameter: Parameter) -> list[dict[str, Any]]:
    if isinstance(parameter.type, tuple):
        constants = [constant for constant in parameter.type if not isinstance(constant, type)]
        return [{"enum": constants}] + ([{"type": "number"}] if len(constants) < len(parameter.type) else [])
    if parameter.type is bool:
        return [{"type": "boolean"}]
    if parameter.type is str:
        return [{"type": "string"}]
    number: dict[str, Any] = {"type": "integer" if parameter.type is int else "number"}
    if parameter.minimum is not None:
        number["minimum"] = parameter.minimum
    if parameter.maximum is not None:
        number["maximum"] = parameter.maximum
    return [number]


def _setting(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a setting: a value, a gradient, or either of them under conditions."""
    scalar = {"anyOf": values} if len(values) > 1 else values[0]
    value = {"anyOf": [scalar, {"type": "array", "items": scalar, "minItems": 1}]}
    condition = {
        "type": "object",
        "properties": {"value": value, "filter": {"type": ["string", "null"]}},
        "required": ["value"],
    }
    return {"anyOf": [*value["anyOf"], condition, {"type": "array", "items": condition}]}
