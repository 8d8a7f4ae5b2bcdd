"""How the parameters of a run are spread over its processes: the interface to engines that shard, and what is done without.

`Replicated` is the interface, and what it does with complete parameters. The engines are subclasses in `fsdp2` and `zero`; the
rest of the package does not depend on which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # `trust_region` needs torch alone
    from accelerate import Accelerator

Result = TypeVar("Result")


class Replicated:
    """Every process has all parameters: one process, or several with DDP."""

    sharded = False
    """Whether an engine shards what is trained. Then all processes must make the same passes."""
    steps_in_backward = False
    """Whether accelerate makes the step of the optimizer within the backward pass of its last micro-batch."""
    shards_weights = False
    """Whether a process has only a part of each weight, also of those that are not trained."""

    def place(self, reference: nn.Module, device: torch.device) -> None:
        """Move a separate reference to the process's device, or leave that to `prepare`."""
        reference.to(device)

    def prepare(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, reference: nn.Module | None
    ) -> tuple[nn.Module, Any]:
        """The wrapped model, which is called for passes with gradients, and the wrapped optimizer.

        reference: a separate reference, which is not trained. Parameters may be other objects afterwards.
        """
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        return wrapped, optimizer

    def loaded(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which the parts of a model that was sharded before training can be called, for its checks."""
        return nullcontext()

    def observe(self, model: nn.Module, optimizer: Any, reference: nn.Module | None = None) -> Any:
        """Use the wrapped model and optimizer of another trainer, and its wrapped reference, instead of `prepare`. Returns the
        optimizer with its state by the parameters of the model."""
        return optimizer

    def run(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, which makes passes of the trained model, or reads its head, without gradients."""
        return call()

    def run_reference(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, which makes passes of the reference without gradients."""
        return call()

    def gathered(self, call: Callable[[], Result]) -> Result:
        """The result of `call`: for its duration, every process has all parameters of the trained model."""
        return call()

    def holding(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which this process has all parameters of `module`, a part of the trained model or another model.

        All processes enter and leave it together. If `module` contains layers, it has those that are in no layer; the context
        of a layer within it, or a pass of the layer, has the layer's.
        """
        return nullcontext()

    def accumulating(self, accelerator: Accelerator, wrapped: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """The context of a pass of `wrapped` and its backward pass.

        Gradients are averaged over the processes in the backward pass of the `last` micro-batch of a step.
        """
        return nullcontext() if last else accelerator.no_sync(wrapped)

    def backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        """Add the gradients of `loss`."""
        accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients to a norm of `limit`; returns the norm before, over all parameters on all processes."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def scale_gradients(self, parameters: Sequence[nn.Parameter], factor: float) -> None:
        """Multiply the gradients by a factor."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def step(self, optimizer: Any) -> None:
        """Make a step of the optimizer that `prepare` returned."""
        optimizer.step()

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter, or of a moment of it, that this process has and trains. It shares the tensor's memory."""
        return tensor

    def remake(self, tensor: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that makes a tensor such as this one from a copy of its local part."""
        device = tensor.device
        return lambda part: part.to(device, copy=True)

    def written(self) -> None:
        """To be called after local parts were written outside of a pass."""

    def shape(self, parameter: Tensor) -> torch.Size:
        """The shape of the complete parameter."""
        return parameter.shape

    def complete(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The complete tensor, to be saved. All processes call it; those that save get it, the others an empty tensor.

        like: the parameter that the tensor is, or is a moment of.
        """
        return tensor.detach()

    def part(self, complete: Tensor, like: Tensor) -> Tensor:
        """The inverse of `complete`, on every process: the tensor, sharded as the parameter `like` if it has its shape."""
        return complete


REPLICATED = Replicated()
