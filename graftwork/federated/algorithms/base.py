"""What a federated algorithm is: a server half and a client half in one class, and state as named tensors.

To add one, write a file in this folder with a subclass of `Algorithm`, and a row in `algorithms/__init__.py`.
`fedavg.py` is the worked example; `scaffold.py` has extra global tensors and private state.

**Names.** All tensors travel in one flat mapping whose names say what they belong to: `model/conv1.weight`,
`generator/0.weight`, `control/conv1.weight`. What belongs to the model is called `model/` + its name in the state
dict; other groups are an algorithm's own. `select(tensors, "model")` gives one group without its prefix,
`prefixed("model", tensors)` puts it back.

**A run**, in order:

    server  check(server)            problems that are known before anything is sent
    server  start(server)            put extra tensors into server.shared / server.kept
    server  before_rounds(server)    may ask: server.ask("moments", …) → list[Reply]
    for each round:
      server  outgoing(server, site)         Outgoing(tensors, config), by default all of server.shared
      client  train(client)                  → Update(tensors, examples, metrics, private)
      runtime                                 waits, validates each reply against expected(), orders them by site
      server  aggregate(server, replies)     replace server.shared (and server.kept)
      server  after_round(server, replies)   → metrics; may ask again (votes), fine-tune server.shared …
      client  evaluate(client)               → Update without tensors: metrics on the site's own test data
      server  evaluate_server(server)        → metrics on the server's test data, if it has any
      runtime                                 metrics, checkpoint
    server  finish(server)           the last change of server.shared, such as recalibrated batch normalisation

**What is kept.** `server.shared` (what is sent, and what the run is about), `server.kept` (tensors that never leave the
server: moments of an optimiser, geometry) and `server.record` (small JSON values) are saved with every round and loaded
by a resumed run. Nothing else survives, so keep no state in `self`: server and clients are different processes, and one
instance may serve several sites. `Update.private` is the client's whole private state from now on (None: as it was); it
is saved on the site, stamped with the round, and comes back as `client.private`. It may be missing at any time (a new
client, a lost disk): then `client.private` is empty and the algorithm starts cold.

**Determinism.** Everything drawn comes from `client.seed(…)`/`client.generator(…)`, `server.seed(…)`, which depend on
(seed, site, round, purpose). Inside `train`, `answer` and `evaluate` torch's global generator is seeded likewise and
torch runs one thread. Never use time, process ids, or the order in which replies came; they are sorted by site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from graftwork.federated.compute import CPU, Compute
from graftwork.federated.errors import FederationError
from graftwork.federated.examples import Examples, collect
from graftwork.federated.seeds import generator_of, seed_of, torch_seed
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from graftwork.merge.task import Task

    Tensors = Mapping[str, Tensor]

Scalar = bool | int | float | str
"""What a message's configuration may hold."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Return a field of a settings dataclass with its description and bounds (included)."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a local update, common to all algorithms that train; an algorithm's own derive from this.

    Fields are bool, int, float, str or a `Literal` of words, made by `setting`; the command line sets them with
    `--set name=value`.
    """

    learning_rate: float = setting(0.05, "Step size of the local optimiser.", minimum=0)
    optimiser: Literal["sgd", "adam"] = setting("sgd", "Local optimiser; it starts afresh in every round.")
    momentum: float = setting(0.0, "Momentum of sgd.", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "Weight decay of the local optimiser.", minimum=0)
    batch_size: int = setting(32, "Examples per local step.", minimum=1)
    local_epochs: int = setting(1, "Passes over the site's examples per round.", minimum=0)
    local_steps: int = setting(0, "Steps per round; if above 0, instead of local_epochs.", minimum=0)
    clip: float = setting(0.0, "Largest norm of a gradient; 0: any.", minimum=0)
    weights: Literal["examples", "equal"] = setting("examples", "What a client weighs in the mean.")

    def __post_init__(self) -> None:
        """Refuse values outside the declared bounds."""
        problems = []
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, low, high = getattr(self, item.name), item.metadata.get("minimum"), item.metadata.get("maximum")
            hint = hints[item.name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                problems.append(f"{item.name} is {quoted(value)}, not one of {listed(get_args(hint))}")
            elif isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{item.name} is {value}, not a finite number")
            elif (low is not None and value < low) or (high is not None and value > high):
                bounds = [
                    f"at least {low:g}" if low is not None else "",
                    f"at most {high:g}" if high is not None else "",
                ]
                problems.append(f"{item.name} is {value}; it has to be {' and '.join(filter(None, bounds))}")
        problems += self.problems()
        if problems:
            raise FederationError(*(f"cannot use these settings: {problem}" for problem in problems))

    def problems(self) -> Iterable[str]:
        """Return what is wrong with the settings taken together; for algorithms to override."""
        return ()

    def record(self) -> dict[str, Any]:
        """Return all values, for JSON."""
        return dataclasses.asdict(self)


def parse_settings(kind: type[Settings], given: Mapping[str, Any], preset: Mapping[str, Any] | None = None) -> Settings:
    """Return settings from texts (or values), on top of a preset.

    Raises:
        FederationError: A name is unknown, or a text is no value of its type; every problem at once.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = dict(preset or {})
    problems = []
    for key, text in given.items():
        name = key.replace("-", "_")
        if name not in hints or name not in {item.name for item in dataclasses.fields(kind)}:
            names = [item.name for item in dataclasses.fields(kind)]
            problems.append(
                f"there is no setting {quoted(key)}{did_you_mean(name, names) or '; there are ' + listed(names, 40)}"
            )
            continue
        try:
            values[name] = _parsed(hints[name], text)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise FederationError(*(f"cannot use these settings: {problem}" for problem in problems))
    return kind(**values)


def _parsed(hint: Any, value: Any) -> Any:
    if get_origin(hint) is Literal:
        for word in get_args(hint):
            if str(value) == str(word):
                return word
        raise ValueError(f"{quoted(value)} is not one of {listed(get_args(hint))}")
    if hint is bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() not in words:
            raise ValueError(f"{quoted(value)} is neither true nor false")
        return words[str(value).lower()]
    if hint is str:
        return str(value)
    try:
        return hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"{quoted(value)} is not {'a whole number' if hint is int else 'a number'}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tensors by name


def select(tensors: Tensors, group: str) -> dict[str, Tensor]:
    """Return the tensors of one group, without the prefix `group/`."""
    prefix = group + "/"
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def prefixed(group: str, tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors with `group/` in front of their names."""
    return {f"{group}/{name}": value for name, value in tensors.items()}


@dataclass(frozen=True, slots=True)
class Form:
    """What a tensor of a reply has to look like.

    Args:
        dtype: A torch dtype, written like `float32`.
        shape: Its shape; −1 stands for any length.
    """

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


# ---------------------------------------------------------------------------------------------------------------------
# What halves hand to the runtime, and get from it


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What the server sends to one site.

    Args:
        tensors: Flat names → tensors.
        config: Small values. The runtime adds round, rounds and what names the experiment.
    """

    tensors: Tensors
    config: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Update:
    """What a client hands back.

    Args:
        tensors: Flat names → tensors; for `train` exactly those that `Algorithm.expected` names.
        examples: How many examples stand behind it: the weight in a mean. 0 is accepted and weighs nothing.
        metrics: Numbers for the record. Of `loss` and `accuracy` the runtime shows the weighted means.
        private: The site's whole private state from now on; None leaves it as it was. Ignored in `evaluate`.
    """

    tensors: Tensors
    examples: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    private: Tensors | None = None


class Reply:
    """A validated answer of a site, as the server's half sees it.

    Attributes:
        site: The site's name.
        examples: The weight it claims, ≥ 0 and finite.
        metrics: Its numbers.
    """

    def __init__(
        self, site: str, examples: float, metrics: Mapping[str, float], load: Callable[[], dict[str, Tensor]]
    ) -> None:
        self.site = site
        self.examples = examples
        self.metrics = dict(metrics)
        self._load = load

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The reply's tensors. They may come from a disk: take them once, and let go of them."""
        return self._load()


@dataclass(slots=True)
class Client:
    """What a client half works with: the site, what the server sent, and what the site has kept.

    Attributes:
        site: The site's name.
        task: Its model and data.
        algorithm: Settings are in `algorithm.settings`.
        round: Number of the round, from 1; 0 before the rounds.
        rounds: How many there will be.
        received: What the server sent, by flat name.
        config: The small values that came with it.
        private: The private state of the newest earlier round; empty at a cold start.
        private_round: The round of that state; −1 at a cold start. A gap to `round` means missed rounds.
        question: In `answer`, what is asked.
        base_seed: The run's seed.
        initial: Entries of the model that are never sent (`exchange`), at their start values; by plain name.
        loaded: The site's examples, if they were replaced or have been collected.
        compute: Device and precision; `received`, `private`, `initial` and `module()` are on the device already, and
            examples come to it in `take`.
    """

    site: str
    task: Task
    algorithm: Algorithm
    round: int
    rounds: int
    received: dict[str, Tensor]
    config: dict[str, Scalar]
    private: dict[str, Tensor]
    private_round: int = -1
    question: str = ""
    base_seed: int = 0
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    loaded: Examples | None = None
    compute: Compute = CPU

    @property
    def settings(self) -> Any:
        """The algorithm's settings."""
        return self.algorithm.settings

    @property
    def progress(self) -> float:
        """Return the share of rounds that lie before this one: 0 in the first round."""
        return max(0, self.round - 1) / max(1, self.rounds)

    def seed(self, purpose: str) -> int:
        """Return the seed of this site and round for one purpose."""
        return seed_of(self.base_seed, self.site, self.round, purpose)

    def generator(self, purpose: str) -> np.random.Generator:
        """Return a numpy generator of this site and round for one purpose."""
        return generator_of(self.base_seed, self.site, self.round, purpose)

    @property
    def examples(self) -> Examples:
        """The site's training examples; collected once per process."""
        if self.loaded is None:
            self.loaded = collect(self.task.batches, f"cannot read the data of site {quoted(self.site)}")
        return self.loaded.on(self.compute.device)

    def with_examples(self, examples: Examples) -> Client:
        """Return the same client with other training examples, for algorithms that wrap another one."""
        return dataclasses.replace(self, loaded=examples)

    def module(self) -> nn.Module:
        """Return a fresh model: start values, then received `model/` entries, then private `model/` entries."""
        with torch_seed(seed_of(self.base_seed, "model")):
            module = self.compute.prepare(self.task.model())
        state = {**self.initial, **select(self.received, "model"), **select(self.private, "model")}
        _load(module, state, f"cannot load what site {quoted(self.site)} received into its model")
        return module

    def update(self, module: nn.Module, **metrics: float) -> Update:
        """Return the plain answer of an algorithm that exchanges a model.

        It has the module's entries under the names that were received (those of floating point), and keeps as private
        state what the model has besides and what is private already. Examples weigh by their number.
        """
        state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        sent = {
            f"model/{name}": value
            for name, value in state.items()
            if f"model/{name}" in self.received and value.is_floating_point()
        }
        return Update(
            {name: value.to(self.received[name].dtype) for name, value in sent.items()},
            examples=float(len(self.examples)),
            metrics=metrics,
            private=self.private_model(state),
        )

    def private_model(self, state: Tensors) -> dict[str, Tensor] | None:
        """Return private state with the model entries of `state` that are not exchanged and differ from their start."""
        own = {
            f"model/{name}": value
            for name, value in state.items()
            if f"model/{name}" not in self.received and self._has_changed(name, value)
        }
        others = {name: value for name, value in self.private.items() if not name.startswith("model/")}
        return {**others, **own} if own or others else None

    def _has_changed(self, name: str, value: Tensor) -> bool:
        start = self.initial.get(name)
        return start is None or not bool((start == value).all())


@dataclass(slots=True)
class Server:
    """What a server half works with.

    Attributes:
        algorithm: Settings are in `algorithm.settings`.
        task: The server's task: the model's architecture, and data if the server has any: `unlabelled` (a target
            domain's training inputs), `test` (its labelled test split, for evaluation only).
        has_data: False if the task is a site's, lent for its architecture alone.
        sites: Names of all sites that answered the roll call, sorted.
        rounds: How many rounds there will be.
        seed_base: The run's seed.
        shared: What is sent and averaged, by flat name.
        kept: Tensors that never leave the server.
        record: Small JSON values that are kept.
        initial: The whole start model by plain name, also what is never sent.
        exchange: Tells whether a tensor of the model, by plain name, may travel.
        round: The present round; 0 before the first.
        ask: See `Ask`.
        merge: Aggregates replies: `merge(replies, names, weights)` → tensors; see `Merge`.
    """

    algorithm: Algorithm
    task: Task
    has_data: bool
    sites: tuple[str, ...]
    rounds: int
    seed_base: int
    shared: dict[str, Tensor]
    kept: dict[str, Tensor]
    record: dict[str, Any]
    initial: dict[str, Tensor]
    exchange: Callable[[str], bool]
    ask: Ask
    merge: Merge
    round: int = 0
    last_sent: dict[str, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> Any:
        """The algorithm's settings."""
        return self.algorithm.settings

    @property
    def progress(self) -> float:
        """Return the share of rounds that lie before this one: 0 in the first round."""
        return max(0, self.round - 1) / max(1, self.rounds)

    def seed(self, purpose: str) -> int:
        """Return the server's seed of this round for one purpose."""
        return seed_of(self.seed_base, "", self.round, purpose)

    def generator(self, purpose: str) -> np.random.Generator:
        """Return the server's numpy generator of this round for one purpose."""
        return generator_of(self.seed_base, "", self.round, purpose)

    def model_state(self) -> dict[str, Tensor]:
        """Return the whole global model by plain name: shared entries over start values."""
        return {**self.initial, **select(self.shared, "model")}

    def module(self, tensors: Tensors | None = None) -> nn.Module:
        """Return a module with the global model's values, or with those of a reply (flat names) over them."""
        with torch_seed(seed_of(self.seed_base, "model")):
            module = self.task.model()
        state = {**self.model_state(), **(select(tensors, "model") if tensors is not None else {})}
        _load(module, state, "cannot load the global model into the server's model")
        return module

    def put_module(self, module: nn.Module) -> None:
        """Replace the `model/` entries of `shared` by the module's values; integers stay as they are."""
        state = module.state_dict()
        for name, value in select(self.shared, "model").items():
            if value.is_floating_point():
                self.shared[f"model/{name}"] = state[name].detach().clone().to(value.dtype)

    def inputs(self) -> Any:
        """Return the server's unlabelled inputs: its task's `unlabelled`, else the inputs of its training batches."""
        batches = self.task.unlabelled or self.task.batches
        return collect(batches, "cannot read the server's data").inputs

    def weights(self, replies: Sequence[Reply]) -> list[float]:
        """Return what replies weigh, as the setting `weights` says; a reply without examples weighs nothing."""
        equal = self.settings.weights == "equal"
        return [(1.0 if reply.examples > 0 else 0.0) if equal else reply.examples for reply in replies]


if TYPE_CHECKING:
    from typing import Protocol

    class Ask(Protocol):
        """Send a question to sites, wait, validate, and return the answers in the order of the sites."""

        def __call__(
            self,
            question: str,
            outgoing: Outgoing | Callable[[str], Outgoing],
            *,
            expect: Mapping[str, Form] | None = None,
            sites: Iterable[str] | None = None,
            quorum: float | None = None,
        ) -> list[Reply]:
            """Ask.

            Args:
                question: Its name, which `Algorithm.answer` finds in `client.question`.
                outgoing: What is sent, or what is sent to each site.
                expect: The tensors that an answer has to have; None accepts any.
                sites: Whom to ask; by default everybody.
                quorum: The share of them that has to answer; by default the run's. Missed, `QuorumError`.
            """

    class Merge(Protocol):
        """Aggregate tensors of replies as `--aggregate` says (by default the weighted mean)."""

        def __call__(
            self,
            replies: Sequence[Reply],
            names: Iterable[str] | None = None,
            weights: Sequence[float] | None = None,
            *,
            mean: bool = False,
        ) -> dict[str, Tensor]:
            """Merge.

            Args:
                replies: The replies.
                names: Flat names; by default all that the first reply has.
                weights: One per reply; by default `server.weights(replies)`.
                mean: Take the mean whatever `--aggregate` says (for control variates, prototypes).
            """


def _load(module: nn.Module, state: Tensors, doing: str) -> None:
    own = module.state_dict()
    unknown = [name for name in state if name not in own]
    if unknown:
        raise FederationError(f"{doing}: the model has no {listed(unknown, 3)}")
    wrong = [name for name, value in state.items() if own[name].shape != value.shape]
    if wrong:
        name = wrong[0]
        raise FederationError(
            f"{doing}: {quoted(name)} is {tuple(state[name].shape)}, in the model {tuple(own[name].shape)}"
        )
    module.load_state_dict(dict(state), strict=False)


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


class Algorithm:
    """A federated algorithm: see the top of this file for the order in which its parts are called.

    A subclass sets the class variables and overrides what it does differently; `train` is all that it must have.

    Attributes:
        name: As `--algorithm` has it.
        title: Its name in prose.
        reference: Where it comes from.
        settings_type: Its settings.
        presets: Named values of settings, `{"fedka-paper": {…}}`; a preset's name works as `--algorithm` too.
        is_personal: Whether a model is meant for the site that trained it: then results are those on the sites' own
            test data, and the global model alone is not usable.
        has_private_state: Whether clients keep anything; what Ray cannot resume.
        needs_server_data: Whether the server must have unlabelled inputs.
        merges_models: Whether replies are merged as `--aggregate` says.
        has_common_start: Whether sites train the model that they were sent, so that their changes can be compared.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    settings_type: ClassVar[type[Settings]] = Settings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    is_personal: ClassVar[bool] = False
    has_private_state: ClassVar[bool] = False
    needs_server_data: ClassVar[bool] = False
    merges_models: ClassVar[bool] = True
    has_common_start: bool = True

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings: Any = settings if settings is not None else self.settings_type()

    def data_defaults(self, federation: str, *, has_folder: bool) -> Mapping[str, str]:
        """Return options of a built-in federation's data that suit the algorithm where none are given.

        Args:
            federation: `digits`, `office` or `amazon`.
            has_folder: Whether there is a folder of real domains.
        """
        return {}

    # --- server half

    def check(self, server: Server) -> Iterator[str] | list[str]:
        """Return problems that are known before anything is sent."""
        if self.needs_server_data and not (server.has_data and server.task.unlabelled is not None):
            return [f"{self.name} needs unlabelled inputs of a target domain on the server; name one with --target"]
        return []

    def start(self, server: Server) -> None:
        """Put what the algorithm has besides the model into `server.shared` and `server.kept`; once per run."""

    def before_rounds(self, server: Server) -> None:
        """Do what comes before the first round, such as collecting statistics; once per run."""

    def local_names(self, module: nn.Module, head: str | None = None) -> frozenset[str]:
        """Return the entries of a model that stay on the sites, by plain name; by default none.

        Args:
            module: The model.
            head: The task's head, `task.head`; an algorithm that trains the head alone keeps all else on the sites.
        """
        return frozenset()

    def outgoing(self, server: Server, site: str) -> Outgoing:
        """Return what one site is sent in this round; by default all of `server.shared`."""
        return Outgoing(server.shared)

    def expected(self, server: Server, sent: Tensors) -> dict[str, Form]:
        """Return what each reply has to hold; by default all floating-point tensors of `shared` that were sent."""
        return {
            name: Form.of(value) for name, value in sent.items() if name in server.shared and value.is_floating_point()
        }

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> None:
        """Put the aggregate of the replies into `server.shared`; by default of all that they hold."""
        server.shared.update(server.merge(replies))

    def after_round(self, server: Server, replies: Sequence[Reply]) -> Mapping[str, float]:
        """Do what comes after the aggregation; return numbers for the record."""
        return {}

    def evaluate_server(self, server: Server) -> Mapping[str, float]:
        """Return loss and accuracy of the global model on the server's test data; empty if it has none.

        With unlabelled inputs and batch normalisation also `accuracy_adapted` and `loss_adapted`: the same model with
        the running statistics of these inputs (AdaBN), which belongs beside every result on a target domain.
        """
        from graftwork.federated.training import evaluate_server

        return evaluate_server(server)

    def finish(self, server: Server) -> None:
        """Make the last change to `server.shared`, once all rounds are done."""

    # --- client half

    def train(self, client: Client) -> Update:
        """Return a local update."""
        raise NotImplementedError

    def answer(self, client: Client) -> Update:
        """Return the answer to `client.question`."""
        raise FederationError(f"{self.name} has no answer to {quoted(client.question)}")

    def evaluate(self, client: Client) -> Update:
        """Return loss and accuracy on the site's own test data of the received model with its private entries."""
        from graftwork.federated.training import evaluate_client

        return evaluate_client(client, client.module())
