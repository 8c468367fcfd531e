"""Where and how a site computes its local update: device, mixed precision, deterministic operators."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import listed, quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Precision = Literal["float32", "bfloat16", "float16"]

PRECISIONS: tuple[str, ...] = get_args(Precision)

WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""What cuBLAS needs in the environment before it is first used, to give the same sums each time."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how a local update is computed. What travels and what is kept is float32 in any case.

    Args:
        device: A torch device that exists: `cpu`, `cuda`, `cuda:1`.
        precision: Of forward passes of the model (`torch.autocast`); weights, losses, gradients' sums and statistics
            stay as they are.
        deterministic: Use operators that give the same bits each time, or fail where there is none.
    """

    device: str = "cpu"
    precision: str = "float32"
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown precision."""
        if self.precision not in PRECISIONS:
            raise FederationError(f"precision is {quoted(self.precision)}, not one of {listed(PRECISIONS)}")

    @property
    def is_plain(self) -> bool:
        """Whether this is what happens without saying anything: float32 on the CPU."""
        return self.device == "cpu" and self.precision == "float32"

    def place(self, value: Any) -> Any:
        """Return a tensor, or a mapping of tensors, on the device."""
        if self.device == "cpu":
            return value
        if isinstance(value, dict):
            return {name: self.place(item) for name, item in value.items()}
        return value.to(self.device)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Return the module on the device, with forward passes in the chosen precision; its outputs are float32."""
        if self.device != "cpu":
            module = module.to(self.device)
        if self.precision == "float32":
            return module
        import torch

        kind, dtype = self.device.partition(":")[0], getattr(torch, self.precision)
        plain = module.forward

        @functools.wraps(plain)
        def forward(*arguments: Any, **more: Any) -> Any:
            with torch.autocast(kind, dtype=dtype):
                result = plain(*arguments, **more)
            return _widened(result)

        module.forward = forward
        return module

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return what scales losses so that gradients do not vanish in float16; None where that is not needed."""
        if self.precision != "float16":
            return None
        import torch

        # A local update is short: a start of 2¹⁶ would cost its first steps.
        return torch.amp.GradScaler(self.device.partition(":")[0], init_scale=2.0**12)

    def need_wide_range(self, algorithm: str) -> None:
        """Refuse float16 for an algorithm whose losses are not scaled.

        Raises:
            FederationError: The precision is float16.
        """
        if self.precision == "float16":
            raise FederationError(
                f"{algorithm} does not train in float16, in which its gradients would vanish; set precision to "
                "bfloat16 or float32 in the site's file"
            )

    @contextlib.contextmanager
    def session(self, seed: int) -> Iterator[None]:
        """Let a device other than the CPU draw from `seed`, and operators be deterministic if that is asked for."""
        import torch

        with contextlib.ExitStack() as stack:
            if self.device != "cpu":
                stack.enter_context(torch.random.fork_rng(devices=[torch.device(self.device)]))
                torch.cuda.manual_seed_all(seed)
            if self.deterministic:
                os.environ.setdefault(*WORKSPACE)
                before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
                stack.callback(_restore, *before)
            yield


CPU = Compute()
"""float32 on the CPU."""


def _restore(deterministic: bool, benchmark: bool) -> None:
    import torch

    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


def _widened(result: Any) -> Any:
    """Return a model's output in float32 where autocast has made it narrower."""
    import torch

    if isinstance(result, torch.Tensor):
        return result.float() if result.dtype in (torch.bfloat16, torch.float16) else result
    if isinstance(result, dict):
        return type(result)((key, _widened(value)) for key, value in result.items())
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*map(_widened, result))
    if isinstance(result, tuple | list):
        return type(result)(map(_widened, result))
    return result


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's first parameter or buffer is; the CPU if it has none."""
    import torch

    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def as_parameters(features: Tensor, module: nn.Module) -> Tensor:
    """Return features in the dtype of a module's parameters: what a layer in mixed precision gives is narrower."""
    import torch

    if features.dtype not in (torch.bfloat16, torch.float16):
        return features
    for parameter in module.parameters():
        return features.to(parameter.dtype)
    return features.float()
