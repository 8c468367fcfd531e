"""Repositories of the hub: the cache, a server on this machine, and what is said when there is neither."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from graftwork.merge import load_recipe, make_plan, merge
from graftwork.merge.checkpoint import Checkpoint, load_numpy
from graftwork.merge.errors import CheckpointError, RecipeError
from graftwork.merge.hub import Hub, cached, localised
from graftwork.merge.lineage import own_parents
from graftwork.merge.plan import Options

SHA = "c0ffee" + 34 * "1"
OTHER_SHA = "decade" + 34 * "2"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own, with a cache of its own and no settings of this machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")


def weights(value: float) -> dict[str, np.ndarray]:
    return {f"model.layers.{layer}.w.weight": np.full((2, 2), value, np.float32) for layer in range(2)}


def files(value: float, **more: bytes) -> dict[str, bytes]:
    """Return the files of a model."""
    return {
        "config.json": json.dumps(CONFIG).encode(), "tokenizer_config.json": b"{}", "LICENSE": b"free",
        "model.safetensors": save(weights(value), {"format": "pt"}), **more,
    }  # fmt: skip


def sharded(value: float) -> dict[str, bytes]:
    """Return the files of a model in two shards, with a third file of weights that its index does not name."""
    parts = {f"model-0000{number}-of-00002.safetensors": item for number, item in enumerate(weights(value).items(), 1)}
    index = {"metadata": {}, "weight_map": {name: file for file, (name, _) in parts.items()}}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: save({name: values}, {"format": "pt"}) for file, (name, values) in parts.items()},
        "consolidated.safetensors": b"gigabytes of the same",
    }


def into_cache(
    root: Path, repository: str, content: dict[str, bytes], sha: str = SHA, ref: str | None = "main"
) -> Path:
    """Lay a repository out as the hub's library does: blobs, and links to them."""
    folder = root / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / sha
    for name, data in content.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(sha)
    return snapshot


def recipe(*models: str, more: str = "") -> Path:
    entries = ", ".join(f"{{model: {json.dumps(name)}}}" for name in models)
    Path("recipe.yml").write_text(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{entries}]\n{more}\n")
    return Path("recipe.yml")


def local(name: str, value: float) -> None:
    Path(name).mkdir()
    save_file(weights(value), f"{name}/model.safetensors")
    Path(name, "config.json").write_text(json.dumps(CONFIG))


def values(path: str = "out") -> list[float]:
    with Checkpoint.open(path) as checkpoint:
        return [float(value) for tensor in load_numpy(checkpoint).values() for value in np.unique(tensor)]


def problem(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **more)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


# ----------------------------------------------------------------------------------------------------------------------
# The cache alone

OFFLINE = Options(offline=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def test_a_cached_repository_is_merged_where_it_lies(root: Path) -> None:
    into_cache(root, "org/one", files(1.0))
    into_cache(root, "two", sharded(3.0), OTHER_SHA, "v1")
    result = merge(recipe("org/one", "two@v1"), "out", options=OFFLINE)
    assert values() == [2.0, 2.0]
    assert [file.name for file in Path("out").iterdir() if file.name == "LICENSE"] == ["LICENSE"]
    assert not Path("out/LICENSE").is_symlink()
    with Checkpoint.open(result.out) as out:
        parents = own_parents(out.metadata)
        metadata = "".join(out.metadata.values())
    assert [(item["repository"], item["commit"]) for item in parents] == [("org/one", SHA), ("two", OTHER_SHA)]
    assert [item["name"] for item in parents] == ["one", "two@v1"]
    assert str(root) not in metadata
    card = Path("out/README.md").read_text()
    assert "base_model:\n- org/one\n- two\n" in card
    assert f"[two](https://huggingface.co/two) at commit {OTHER_SHA}" in card


def test_no_output_depends_on_where_the_cache_is(root: Path, tmp_path: Path) -> None:
    for place in (root, tmp_path / "elsewhere"):
        into_cache(place, "org/one", files(1.0))
    first = merge(recipe("org/one"), "out", options=OFFLINE)
    second = merge(recipe("org/one"), "again", options=Options(cache=tmp_path / "elsewhere", offline=True))
    assert Path(first.out, "model.safetensors").read_bytes() == Path(second.out, "model.safetensors").read_bytes()


@pytest.mark.parametrize("revision", [SHA, "main", "refs/pr/1"])
def test_commits_branches_and_references_are_found(root: Path, revision: str) -> None:
    snapshot = into_cache(root, "org/one", files(1.0), ref=None if revision == SHA else revision)
    found = cached(root, "org/one", revision)
    assert found is not None
    assert (found.path, found.commit) == (snapshot, SHA)
    assert cached(root, "org/one", "other") is None
    assert cached(root, "org/two") is None


def test_the_root_is_where_the_library_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Hub().root == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/a")
    assert Hub().root == Path("/a")
    assert Hub(cache=Path("/b")).root == Path("/b")
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/me")
    assert Hub().root == Path("/me/.cache/huggingface/hub")


def test_two_texts_for_one_commit_are_one_model(root: Path) -> None:
    into_cache(root, "org/one", files(1.0))
    local("Z", 0.0)
    with pytest.raises(RecipeError, match=r"models\[1\]\.model: is the same model as models\[0\]"):
        make_plan(load_recipe(recipe("org/one", f"org/one@{SHA}")).recipes[0], OFFLINE)
    path = recipe("Z", "org/one", more=f"base_model: org/one@{SHA}")
    plan = make_plan(load_recipe(path).recipes[0], OFFLINE)
    assert len(plan.checkpoints) == 2
    plan.close()


def test_adapters_may_be_repositories(root: Path) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["w"]}
    name = "base_model.model.model.layers.0.w"
    tensors = {
        f"{name}.lora_A.weight": np.ones((1, 2), np.float32),
        f"{name}.lora_B.weight": np.ones((2, 1), np.float32),
    }
    adapter = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    into_cache(root, "org/adapter", adapter, OTHER_SHA)
    into_cache(root, "org/one", files(1.0))
    merge(recipe("org/one+org/adapter"), "out", options=OFFLINE)
    assert values() == [3.0, 1.0]
    with Checkpoint.open("out") as out:
        (parent,) = own_parents(out.metadata)
    assert (parent["commit"], parent["adapter_commit"]) == (SHA, OTHER_SHA)
    local("L", 5.0)
    merge(recipe("L+org/adapter"), "again", options=OFFLINE)
    assert values("again") == [7.0, 5.0]


def test_what_is_not_in_the_cache_is_named_with_the_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = problem(merge, recipe("org/none"), "out", options=OFFLINE)
    assert line == (
        f'models[0].model: "org/none" is no folder or file here, and it is not in the hub\'s cache at "{root}", and '
        "--offline is given"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert problem(merge, recipe("org/none"), "out").endswith("and HF_HUB_OFFLINE is set")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert problem(merge, recipe("org/none"), "out").endswith('to fetch it, pip install "graftwork[hub]"')
    assert not Path("out").exists()


def test_every_missing_repository_is_named_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        merge(recipe("org/none", "org/nothing", "x+y/z"), "out", options=OFFLINE)
    assert [line.split(" is ")[0] for line in caught.value.problems] == [
        'models[0].model: "org/none"', 'models[1].model: "org/nothing"', 'models[2].model: "x"',
        'models[2].model: "y/z"',
    ]  # fmt: skip


def test_a_snapshot_without_a_shard_is_not_whole(root: Path) -> None:
    content = sharded(1.0)
    del content["model-00002-of-00002.safetensors"]
    into_cache(root, "org/one", content)
    line = problem(merge, recipe("org/one"), "out", options=OFFLINE)
    assert 'it lacks "model-00002-of-00002.safetensors", and --offline is given' in line
    into_cache(root, "org/two", {"config.json": b"{}"})
    assert 'it lacks "*.safetensors"' in problem(merge, recipe("org/two"), "out", options=OFFLINE)


def test_a_blob_that_is_gone_is_missing(root: Path) -> None:
    snapshot = into_cache(root, "org/one", files(1.0))
    (snapshot / "model.safetensors").resolve().unlink()
    assert 'it lacks "*.safetensors"' in problem(merge, recipe("org/one"), "out", options=OFFLINE)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a/../b", "a\0b", "..\\x"])
def test_revisions_do_not_lead_out_of_the_cache(root: Path, revision: str) -> None:
    assert "is no revision" in problem(cached, root, "org/one", revision)


def test_a_reference_without_a_commit_is_damage(root: Path) -> None:
    into_cache(root, "org/one", files(1.0))
    (root / "models--org--one" / "refs" / "main").write_text("../../../outside")
    assert "holds no commit" in problem(cached, root, "org/one")


def test_local_models_touch_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    local("A", 1.0)
    local("B", 3.0)
    merge(recipe("A", "./B"), "out")
    assert values() == [2.0, 2.0]
    (item,) = load_recipe(recipe("A", "B")).recipes
    assert localised(item, Hub()) is item


# ----------------------------------------------------------------------------------------------------------------------
# A server on this machine


@dataclass
class Server:
    """A hub with a few repositories, by name and commit."""

    content: dict[str, dict[str, dict[str, bytes]]]
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        path = path.partition("?")[0]
        for name, commits in self.content.items():
            newest = next(reversed(commits))
            if path.startswith(f"/api/models/{name}"):
                kind, _, revision = path.removeprefix(f"/api/models/{name}").strip("/").partition("/")
                commit = newest if revision in {"", "main"} else revision
                if commit not in commits:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                files = commits[commit]
                if kind == "tree":
                    entries = [
                        {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for file, data in files.items()
                    ]
                    return 200, {}, json.dumps(entries).encode()
                siblings = [{"rfilename": file} for file in files]
                return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
            if path.startswith(f"/{name}/resolve/"):
                commit, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                data = commits.get(commit, {}).get(file)
                if data is None:
                    return 404, {"X-Error-Code": "EntryNotFound"}, b""
                return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a hub, and let the hub's library use it."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    hub = Server({"org/one": {OTHER_SHA: files(5.0), SHA: files(1.0)}, "org/two": {SHA: sharded(3.0)}})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, data = hub.answer(self.path)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = running.server_address[1]
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{hub.port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    hub.stop = lambda: (running.shutdown(), running.server_close())  # type: ignore[attr-defined]
    yield hub
    hub.stop()  # type: ignore[attr-defined]
    thread.join()


def fetched(server: Server) -> set[str]:
    return {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}


def test_repositories_are_fetched_and_used_again_offline(server: Server, root: Path) -> None:
    told: list[str] = []
    merge(recipe("org/one", "org/two"), "out", tell=told.append)
    assert values() == [2.0, 2.0]
    assert any('fetching the weights of "org/two@' in line for line in told)
    assert fetched(server) >= {"config.json", "LICENSE", "model.safetensors", "model-00002-of-00002.safetensors"}
    assert "consolidated.safetensors" not in fetched(server)
    asked = len(server.asked)
    merge(recipe("org/one", "org/two"), "again", options=OFFLINE)
    assert len(server.asked) == asked
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_a_commit_is_fetched_once(server: Server) -> None:
    path = recipe(f"org/one@{OTHER_SHA}")
    merge(path, "out")
    assert values() == [5.0, 5.0]
    asked = len(server.asked)
    merge(path, "again")
    assert len(server.asked) == asked


def test_weights_are_not_fetched_while_a_repository_is_unknown(server: Server) -> None:
    line = problem(merge, recipe("org/one", "org/none"), "out")
    assert line == (
        'models[1].model: "org/none" is no folder or file here, and on the hub there is no such repository, or you '
        "have no access: check the name, or set HF_TOKEN"
    )
    assert "model.safetensors" not in fetched(server)
    assert not Path("out").exists()


def test_an_unknown_revision_is_named(server: Server) -> None:
    line = problem(merge, recipe("org/one@v9"), "out")
    assert line == 'models[0].model: "org/one@v9": the repository has no such revision; check the branch, tag or commit'


def test_without_the_server_the_cache_is_used(server: Server, root: Path) -> None:
    merge(recipe("org/one"), "out")
    server.stop()  # type: ignore[attr-defined]
    merge(recipe("org/one"), "again")
    assert values("again") == [1.0, 1.0]
    line = problem(merge, recipe("org/two"), "third")
    assert "the hub cannot be reached (" in line
    assert "check the network" in line


def test_quantised_weights_are_refused_before_they_are_fetched(server: Server) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq"}}
    server.content["org/packed"] = {SHA: {**files(1.0), "config.json": json.dumps(config).encode()}}
    line = problem(merge, recipe("org/one", "org/packed"), "out")
    assert line.startswith('models[1].model: "org/packed" is quantised with awq (')
    assert "model.safetensors" not in fetched(server)


def test_a_pipeline_of_the_hub_is_merged_whole(server: Server) -> None:
    content = {
        "model_index.json": json.dumps({"unet": ["x", "X"]}).encode(), "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": save(weights(7.0)),
    }  # fmt: skip
    server.content["org/pipe"] = {SHA: content}
    merge(recipe("org/pipe"), "out")
    assert values() == [7.0, 7.0]
    assert Path("out/unet/diffusion_pytorch_model.safetensors").is_file()


def test_a_repository_without_weights_says_so(server: Server) -> None:
    server.content["org/none"] = {SHA: {"config.json": b"{}"}}
    assert "has no weights that can be read here" in problem(merge, recipe("org/none"), "out")


def test_a_tokenizer_comes_without_weights(server: Server, root: Path) -> None:
    local("A", 1.0)
    more = "tokenizer_source: org/one"
    (item,) = load_recipe(recipe("A", more=more)).recipes
    found = localised(item, Hub())
    assert found.tokenizer is not None
    assert found.tokenizer.source.path is not None  # type: ignore[union-attr]
    assert "tokenizer_config.json" in fetched(server)
    assert "model.safetensors" not in fetched(server)
