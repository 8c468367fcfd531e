"""What a site says of itself, what it lets leave, and what it computes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from torch import nn

from graftwork.federated import messages
from graftwork.federated.algorithms import create, names
from graftwork.federated.client import PrivateState, Worker
from graftwork.federated.compute import CPU, PRECISIONS, Compute, as_parameters
from graftwork.federated.domains import Federation
from graftwork.federated.errors import FederationError
from graftwork.federated.explain import explain
from graftwork.federated.grid import InProcessGrid
from graftwork.federated.site import Site, load_site, read_site
from graftwork.federated.strategy import Strategy
from graftwork.merge.errors import GraftworkError
from tests.federated.toys import FAST, Net, experiment, toy_federation, toy_task

TASK = """
import torch
from torch import nn
from graftwork.merge import Task

def make(count=12, shift=0.0):
    labels = torch.arange(count) % 3
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(1)) + shift
    return Task("made", model=lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
                batches=lambda: [(inputs, labels)])

def needy(folder): ...
def broken(): raise RuntimeError("no such disk")

task = make()
several = lambda: {"oslo": make(), "bergen": make(4)}
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text)
    return path


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_task_is_found_beside_the_file_and_gets_its_arguments(folder: Path) -> None:
    path = write(folder, 'task = "task.py:make"\ndevice = "cpu"\n[arguments]\ncount = 9\nshift = 0.5\n')
    site = load_site(path, "oslo")
    inputs, labels = next(iter(site.task.batches()))
    assert (site.site, site.device, len(labels)) == ("oslo", "cpu", 9)
    assert abs(float(inputs.mean()) - 0.5) < 0.5


def test_a_function_may_return_the_tasks_of_all_sites(folder: Path) -> None:
    site = load_site(write(folder, 'task = "task.py:several"\ndevice = "cpu"\n'), "bergen")
    assert len(next(iter(site.task.batches()))[1]) == 4


def test_a_site_of_a_simulation_has_the_data_that_the_simulation_gives_it(folder: Path) -> None:
    pytest.importorskip("sklearn")
    from graftwork.federated.domains import FederationSpec, build

    path = write(
        folder,
        'simulation = "digits"\ndomain = "rotate"\ndevice = "cpu"\n[arguments]\nexamples = 20\ndomains = "rotate"\n',
    )
    wanted = build(FederationSpec("digits", options={"examples": 20, "domains": "rotate"})).sites["rotate"]
    found, expected = (next(iter(task.batches())) for task in (load_site(path, "oslo").task, wanted))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_defaults_allow_everything_and_compute_plainly(folder: Path) -> None:
    said = read_site(write(folder, 'task = "task.py:task"\n'))
    assert (said.device, said.precision, said.deterministic) == ("auto", "float32", False)
    assert said.algorithms == ()
    assert said.exchange is None


def test_all_problems_of_a_file_are_told_at_once(folder: Path) -> None:
    path = write(
        folder,
        'tsak = "task.py:task"\ndevcie = "cpu"\nprecision = "bfloat61"\ndeterministic = "yes"\n'
        'algorithms = ["fedavgg"]\nexchange = "head.*"\n',
    )
    with pytest.raises(FederationError) as caught:
        read_site(path)
    text = str(caught.value)
    for part in (
        '"tsak"; did you mean "task"?',
        '"devcie"; did you mean "device"?',
        '"bfloat61"; did you mean "bfloat16"?',
        "deterministic is 'yes', not true or false",
        '"fedavgg"; did you mean "fedavg"?',
        "exchange is 'head.*', not a list of texts",
    ):
        assert part in text
    assert all(problem.startswith("site.toml: ") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", 'lacks task = "file.py:name"'),
        ('task = "task.py:task"\nsimulation = "digits"', "has both task and simulation"),
        ('task = "task.py"', "write file.py:name"),
        ('task = "task.py:task"\ndomain = "x"', "put it under [arguments]"),
        ('simulation = "digts"', 'did you mean "digits"?'),
        ('task = "task.py:task"\ndevice = "gpu"', "write cpu, cuda, cuda:1 or auto"),
        ('task = "task.py:task"\nsite = "a/b"', "use letters"),
        ("task = ", "it is no TOML"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder: Path, text: str, part: str) -> None:
    with pytest.raises(FederationError) as caught:
        read_site(write(folder, text))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('task = "task.py:tsak"', 'has no "tsak"; did you mean "task"?'),
        ('task = "taks.py:task"', 'did you mean "task.py"?'),
        ('task = "task.py:number"', "is int, not a Task"),
        ('task = "task.py:broken"', "no such disk"),
        ('task = "task.py:needy"', 'needs the argument "folder"; put it under [arguments]'),
        ('task = "task.py:make"\n[arguments]\ncuont = 3', 'has no argument "cuont"; did you mean "count"?'),
        ('task = "task.py:task"\n[arguments]\ncount = 3', "takes no [arguments]"),
        ('task = "task.py:several"', 'without the site "narvik"'),
        ('task = "task.py:task"\nsite = "oslo"', 'says site "oslo", the keys belong to site "narvik"'),
        ('task = "task.py:task"\ndevice = "cuda:99"', 'cannot use the device "cuda:99"'),
    ],
)
def test_what_does_not_load_is_told_in_one_line(folder: Path, text: str, part: str) -> None:
    if "device" not in text:
        text = f'device = "cpu"\n{text}'
    with pytest.raises(GraftworkError) as caught:
        load_site(write(folder, text), "narvik")
    assert part in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_missing_file_is_told_with_the_nearest_one(folder: Path) -> None:
    write(folder, 'task = "task.py:task"')
    with pytest.raises(FederationError, match="there is no file") as caught:
        read_site(folder / "sight.toml")
    assert "site.toml" in str(caught.value)


# --- limits -----------------------------------------------------------------------------------------------------------


def site_of(**more: Any) -> Site:
    return Site("s0", toy_task("s0", 0), **more)


def test_a_pattern_allows_plain_names_of_the_model_and_flat_names_of_the_rest() -> None:
    site = site_of(exchange=("head.*", "control/head.*", "counts"))
    may = {
        name: site.may_leave(name) for name in ("model/head.weight", "model/neck.0.bias", "control/head.bias", "counts")
    }
    assert may == {"model/head.weight": True, "model/neck.0.bias": False, "control/head.bias": True, "counts": True}
    assert site_of().may_leave("anything")
    assert not site_of(exchange=()).may_leave("model/head.weight")


def run(site: Site, algorithm: str, private: Path, **more: Any) -> tuple[list[tuple[str, Message]], Strategy]:
    """Let a site answer the messages of one real round; return its replies with what was asked."""
    chosen = experiment(algorithm, rounds=1, outlier=0.0, **more)
    federation = Federation("one", {site.site: site.task}, toy_federation().server)
    worker = Worker(chosen, private, federation, site=site)
    replies: list[tuple[str, Message]] = []

    def answer(message: Message, context: Context) -> Message:
        request = messages.read_request(message)
        reply = worker.handle(message, context)
        replies.append((request.question or request.kind, reply))
        return reply

    strategy = Strategy(chosen, create(chosen.algorithm, chosen.settings), federation)
    with InProcessGrid(answer, [site.site]) as grid:
        strategy.run(grid)
    return replies, strategy


def test_a_reply_with_tensors_that_may_not_leave_is_not_made_and_nothing_private_is_written(tmp_path: Path) -> None:
    with pytest.raises(FederationError) as caught:
        run(site_of(exchange=("head.*",)), "fedbn", tmp_path)
    assert '"model/encoder.0.bias"' in str(caught.value)
    assert 'its own file allows "head.*"' in str(caught.value)
    assert PrivateState(tmp_path / "s0", "x").load(10) == ({}, -1)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_limit_that_the_run_keeps_to_changes_nothing(tmp_path: Path) -> None:
    limited, _ = run(site_of(exchange=("head.*",)), "fedavg", tmp_path / "a", exchange=("head.*",))
    free, _ = run(site_of(), "fedavg", tmp_path / "b", exchange=("head.*",))
    for (_, one), (_, other) in zip(limited, free, strict=True):
        assert _bytes(one) == _bytes(other)


def _bytes(reply: Message) -> dict[str, bytes]:
    return {name: array.data for name, array in reply.content["arrays"].items()}


def test_a_site_takes_part_only_in_the_algorithms_that_it_names(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match='takes part in "fedka" only, not in "fedavg"'):
        Worker(experiment("fedavg"), tmp_path, site=site_of(algorithms=("fedka",)))
    Worker(experiment("fedka-paper"), tmp_path, site=site_of(algorithms=("fedka",)))


# --- what would leave -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", names())
def test_what_is_explained_is_what_a_real_reply_holds(algorithm: str, tmp_path: Path) -> None:
    site = site_of()
    settings = {"batch_size": 16, **FAST.get(algorithm, {}), "local_steps": 3}
    found = explain(site, algorithm, {**settings, "local_steps": 1})
    replies, _ = run(site, algorithm, tmp_path, settings=settings)
    explained = {departure.when: departure for departure in found.departures}
    assert "train" in explained
    for asked, reply in replies:
        departure = explained["the roll call" if asked == messages.ROLL_CALL else asked]
        answer = messages.read_answer(reply)
        real = {name: messages.form_of(raw) for name, raw in answer.tensors.items()}
        assert {each.name: (each.shape, each.dtype) for each in departure.tensors} == {
            name: (form.shape, form.dtype) for name, form in real.items()
        }
        assert departure.bytes == sum(raw[1].nbytes for raw in answer.tensors.values())
        assert set(departure.numbers) == {messages.EXAMPLES, *answer.metrics}
    # What stays is what the model has and no reply had, and the private state.
    sent = {each.name for departure in found.departures for each in departure.tensors}
    stays = {each.name for each in found.stays}
    model = {f"model/{name}" for name, value in Net().state_dict().items() if value.is_floating_point()}
    assert model <= sent | stays
    private = {f"{entry}" for file in tmp_path.rglob("*.safetensors") for entry in _names(file)}
    assert private <= stays
    assert not (sent & stays) - {name for name in sent if name.startswith("control/")}


def _names(file: Path) -> list[str]:
    from graftwork.merge.checkpoint import Checkpoint

    with Checkpoint.open(file) as checkpoint:
        return list(checkpoint.tensors)


def test_batch_norm_and_residual_networks_stay_at_the_site() -> None:
    found = explain(site_of(), "fraug", {"local_steps": 1})
    stays = {each.name for each in found.stays}
    sent = {each.name for departure in found.departures for each in departure.tensors}
    assert any(name.startswith("residual/") for name in stays)
    assert {"prototypes", "model/encoder.1.running_mean"} <= stays
    assert not {name for name in sent if name.startswith(("residual/", "prototypes", "model/encoder.1."))}


def test_what_a_site_would_refuse_is_marked(tmp_path: Path) -> None:
    found = explain(site_of(exchange=("head.*",)), "fedavg")
    assert "model/neck.0.weight" in found.refused
    assert "model/head.weight" not in found.refused
    with pytest.raises(FederationError, match="takes part in"):
        explain(site_of(algorithms=("fedka",)), "fedavg")
    with pytest.raises(FederationError, match="names no head"):
        explain(dataclasses.replace(site_of(), task=dataclasses.replace(toy_task("s0", 0), head=None)), "fraug")


# --- device and precision ---------------------------------------------------------------------------------------------


def trained(compute: Compute, algorithm: str, private: Path, **settings: Any) -> dict[str, torch.Tensor]:
    site = site_of(compute=compute)
    replies, _ = run(site, algorithm, private, settings={"local_steps": 4, **settings})
    reply = next(reply for asked, reply in replies if asked == "train")
    return {name: messages.tensor_of(raw) for name, raw in messages.read_answer(reply).tensors.items()}


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fraug", "ggeur"])
def test_mixed_precision_reaches_the_local_step_and_what_leaves_stays_float32(algorithm: str, tmp_path: Path) -> None:
    plain = trained(CPU, algorithm, tmp_path / "a")
    mixed = trained(Compute(precision="bfloat16"), algorithm, tmp_path / "b")
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    assert plain.keys() == mixed.keys()
    differing = [name for name in plain if not torch.equal(plain[name], mixed[name])]
    assert differing
    for name, value in plain.items():
        if name.startswith("model/"):
            assert float((value - mixed[name]).abs().max()) < 0.1


def test_forward_passes_really_run_in_bfloat16() -> None:
    seen: list[torch.dtype] = []
    module = Compute(precision="bfloat16").prepare(Net())
    module.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    module.encoder[0].register_forward_hook(lambda _, given, result: seen.append(result.dtype))
    result = module(torch.randn(4, 6))
    assert torch.bfloat16 in seen
    assert result.dtype == torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_float16_scales_its_losses_and_still_learns(tmp_path: Path) -> None:
    plain = trained(CPU, "fedavg", tmp_path / "a")
    narrow = trained(Compute(precision="float16"), "fedavg", tmp_path / "b")
    start = {f"model/{name}": value for name, value in _start(tmp_path).items()}
    moved = torch.cat([(plain[name] - start[name]).flatten() for name in plain])
    also = torch.cat([(narrow[name] - start[name]).flatten() for name in plain])
    assert float(torch.cosine_similarity(moved, also, dim=0)) > 0.99


def _start(folder: Path) -> dict[str, torch.Tensor]:
    from graftwork.federated.client import start_values

    return start_values(toy_task("s0", 0), experiment("fedavg"))


def test_float16_is_refused_where_losses_are_not_scaled(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="fraug does not train in float16"):
        trained(Compute(precision="float16"), "fraug", tmp_path)
    with pytest.raises(FederationError, match="precision is"):
        Compute(precision="int4")


def test_deterministic_operators_are_asked_for_during_the_step_only(tmp_path: Path) -> None:
    asked: list[bool] = []
    task = toy_task("s0", 0)

    def logits(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        asked.append(torch.are_deterministic_algorithms_enabled())
        result: torch.Tensor = module(inputs)
        return result

    site = Site("s0", dataclasses.replace(task, logits=logits), Compute(deterministic=True))
    worker = Worker(experiment("fedavg", rounds=1), tmp_path, Federation("one", {"s0": site.task}, None), site=site)
    chosen = worker.experiment
    strategy = Strategy(chosen, create("fedavg", chosen.settings), worker.federation)
    with InProcessGrid(worker.handle, ["s0"]) as grid:
        strategy.run(grid)
    assert asked
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()


def test_features_of_a_narrow_model_keep_its_dtype() -> None:
    head = nn.Linear(3, 2).bfloat16()
    features = torch.randn(4, 3).bfloat16()
    assert as_parameters(features, head).dtype == torch.bfloat16
    assert as_parameters(features, nn.Linear(3, 2)).dtype == torch.float32
    assert PRECISIONS == ("float32", "bfloat16", "float16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", names())
def test_a_gpu_gives_nearly_the_same_update(algorithm: str, precision: str, tmp_path: Path) -> None:
    settings = FAST.get(algorithm, {})
    plain = trained(CPU, algorithm, tmp_path / "a", **settings)
    there = trained(Compute("cuda", precision), algorithm, tmp_path / "b", **settings)
    assert plain.keys() == there.keys()
    for name, value in plain.items():
        assert float((value - there[name]).abs().max()) < (1e-3 if precision == "float32" else 0.2), name
