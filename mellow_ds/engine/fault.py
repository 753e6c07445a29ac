"""Why a step was skipped: run it once more, looking at what each module gives, and name the first that is at fault."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mellow_ds.data.batch import Batch

_MAX_EXAMPLES = 8  # named in a message
_MESSAGE_BYTES = 1024


class RandomState:
    """Generator states of a moment, so that a step can be run again with the same dropout."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def describe_fault(
    model: nn.Module,
    forward: Callable[[dict[str, Any]], Any],
    batches: Sequence[Batch],
    device: torch.device,
    rank: int,
) -> str:
    """The message of the first rank that finds something, the same on all (a collective call); empty where none does.

    Runs every micro-batch forward, and backward through activations only: no gradient of a weight comes of it. The loss
    is not scaled: what overflows float16 by its loss scale alone is no fault.
    """
    found = ""
    for number, batch in enumerate(batches):
        text = _look_at(model, forward, batch.to(device))
        if text and not found:
            examples = ", ".join(batch.example_ids[:_MAX_EXAMPLES]) + ("..." * (batch.num_examples > _MAX_EXAMPLES))
            found = f"rank {rank}, micro-batch {number} (examples {examples}): {text}"
    return _first_of_all_ranks(found, device)


def _look_at(model: nn.Module, forward: Callable[[dict[str, Any]], Any], batch: Batch) -> str:
    """What is wrong with one micro-batch; empty where nothing is. All ranks run the same passes."""
    watch = _Watch(model)
    with watch:
        output = forward(batch.model_inputs())
        sources = list(watch.sources)  # the backward pass may run modules again, and so add to them
        if sources:
            # all of them take part in the loss, so this reaches every block on every rank
            torch.autograd.grad(output.loss_sum, sources, allow_unused=True)
    if watch.first_bad:
        return f"{watch.first_bad} gives values that are not finite, the first to do so"
    if not torch.isfinite(output.loss_sum):
        return f"the loss is {float(output.loss_sum)}, though every module gives finite values"
    if watch.first_bad_gradient:
        return f"the gradient at the output of {watch.first_bad_gradient} is not finite, the first in the backward pass"
    return ""


class _Watch:
    """Looks at the output of every module, and at its gradient, while it is open; keeps next to none of them."""

    def __init__(self, model: nn.Module) -> None:
        self.first_bad = ""
        self.first_bad_gradient = ""
        self.sources: list[torch.Tensor] = []  # outputs with a graph of modules whose inputs have none
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def look(_module: nn.Module, inputs: Any, named_inputs: Any, output: Any) -> None:
            begins = not any(tensor.requires_grad for tensor in (*_tensors(inputs), *_tensors(named_inputs)))
            for tensor in _tensors(output):
                if not self.first_bad and not torch.isfinite(tensor).all():
                    self.first_bad = name
                if tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(name))
                    if begins:
                        self.sources.append(tensor)

        return look

    def _gradient_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def look(gradient: torch.Tensor) -> None:
            if not self.first_bad_gradient and not torch.isfinite(gradient).all():
                self.first_bad_gradient = name

        return look


def _tensors(output: Any) -> list[torch.Tensor]:
    """Floating-point tensors of what a module gives: a tensor, or a flat collection of some."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _first_of_all_ranks(text: str, device: torch.device) -> str:
    own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=device)
    raw = text.encode()[:_MESSAGE_BYTES]
    own[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    texts = [bytes(message.tolist()).rstrip(b"\0").decode(errors="replace") for message in everyone]
    return next((message for message in texts if message), "")
