"""What a federation.toml may say, what is said about one that is wrong, and what of it the sites get to see."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

from graftwork.federated.authority import make_keys
from graftwork.federated.client_app import experiment_of
from graftwork.federated.configuration import ServerPlace, read_federation, record_for_sites
from graftwork.federated.errors import FederationError

WHOLE = """
sites = ["oslo", "bergen"]
task = "task.py:task"
server_task = "task.py:server"
algorithm = "fedprox"
rounds = 7
seed = 5
out = "runs/first"
quorum = 1
deadline = 30.5
exchange = ["body.*"]
init = "start.safetensors"
keep_sites = true

[settings]
mu = 0.1

[server]
host = "10.0.0.5"
port = 4433
names = ["fl.example.org"]
keys = "secret/keys"
wait = 20
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "federation.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(FederationError) as caught:
        read_federation(written(folder, text))
    return [problem.removeprefix("federation.toml: ") for problem in caught.value.problems]


def test_everything_is_read_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    said = read_federation(written(tmp_path, WHOLE))
    assert said.sites == ("bergen", "oslo")
    assert said.task == f"{tmp_path}/task.py:task"
    assert said.server_task == f"{tmp_path}/task.py:server"
    assert said.out == tmp_path / "runs" / "first"
    assert said.server == ServerPlace("10.0.0.5", 4433, ("fl.example.org",), tmp_path / "secret/keys", None, 20.0)
    experiment = said.experiment
    assert (experiment.algorithm, experiment.settings, experiment.rounds) == ("fedprox", {"mu": 0.1}, 7)
    assert (experiment.seed, experiment.quorum, experiment.deadline) == (5, 1, 30.5)
    assert (experiment.exchange, experiment.keep_sites) == (("body.*",), True)
    assert experiment.init == str(tmp_path / "start.safetensors")


def test_encryption_and_keys_are_what_one_gets_unasked(tmp_path: Path) -> None:
    said = read_federation(written(tmp_path, 'sites = ["a"]\ntask = "t.py:t"\n'))
    assert not said.server.insecure
    assert said.server.keys == tmp_path / "keys"


def test_every_problem_is_named_at_once_with_its_place(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
        sites = ["clean", "clean", "a/b"]
        algoritm = "fedka"
        rounds = "2"
        port = 3
        [simulaton]
        [server]
        hots = "127.0.0.1"
        port = 99999
        wait = -1
        """,
    )
    assert sorted(found) == sorted(
        [
            "server.port is 99999: input should be less than or equal to 65535",
            "server.wait is -1: input should be greater than 0",
            'there is no key "server.hots"; did you mean "host"?',
            'rounds is "2", not a whole number',
            'there is no key "algoritm"; did you mean "algorithm"?',
            'there is no key "port"; it belongs into [server]',
            'there is no key "simulaton"; did you mean "simulation"?',
            "sites: \"a/b\" names files; use letters, digits, '.', '_', '-'",
            'sites: "clean" is named twice',
            'lacks task = "file.py:name" (or a table [simulation])',
        ]
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('task = "t.py:t"', 'lacks sites = ["amsterdam", "berlin"]'),
        ('sites = []\ntask = "t.py:t"', "sites is empty; name at least one site"),
        ('sites = ["a"]\ntask = "t.py"', 'task is "t.py"; write file.py:name or package.module:name'),
        ('sites = ["a"]\ntask = "t.py:t"\n[simulation]\nname = "digits"', "has both task and [simulation]; keep one"),
        (
            'sites = ["a"]\n[simulation]\nname = "digit"',
            'simulation.name: there is no simulation "digit"; did you mean "digits"?',
        ),
        ('sites = ["a"]\ntask = "t.py:t"\nrounds = 0', "rounds is 0; it has to be at least 1"),
        ('sites = ["a"]\ntask = "t.py:t"\nquorum = 2', "quorum is 2.0, not above 0 and at most 1"),
        (
            'sites = ["a"]\ntask = "t.py:t"\n[server]\ninsecure = true',
            'server.insecure needs host = "127.0.0.1", not "0.0.0.0": without TLS and keys, whoever reaches the port '
            "takes part",
        ),
        (
            'sites = ["a"]\ntask = "t.py:t"\n[server]\ncertificate = "x.crt"',
            'server: "certificate" without the others; certificate, certificate_key and certificate_authority belong '
            "together",
        ),
        ('sites = ["a"]\ntask = "t.py:t"\n[server]\nnames = ["a b"]', 'server.names: "a b" is neither a host name nor '
         "an address"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in problems(tmp_path, text)


def test_a_misspelt_algorithm_or_setting_is_refused_before_anything_starts(tmp_path: Path) -> None:
    found = problems(tmp_path, 'sites = ["a"]\ntask = "t.py:t"\nalgorithm = "fedavgg"')
    assert 'did you mean "fedavg"?' in found[0]
    found = problems(tmp_path, 'sites = ["a"]\ntask = "t.py:t"\n[settings]\nlearning_rat = 1.0')
    assert 'did you mean "learning_rate"?' in found[0]


def test_a_file_that_is_not_there_or_no_toml_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "sites = [")
    with pytest.raises(FederationError, match="it is no TOML"):
        read_federation(tmp_path / "federation.toml")
    with pytest.raises(FederationError, match=r'there is no file .*; did you mean ".*federation\.toml"\?'):
        read_federation(tmp_path / "federaton.toml")


def test_own_certificates_are_taken(tmp_path: Path) -> None:
    make_keys(tmp_path / "made", ["a"])
    said = read_federation(
        written(
            tmp_path,
            """
            sites = ["a"]
            task = "t.py:t"
            [server]
            certificate = "made/server/server.crt"
            certificate_key = "made/server/server.key"
            certificate_authority = "made/ca.crt"
            """,
        )
    )
    assert said.server.own is not None
    assert said.server.own.key == tmp_path / "made/server/server.key"


def test_sites_are_told_the_experiment_without_the_servers_paths(tmp_path: Path) -> None:
    said = read_federation(written(tmp_path, WHOLE))
    text = record_for_sites(said.experiment)
    assert str(tmp_path) not in text
    assert ".py" not in text
    experiment = experiment_of(text)
    assert (experiment.algorithm, experiment.rounds, experiment.seed) == ("fedprox", 7, 5)
    assert experiment.init is None
    assert text == record_for_sites(said.experiment)


def test_a_simulation_is_told_in_full_so_that_the_run_equals_one_in_process(tmp_path: Path) -> None:
    simulation = (
        'sites = ["clean"]\nseed = 3\n[simulation]\nname = "digits"\ntarget = "scale"\noptions = {examples = 40}'
    )
    said = read_federation(written(tmp_path, simulation))
    assert experiment_of(record_for_sites(said.experiment)).identity == said.experiment.identity
    assert said.experiment.federation.target == "scale"


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"federation": 3}', '{"federation": {"name": "x"}, "rounds": -1}'])
def test_a_record_that_is_no_experiment_is_refused_on_the_site(record: str) -> None:
    with pytest.raises(FederationError):
        experiment_of(record)
