"""The generator states of a rank: what dropout draws from."""

import torch


def generator_states() -> dict[str, torch.Tensor]:
    """Those of the CPU and of this rank's GPU, copied."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `generator_states`; a state of a GPU that is not there is passed over."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def branch_generators(number: int) -> None:
    """Go on from the present states to ones that follow from them and from `number`, on the CPU and all GPUs."""
    torch.manual_seed((int(torch.randint(2**62, ())) + number) % 2**62)
