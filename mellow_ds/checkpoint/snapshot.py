"""What a rank keeps of a step: its share of the tensors, copied to CPU memory, to be written while training goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mellow_ds.checkpoint.staging import Staging
from mellow_ds.checkpoint.step_folder import MODEL, OPTIMIZER
from mellow_ds.checkpoint.tensor_files import file_name, index_name, index_text
from mellow_ds.engine.protocol import Engine, ParameterState

MOMENT_SEPARATOR = "::"
NUM_UPDATES = "num_updates"


@dataclass
class Snapshot:
    """One rank's share, and on every rank who has the rest.

    A tensor goes to the rank that holds most of it already; of those that hold as much, to the one that has the fewest
    bytes so far; a parameter together with its moments. All ranks see the same names and sizes in the same order, so
    they agree without a word, and shares differ by about one parameter.
    """

    rank: int
    num_ranks: int
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {MODEL: {}, OPTIMIZER: {}})  # own
    owners: dict[str, dict[str, int]] = field(default_factory=lambda: {MODEL: {}, OPTIMIZER: {}})  # of all, by stem
    stem_bytes: dict[str, int] = field(default_factory=lambda: {MODEL: 0, OPTIMIZER: 0})  # over all ranks
    rank_bytes: list[int] = field(default_factory=list)
    assigned: dict[str, int] = field(default_factory=dict)
    staging: Staging = field(default_factory=Staging)

    def __post_init__(self) -> None:
        self.rank_bytes = [0] * self.num_ranks

    @property
    def num_bytes(self) -> int:
        """Of the tensors of all ranks."""
        return sum(self.rank_bytes)

    def owner(self, name: str, held: Sequence[int] = ()) -> int:
        """See `mellow_ds.engine.owner.Keeper`."""
        most = max(held, default=0)
        able = [rank for rank in range(self.num_ranks) if not held or held[rank] == most]
        owner = min(able, key=lambda rank: self.rank_bytes[rank])
        self.assigned[name] = owner
        return owner

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """See `mellow_ds.engine.owner.Keeper`."""
        return self.staging.empty(shape, dtype)

    def add(self, name: str, stems: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take what belongs to an assigned tensor (stem -> name -> tensor); keep it where this rank shall."""
        owner = self.assigned[name]
        for stem, tensors in stems.items():
            for name, tensor in tensors.items():
                self.owners[stem][name] = owner
                self.stem_bytes[stem] += tensor.nbytes
                self.rank_bytes[owner] += tensor.nbytes
                if owner == self.rank:
                    self.tensors[stem][name] = tensor.contiguous()

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The files that this rank writes: name -> tensors."""
        return {self._files(stem)[self.rank]: tensors for stem, tensors in self.tensors.items() if tensors}

    def indices(self) -> dict[str, str]:
        """The index files, name -> text: where tensors of several ranks are."""
        found = {}
        for stem, owners in self.owners.items():
            files = self._files(stem)
            if len(files) > 1:
                by_name = {name: files[owner] for name, owner in sorted(owners.items())}
                found[index_name(stem)] = index_text(by_name, self.stem_bytes[stem])
        return found

    def _files(self, stem: str) -> dict[int, str]:
        """Rank -> file, of the ranks that have something."""
        ranks = sorted(set(self.owners[stem].values()))
        return {rank: file_name(stem, number, len(ranks)) for number, rank in enumerate(ranks, start=1)}


def take_snapshot(engine: Engine, rank: int, num_ranks: int, staging: Staging | None = None) -> Snapshot:
    """Gather the engine's tensors one at a time and keep this rank's share in `staging`; a collective call."""
    snapshot = Snapshot(rank, num_ranks, staging=staging or Staging())
    snapshot.staging.reset()
    for state in engine.parameter_states(snapshot):
        snapshot.add(state.name, {MODEL: {state.name: state.weight}, OPTIMIZER: _optimizer_tensors(state)})
    for name, tensor in engine.fixed_states(snapshot):
        snapshot.add(name, {MODEL: {name: tensor}})
    return snapshot


def _optimizer_tensors(state: ParameterState) -> dict[str, torch.Tensor]:
    found = {state.name + MOMENT_SEPARATOR + key: moment for key, moment in state.moments.items()}
    return {**found, state.name + MOMENT_SEPARATOR + NUM_UPDATES: torch.tensor(state.num_updates)}
