"""The documentation is run: every command, recipe and Python block on its pages, on small stand-ins for the models.

How a page is read:

* ```` ```console ```` holds commands after `$ ` and what they print, progress aside. Each command has to succeed unless
  `$ echo $?` follows it, and what is shown has to appear in the same order. Digests and numbers with a point differ
  from run to run and are not compared; a line `…` stands for lines left out.
* ```` ```bash ```` holds what is too slow for a test (installing, the demo, all tests); its form is checked.
* ```` ```yaml ```` holds a whole recipe, ```` ```python ```` a whole script. If the first line is a comment with a
  file's name, the block is saved under it for the commands that follow. A recipe named `wrong…` has to be refused.

Run this file to print the generated parts of the pages: `python -m tests.packaging.test_documentation`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from graftwork.cli.application import app
from graftwork.cli.demo import LEFT_OUT
from graftwork.merge.errors import RecipeError
from graftwork.merge.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
IS_CHECKOUT = (ROOT / "pyproject.toml").exists()
"""False where only tests and documentation were copied, to test an installed wheel."""
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
PAGES = [name for name in sorted(NAMES) if (ROOT / name).exists()]

FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LANGUAGES = {"bash", "console", "yaml", "python", "text", "json", "toml"}
OTHERS = {
    "python3",
    "python",
    "git",
    "mypy",
    "pip-audit",
    "pip-licenses",
    "ruff",
    "source",
    "cd",
    "sudo",
    "journalctl",
    "ssh-keygen",
}
"""Programs that are not ours and that slow commands may use."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name under which it is saved."""
        found = re.match(r"# ([\w-]+\.(?:ya?ml|py|toml))$", self.text.split("\n", 1)[0])
        return found[1] if found else None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def of_language(*languages: str) -> Iterator[Any]:
    for page in PAGES:
        for block in blocks(page):
            if block.language in languages:
                yield pytest.param(page, block, id=f"{page}:{block.line}")


# --- stand-ins for the models -----------------------------------------------------------------------------------------


def layered(seed: int, *, layers: int = 4, width: int = 16, words: int = 64) -> dict[str, np.ndarray]:
    """Return a small model whose tensors are named as a Llama's; different seeds give relatives."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return (0.05 * common.normal(size=shape) + 0.005 * own.normal(size=shape)).astype(np.float32)

    model = {"model.embed_tokens.weight": values(words, width)}
    for i in range(layers):
        model[f"model.layers.{i}.self_attn.q_proj.weight"] = values(width, width)
        model[f"model.layers.{i}.mlp.up_proj.weight"] = values(4 * width, width)
        model[f"model.layers.{i}.input_layernorm.weight"] = 1 + values(width)
    model["model.norm.weight"] = 1 + values(width)
    model["lm_head.weight"] = values(words, width)
    return model


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 64, "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages merge: the demo's checkpoints (untrained), and model folders under `models/`."""
    from safetensors.torch import save_file as save_torch

    from graftwork.simulations.digits import Network

    root = tmp_path_factory.mktemp("models")
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        common = Network().state_dict()
        (root / "demo").mkdir()
        for name in ("base", "turned", "negative", "scrambled"):
            changed = {key: value + 0.01 * torch.randn_like(value) for key, value in common.items()}
            save_torch(changed, root / "demo" / f"{name}.safetensors", metadata={"format": "pt"})
    for seed, name in enumerate(("base", "chat", "code", "math"), start=1):
        folder = root / "models" / name
        folder.mkdir(parents=True)
        save_file(layered(seed), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory from which the models of the pages are found."""
    for folder in ("demo", "models"):
        (tmp_path / folder).mkdir()
        for file in sorted((models / folder).rglob("*")):
            if file.is_file():
                target = tmp_path / file.relative_to(models)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- running ----------------------------------------------------------------------------------------------------------


def stable(line: str) -> str:
    """Return what is the same in every run of a line of output."""
    line = re.sub(r"\b[0-9a-f]{32}\b|\b[0-9a-f]{12}$", "DIGEST", line)
    line = re.sub(r"^(time) .*", r"\1", line)
    line = re.sub(r"-?\d+\.\d+(e[+-]?\d+)?", "NUMBER", line)
    return " ".join(line.split())


PROGRESS = re.compile(r"(merging|comparing|verifying): |\S+ on \S+: .*, loss ")
"""What commands say on stderr only if they take longer than two seconds, as on a busy machine."""


def assert_shown(expected: list[str], output: str, where: str) -> None:
    """Check that the lines shown are those printed, in order; `…` stands for any lines."""
    printed = [stable(line) for line in output.splitlines() if line.strip() and not PROGRESS.match(line)]
    at, gap = 0, False
    for line in (line for line in expected if line.strip()):
        if line.strip() == "…":
            gap = True
            continue
        wanted = stable(line)
        while gap and at < len(printed) and not _same(wanted, printed[at]):
            at += 1
        found = printed[at] if at < len(printed) else "(nothing)"
        assert _same(wanted, found), f"{where}: shows {wanted!r}, printed was {found!r}\n{output}"
        at, gap = at + 1, False
    assert gap or not expected or at == len(printed), f"{where}: does not show {printed[at:]}"


def _same(wanted: str, printed: str) -> bool:
    return printed.startswith(wanted[:-1]) if wanted.endswith("…") else wanted == printed


def steps(block: Block) -> list[tuple[str, list[str]]]:
    """Return the commands of a console block, each with what it prints."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"output before the first command: {line}"
            found[-1][1].append(line)
    return found


def execute(command: str) -> tuple[int, str]:
    words = shlex.split(command, comments=True)
    if words[0] == "graftwork":
        result = CliRunner().invoke(app, words[1:], prog_name="graftwork")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output
    assert words[0] in {"cat", "ls", "rm", "mkdir", "mv"}, f"a page may not run {words[0]}"
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_commands_recipes_and_scripts_of_a_page_run_as_shown(page: str, place: Path) -> None:
    code: int | None = None
    for block in blocks(page):
        where = f"{page}, line {block.line}"
        if block.file is not None:
            (place / block.file).write_text(block.text, encoding="utf-8")
        if block.language == "yaml":
            if block.file is not None and block.file.startswith("wrong"):
                with pytest.raises(RecipeError):
                    parse_recipe(block.text)
            else:
                assert parse_recipe(block.text).recipes, where
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), {"__name__": "__main__"})
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "console":
            todo = steps(block)
            for number, (command, shown) in enumerate(todo):
                if command == "echo $?":
                    assert shown == [str(code)], where
                    continue
                code, output = execute(command)
                may_fail = number + 1 < len(todo) and todo[number + 1][0] == "echo $?"
                assert code == 0 or may_fail, f"{where}: {command} ended with {code}\n{output}"
                if shown:
                    assert_shown(shown, output, f"{where}: {command}")


def test_the_check_of_output_sees_a_line_that_is_not_printed() -> None:
    assert_shown(["tensors  30", "…", "digest " + "0" * 32], "tensors 30\nx\ndigest " + "a" * 32, "here")
    assert_shown(["x", "y"], "x\nmerging: 4 %, 9 MB\na.safetensors on blurred: 10.40 %, loss 2.5\ny", "here")
    for wrong in (["tensors 31", "…"], ["tensors 30"], ["…", "result sound"]):
        with pytest.raises(AssertionError, match="here"):
            assert_shown(wrong, "tensors 30\nx", "here")


# --- what is too slow to run ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_CHECKOUT, reason="there is no project file here")
@pytest.mark.parametrize(("page", "block"), list(of_language("bash")))
def test_slow_commands_name_what_exists(page: str, block: Block) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in block.text.splitlines():
        for part in re.split(r"\s&&\s", line.split(" #")[0].strip()):
            words = shlex.split(part)
            if not words:
                continue
            name = Path(words[0]).name
            if "pip" in (name, *words[2:3]) and "install" in words:
                named = re.findall(r"\[([a-z,]+)\]", part)
                assert {extra for found in named for extra in found.split(",")} <= set(extras), part
                if "-c" in words:
                    assert (ROOT / words[words.index("-c") + 1]).exists(), part
            elif name == "graftwork":
                result = CliRunner().invoke(app, [words[1], "--help"])
                assert result.exit_code == 0, part
                assert all(word.split("=")[0] in result.output for word in words[2:] if word.startswith("--")), part
            else:
                files = [word for word in words if re.search(r"\.(py|sh)$|^\.ci/|^tests/", word)]
                assert all((ROOT / file).exists() for file in files), part
                assert files or name in OTHERS, part


def test_the_readme_begins_with_two_commands() -> None:
    install, test = [block.text.strip() for block in blocks("README.md") if block.language == "bash"][:2]
    assert install == (
        'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ".[all]" && .venv/bin/graftwork demo'
    )
    assert test == ('.venv/bin/pip install -c constraints.txt ".[all,test]" && .venv/bin/python -m pytest -n auto')


def test_the_demo_shown_has_a_row_for_every_model_and_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {line.split()[0] for line in text.splitlines() if re.fullmatch(r"\w+(\s+\d+\.\d){5}", line)}
    methods = {method["name"] for method in registered()} - set(LEFT_OUT)
    assert shown == {"base", "turned", "negative", "scrambled", *methods}


# --- what is generated ------------------------------------------------------------------------------------------------


def registered() -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["methods", "--json"])
    assert result.exit_code == 0
    methods: list[dict[str, Any]] = json.loads(result.output)
    return methods


def count(method: dict[str, Any]) -> str:
    low, high = method["minimum_models"], method["maximum_models"]
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def methods_table() -> str:
    """Return the table of methods in the README."""
    rows = ["| method | what it does | base | models | source |", "|---|---|---|---|---|"]
    for method in registered():
        link = f"[`{method['name']}`](docs/methods.md#{method['name']})"
        source = re.sub(r"^https?://(www\.)?", "", method["reference"]).split("/")[0]
        rows.append(
            f"| {link} | {method['summary']} | {method['base']} | {count(method)} | [{source}]({method['reference']}) |"
        )
    return "\n".join(rows)


def word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def facts(method: dict[str, Any]) -> str:
    """Return what the page on methods says of one by its registration."""
    lines = [
        f"## {method['name']}",
        "",
        f"**{method['title']}.** {method['summary']}",
        "",
        "```text",
        method["formula"],
        "```",
        "",
        f"Base: {method['base']}. Models besides the base: {count(method)}. Kind: {method['kind']}. "
        f"[Source]({method['reference']}).",
    ]
    if method["parameters"]:
        lines += ["", "| parameter | default | scope | values | meaning |", "|---|---|---|---|---|"]
    for item in method["parameters"]:
        kind = item["type"]
        values = ", ".join(map(word, kind)) if isinstance(kind, list) else "true, false" if kind == "bool" else kind
        low, high = item["minimum"], item["maximum"]
        values += f" ≥ {low:g}" if low is not None and high is None else ""
        values += f", {low:g} to {high:g}" if low is not None and high is not None else ""
        marks = [*["not in mergekit"] * item["is_extension"], *["no effect"] * (not item["has_effect"])]
        default = "required" if item["is_required"] else f"`{word(item['default'])}`"
        if not item["is_required"] and item["default"] is None:
            default = "none"
        scope = "per model" if item["is_per_model"] else "shared"
        meaning = item["help"].replace("|", "\\|") + (f" ({', '.join(marks)})" if marks else "")
        lines.append(f"| `{item['name']}` | {default} | {scope} | {values} | {meaning} |")
    return "\n".join(lines)


def test_the_table_of_methods_is_the_registry() -> None:
    assert methods_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_method_has_a_section_with_its_parameters() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    for method in registered():
        assert f"\n{facts(method)}\n" in page, method["name"]


# --- links and paths --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = [line.lstrip("#").strip().lower() for line in text.splitlines() if re.match(r"#{1,6} ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page: str) -> None:
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not IS_CHECKOUT and not target.is_relative_to(ROOT / "docs") and target != ROOT / "README.md":
            continue
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_pictures_are_shown_and_small() -> None:
    shown = {Path(link).name for page in PAGES for link in LINK.findall((ROOT / page).read_text(encoding="utf-8"))}
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.name in shown
        assert picture.stat().st_size < 150_000


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_known_language_and_paths_are_nobodys_own(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert not re.search(r"(?<![\w./])/(home|root|work|tmp|Users)/", text)


if __name__ == "__main__":
    print(methods_table())
    for known in registered():
        print(f"\n{facts(known)}")
