"""The chat template of an output: that of most inputs, a well-known one, or the recipe's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftwork.merge.checkpoint import parse_json, quoted
from graftwork.merge.errors import MismatchError, did_you_mean

FILE = "chat_template.jinja"


def _turns(before: str, after: str, *, names: str = "message['role']", start: str = "", prompt: str) -> str:
    """Return a template that writes every message between two texts, and the beginning of an answer if asked to."""
    return (
        start
        + "{% for message in messages %}"
        + "{{ '" + before.replace("ROLE", "' + " + names + " + '") + "' + message['content'] + '" + after + "' }}"
        + "{% endfor %}{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )  # fmt: skip


TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        "chatml": _turns("<|im_start|>ROLE\\n", "<|im_end|>\\n", prompt="<|im_start|>assistant\\n"),
        "llama3": _turns(
            "<|start_header_id|>ROLE<|end_header_id|>\\n\\n", "<|eot_id|>", start="{{ bos_token }}",
            prompt="<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        ),
        "exaone": _turns("[|ROLE|]", "\\n", prompt="[|assistant|]"),
        "alpaca": (
            "{% for message in messages %}"
            "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
            "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
            "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
        ),
        "mistral": (
            "{{ bos_token }}{% for message in messages %}"
            "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
            "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
        ),
    }
)  # fmt: skip


def chosen_template(setting: str, folders: Sequence[Path]) -> str:
    """Return the text of a chat template.

    Args:
        setting: `auto` for the most frequent among the inputs (the first of equals), a known name, or Jinja text.
        folders: The inputs' folders in recipe order.

    Raises:
        MismatchError: There is no such template.
    """
    if setting == "auto":
        found = [text for folder in folders if (text := template_of(folder)) is not None]
        if not found:
            raise MismatchError(
                "chat_template: is auto, but no input has a chat template; name one or leave the key out"
            )
        return max(dict.fromkeys(found), key=found.count)
    if setting in TEMPLATES:
        return TEMPLATES[setting]
    if "{" in setting:
        return setting
    known = ["auto", *TEMPLATES]
    raise MismatchError(
        f"chat_template: there is no template {quoted(setting)}{did_you_mean(setting, known)}; "
        f"there are {', '.join(known)}, and any Jinja text"
    )


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model folder, or None."""
    try:
        if (folder / FILE).is_file():
            return (folder / FILE).read_text(encoding="utf-8")
        for name in ("tokenizer_config.json", "chat_template.json"):
            if (folder / name).is_file():
                value = parse_json((folder / name).read_bytes())
                text = _text(value.get("chat_template") if isinstance(value, dict) else None)
                if text is not None:
                    return text
    except (OSError, ValueError) as error:
        raise MismatchError(f"cannot read the chat template of {quoted(folder)}: {error}") from None
    return None


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and entry.get("name") == "default" and isinstance(entry.get("template"), str):
                return str(entry["template"])
    return None


def files_with(text: str, config: bytes | None) -> dict[str, bytes]:
    """Return the files that hold a template; where `tokenizer_config.json` holds one, it is replaced there, too."""
    files = {FILE: text.encode()}
    if config is not None:
        value = parse_json(config)
        if isinstance(value, dict) and "chat_template" in value:
            value["chat_template"] = text
            files["tokenizer_config.json"] = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    return files
