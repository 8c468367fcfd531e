"""The model card of an output: what was merged, how, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftwork import __version__
from graftwork.merge import lineage

if TYPE_CHECKING:
    from graftwork.merge.plan import Plan


def model_card(plan: Plan, name: str, recipe: str, metadata: Mapping[str, str]) -> str:
    """Return the text of `README.md` for an output called `name`."""
    hub = [reference.hub for reference in plan.recipe.inputs if reference.hub]
    front = ["---"]
    if hub:
        front += ["base_model:", *(f"- {repository}" for repository in hub)]
    front += ["library_name: transformers", "tags:", "- merge", "- graftwork", "---", ""]
    method = plan.method
    merged, copied = len(plan.merged), len(plan.copied)
    body = [
        f"# {name}",
        "",
        f"Merged with graftwork {__version__} by [{method.title}]({method.reference}) (`{method.name}`).",
        "",
        f"    {method.formula}",
        "",
        f"{merged} tensors were merged and {copied} copied; {plan.elements:,} parameters in all.",
        "",
        "## Inputs",
        "",
        *(f"- {label}{_origin(origin)}" for label, origin in zip(plan.labels, plan.origins(), strict=True)),
        "",
        "## Lineage",
        "",
        "```",
        *lineage.tree(metadata, name),
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip("\n"),
        "```",
        "",
    ]
    return "\n".join([*front, *body])


def _origin(origin: Mapping[str, str]) -> str:
    """Return which commits of which repositories an input is."""
    found = [
        f"{part} [{origin[f'{key}repository']}](https://huggingface.co/{origin[f'{key}repository']}) at commit "
        f"{origin[f'{key}commit']}"
        for key, part in (("", "model"), ("adapter_", "adapter"))
        if f"{key}repository" in origin
    ]
    return f": {', '.join(found)}" if found else ""
